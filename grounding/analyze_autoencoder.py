"""How well do digits of one class lie together in the latent? A kNN classifier answers, beside pixels and PCA.

The neighbours are the digits the autoencoder was trained on, with their labels; the queries are those of --split. The
same k and metric serve the latent, the raw pixels, and a PCA of the latent's dimension fitted on the training digits.

Reads:  the config, output.checkpoint_path (or --checkpoint), MNIST from data.root
Writes: output.analysis_path if set, else artifacts/<experiment name>_analysis.json
    python grounding/analyze_autoencoder.py --config grounding/configs/1_naive_covnet_autoencoder.yaml
"""
import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix

import autoencoders
import digits
import settings
from latents import knn_predictions, print_table


def spaces(model, train, split, latent_dim, device, seed):
    """{name: (train (N, D), split (M, D), map of (P, D) back to images (P, 784))} of the latent and its baselines."""
    if latent_dim > len(train):
        settings.fail(f'PCA of {latent_dim} dimensions needs as many training digits, but there are {len(train)}')
    pca = PCA(latent_dim, random_state=seed).fit(train.flat())
    return {'latent': (autoencoders.encode(model, train.images, device),
                       autoencoders.encode(model, split.images, device),
                       lambda Z: autoencoders.decode(model, Z, device).flatten(1).numpy()),
            'raw pixels': (train.flat(), split.flat(), lambda X: X),
            'PCA': (pca.transform(train.flat()), pca.transform(split.flat()),
                    lambda Z: pca.inverse_transform(Z).clip(0, 1).astype(np.float32))}


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--split', choices=('val', 'test'), default='test')
    args = p.parse_args()
    config = settings.load_config(args)
    device = settings.start(config)
    model, epoch = autoencoders.load(config, device, args.checkpoint)
    splits, source = digits.load(config)
    train, split = splits['train'], splits[args.split]
    k, metric = config['analysis']['k'], config['analysis']['metric']
    y, counts = split.labels.numpy(), autoencoders.parameter_counts(model)
    results = {}
    for name, (A, B, _) in spaces(model, train, split, config['model']['latent_dim'], device,
                                  config['experiment']['seed']).items():
        predicted = knn_predictions(A, train.labels.numpy(), B, k, metric)
        matrix = confusion_matrix(y, predicted, labels=range(10))
        recall = [row[c] / row.sum() if row.sum() else None for c, row in enumerate(matrix)]   # None: no such digit
        results[name] = {'dimension': A.shape[1], 'knn_accuracy': float((predicted == y).mean()),
                         'recall_per_digit': recall, 'confusion': matrix.tolist()}
    error = autoencoders.reconstruction_error(model, split.images, device)
    print_table(source, ['space', 'dimension', f'{k}-NN accuracy'],
                [[name, r['dimension'], r['knn_accuracy']] for name, r in results.items()])
    print(f'\n{metric} distance; {len(train):,} labelled neighbours, {len(split):,} {args.split} digits; '
          f'epoch {epoch}; reconstruction error {error:.5f} a pixel')
    print(f'parameters: {counts["encoder"]:,} encoder + {counts["decoder"]:,} decoder = {counts["total"]:,}\n')
    print('confusion in the latent: row = true digit, column = neighbours\' vote')
    print('\n'.join(f'{c}  ' + ' '.join(f'{n:5d}' for n in row)
                    for c, row in enumerate(results['latent']['confusion'])))
    path = config['output'].get('analysis_path') or settings.artifact(config, 'analysis.json')
    settings.write_json(path, {
        'experiment': config['experiment']['name'], 'seed': config['experiment']['seed'], 'data': source,
        'split': args.split, 'epoch': epoch, 'k': k, 'metric': metric, 'parameters': counts,
        'reconstruction_error': error, 'spaces': results})
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
