"""How good a map of the digits is the latent? Seven measures, beside pixels and PCA of the same dimension.

  trustworthiness            are neighbours in the latent neighbours in pixels? (Venna & Kaski 2001)
  continuity                 are neighbours in pixels neighbours in the latent? (the same, with the spaces exchanged)
  neighborhood_hit           share of the k nearest that have the same label (Paulovich et al. 2008)
  silhouette                 (b - a) / max(a, b) of the labels, in [-1, 1] (Rousseeuw 1987)
  knn_accuracy               as in analyze_autoencoder.py: training digits vote on this split
  interpolation_smoothness   decode midpoints of random pairs and ask a small classifier, trained on real pixels:
                             (share of same-class midpoints that it calls that class
                              + its mean confidence on midpoints of two classes) / 2
  intrinsic_dimension        of the latent around its points: maximum likelihood (Levina & Bickel 2004), averaged as
                             MacKay & Ghahramani (2005) correct it; reads low where a neighbourhood reaches over an edge

  manifold_score = mean(trustworthiness, continuity, neighborhood_hit, (silhouette + 1) / 2, knn_accuracy,
                        interpolation_smoothness), in [0, 1]

The intrinsic dimension is reported but no part of the score: neither more nor less of it is better. knn_accuracy and
neighborhood_hit take analysis.k and analysis.metric; the other distances are Euclidean.

Reads:  the config, output.checkpoint_path (or --checkpoint), MNIST from data.root
Writes: output.manifold_analysis_path if set, else artifacts/<experiment name>_manifold_metrics.json
    python grounding/analyze_manifold.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml --split test
"""
import numpy as np
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier

import autoencoders
import digits
import settings
from analyze_autoencoder import spaces
from latents import knn_predictions, print_table, subset

NEIGHBORS = 12          # of trustworthiness and continuity
LID_NEIGHBORS = 20      # of the intrinsic dimension
PAIRS = 1000            # midpoints of either kind
JUDGE_DIGITS = 5000     # at most so many training digits teach the classifier
PARTS = ('trustworthiness', 'continuity', 'neighborhood_hit', 'silhouette', 'knn_accuracy', 'interpolation_smoothness')


def neighborhood_hit(Z, labels, k, metric):
    """Mean share of the k nearest others of each row of Z (N, D) that have its label (N,)."""
    neighbors = NearestNeighbors(n_neighbors=k, metric=metric).fit(Z)
    nearest = neighbors.kneighbors(return_distance=False)                         # (N, k), self left out
    return float((labels[nearest] == labels[:, None]).mean())


def intrinsic_dimension(distances):
    """Maximum-likelihood dimension from the distances (N, k), ascending, of N points to their k nearest others.

    1 / m = mean over the points and over j < k of log(T_k / T_j), T_j the distance of the j-th nearest. On a flat patch
    without edges the k - 1 logarithms of a point are exponential with mean 1 / m, so their mean is unbiased. (Levina
    and Bickel's k - 2 is for a mean of m; with it a mean of 1 / m reads low by 1 / (k - 1).) None if all coincide.
    """
    distances = distances[distances[:, 0] > 0].astype(np.float64)                 # a duplicate has no neighbourhood
    if not len(distances):
        return None
    inverse = np.log(distances[:, -1:] / distances[:, :-1]).mean()
    return float(1 / inverse) if inverse > 0 else None


def pairs(labels, number, same, generator):
    """(number, 2) indices of two digits, of one class or of two; fewer when chance finds none (a tiny split)."""
    drawn = generator.integers(len(labels), size=(40 * number, 2))
    first, second = drawn.T
    good = ((labels[first] == labels[second]) == same) & (first != second)
    return drawn[good][:number]


def interpolation_smoothness(Z, labels, to_images, judge, generator):
    """(smoothness, its two parts) of midpoints (z_a + z_b) / 2, decoded and judged; see the module's docstring."""
    alike, apart = (pairs(labels, PAIRS, same, generator) for same in (True, False))
    if not len(alike) or not len(apart):
        settings.fail('interpolation needs two digits of one class and two of different classes; raise --max-points')
    middle = lambda pair: to_images((Z[pair[:, 0]] + Z[pair[:, 1]]) / 2)             # noqa: E731
    kept = float((judge.predict(middle(alike)) == labels[alike[:, 0]]).mean())
    confidence = float(judge.predict_proba(middle(apart)).max(1).mean())
    return (kept + confidence) / 2, {'same_class_kept': kept, 'different_class_confidence': confidence}


def measure(X, Z, y, knn_accuracy, to_images, judge, k, metric, seed):
    """All measures of one space: pixels X (N, 784) and points Z (N, D) of the same digits, labels y (N,)."""
    smoothness, parts = interpolation_smoothness(Z, y, to_images, judge, np.random.default_rng(seed))
    metrics = {'trustworthiness': float(trustworthiness(X, Z, n_neighbors=NEIGHBORS)),
               'continuity': float(trustworthiness(Z, X, n_neighbors=NEIGHBORS)),
               'neighborhood_hit': neighborhood_hit(Z, y, k, metric),
               'silhouette': float(silhouette_score(Z, y)),
               'knn_accuracy': knn_accuracy,
               'interpolation_smoothness': smoothness}
    terms = [(metrics[name] + 1) / 2 if name == 'silhouette' else metrics[name] for name in PARTS]
    distances, _ = NearestNeighbors(n_neighbors=LID_NEIGHBORS).fit(Z).kneighbors()   # self left out
    return {'manifold_score': float(np.mean(terms))} | metrics | {
        'interpolation': parts, 'intrinsic_dimension': intrinsic_dimension(distances)}


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--split', choices=('val', 'test'), default='test',
                   help='training digits would vote for themselves')
    p.add_argument('--max-points', type=settings.positive, default=2000,
                   help='digits of the split that are compared, at random: the measures need all pairs of them')
    args = p.parse_args()
    config = settings.load_config(args)
    device = settings.start(config)
    model, epoch = autoencoders.load(config, device, args.checkpoint)
    splits, source = digits.load(config)
    train, split = splits['train'], splits[args.split]
    k, metric = config['analysis']['k'], config['analysis']['metric']
    seed, dim = config['experiment']['seed'], config['model']['latent_dim']
    chosen = subset(split, args.max_points, seed)
    X, y = split.flat()[chosen], split.labels.numpy()[chosen]
    if len(y) < max(40, k + 1) or len(set(y)) < 2:
        settings.fail(f'{len(y)} digits of {len(set(y))} classes are too few to measure a manifold; '
                      f'raise --max-points or data.{args.split}_samples')
    # The same judge for all experiments: digits of the training files, however few this experiment may train on.
    teachers, _ = digits.load(config | {'data': config['data'] | {'train_samples': 'all'}})
    taught = subset(teachers['train'], JUDGE_DIGITS, seed)
    judge = MLPClassifier((128,), random_state=seed, early_stopping=True).fit(
        teachers['train'].flat()[taught], teachers['train'].labels.numpy()[taught])
    results = {}
    for name, (A, B, to_images) in spaces(model, train, split, dim, device, seed).items():
        right = knn_predictions(A, train.labels.numpy(), B, k, metric) == split.labels.numpy()
        results[name] = measure(X, B[chosen], y, float(right.mean()), to_images, judge, k, metric, seed)
    columns = ('manifold_score', *PARTS, 'intrinsic_dimension')
    print_table(source, ['space', *columns],
                [[name, *('-' if r[c] is None else r[c] for c in columns)] for name, r in results.items()])
    accuracy = float(judge.score(X, y))
    print(f'\n{len(y):,} of {len(split):,} {args.split} digits compared; epoch {epoch}; the judge of midpoints is '
          f'right on {accuracy:.3f} of the real ones')
    path = config['output'].get('manifold_analysis_path') or settings.artifact(config, 'manifold_metrics.json')
    settings.write_json(path, {
        'experiment': config['experiment']['name'], 'seed': seed, 'data': source, 'split': args.split,
        'num_points': len(y), 'epoch': epoch, 'k': k, 'metric': metric, 'latent_dim': dim,
        'judge': {'training_digits': len(taught), 'accuracy': accuracy}, **results['latent'],
        'baselines': {name: r for name, r in results.items() if name != 'latent'}})
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
