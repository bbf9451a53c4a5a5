"""Latents of a split: their nearest neighbours, their map, and the table that analyses print."""
import json
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from settings import fail

EPSILON = 1e-12


def l2_normalize(Z):
    """Rows of Z (N, D) at length 1; a row of zeros stays."""
    return Z / np.maximum(np.linalg.norm(Z, axis=1, keepdims=True), EPSILON)


def subset(digits, max_points, seed):
    """Indices of at most max_points digits of a split, in random order."""
    return np.random.default_rng(seed).permutation(len(digits))[:max_points]


def knn_predictions(train, labels, queries, k, metric):
    """Labels (M,) by majority of the k nearest of train (N, D). SystemExit(2) when k > N."""
    if k > len(train):
        fail(f'analysis.k is {k}, but there are only {len(train)} training digits')
    return KNeighborsClassifier(k, metric=metric).fit(train, labels).predict(queries)


def umap_map(Z, dimensions, n_neighbors, min_dist, seed):
    """UMAP (McInnes et al. 2018) of Z (N, D) to (N, dimensions), centred, its longest half axis 1. Same seed, same map.

    Raises SystemExit(2) for fewer points than a neighbourhood needs.
    """
    if len(Z) <= n_neighbors + 1:
        fail(f'--umap-n-neighbors {n_neighbors}: there are only {len(Z)} points; ask for fewer neighbours')
    import numba   # here, because importing the two takes seconds
    # numba's OpenMP layer sets the number of threads of torch too, and another number of threads adds in another order.
    numba.config.THREADING_LAYER = 'workqueue'
    import umap
    points = umap.UMAP(n_components=dimensions, n_neighbors=n_neighbors, min_dist=min_dist, random_state=seed,
                       n_jobs=1).fit_transform(Z)
    points = points - points.mean(0)
    return points / max(abs(points).max(), EPSILON)


def rounded(array, digits):
    """A nested list of floats with so many decimals: JSON at a third of the size."""
    return np.round(np.asarray(array, dtype=np.float64), digits).tolist()


def print_table(source, header, rows):
    """Print the line that says which data, then columns: text to the left, numbers with three decimals to the right."""
    cells = [[f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(source)
    for row in cells:
        print('  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def read_json(path, what):
    """The object in a JSON file that a script of this folder wrote. SystemExit(2) when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        fail(f'{path}: {error.strerror}; {what} writes it')
    except ValueError:
        fail(f'{path}: not JSON; write it again with {what}')
