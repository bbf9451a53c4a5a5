"""Figures of one experiment: reconstructions, the latent's UMAP in two dimensions, metrics per epoch.

Reads:  the config, output.checkpoint_path (or --checkpoint), output.report_path, MNIST from data.root
Writes: artifacts/<experiment name>_{reconstructions,umap,epochs}.png
    python grounding/figures.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml
"""
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import autoencoders
import digits
import settings
from latents import l2_normalize, read_json, subset, umap_map

# The colours of the pages (scene.js).
PALETTE = ('#f27697', '#5000ce', '#c0c675', '#1a691b', '#847fff', '#270028', '#3cc0f0', '#e4b40c', '#971c96', '#4b4745')
COLUMNS = 12             # digits in the figure of reconstructions
matplotlib.rcParams.update({'font.size': 9, 'axes.titlesize': 9.5, 'axes.titlelocation': 'left', 'savefig.dpi': 160,
                            'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False})


def reconstructions(images, augmented, decoded, decoded_augmented):
    """Four rows of COLUMNS images (N, 1, 28, 28): x, D(E(x)), an augmented x, what is drawn from it."""
    rows = {'x': images, 'D(E(x))': decoded, 'augmented x\'': augmented, 'D(E(x\'))': decoded_augmented}
    fig = Figure(figsize=(9, 3.2), layout='constrained')
    for ax, (title, row) in zip(fig.subplots(len(rows), 1), rows.items()):
        ax.imshow(np.hstack(row[:COLUMNS, 0].numpy()), cmap='gray_r', vmin=0, vmax=1, interpolation='nearest')
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(title, rotation=0, ha='right', va='center')
        ax.spines[:].set_visible(False)
    return fig


def scatter(points, labels, title):
    """points (N, 2) in the colour of their label, the digit written at the median of each class."""
    fig = Figure(figsize=(6, 5.6), layout='constrained')
    ax = fig.subplots()
    for c in range(10):
        members = points[labels == c]
        if len(members):
            ax.scatter(*members.T, s=5, color=PALETTE[c], alpha=0.7, linewidths=0)
            ax.annotate(str(c), np.median(members, axis=0), fontsize=14, weight='bold', color=PALETTE[c], ha='center',
                        va='center', bbox={'boxstyle': 'circle,pad=0.15', 'fc': 'white', 'ec': 'none', 'alpha': 0.8})
    ax.set(xticks=[], yticks=[], xlabel='UMAP 1', ylabel='UMAP 2')
    ax.set_title(title, fontsize=8)
    return fig


def metrics(epochs, title):
    """Beside each other, per epoch: cross-entropy in training and validation; kNN accuracy of validation digits."""
    fig = Figure(figsize=(9, 3.2), layout='constrained')
    left, right = fig.subplots(1, 2)
    x = [e['epoch'] for e in epochs]
    left.plot(x, [e['train_loss'] for e in epochs], color='#888888', marker='.', label='training')
    left.plot(x, [e['val_loss'] for e in epochs], color='#1f4e79', marker='.', label='validation, not augmented')
    left.set(ylabel='cross-entropy a pixel, nats', title=title)
    left.legend()
    right.plot(x, [e['val_knn_accuracy'] for e in epochs], color='#1f4e79', marker='.')
    right.set(ylabel='kNN accuracy of the latent, validation')
    for ax in (left, right):
        ax.set(xlabel='epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--split', choices=('val', 'test'), default='test')
    p.add_argument('--max-points', type=settings.positive, default=3000, help='digits on the UMAP (3000)')
    args = p.parse_args()
    config = settings.load_config(args)
    device = settings.start(config)
    report = read_json(config['output']['report_path'], 'the trainer')
    model, epoch = autoencoders.load(config, device, args.checkpoint)
    splits, source = digits.load(config)
    print(source)
    if args.max_points < 12:
        settings.fail(f'--max-points {args.max_points}: a UMAP needs at least 12')
    split, seed, name = splits[args.split], config['experiment']['seed'], config['experiment']['name']
    chosen = subset(split, args.max_points, seed)
    images = split.images[chosen]
    latents = autoencoders.encode(model, images, device)
    shown = images[:COLUMNS]
    augmented = digits.augment(shown, config['self_supervised'])
    with torch.no_grad():
        decoded, decoded_augmented = (model(x.to(device)).cpu() for x in (shown, augmented))
    points = umap_map(l2_normalize(latents), 2, n_neighbors=min(30, len(latents) // 3), min_dist=0.1, seed=seed)
    title = f'{name}: {len(latents):,} {args.split} digits, epoch {epoch}'
    for ending, fig in (('reconstructions', reconstructions(shown, augmented, decoded, decoded_augmented)),
                        ('umap', scatter(points, split.labels[chosen].numpy(), title)),
                        ('epochs', metrics(report['epochs'], name))):
        path = settings.artifact(config, f'{ending}.png')
        settings.write_atomic(path, lambda file: fig.savefig(file, format='png'))
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
