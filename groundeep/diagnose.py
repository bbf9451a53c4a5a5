"""How the representations look: similarity, variance, entropy, dead units, alignment, RSA; and the figures of a run.

Pure functions; run.py calls them, every epoch and at the end. `--resume=true` on a finished run draws it again.
"""
import numpy as np
import scipy.stats
from scipy.spatial.distance import pdist, squareform

from groundeep.evaluate import overlap
from plot import FAINT, GREY, SERIES, VAL, figure


# ---- one layer ------------------------------------------------------------------------------------------------------

def layer_statistics(z):
    """Of codes z (N, Z) in [0, 1]: cosine: mean cosine similarity of two stimuli; variance: over stimuli, mean over
    units; entropy: bits of a unit's mean activity, mean over units (1 when all are on half of the time); dead and
    saturated: shares of units that are below 0.01, above 0.99, for every stimulus.
    """
    z = np.asarray(z, dtype=np.float64)
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    N = len(z)
    p = z.mean(0).clip(1e-9, 1 - 1e-9)
    return {'cosine': float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (N * (N - 1))),
            'variance': float(z.var(0).mean()),
            'entropy': float((-p * np.log2(p) - (1 - p) * np.log2(1 - p)).mean()),
            'dead': float((z.max(0) < 0.01).mean()), 'saturated': float((z.min(0) > 0.99).mean())}


def alignment(x, y):
    """Linear CKA (Kornblith et al. 2019) of codes x (N, X) and y (N, Y) of the same stimuli: 1 when one is a rotation
    and uniform scaling of the other, near 0 when they are unrelated and N is well above X and Y."""
    x, y = (np.asarray(z, dtype=np.float64) - np.asarray(z, dtype=np.float64).mean(0) for z in (x, y))
    cross, own = np.linalg.norm(x.T @ y) ** 2, np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(cross / own) if own else 0.0


# ---- representational similarity -------------------------------------------------------------------------------------

def model_distances(part):
    """{name: (N, N)} distances of stimuli (a split of `stimuli`) by number and by what goes with it.

    number, log number; cumulative area: log pixels that are on; density: log n / FA; overlap: 1 - Jaccard of pixels.
    """
    values = {'number': part['number'], 'log number': np.log(part['number']), 'cumulative area': np.log(part['area']),
              'density': np.log(part['number'] / part['field'])}
    found = {name: np.abs(np.subtract.outer(x, x)).astype(np.float64) for name, x in values.items()}
    return found | {'overlap': 1 - overlap(part['image'])}


def code_distances(z):
    """Euclidean distances (N, N) of codes z (N, Z)."""
    return squareform(pdist(np.asarray(z, dtype=np.float64)))


def rsa(distances, models, permutations, seed):
    """Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008): Spearman correlation of the upper
    triangles of `distances` (N, N) with those of each of `models` {name: (N, N)}.

    Returns {name: (rho, p)}; p is one-sided, (1 + permutations at least as high) / (1 + permutations), the stimuli of
    the layer relabelled at random. NaN where a model, or the layer, has no variance.
    """
    above = np.triu_indices(len(distances), 1)

    def standard(values):
        ranks = scipy.stats.rankdata(values)
        ranks -= ranks.mean()
        length = np.linalg.norm(ranks)
        return ranks / length if length else np.full_like(ranks, np.nan)

    layer = np.zeros_like(distances)
    layer[above] = standard(distances[above])
    layer += layer.T
    names, found = list(models), {}
    ranks = np.stack([standard(models[name][above]) for name in names])                              # (M, pairs)
    rho = ranks @ layer[above]
    rng, beaten = np.random.default_rng(seed), np.zeros(len(names))
    for _ in range(permutations):
        order = rng.permutation(len(layer))
        beaten += ranks @ layer[np.ix_(order, order)][above] >= rho
    for name, value, count in zip(names, rho, beaten):
        p = (1 + count) / (1 + permutations) if np.isfinite(value) else np.nan
        found[name] = (float(value), float(p))
    return found


def embed(distances, dimensions=2):
    """Classical multidimensional scaling (Torgerson 1952) of distances (N, N): (N, dimensions)."""
    N = len(distances)
    centre = np.eye(N) - 1 / N
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distances) @ centre)
    return vectors[:, ::-1][:, :dimensions] * np.sqrt(np.maximum(values[::-1][:dimensions], 0))


# ---- figures ---------------------------------------------------------------------------------------------------------

def picture_grid(rows, side, row_titles, column_titles=()):
    """A figure of images: rows, a list of lists of (side**2,) arrays in [0, 1], with a title for each."""
    columns = max(map(len, rows))
    fig, axes = figure(0.62 * columns + 1.2, 0.66 * len(rows) + 0.3, len(rows), columns)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    for line, images, title in zip(axes, rows, row_titles):
        line[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=8)
        for ax, image in zip(line, images):
            ax.imshow(np.asarray(image).reshape(side, side), cmap='gray', vmin=0, vmax=1, interpolation='nearest')
    for ax, title in zip(axes[0], column_titles):
        ax.set_title(title, fontsize=7, loc='center', weight='normal')
    return fig


def filters(W, side, count=64):
    """The strongest first-layer filters: columns of W (pixels, H), each on its own symmetric scale."""
    W = np.asarray(W)
    chosen = np.argsort(-np.linalg.norm(W, axis=0))[:count]
    rows = -(-len(chosen) // 16)
    fig, axes = figure(9, 0.6 * rows + 0.6, rows, 16)
    fig.suptitle('First-layer weights, strongest first; red +, blue −, each on its own scale', fontsize=9)
    for ax in axes.flat:
        ax.axis('off')
    for ax, column in zip(axes.flat, W[:, chosen].T):
        most = np.abs(column).max() or 1.0
        ax.imshow(column.reshape(side, side), cmap='RdBu_r', vmin=-most, vmax=most)
    return fig


def rsa_figure(distances, models, results):
    """Matrices of the layers `distances` {name: (N, N)} and of the models, stimuli sorted by number; under each layer
    its correlations. results: {layer: {model: {'rho', 'p'}}}."""
    columns = max(len(distances), len(models))
    fig, axes = figure(2.1 * columns, 6.2, 3, columns)
    for line, matrices in ((axes[0], models), (axes[1], distances)):
        for ax, (name, matrix) in zip(line, matrices.items()):
            ax.imshow(scipy.stats.rankdata(matrix).reshape(matrix.shape), cmap='viridis')
            ax.set_title(name)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    for ax, layer in zip(axes[2], distances):
        names = list(results[layer])
        ax.barh(names, [results[layer][name]['rho'] for name in names], color=VAL)
        ax.set_xlim(-0.2, 1), ax.invert_yaxis()
        ax.set_xticks((0, 0.5, 1), minor=False), ax.set_xlabel('Spearman ρ')
        ax.set_yticks(range(len(names)), names if layer == next(iter(distances)) else [])
    for line, used in ((axes[0], models), (axes[1], distances), (axes[2], distances)):
        for ax in line[len(used):]:
            ax.remove()
    return fig


def code_map(z, numbers):
    """PCA and classical MDS (of cosine distances) of the joint code z (N, Z), coloured by number."""
    z = np.asarray(z, dtype=np.float64)
    centred = z - z.mean(0)
    _, _, axes_of = np.linalg.svd(centred, full_matrices=False)
    fig, axes = figure(9, 3.8, 1, 2)
    cosine = squareform(pdist(z, 'cosine'))
    for ax, points, title in ((axes[0, 0], centred @ axes_of[:2].T, 'Joint code, PCA'),
                              (axes[0, 1], embed(cosine), 'Joint code, MDS of cosine distances')):
        shown = ax.scatter(*points.T, c=np.log2(numbers), s=9, cmap='viridis')
        ax.set_title(title), ax.set_xticks([]), ax.set_yticks([])
        ax.set_xlabel('first axis'), ax.set_ylabel('second axis')
    bar = fig.colorbar(shown, ax=axes[0, 1])
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= numbers.max()]
    bar.set_ticks(np.log2(ticks), labels=[str(n) for n in ticks])
    bar.set_label('number')
    return fig


def behaviour(choice, log2_ratio, w, naming, drawing):
    """Three curves: choices against the ratio of numbers with the fitted Weber fraction w; numbers named (M, 3: true,
    mean, sd) and numbers drawn, likewise, against the true ones."""
    fig, axes = figure(9, 3.2, 1, 3)
    edges = np.linspace(-3, 3, 25)
    middle, inside = (edges[1:] + edges[:-1]) / 2, np.digitize(log2_ratio, edges) - 1
    share = [choice[inside == i].mean() if (inside == i).any() else np.nan for i in range(24)]
    axes[0, 0].plot(middle, share, 'o', ms=3, color=VAL, label='choices')
    axes[0, 0].plot(edges, scipy.stats.norm.cdf(np.log(2) * edges / (2 ** 0.5 * w)), color=GREY, lw=1,
                    label=f'Weber fraction {w:.2f}')
    axes[0, 0].set_xlabel('log2 ratio of numbers'), axes[0, 0].set_title('Which image has more'), axes[0, 0].legend()
    axes[0, 0].set_ylabel('share of "the first"')
    for ax, curve, title, unit in ((axes[0, 1], naming, 'Number named', 'number'),
                                   (axes[0, 2], drawing, 'Components drawn', 'components')):
        ax.errorbar(curve[:, 0], curve[:, 1], curve[:, 2], fmt='o', ms=3, lw=0.8, color=VAL)
        ax.plot(curve[:, 0], curve[:, 0], color=FAINT, lw=1)
        ax.set_xlabel('true number'), ax.set_ylabel(unit), ax.set_title(title + ', mean ± sd')
    return fig


def trends(rows):
    """Curves of history rows: reconstruction errors by stage, and the diagnostics of the joint stage by epoch."""
    keys = {'Reconstruction error (mean square)': 'error', 'Cosine similarity': 'cosine', 'Variance': 'variance',
            'Unit entropy (bits)': 'entropy', 'Dead units (share)': 'dead', 'Saturated units (share)': 'saturated',
            'CKA of z_img and z_txt': 'alignment', 'Distinct drawings (share)': 'distinct',
            'Named right (share)': 'named', 'Drawn right (share)': 'drawn', 'RSA with log number (ρ)': 'rsa log number',
            'RSA with pixel overlap (ρ)': 'rsa overlap', 'Gain': 'gain'}
    panels = {title: [k for k in dict.fromkeys(k for r in rows for k in r) if k.split('/')[0] == key]
              for title, key in keys.items()}
    panels = {title: names for title, names in panels.items() if names}
    height = -(-len(panels) // 3)
    fig, axes = figure(9, 2.3 * height, height, 3)
    for ax, (title, names) in zip(axes.flat, panels.items()):
        for name, colour in zip(names, SERIES):
            points = [(row['step'], row[name]) for row in rows if name in row]
            ax.plot(*zip(*points), color=colour, label=name.partition('/')[2])
        ax.set_title(title), ax.set_xlabel('epoch, all stages')
        ax.ticklabel_format(useOffset=False)
        if title.endswith('(share)'):
            ax.set_ylim(-0.05, 1.05)
        ax.legend(fontsize=6) if len(names) > 1 else None
    for ax in list(axes.flat)[len(panels):]:
        ax.remove()
    return fig

