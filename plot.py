"""Draw what a run folder holds: canvases, spectra, embeddings, attention, trends, samples and gates.

A phase hands the arrays of an evaluation to `evaluation`, which stores them before it draws them, so that every figure
can be drawn again, or differently, from the files alone.

Reads:  out/pN/plots/step_*.npz, metrics.jsonl, samples.jsonl, gate.json      Writes: out/pN/plots/*.png, out/gates.png
    python plot.py --run=out/p1
    python plot.py --gates=true
    python plot.py --gates=true --out=out/seed0,out/seed1,out/seed2      # mean ± sd over the runs
"""
import colorsys
import json
import os
import re
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

import priors
import runtime

run = ''          # one run folder; '' is every p*/ in `out`
out = 'out'       # the folder that holds the run folders; also several, a,b,c: one a seed
gates = False     # a table of all gates, drawn and printed, instead of the figures
config = runtime.configure(globals())

DPI = 160            # pixels an inch: a figure 9 inches wide is sharp in a README, which shows about 900 pixels
BAND = (1.5, 2.5)    # P1's band for the spectral slope
GATE = (0, (4, 3))   # the dashes of a threshold
CHANNELS = ('#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9', '#4D4D4D', '#999933')  # Okabe & Ito, + 2
KINDS = {'colour': '#CC6677', 'shape': '#3388BB', 'count': '#B8963E', 'relation': '#2A9D7F',   # of tokens and of
         'argument swap': '#332288', 'attribute swap': '#AA4499', 'function': '#8A8A8A'}       # counterfactuals
WHOLE = 'total', 'mean', 'all channels', 'all tokens', 'weighted sum'    # drawn in ink, above its parts
VAL = '#1F4E79'      # what is measured on held-out data
SERIES = (VAL, '#CC6677', '#2A9D7F', '#AA4499', '#B8963E', '#3388BB', '#882255', '#8A8A8A')    # anything else, in turn
# Terms of the loss: a colour and a line each, the same in every panel; beside the U-Net's loss that of a Wiener filter.
TERMS = {name: (SERIES[i % len(SERIES)], ('-', '--', ':')[i // len(SERIES)]) for i, name in enumerate((
    'spectrum', 'tv', 'wavelet', 'gradkurt', 'cov', 'var', 'common', 'lattice', 'rec', 'nce', 'inv', 'again', 'para',
    'cycle', 'copy', 'prior', 'diffusion', 'image'))}
TERMS |= {'exact': (VAL, '-'), 'by concept': (SERIES[1], '-'), 'exact, auxiliary decoder': (SERIES[2], '-'),
          'by concept, auxiliary decoder': (SERIES[3], '-')}
TERMS |= {f'{name} t {quarter}': (SERIES[i], line) for name, line in (('diffusion', '-'), ('wiener', '--'))
          for i, quarter in enumerate(('0-25%', '25-50%', '50-75%', '75-100%'))}
INK, GREY, FAINT, SHADE, PASS, FAIL = '#222222', '#555555', '#B5B5B5', '#EFEFEF', '#117733', '#C0392B'
matplotlib.rcParams.update({
    'font.size': 9, 'axes.titlesize': 9.5, 'axes.titlelocation': 'left', 'axes.titleweight': 'bold',
    'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8, 'legend.fontsize': 8, 'legend.frameon': False,
    'legend.labelspacing': 0.25, 'legend.handlelength': 1.4, 'lines.linewidth': 1.3, 'savefig.dpi': DPI,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.linewidth': 0.6, 'axes.edgecolor': '#888888',
    'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'xtick.minor.width': 0.4, 'ytick.minor.width': 0.4,
    'text.color': INK, 'axes.labelcolor': INK, 'xtick.color': GREY, 'xtick.labelcolor': INK, 'ytick.color': GREY,
    'ytick.labelcolor': INK})


# ---- small parts ----------------------------------------------------------------------------------------------------

def figure(width, height, rows=1, columns=1, **kwargs):
    """A Figure of so many inches and its axes, (rows, columns). No pyplot, so nothing has to be closed."""
    fig = Figure(figsize=(width, height), layout='constrained')
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs)


def channel_colour(c):
    return CHANNELS[c % len(CHANNELS)]


def gate_line(ax, value, label, horizontal=True):
    """A threshold of a gate: thin, dashed, named."""
    (ax.axhline if horizontal else ax.axvline)(value, color=INK, lw=0.8, ls=GATE, zorder=1, label=label)


def bars(ax, names, values, colours):
    """Horizontal bars from the top down, each with its value at its end."""
    y, form = np.arange(len(values)), '.2f' if np.max(np.abs(values)) >= 0.1 else '.2g'
    ax.barh(y, values, color=colours, height=0.66)
    for i, value in enumerate(values):
        ax.annotate(format(value, form), (max(value, 0), i), (4, 0), textcoords='offset points', va='center', fontsize=8)
    ax.set_yticks(y, [balanced(str(name), 26) for name in names])
    ax.invert_yaxis()
    ax.tick_params(axis='y', length=0)
    ax.margins(x=0.14)


def balanced(text, width, max_lines=5):
    """Text wrapped to as few lines as `width` allows, all about as long."""
    lines = len(textwrap.wrap(text, width))
    width = next((w for w in range(8, width) if len(textwrap.wrap(text, w)) <= lines), width)
    return textwrap.fill(text, width, max_lines=max_lines)


def table(title, header, rows, widths, colours, note=''):
    """A Figure of text in columns: rows of strings, wrapped at widths (characters); colours {(row, column): colour}."""
    rows = [[textwrap.wrap(cell, width) or [''] for cell, width in zip(row, widths)] for row in rows]
    lines = [max(map(len, row)) for row in rows]
    line, gap, char = 0.145, 0.11, 0.066                                      # inches, for text of 8.5 points
    left = 0.15 + np.cumsum([0, *(width * char + 0.12 for width in widths)])
    height = 0.75 + sum(lines) * line + len(rows) * gap + (0.25 if note else 0)
    fig = Figure(figsize=(left[-1] + 0.1, height))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, left[-1] + 0.1), ylim=(height, 0))
    ax.axis('off')
    ax.text(left[0], 0.24, title, fontsize=10, weight='bold', va='center')
    for x, cell in zip(left, header):
        ax.text(x, 0.52, cell, fontsize=8, color=GREY, va='center')
    y = 0.66
    for i, (row, count) in enumerate(zip(rows, lines)):
        ax.plot((left[0], left[-1] - 0.05), (y, y), color=FAINT, lw=0.5)
        for j, (x, cell) in enumerate(zip(left, row)):
            colour = colours.get((i, j))
            ax.text(x, y + (gap + line * count) / 2, '\n'.join(cell), fontsize=8.5, va='center', linespacing=1.15,
                    color=colour or INK, weight='bold' if colour else 'normal', parse_math=False)  # a $ is a $
        y += gap + line * count
    ax.text(left[0], y + 0.2, note, fontsize=8, color=GREY, va='center')
    return fig


def number(value, form):
    """A number as text; a text as it is; a dash where JSON has null, because the value was not finite."""
    return '–' if value is None else value if isinstance(value, str) else format(value, form)


def save(fig, path):
    """Write a PNG, in one move like everything else in a run folder; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')         # a letter that the font lacks is an empty box
        fig.savefig(temporary, format='png')
    os.replace(temporary, path)
    return path


def read_lines(path):
    """The JSON objects of a .jsonl file, [] without one; a last line that is still being written is left out.
    SystemExit(2), after one line, if another is damaged."""
    if not path.is_file():
        return []
    rows = []
    for n, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            runtime.fail(f'{path}, line {n}: no JSON object, is it damaged? Take the line out, or begin the run again')
    return rows


def read_json(path, keys=()):
    """A JSON object from a file. SystemExit(2), after one line, if it is none or lacks one of keys."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        missing = [key for key in keys if key not in found]
    except (ValueError, TypeError):
        missing = ['JSON']
    if missing:
        runtime.fail(f'{path}: lacks {", ".join(missing)}, is it damaged? The run writes it again: --resume=true')
    return found


# ---- figures of one evaluation: each takes all arrays of it, {name: array}, and returns a Figure ---------------------

def montage(a):
    """Canvases `montage` (N, C, H, W), a row for each sentence of `titles` (N,), a column for each channel.

    Each canvas pixel is a square of whole screen pixels: resampling could add, or hide, the very lattice one looks for.
    """
    V = a['montage'].astype(np.float32)
    N, C, H, W = V.shape
    zoom, gap = max(1, round(96 / W)), 2
    columns = np.pad(V.transpose(1, 0, 2, 3), ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=np.nan)
    columns = columns.reshape(C, N * (H + gap), W)[:, :-gap]                  # (C, N, H+gap, W) -> one tall strip each
    left, top, bottom, pitch = 275, 40, 48, (W + gap) * zoom                  # pixels
    width, tall = left + C * pitch + 14, columns.shape[1] * zoom
    height = top + tall + bottom
    fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for c, strip in enumerate(columns):
        x, middle = left + c * pitch, np.nanmedian(strip)                     # the priors leave a channel's mean free
        spread = max(np.nanquantile(abs(strip - middle), 0.995), 1e-6)
        style = {'cmap': 'RdBu_r', 'vmin': middle - spread, 'vmax': middle + spread, 'aspect': 'auto'}
        ax = fig.add_axes((x / width, bottom / height, W * zoom / width, tall / height))
        ax.imshow(strip, interpolation='nearest', **style)
        ax.set_title(f'channel {c}', loc='center', weight='normal', fontsize=8.5, pad=5)
        key = fig.add_axes((x / width, (bottom - 16) / height, W * zoom / width, 8 / height))
        key.imshow(np.linspace(middle - spread, middle + spread, 64)[None], **style)
        for position, value, side in ((0, middle - spread, 'left'), (1, middle + spread, 'right')):
            key.text(position, -0.6, f'{value:.2g}', transform=key.transAxes, ha=side, va='top', fontsize=6.5)
        ax.axis('off'), key.axis('off')
    for i, title in enumerate(a.get('titles', [''] * N)):
        y = 1 - (top + (i * (H + gap) + H / 2) * zoom) / height
        label = balanced(str(title), 25)
        fig.text((left - 14) / width, y, label, ha='right', va='center', fontsize=8, parse_math=False)
    return fig


def drawn(a):
    """Canvases `drawn` (N, C, H, W) from noise, and some painted from sentences, with
    what the decoder reads in them."""
    return montage({'montage': a['drawn'], 'titles': a['drawn_titles']})


def spectra(a):
    """Radial power (C, K) of each channel, plain and under a Hann window, with the line of its slope α (C,)."""
    windows = [(name, a[f'power{key}'], a[f'alpha{key}']) for name, key in (('Plain FFT', ''), ('Hann window', '_hann'))
               if f'power{key}' in a]
    fig, axes = figure(9, 3.9, 1, len(windows), sharey=True)
    for ax, (name, power, alpha) in zip(axes[0], windows):
        power = np.maximum(power, 1e-12)                                      # a flat channel has a logarithm too
        k = np.arange(1, power.shape[1] + 1)
        for c, (P, slope) in enumerate(zip(power, alpha)):
            fit = np.exp(np.log(P).mean() - slope * (np.log(k) - np.log(k).mean()))
            ax.loglog(k, fit, lw=0.9, color=channel_colour(c))
            ax.loglog(k, P, 'o', ms=3, mew=0, color=channel_colour(c), label=f'channel {c}: α {slope:.2f}')
        ax.loglog(k, 3 * power[:, 0].max() / k**2.0, color=FAINT, lw=2.5, label='1/f²')
        good = sum(BAND[0] <= slope <= BAND[1] for slope in alpha)
        ax.set_title(f'{name}: α in [{BAND[0]}, {BAND[1]}] for {good} of {len(alpha)} channels')
        ax.set_xlabel('spatial frequency (cycles per canvas)')
        ax.set_xticks([t for t in (1, 2, 4, 8, 16, 32) if t <= k[-1]], minor=False)
        ax.xaxis.set_major_formatter('{x:.0f}'), ax.minorticks_off()
        ax.legend(loc='lower left')
    axes[0, 0].set_ylabel('power, mean over sentences')
    return fig


def slopes(a):
    """Histogram over sentences of the slope `alpha_image` (B, C), a ridge for each channel."""
    alpha = a['alpha_image']
    C = alpha.shape[1]
    fig, axes = figure(4.5, 3.4)
    ax = axes[0, 0]
    ax.axvspan(*BAND, color=SHADE, zorder=0)
    edges = np.linspace(min(alpha.min(), BAND[0]) - 0.2, max(alpha.max(), BAND[1]) + 0.2, 49)
    for c in range(C):
        count = np.histogram(alpha[:, c], edges)[0]
        ridge = {'baseline': -c, 'color': channel_colour(c)}
        ax.stairs(1.25 * count / count.max() - c, edges, fill=True, alpha=0.45, zorder=c + 1, **ridge)
        ax.stairs(1.25 * count / count.max() - c, edges, lw=1.1, zorder=c + 1, **ridge)
    inside = np.mean((alpha >= BAND[0]) & (alpha <= BAND[1]))
    ax.set(title=f'Slope of each canvas: {inside:.1%} in [{BAND[0]}, {BAND[1]}]', xlabel='spectral slope α')
    ax.set_yticks(-np.arange(C), [f'channel {c}' for c in range(C)])
    ax.tick_params(axis='y', length=0), ax.spines['left'].set_visible(False)
    return fig


def correlation(a):
    """Channel correlation (C, C), with its numbers."""
    R = a['correlation']
    fig, axes = figure(4.5, 3.7)
    ax = axes[0, 0]
    ax.imshow(R, cmap='RdBu_r', vmin=-1, vmax=1)
    for (i, j), value in np.ndenumerate(R.round(2) + 0.0):                    # + 0, or there is a -0.00
        ax.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=8, color='white' if abs(value) > 0.6 else INK)
    largest = abs(R - np.diag(np.diag(R))).max()
    ax.set(title=f'Channel correlation: largest {largest:.2f}', xlabel='channel', ylabel='channel')
    ax.set_xticks(range(len(R))), ax.set_yticks(range(len(R)))
    ax.tick_params(length=0), ax.spines[:].set_visible(False)
    return fig


def gradients(a):
    """Density of the standardised gradients (M,), beside a Gaussian and a Laplace density of variance 1."""
    d = a['gradients']
    d = (d - d.mean()) / max(d.std(), 1e-12)
    limit = float(np.clip(abs(d).max(), 5, 12))
    density, edges = np.histogram(d, bins=np.linspace(-limit, limit, 101))
    one = 1 / (len(d) * (edges[1] - edges[0]))                                # density of a bin that holds one sample
    x = np.linspace(-limit, limit, 401)
    fig, axes = figure(4.5, 3.4)
    ax = axes[0, 0]
    density = np.where(density > 0, density * one, np.nan)                    # a gap, not a plunge, where there is none
    ax.stairs(density, edges, baseline=None, color=VAL, lw=1.3, label='canvas gradients')
    ax.plot(x, np.exp(-x**2 / 2) / np.sqrt(2 * np.pi), color=FAINT, lw=1.2, label='Gaussian, kurtosis 3')
    ax.plot(x, np.exp(-np.sqrt(2) * abs(x)) / np.sqrt(2), color=GREY, lw=1.0, ls='--', label='Laplace, kurtosis 6')
    ax.set(yscale='log', ylim=(0.3 * one, 20), xlim=(-limit, limit), xlabel='∂x, ∂y (standard deviations)',
           ylabel='density', title=f'Gradients: kurtosis {np.mean(d**4):.1f}')
    ax.legend(loc='upper right')
    return fig


def tsne(a):
    """t-SNE, by cosine, of embeddings `tsne_z` (N, E): a colour for each scene (N,), a marker for each kind (N,)."""
    from sklearn.manifold import TSNE                                         # a second to import, and seldom needed
    z, scene, kind = a['tsne_z'].astype(np.float32), a['tsne_scene'], a['tsne_kind']
    perplexity = min(30.0, (len(z) - 1) / 3)
    xy = TSNE(metric='cosine', perplexity=perplexity, init='pca', random_state=0).fit_transform(z)   # (N, 2)
    scenes = np.unique(scene)
    hues = [colorsys.hls_to_rgb(0.618 * i % 1, (0.33, 0.5)[i % 2], 0.7) for i in range(len(scenes))]  # golden steps
    palette = dict(zip(scenes, hues))
    families = [name for name in dict.fromkeys(kind.tolist()) if name != 'paraphrase']
    plain = [name for name in families if 'swap' not in name]
    markers = {'paraphrase': 'o'} | dict.fromkeys(plain, 'o')
    markers |= dict(zip((name for name in families if 'swap' in name), 'D^vsPX'))
    fig, axes = figure(9, 6.4)
    ax = axes[0, 0]
    for name, marker in markers.items():
        for s in scenes:
            points = xy[(kind == name) & (scene == s)]
            if name in families:
                style = {'facecolors': 'none', 'edgecolors': [palette[s]], 'linewidths': 1.0, 's': 26}
            else:
                style = {'color': palette[s], 'linewidths': 0, 's': 34}
            ax.scatter(*points.T, marker=marker, **style)
    entries = [('paraphrases, a colour for each scene', {'marker': 'o', 'ms': 6, 'mew': 0})]
    hollow = {'mfc': 'none', 'ms': 5.5, 'mew': 1.0}
    entries += [('counterfactuals of that scene: ' + ', '.join(plain), hollow | {'marker': 'o'})] if plain else []
    entries += [(name, hollow | {'marker': markers[name]}) for name in families if name not in plain]
    handles = [Line2D([], [], ls='', color=GREY, label=label, **style) for label, style in entries]
    fig.legend(handles=handles, loc='outside lower center', ncols=len(handles), handletextpad=0.2, columnspacing=1.4)
    ax.set_title(f't-SNE of z, cosine distance, perplexity {perplexity:.0f}, {len(z)} held-out sentences')
    ax.set_xticks([]), ax.set_yticks([]), ax.spines[:].set_visible(False)
    return fig


def shift(a):
    """Cosine of z before and after V is shifted by `shift` (S,) pixels; bars for other jitter, if there are any."""
    panels = 2 if 'jitter_cosine' in a else 1
    fig, axes = figure(9 if panels == 2 else 4.5, 3.3, 1, panels, width_ratios=(3, 2)[:panels])
    ax = axes[0, 0]
    gate_line(ax, 0.9, 'gate 0.9')
    if 'shift_cosine_before' in a:
        ax.plot(a['shift'], a['shift_cosine_before'], 'o--', ms=3.5, color=FAINT, label='before this phase')
    ax.plot(a['shift'], a['shift_cosine'], 'o-', ms=4.5, color=VAL, label='now')
    ax.set(title='Shifted canvas, same meaning?', xlabel='shift (pixels)', ylabel='cosine of g(V) and g(shifted V)')
    ax.set_ylim(min(0.5, ax.get_ylim()[0]), 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc='lower left')
    if panels == 2:
        bars(axes[0, 1], a['jitter_names'], a['jitter_cosine'], VAL)
        gate_line(axes[0, 1], 0.9, None, horizontal=False)
        axes[0, 1].set(title='Other jitter', xlabel='cosine', xlim=(0, 1.15), xticks=(0, 0.25, 0.5, 0.75, 1))
    return fig


def attention(a):
    """Decoder attention (examples, T, h, w): where on the canvas each token looked, and over how many cells."""
    maps, tokens = a['attention'].astype(np.float32), a['attention_tokens']
    kinds = np.broadcast_to(a.get('attention_types', ''), tokens.shape)
    across, side, pitch = 12, 0.68, 0.98                                      # maps a line; inches
    lines = [(i, part) for i, shown in enumerate(map(np.flatnonzero, tokens != ''))
             for part in np.array_split(shown, -(-len(shown) // across) or 1)]
    extra = np.cumsum([0] + [0.12 * (after[0] != line[0]) for line, after in zip(lines, lines[1:])])  # between examples
    width, height = across * (side + 0.06) + 0.25, len(lines) * pitch + extra[-1] + 0.5
    fig = Figure(figsize=(width, height))
    for n, (i, shown) in enumerate(lines):
        norm = PowerNorm(0.5, 0, max(maps[i][tokens[i] != ''].max(), 1e-12))  # one scale a sentence; faint cells show
        for column, t in enumerate(shown):
            x, y = 0.15 + column * (side + 0.06), height - 0.22 - side - n * pitch - extra[n]
            ax = fig.add_axes((x / width, y / height, side / width, side / height))
            ax.imshow(maps[i, t], cmap='magma', norm=norm, interpolation='nearest')
            weight = 'normal' if kinds[i, t] in ('', 'function') else 'bold'
            ax.set_title(str(tokens[i, t]).strip()[:12], loc='center', pad=3, fontsize=7.5, weight=weight,
                         color=KINDS.get(kinds[i, t], INK), parse_math=False)
            p = maps[i, t] / max(maps[i, t].sum(), 1e-12)
            cells = np.exp(-(p * np.log(np.maximum(p, 1e-12))).sum())
            ax.text(0.5, -0.05, f'{cells:.0f}', transform=ax.transAxes, ha='center', va='top', fontsize=6.5, color=GREY)
            ax.axis('off')
    fig.text(0.15 / width, 0.13 / height, 'number: cells the token attends to, exp(entropy)', fontsize=8)
    handles = [Line2D([], [], ls='', marker='s', color=KINDS[name], label=name) for name in KINDS if name in kinds]
    fig.legend(handles=handles, loc='lower right', ncols=6, handletextpad=0.2, columnspacing=1.2)
    return fig


def token_types(a):
    """Cross-entropy `ce_values` of the tokens of each type in `ce_types`."""
    fig, axes = figure(4.5, 0.9 + 0.36 * len(a['ce_values']))
    ax = axes[0, 0]
    bars(ax, a['ce_types'], a['ce_values'], [KINDS.get(str(name), GREY) for name in a['ce_types']])
    ax.set(title='Reading the sentence back', xlabel='cross-entropy (nats per token)')
    return fig


def controls(a):
    """What decoders with less to read from reach: `controls_ce`, `controls_accuracy` for each of `controls_names`."""
    fig, axes = figure(9, 1.0 + 0.36 * len(a['controls_names']), 1, 2, sharey=True)
    colours = [VAL] + [FAINT] * (len(a['controls_names']) - 1)                # the first is the model itself
    bars(axes[0, 0], a['controls_names'], a['controls_ce'], colours)
    axes[0, 0].set(title='Cross-entropy', xlabel='nats per token')
    bars(axes[0, 1], a['controls_names'], a['controls_accuracy'], colours)
    axes[0, 1].invert_yaxis()                                                 # shared, so it was turned twice
    gate_line(axes[0, 1], 0.9, None, horizontal=False)
    axes[0, 1].set(title='Content tokens read right (gate 0.9)', xlabel='accuracy', xlim=(0, 1.12))
    return fig


def sentence(a):
    """One sentence `title`: its canvas `V` (C, H, W), the mean of the channels, and below where the decoder looks,
    `maps` (T, h, w), as it says each of `words` (T,). All tiles stand in one Axes: one for each takes three times as
    long to draw, and somebody is waiting."""
    V, maps, words = a['V'].astype(np.float32), a['maps'], a['words']
    panels = [*((f'channel {c}', channel) for c, channel in enumerate(V)), ('mean', V.mean(0))]
    columns = max(len(panels), 8)
    rows = 1 + -(-len(words) // columns)
    fig = Figure(figsize=(1.15 * columns, 1.3 * rows + 0.4))
    ax = fig.add_axes((0.01, 0.0, 0.98, 1 - 0.4 / (1.3 * rows + 0.4)))
    ax.axis('off')

    def tile(i, row, name, image, **how):
        """An image of width 1 in column i of a row, its name above."""
        y = 1.15 * row
        ax.imshow(image, extent=(i + 0.03, i + 0.97, y + 1.0, y + 0.06), interpolation='nearest', **how)
        ax.text(i + 0.5, y + 0.02, name, ha='center', fontsize=8, parse_math=False)

    for c, (name, channel) in enumerate(panels):
        spread = max(np.quantile(abs(channel - np.median(channel)), 0.995), 1e-6)
        tile(c, 0, name, channel - np.median(channel), cmap='RdBu_r', vmin=-spread, vmax=spread)
    norm = PowerNorm(0.5, 0, max(maps.max(), 1e-12))                     # as in `attention`
    for t, (word, weights) in enumerate(zip(words, maps)):
        tile(t % columns, 1 + t // columns, str(word).strip(), weights, cmap='magma', norm=norm)
    ax.set(xlim=(0, columns), ylim=(1.15 * rows, -0.15), aspect='equal')
    fig.suptitle(str(a['title']), fontsize=10, parse_math=False)
    return fig


FIGURES = {'montage': ('montage', montage), 'spectra': ('power', spectra), 'slopes': ('alpha_image', slopes),
           'correlation': ('correlation', correlation), 'gradients': ('gradients', gradients), 'tsne': ('tsne_z', tsne),
           'shift': ('shift_cosine', shift), 'attention': ('attention', attention),
           'token_types': ('ce_values', token_types), 'controls': ('controls_ce', controls),
           'drawn': ('drawn', drawn)}  # file: (array, function)


def as_array(value, half=False):
    """A tensor, array or list of strings as a NumPy array that a file holds without pickle: float32 or float16."""
    if torch.is_tensor(value):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    value = np.asarray(value)
    return value.astype(np.float16 if half else np.float32) if value.dtype.kind == 'f' else value


def numbered(folder, name, kind='png'):
    """The plots/<name>_<step>.<kind> files of a run folder, in the order of their steps; nobody else's files."""
    return sorted((path for path in Path(folder).glob(f'plots/{name}_*.{kind}')
                   if re.fullmatch(rf'{name}_\d+', path.stem)), key=step_of)


def stored(folder):
    """The arrays of the evaluations that a run folder keeps."""
    return numbered(folder, 'step', 'npz')


def step_of(path):
    return int(path.stem.rpartition('_')[2])


def evaluation(folder, step, arrays):
    """Store the arrays of an evaluation as plots/step_<step>.npz, the newest two of them, and draw all they allow.

    arrays: {name: tensor, array or list of strings}; the figures above name those that they read. Canvases that are not
    finite are not drawn: the run is about to end, and says so itself.
    """
    arrays = {name: as_array(value, half=name == 'montage') for name, value in arrays.items()}
    if not all(np.isfinite(arrays[name]).all() for name in ('alpha_image', 'gradients', 'tsne_z') if name in arrays):
        return
    path = Path(folder) / 'plots' / f'step_{step:06d}.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'wb') as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)
    upto = [other for other in stored(folder) if step_of(other) <= step]
    later = [figure for name in (*FIGURES, 'trends') for figure in numbered(folder, name) if step_of(figure) > step]
    for other in (set(stored(folder)) - set(upto[-2:])) | set(later):         # a later step is of an earlier run
        other.unlink()
    draw(path)


def draw(path):
    """Draw the figures of one plots/step_<step>.npz beside it."""
    with np.load(path) as file:
        a = dict(file)
    for name, (key, function) in FIGURES.items():
        if key in a:
            save(function(a), path.with_name(f'{name}_{step_of(path):06d}.png'))


@torch.no_grad()
def spectra_arrays(V, samples=20_000):
    """The arrays of P1's figures from canvases V (B, C, H, W): spectra, slopes, channel correlation, gradients."""
    V = V.float()
    statistics = priors.statistics(V)
    standard = [d / (d.std((2, 3), keepdim=True) + 1e-12) for d in priors.gradients(V)]
    d = torch.cat([part.flatten() for part in standard])
    pick = torch.randint(len(d), (min(samples, len(d)),), generator=torch.Generator().manual_seed(0))
    return {'power': priors.radial_power(V)[0].mean(0), 'power_hann': priors.radial_power(V, hann=True)[0].mean(0),
            'gradients': d[pick.to(d.device)],
            **{name: statistics[name] for name in ('alpha', 'alpha_hann', 'alpha_image', 'correlation')}}


# ---- figures of a run -----------------------------------------------------------------------------------------------

PANELS = (  # title, unit, the metrics that belong there, how they are drawn
    ('Training loss', 'as defined, where above 0',
     r'train/(?!((unet_)?(grad_norm|lr)|stage|swaps_beaten)$).*', {'log': True}),
    ('Total variation', 'mean |difference| a pixel', r'val/tv(_normalised)?', {'zero': True}),
    ('Channel standard deviation', 'of a pixel', r'val/std', {'zero': True}),
    ('Spectral slope α', 'power ~ 1/f^α', r'val/alpha', {'band': BAND}),
    ('Spectral slope α, Hann window', 'power ~ 1/f^α', r'val/alpha_hann', {'band': BAND}),
    ('Gradient kurtosis', 'Gaussian: 3', r'val/kurtosis', {'lines': (3,), 'log': True}),
    ('Variance due to the sentence', 'share', r'val/share(_total)?', {'lines': (0.2,), 'zero': True}),
    ('Channel correlation', 'size', r'val/(max|mean_abs)_correlation', {'lines': (0.3,), 'zero': True}),
    ('Lattice energy', '1/f² field: 1', r'val/lattice', {'lines': (2,), 'zero': True}),
    ('Retrieval of paraphrases', 'share', r'val/r(1|5|1_hard)', {'lines': (0.6, 0.85), 'zero': True}),
    ('Cosine gap to counterfactuals', 'cosine', r'val/gap(_.*)?', {'lines': (0.25,), 'zero': True}),
    ('Counterfactuals beaten', 'share', r'val/wins(_.*)?|train/swaps_beaten', {'lines': (0.95,)}),
    ('Cosine after jitter', 'cosine', r'val/.*(jitter|blur|cutout).*', {'lines': (0.9,)}),
    ('Content tokens read right', 'share', r'val/(rec_)?content_(accuracy|concept)', {'lines': (0.9,), 'zero': True}),
    ('Cross-entropy by type of token', 'nats a token',
     r'val/ce(_(function|colour|shape|count|relation))?', {'log': True}),
    ('CE rise when the canvas is shuffled', 'relative', r'val/shuffle_ce_rise', {'lines': (0.3,), 'log': True}),
    ('Graph F1', 'share', r'val/graph_(f1|exact)', {'lines': (0.85,), 'zero': True}),
    ('Overlap with the input', 'share', r'val/(rouge_l|bigrams)', {'lines': (0.55,), 'zero': True}),
    ('Round-trip cosine', 'cosine', r'val/cosine', {'lines': (0.9,)}),
    ('Diffusion loss, Wiener filter', 'no skill: 1', r'val/(diffusion|wiener)_.*', {'log': True}),
    ('Image priors', 'as each is defined', r'val/prior(_.*)?', {}),
    ('Distance of paraphrases', 'of unit vectors', r'val/paraphrase_distance', {'zero': True}),
    ('Canvases drawn from noise', 'share', r'val/drawn_(parsed|distinct)', {'zero': True}))
LABELS = {'train/loss': 'total', 'val/tv': 'as painted', 'val/tv_normalised': 'at unit variance',
          'val/share_total': 'all channels', 'val/max_correlation': 'largest, pooled',
          'val/mean_abs_correlation': 'mean of each canvas',
          'val/r1': 'R@1', 'val/r5': 'R@5', 'val/r1_hard': 'R@1 hard', 'val/gap': 'mean', 'val/wins': 'mean',
          'train/swaps_beaten': 'in the batch', 'val/content_accuracy': 'exact', 'val/content_concept': 'by concept',
          'val/prior': 'weighted sum', 'val/rec_content_accuracy': 'exact, auxiliary decoder',
          'val/rec_content_concept': 'by concept, auxiliary decoder', 'val/rouge_l': 'ROUGE-L', 'val/bigrams': 'shared bigrams',
          'val/ce': 'all tokens'}


def series(rows):
    """{metric: (steps (n,), values (n,) or (n, C))} of the rows of metrics.jsonl; null becomes nan."""
    found = {}
    for row in rows:
        for name, value in row.items():
            if name != 'step' and not isinstance(value, (str, dict)):
                found.setdefault(name, []).append((row['step'], value))
    result = {}
    for name, points in found.items():
        shape = next((np.shape(value) for _, value in points if value is not None), ())
        points = [(step, np.full(shape, np.nan) if value is None else value) for step, value in points]
        points = [(step, value) for step, value in points if np.shape(value) == shape]
        result[name] = np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)
    return result


def trend(ax, title, curves, control={}, log=False, zero=False, lines=(), band=None):
    """One panel: curves {metric: (steps, values)}; values (n, C) are drawn in the colours of the channels. control:
    the same of another run, each thin, dotted, in the colour of its metric."""
    styles = iter([(colour, style) for style in ('-', '--', ':') for colour in SERIES] * 4)
    for name, (steps, values) in curves.items():
        label = LABELS.get(name) or re.sub('^(gap|wins|prior|ce)_', '', name.partition('/')[2]).replace('_', ' ')
        marker = {'marker': '.', 'ms': 4} if name.startswith('val/') else {}
        if values.ndim == 2:
            for c, column in enumerate(values.T):
                ax.plot(steps, column, color=channel_colour(c), lw=1.1, **marker)
            continue
        colour, style = (KINDS[label], '-') if label in KINDS else TERMS.get(label) or next(styles)
        whole = {'color': INK, 'lw': 1.8, 'zorder': 3} if label in WHOLE else {}
        (line,) = ax.plot(steps, values, **{'color': colour, 'ls': style, 'lw': 1.2, 'label': label} | marker | whole)
        if name in control:
            ax.plot(*control[name], color=line.get_color(), ls=':', lw=0.9, alpha=0.8)
    for value in lines:
        gate_line(ax, value, None)
    if band:
        ax.axhspan(*band, color=SHADE, zorder=0)
    if log:
        ax.set_yscale('log', nonpositive='mask')
        bottom, top = ax.get_ylim()
        total = curves.get('train/loss', (None, np.zeros(0)))[1]
        total = total[total > 0]
        if len(total):                            # what is trained stays in sight; a term of weight 0 need not
            bottom, top = max(bottom, 1e-3 * total.min()), min(top, 10 * total.max())
        else:
            bottom = max(bottom, 1e-4 * top)                                  # a term that has gone to 0 may leave
        ax.set_ylim(bottom, top)
        subs = (1, 2, 5) if top / bottom < 2000 else (1,)                     # or their labels touch
        ax.yaxis.set(major_locator=LogLocator(subs=subs), major_formatter='{x:g}', minor_formatter=NullFormatter())
    elif zero:
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    # Title and legend stand above the axes, the one place where no curve can be.
    handles, labels = ax.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    if len(curves) == 1:                                                      # the title names it
        handles, labels = [], []
    ax.legend(handles, labels, title=title, title_fontproperties={'weight': 'bold', 'size': 9.5}, fontsize=7,
              loc='lower left', bbox_to_anchor=(-0.02, 1.0), ncols=4 if longest < 10 else 3 if longest < 16 else 2,
              alignment='left', borderaxespad=0, borderpad=0.2, handlelength=1.1, handletextpad=0.4, columnspacing=0.8,
              labelspacing=0.15)


def small_multiples(found, titles=None, starts={}, control={}):
    """The panels of PANELS (or those with these titles) that have a metric in found (as of `series`) -> a Figure, or
    None. starts: {name: step} of what begins where on the axis of steps; control: as of `trend`."""
    panels = [(title, unit, {name: found[name] for name in found if re.fullmatch(pattern, name)}, how)
              for title, unit, pattern, how in PANELS if titles is None or title in titles]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    rows, last = -(-len(panels) // 3), max(steps.max() for steps, _ in found.values())
    height = 2.4 * rows + 0.9                                                 # axes of 1.5 inches, 0.9 between them
    fig = Figure(figsize=(9, height))
    axes = fig.subplots(rows, 3, squeeze=False, gridspec_kw={
        'left': 0.07, 'right': 0.985, 'top': 1 - 0.8 / height, 'bottom': 1.0 / height, 'wspace': 0.28, 'hspace': 0.6})
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for i, (ax, (title, unit, curves, how)) in enumerate(zip(axes.flat, panels)):
        trend(ax, title, curves, control, **how)
        ax.set_ylabel(unit, fontsize=7, color=GREY, labelpad=2)
        for name, step in starts.items():
            ax.axvline(step, color=FAINT, lw=0.6, zorder=0)
            ax.annotate(name, (step, 1), (2, -2), xycoords=('data', 'axes fraction'), textcoords='offset points',
                        va='top', fontsize=6.5, color=GREY)
        ax.set_xlim(-0.02 * last, max(1.02 * last, 1))
        ax.set_xlabel('step' if i + 3 >= len(panels) else '')
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10), integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=''))                    # 2000 is 2k
    drawn = [values for _, _, curves, _ in panels for _, values in curves.values()]
    channels = max((values.shape[1] for values in drawn if values.ndim == 2), default=0)
    handles = [Line2D([], [], color=channel_colour(c), label=f'channel {c}') for c in range(channels)]
    handles += [Line2D([], [], color=INK, lw=0.8, ls=GATE, label='gate'), Patch(color=SHADE, label='band of the gate')]
    handles += [Line2D([], [], color=INK, lw=0.9, ls=':', label='the same without the prior')] if control else []
    handles += [Line2D([], [], color=INK, lw=0, marker='.', label='held out (the last of a finished run: test scenes)')]
    fig.legend(handles=handles, loc='lower center', ncols=5, columnspacing=1.2, handletextpad=0.5)
    return fig


def trends(folder):
    """Draw metrics.jsonl as small multiples, plots/trends_<last step>.png, beside the control of a run that has one; a
    metric without a panel is left out."""
    found, about = series(read_lines(Path(folder) / 'metrics.jsonl')), Path(folder) / 'run.json'
    control = about.is_file() and read_json(about, ('config',))['config'].get('control')
    if control:                                       # as a rule its neighbour, wherever both have been moved
        beside = Path(folder).parent / Path(control).name
        control = series(read_lines((beside if beside.is_dir() else Path(control)) / 'metrics.jsonl'))
    fig = small_multiples(found, control=control or {})
    last = max((steps.max() for steps, _ in found.values()), default=0)
    return fig and save(fig, Path(folder) / 'plots' / f'trends_{last:06d}.png')


def ablations(folder):
    """ablations.json of p7_ablate.py as ablations.png and ablation_canvases.png, each where there is enough to draw;
    returns their paths."""
    found = read_json(Path(folder) / 'ablations.json', ('names', 'targets', 'drops', 'sides', 'canvases'))
    drops, sides = np.array(found['drops']), np.array(found['sides'])
    drawn = [drops_figure(found['names'], found['targets'], drops, sides) if found['names'] else None,
             statistics_figure(found['canvases'])]
    names = 'ablations.png', 'ablation_canvases.png'
    return [save(fig, Path(folder) / name) for fig, name in zip(drawn, names) if fig]


def drops_figure(names, targets, drops, sides):
    """Drops (ablations, targets) as of p7_ablate.effects, as a heat map whose colour ends at 5, with a mark where
    `sides` is not 0: a dot where every seed is worse than every one of the baseline (1), a ring where every one is
    better (-1)."""
    fig, axes = figure(9, 1.9 + 0.28 * len(names))
    ax = axes[0, 0]
    image = ax.imshow(np.clip(drops, -5, 5), cmap='RdBu_r', vmin=-5, vmax=5, aspect='auto')
    ax.set_yticks(range(len(names)), [f'without {name}' for name in names])
    ax.set_xticks(range(len(targets)), targets, rotation=40, ha='right')
    for side, fill, label in ((1, INK, 'every seed worse'), (-1, 'white', 'every seed better')):
        i, k = np.nonzero(sides == side)
        ax.plot(k, i, 'o', ms=5, mfc=fill, mec='white' if fill == INK else INK, mew=0.8, label=label)
    ax.set_title('What each piece is for')
    ax.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.3)
    fig.colorbar(image, label='worse by (sd of the baseline,\nat least the resolution)', extend='both')
    return fig


def statistics_figure(runs):
    """The statistics of the canvases of each ablation, None if nothing is finite. runs: {name: [metrics of a run, ...]}
    of which alpha and kurtosis (C,), tv_normalised and correlation (C, C) are drawn: a dot a channel and seed, or a
    seed; correlations as a matrix a seed. (Slopes sentence by sentence are in each run's own plots.)"""
    runs = {name: [m for m in metrics if np.isfinite(np.array([*m['alpha'], *m['kurtosis']], float)).all()]
            for name, metrics in runs.items()}      # a null in the log is not finite
    runs = {name: metrics for name, metrics in runs.items() if metrics}
    if not runs:
        return None
    fig, axes = figure(9, 1.5 + 0.34 * len(runs), 1, 4, sharey=True, width_ratios=(3, 3, 3, 1.4))
    panels = (('alpha', 'Slope of the spectrum', 'α\na dot a channel and seed'),
              ('kurtosis', 'Gradient kurtosis', 'kurtosis\ndashed: Gaussian field'),
              ('tv_normalised', 'TV at unit variance', 'a pixel\na dot a seed'))
    for ax, (key, title, unit) in zip(axes[0], panels):
        for row, (name, metrics) in enumerate(runs.items()):
            values = np.concatenate([np.ravel(m[key]) for m in metrics])
            ax.plot(values, np.full(len(values), row), 'o', ms=4, alpha=0.6, mew=0,
                    color=VAL if name == 'baseline' else SERIES[1])
            ax.plot(np.median(values), row, '|', ms=11, color=INK)
        ax.set(title=title, xlabel=unit)
    axes[0, 0].axvspan(*BAND, color=SHADE, zorder=0)
    gate_line(axes[0, 1], 3, 'Gaussian field', horizontal=False)
    axes[0, 0].set_yticks(range(len(runs)), [name if name == 'baseline' else f'without {name}' for name in runs])
    ax = axes[0, 3]
    for row, metrics in enumerate(runs.values()):
        for k, m in enumerate(metrics):
            image = ax.imshow(np.abs(m['correlation']), cmap='Blues', vmin=0, vmax=0.5, aspect='auto',
                              extent=(k + 0.04, k + 0.96, row + 0.45, row - 0.45))
    most = max(map(len, runs.values()))
    ax.set(title='Correlation', xlim=(0, most), ylim=(len(runs) - 0.5, -0.5), xticks=(), xlabel='channels,\nby seed')
    fig.colorbar(image, ax=ax, extend='max', label='magnitude')
    return fig


def canvases(folder):
    """canvases.json of tools/bench.py against the batch, canvases.png: rates, the best of each marked, and memory."""
    rows = read_json(Path(folder) / 'canvases.json')
    fig, axes = figure(9, 2.9, 1, 3, sharex=True)
    panels = (('forward', 'Forward', 'sentences a second'), ('backward', 'Forward, priors and backward',
              'sentences a second'), ('gigabytes', 'Peak memory (dashed: forward)', 'GiB'))
    for ax, (kind, title, unit) in zip(axes[0], panels):
        for (size, channels), colour in zip(sorted({(row['size'], row['channels']) for row in rows}), SERIES):
            curve = np.array([(row['batch'], row[kind]) for row in rows if row['size'] == size]).T
            ax.plot(*curve, 'o-', ms=4, color=colour, label=f'{size}×{size}×{channels}')
            if kind == 'gigabytes':
                ax.plot(curve[0], [row.get('forward_gigabytes', np.nan) for row in rows if row['size'] == size], 'o--',
                        ms=3, color=colour)
            else:
                ax.plot(*curve[:, [curve[1].argmax()]], 'o', ms=9, mfc='none', color=colour)
        ax.set_xscale('log', base=2)
        ax.set_xticks(sorted({row['batch'] for row in rows}), sorted({row['batch'] for row in rows}))
        ax.set_ylim(bottom=0)
        ax.set(title=title, ylabel=unit, xlabel='batch (sentences)')
    axes[0, 0].legend(title='canvas; circle: its best batch')
    return save(fig, Path(folder) / 'canvases.png')


def samples_table(folder, count=12):
    """Draw the first rows of samples.jsonl (input, paraphrase, f1, rouge_l, cosine) as plots/samples.png; P4 writes
    down no paraphrases."""
    samples = [row for row in read_lines(Path(folder) / 'samples.jsonl') if 'paraphrase' in row][:count]
    if not samples:
        return None
    scores = ('f1', 'rouge_l', 'cosine')
    rows = [[row['input'], row['paraphrase'], *(number(row.get(key), '.2f') for key in scores)] for row in samples]
    colours = {(i, 2): FAIL for i, row in enumerate(samples) if row.get('f1') is not None and row['f1'] < 1}
    fig = table('Paraphrases of held-out sentences', ('input', 'paraphrase', 'Graph F1', 'ROUGE-L', 'cosine'), rows,
                (48, 48, 8, 8, 7), colours, 'red: the checker reads another scene, or none' if colours else '')
    return save(fig, Path(folder) / 'plots' / 'samples.png')


def gate_rows(folders, form='.4g'):
    """Rows (phase, criterion, target, measured, baseline, PASS or FAIL) of the gate.json files of run folders; form: of
    the measured numbers."""
    files = [Path(folder) / 'gate.json' for folder in folders]
    found = [read_json(path, ('phase', 'criteria')) for path in files if path.is_file()]
    if not found:
        runtime.fail(f'no gate.json in {", ".join(map(str, folders)) or out}; a phase writes it when it ends')
    return [(gate['phase'], row['name'], row['target'], number(row['measured'], form), row.get('baseline', ''),
             'PASS' if row['pass'] else 'FAIL') for gate in found for row in gate['criteria']]


def gates_over_seeds(chains):
    """The gates of n chains of run folders as aligned text: mean ± standard deviation (n - 1) of each criterion, its
    worst value, and in how many chains it passes. Raises SystemExit(2), after one line, unless all have the same
    criteria."""
    tables = [gate_rows(folders, '.17g') for folders in chains]                        # all digits of a float
    names = [[row[:2] for row in table] for table in tables]
    if any(other != names[0] for other in names):
        runtime.fail(f'{out}: these runs do not have the same criteria; have all of them ended?')
    lines = [('phase', 'criterion', 'target', 'mean ± sd', 'lowest', 'highest', 'passes')]
    for rows in zip(*tables):
        phase, name, target = rows[0][:3]
        values = np.array([float('nan') if row[3] == '–' else float(row[3]) for row in rows])
        passed = sum(row[5] == 'PASS' for row in rows)
        lines.append((phase, name, target if all(row[2] == target for row in rows) else 'differs',
                      f'{values.mean():.3g} ± {values.std(ddof=1):.2g}', f'{values.min():.4g}', f'{values.max():.4g}',
                      f'{passed} of {len(rows)}'))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    whole = [sum(row[5] == 'PASS' for row in table) for table in tables]
    return '\n'.join([*lines, f"criteria that pass, of {len(tables[0])}: {', '.join(map(str, whole))}"])


def gates_figure(folders):
    """Draw the gates of run folders as one table, gates.png beside the folders; returns its path."""
    rows = gate_rows(folders)
    colours = {(i, 5): PASS if row[5] == 'PASS' else FAIL for i, row in enumerate(rows)}
    # A phase is named once, at its first criterion: the eye then finds where the next one starts.
    shown = [('' if i and row[0] == rows[i - 1][0] else row[0], *row[1:]) for i, row in enumerate(rows)]
    passed = sum(row[5] == 'PASS' for row in rows)
    header = ('phase', 'criterion', 'target', 'measured', 'baseline', '')
    fig = table(f'Gates: {passed} of {len(rows)} criteria pass', header, shown, (5, 52, 10, 10, 32, 6), colours)
    return save(fig, Path(folders[0]).parent / 'gates.png')


def gates_text(folders):
    """The same table as aligned text."""
    rows = gate_rows(folders)
    lines = [('phase', 'criterion', 'target', 'measured', 'baseline', ''), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return '\n'.join([*lines, f'{sum(row[5] == "PASS" for row in rows)} of {len(rows)} criteria pass'])


DRAWN_BY = {'ablations.json': ablations, 'canvases.json': canvases}     # figures of their own beside the phases'


def drawable(folder):
    """Whether a run folder holds anything to draw."""
    return bool(stored(folder)) or any((Path(folder) / name).is_file()
                                       for name in ('metrics.jsonl', 'samples.jsonl', *DRAWN_BY))


def redraw(folder):
    """Draw every figure of a run folder again from its files. SystemExit(2), after one line, if it holds none."""
    if not drawable(folder):
        runtime.fail(f'{folder} holds nothing to draw; a phase makes it: python p1_canvas.py --out_dir={folder}')
    if stored(folder):
        draw(stored(folder)[-1])
    trends(folder)
    samples_table(folder)
    for name, figures in DRAWN_BY.items():
        if (Path(folder) / name).is_file():
            figures(folder)


def main():
    chains = [sorted(path for path in Path(folder).glob('p*') if path.is_dir()) for folder in out.split(',')]
    folders = [Path(run)] if run else [folder for chain in chains for folder in chain]
    if gates and len(chains) > 1:
        print(gates_over_seeds(chains))
        return
    if gates:
        gates_figure(folders)
        print(gates_text(folders))
        return
    if not run:
        folders = [folder for folder in folders if drawable(folder)]
    if not folders:
        runtime.fail(f'no run folder with anything to draw in {out}/; a phase makes one: python p1_canvas.py')
    for folder in folders:
        redraw(folder)
        print(f'drew {folder}/plots')


if __name__ == '__main__':
    main()
