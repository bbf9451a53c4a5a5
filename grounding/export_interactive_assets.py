"""What interactive_latent_playground.html needs beside the two ONNX files: the fixed UMAP manifold of a split, the
latents it was made of, and one sample of each digit, the one nearest to the mean image of its class.

reference_latents are what distances are taken to (of length 1 under --l2-normalize); reference_latents_raw are what
the decoder reads.

Reads:  the config, output.checkpoint_path (or --checkpoint), MNIST from data.root
Writes: --output, else artifacts/<experiment name>_<split>_interactive_assets.json
    python grounding/export_interactive_assets.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml \\
        --split test --max-points 3000 --l2-normalize --umap-n-neighbors 30 --umap-min-dist 0.1 --projection-k 12
"""
import numpy as np

import autoencoders
import digits
import settings
from latents import l2_normalize, rounded, subset, umap_map


def digit_samples(split):
    """(10, 784): of each class the digit nearest to its mean. SystemExit(2) when the split lacks a class."""
    pixels, labels, samples = split.flat(), split.labels.numpy(), []
    for c in range(10):
        members = pixels[labels == c]
        if not len(members):
            settings.fail(f'the split holds no {c}, and the page offers one sample of each digit; take more digits')
        samples.append(members[np.linalg.norm(members - members.mean(0), axis=1).argmin()])
    return np.stack(samples)


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--output', help='instead of the default path')
    settings.add_map_options(p, max_points=3000)
    p.add_argument('--projection-k', type=settings.positive, default=12, help='neighbours that place a new latent')
    args = p.parse_args()
    config = settings.load_config(args)
    device = settings.start(config)
    model, _ = autoencoders.load(config, device, args.checkpoint)
    splits, source = digits.load(config)
    print(source)
    split, seed = splits[args.split], config['experiment']['seed']
    chosen = subset(split, args.max_points, seed)
    if args.projection_k > len(chosen):
        settings.fail(f'--projection-k {args.projection_k}: there are only {len(chosen)} points')
    raw = autoencoders.encode(model, split.images[chosen], device)                    # (N, latent_dim)
    latents = l2_normalize(raw) if args.l2_normalize else raw
    samples = digit_samples(split)
    points = umap_map(latents, 3, args.umap_n_neighbors, args.umap_min_dist, seed)
    path = args.output or settings.artifact(config, f'{args.split}_interactive_assets.json')
    settings.write_json(path, {
        'experiment': config['experiment']['name'], 'num_points': len(chosen), 'latent_dim': raw.shape[1],
        'l2_normalized': args.l2_normalize, 'projection_k': args.projection_k, 'reference_points': rounded(points, 5),
        'reference_latents': rounded(latents, 6), 'reference_latents_raw': rounded(raw, 6),
        'reference_labels': split.labels[chosen].tolist(), 'digit_samples': rounded(samples, 5)}, indent=None)
    print(f'wrote {path}: {len(chosen):,} points')


if __name__ == '__main__':
    main()
