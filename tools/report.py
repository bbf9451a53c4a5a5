"""One HTML file about a chain of runs: gates, the plan's four dashboards, what the diffusion prior of P6 does, learning
curves, provenance.

Everything comes from the run folders; the figures are inside the file, so it can be sent or put on a server as it is.

Reads:  out/pN/{run,gate}.json, metrics.jsonl, samples.jsonl, plots/*.png; out/p7/ablation*.png, out/bench/canvases.png
Writes: out/report.html
    python -m tools.report --out=out
"""
import base64
import io
import os
import shlex
from html import escape
from pathlib import Path

import numpy as np

import plot
import runtime
from p6_diffusion import QUARTERS

out = 'out'               # the folder that holds the run folders of one chain
config = runtime.configure(globals())

# The plan's "Dashboards to keep open": heading, what to look for, panels of plot.PANELS, figures of an evaluation.
DASHBOARDS = (
    ('Latent health', 'Is the canvas a picture? Slopes in the band, TV flat, gradients with heavy tails, channels '
     'apart, and a picture that depends on the sentence.',
     ('Spectral slope α', 'Spectral slope α, Hann window', 'Total variation', 'Channel standard deviation',
      'Gradient kurtosis', 'Variance due to the sentence', 'Channel correlation', 'Lattice energy'),
     ('slopes', 'gradients', 'spectra', 'correlation')),
    ('Semantics', 'Do paraphrases lie together, and does a sentence that says one thing differently lie apart?',
     ('Retrieval of paraphrases', 'Cosine gap to counterfactuals', 'Counterfactuals beaten', 'Cosine after jitter',
      'Distance of paraphrases'), ('tsne', 'shift')),
    ('Decoder', 'Is the sentence read back, and said in other words, or copied?',
     ('Content tokens read right', 'Cross-entropy by type of token', 'CE rise when the canvas is shuffled', 'Graph F1',
      'Overlap with the input', 'Round-trip cosine'),
     ('token_types', 'controls')),
    ('Qualitative', 'Smooth blobs and edges, no dots and no checkerboard; words that look at few places.', (),
     ('montage', 'attention', 'drawn')))
CAPTIONS = {
    'slopes': 'slope of each canvas', 'gradients': 'gradients of the canvases', 'spectra': 'spectra by channel',
    'correlation': 'correlation of the channels', 'tsne': 'the meaning of held-out sentences',
    'shift': 'meaning under jitter', 'token_types': 'cross-entropy by type of token',
    'controls': 'decoders that see less', 'montage': 'sixteen fixed sentences, channel by channel',
    'attention': 'where the decoder looks', 'drawn': 'canvases drawn from noise by the diffusion prior'}
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 3rem 1.5rem 5rem; color: #1c1c20; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 3.5rem 0 .3rem; }
p, figcaption, summary { color: #5c5b62; } p { margin: 0 0 1rem; max-width: 44rem; }
figure { display: inline-block; vertical-align: top; margin: 1.2rem .5rem 1.2rem 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; } figcaption { font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .wide + p { margin-top: 1.6rem; } th { text-align: left; font-weight: 500; color: #5c5b62; }
td.number { white-space: nowrap; } code span { white-space: nowrap; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e6e4de; vertical-align: top; }
.pass { color: #117733; font-weight: 600; } .fail { color: #c0392b; font-weight: 600; }
tr.fails td { background: #fdf1ef; } tbody tr.first td { border-top: 1.5px solid #8a8a8a; }
nav { margin: 1.2rem 0; } nav a { color: #1f4e79; margin-right: 1.1rem; } summary { cursor: pointer; margin: .5rem 0; }
code { font-size: .8rem; }
"""


def image(content, caption):
    """A figure element with a PNG (bytes) inside, all text in it at one size: narrow ones stand side by side."""
    width = int.from_bytes(content[16:20], 'big') * 90 // plot.DPI
    encoded = base64.b64encode(content).decode()
    return (f'<figure><img alt="{escape(caption)}" width="{width}" src="data:image/png;base64,{encoded}">'
            f'<figcaption>{escape(caption)}</figcaption></figure>\n')


def png(fig):
    """The bytes of a Figure."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format='png')
    return buffer.getvalue()


def newest(folders, name):
    """(phase, path) of the figure of the latest step of the latest phase that has it, or None."""
    figures = [(folder.name, path) for folder in folders for path in plot.numbered(folder, name)]
    return figures[-1] if figures else None


def joined(folders):
    """The metrics of all runs one after the other -> ({metric: (steps, values)}, {phase: step it starts at}). A gap
    keeps apart what two phases measured."""
    parts, starts, offset = {}, {}, 0
    for folder in folders:
        curves = plot.series(plot.read_lines(folder / 'metrics.jsonl'))
        if not curves:
            continue
        starts[folder.name] = offset
        for name, (steps, values) in curves.items():
            gap = np.full((1, *values.shape[1:]), np.nan)
            if name not in parts or parts[name][0][1].shape[1:] == values.shape[1:]:
                parts.setdefault(name, []).extend([(steps + offset, values), (steps[-1:] + offset, gap)])
        offset += max(int(steps.max()) for steps, _ in curves.values())
    return {name: tuple(map(np.concatenate, zip(*pieces))) for name, pieces in parts.items()}, starts


def table(header, rows, classes=None):
    """A table element; cells are HTML already. classes: one a row."""
    head = ''.join(f'<th>{cell}</th>' for cell in header)
    body = ''.join(f'<tr class="{kind}">' + ''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>'
                                                    for cell in row) + '</tr>\n'
                   for row, kind in zip(rows, classes or [''] * len(rows)))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def gates(folders):
    """(summary, HTML) of every criterion."""
    if not any((folder / 'gate.json').is_file() for folder in folders):
        return 'no gate yet: a phase writes it when it ends', ''
    rows = plot.gate_rows(folders)
    fails = sum(row[5] == 'FAIL' for row in rows)
    first = [i == 0 or rows[i - 1][0] != row[0] for i, row in enumerate(rows)]
    cells = [(escape(phase.upper()) if new else '', escape(name), f'<td class="number">{escape(target)}</td>',
              escape(measured), escape(baseline), f'<span class="{verdict.lower()}">{verdict}</span>')
             for new, (phase, name, target, measured, baseline, verdict) in zip(first, rows)]
    classes = [' '.join(('first' * new, 'fails' * (row[5] == 'FAIL'))).strip() for new, row in zip(first, rows)]
    phases = {row[0]: [other[5] == 'PASS' for other in rows if other[0] == row[0]] for row in rows}
    each = ', '.join(f'{phase.upper()} {sum(passed)} of {len(passed)}' for phase, passed in phases.items())
    return (f'{len(rows) - fails} of {len(rows)} criteria pass' + (f', {fails} FAIL' if fails else '') + f' ({each})',
            table(('', 'criterion', 'target', 'measured', 'baseline', ''), cells, classes))


def dashboard(folders, text, panels, figures, curves, starts):
    """The HTML of one of the plan's dashboards."""
    fig = plot.small_multiples(curves, panels, starts) if panels else None
    html = f'<p>{escape(text)}</p>\n' + (image(png(fig), 'held-out data, all phases') if fig else '')
    for name in figures:
        latest = newest(folders, name)
        if latest:
            caption = f'{latest[0].upper()}: {CAPTIONS[name]}, step {plot.step_of(latest[1])}'
            html += image(latest[1].read_bytes(), caption)
    return html


def is_control(folder):
    """Whether a run folder is of P6 without its prior: it has metrics, but is no link of the chain."""
    about = Path(folder) / 'run.json'
    facts = plot.read_json(about) if about.is_file() else {}
    return facts.get('phase') == 'p6' and not facts['config']['lambda_prior']


def last_evaluation(folder):
    """The held-out metrics of the last evaluation in a run folder, {name: value}; {} without."""
    rows = [row for row in plot.read_lines(folder / 'metrics.jsonl') if any(key.startswith('val/') for key in row)]
    return {key.removeprefix('val/'): value for key, value in rows[-1].items()} if rows else {}


COMPARED = {'prior_spectrum': 'spectrum prior', 'prior_tv': 'TV', 'prior': 'weighted sum of all priors',
            'paraphrase_distance': 'distance of paraphrases', 'r1': 'R@1', 'r5': 'R@5',
            'r1_hard': 'R@1 with own counterfactuals in the pool'}


def cell(value, form):
    """A number as text, of several channels their mean; a dash where it is not there or was not finite."""
    values = value if isinstance(value, list) else [value]
    return '–' if None in values else plot.number(sum(values) / len(values), form)


def prior_tables(metrics):
    """The U-Net's loss by quarter of t beside a Wiener filter's, and canvases drawn from it beside painted ones."""
    losses = [(quarter, *(cell(metrics.get(f'{kind}_{quarter}'), '.4f') for kind in ('diffusion', 'wiener')))
              for quarter in QUARTERS]
    kinds = {'drawn': 'drawn from noise', 'painted': 'painted from sentences', 'phases': 'painted, with random phases'}
    columns = {'parsed': '.3f', 'distinct': '.3f', 'alpha': '.2f', 'tv': '.3f', 'kurtosis': '.1f', 'lattice': '.2f'}
    rows = []
    for kind, label in kinds.items():
        values = {name: metrics.get(f'{kind}_{name}') for name in columns}
        if values['kurtosis'] and None not in values['kurtosis']:
            values['kurtosis'] = min(values['kurtosis'])
        rows.append((label, *(cell(values[name], form) for name, form in columns.items())))
    return ('<p>How well the U-Net takes noise off held-out canvases: where its loss is below that of the Wiener '
            'filter, it knows more of them than their spectrum.</p>\n'
            + table(('noise level', 'diffusion loss', 'Wiener filter'), losses)
            + '<p>What the decoder reads in canvases, and their statistics: mean slope, kurtosis of the lowest channel.'
            '</p>\n' + table(('canvases', 'parsed', 'distinct', 'slope', 'TV', 'kurtosis', 'lattice'), rows))


COMPARED = {'prior_spectrum': 'spectrum prior', 'prior_tv': 'TV', 'prior': 'weighted sum of all priors',
            'paraphrase_distance': 'distance of paraphrases', 'r1': 'R@1', 'r5': 'R@5',
            'r1_hard': 'R@1 with own counterfactuals in the pool'}


def control_table(folder, before):
    """The test scenes at the end of P5, of P6 and, if it has one, of its control. folder: of P6, before: of P5."""
    runs = {'before': last_evaluation(before), 'with the prior': last_evaluation(folder)}
    about = folder / 'run.json'
    control = about.is_file() and plot.read_json(about, ('config',))['config'].get('control')
    if control:                                       # as a rule its neighbour, wherever both have been moved
        beside = folder.parent / Path(control).name
        runs['without'] = last_evaluation(beside if beside.is_dir() else Path(control))
    names = COMPARED | {name: f'gap, {name[4:]}' for name in runs['with the prior'] if name.startswith('gap_')}
    rows = [(escape(label), *(cell(metrics.get(name), '.3f') for metrics in runs.values()))
            for name, label in names.items()]
    compared = 'and of its control, the same steps without the prior' if control else '; it has no control'
    return (f'<p>Held-out scenes at the end of P5, of P6 {compared}.</p>\n' + table(('test scenes', *runs), rows))


def diffusion_prior(folders):
    """The HTML of what the diffusion prior of P6 does; '' without one that was measured."""
    chain = {folder.name: folder for folder in folders}
    metrics = last_evaluation(chain['p6']) if 'p6' in chain else {}
    html = prior_tables(metrics) if f'diffusion_{QUARTERS[0]}' in metrics else ''
    if 'r1' in metrics and 'p5' in chain:                                     # not while the U-Net learns alone
        html += control_table(chain['p6'], chain['p5'])
    return html


def samples(folders, count=16):
    """The first paraphrases that the last phase which has any wrote down; '' without."""
    for folder in reversed(folders):
        rows = [row for row in plot.read_lines(folder / 'samples.jsonl') if 'paraphrase' in row][:count]
        if rows:
            scores = 'f1', 'rouge_l', 'cosine'
            cells = [(escape(row['input']), escape(row['paraphrase']),
                      *(plot.number(row.get(score), '.2f') for score in scores)) for row in rows]
            kinds = ['fails' if row.get('f1') is not None and row['f1'] < 1 else '' for row in rows]
            return (f'<p>The first {len(rows)} held-out sentences of {folder.name.upper()} and what it says; shaded: '
                    'the checker reads another scene, or none.</p>\n'
                    + table(('input', 'paraphrase', 'Graph F1', 'ROUGE-L', 'cosine'), cells, kinds))
    return ''


def provenance(folders):
    """What each run was: command, commit, machine, versions."""
    rows, commands = [], ''
    for folder in folders:
        if (folder / 'run.json').is_file():
            about = plot.read_json(folder / 'run.json', (
                'versions', 'started', 'config', 'hardware', 'dtype', 'world', 'argv'))
            commit = about.get('commit') or 'not under git'
            versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
            rows.append([escape(str(cell)) for cell in (
                folder.name.upper(), about['started'][:16].replace('T', ' '), about['config'].get('seed', ''),
                commit[:12] + ('-dirty' if commit.endswith('dirty') else ''), about['hardware'],
                f"{about['dtype'].removeprefix('torch.')}, {about['world']} process(es)", versions)])
            words = ' '.join(f'<span>{escape(shlex.quote(word))}</span>' for word in ('python', *about['argv']))
            commands += f'<p><code>{words}</code></p>\n'
    return table(('', 'started', 'seed', 'commit', 'hardware', 'ran as', 'versions'), rows) + commands


def write(folders):
    """Write report.html beside run folders (one chain, in order) -> its path."""
    folders = [Path(folder) for folder in folders]
    all_curves, starts = joined(folders)
    summary, gate_table = gates(folders)
    sections = {'Gates': gate_table}
    for heading, text, panels, figures in DASHBOARDS:
        sections[heading] = dashboard(folders, text, panels, figures, all_curves, starts)
    montages = [(folder.name.upper(), latest) for folder in folders if (latest := newest([folder], 'montage'))]
    sections['Qualitative'] += ''.join(
        f'<details><summary>{name}: the sixteen sentences as this phase left them</summary>'
        f'{image(latest[1].read_bytes(), name)}</details>\n' for name, latest in montages[:-1]) + samples(folders)
    if prior := diffusion_prior(folders):
        sections['Diffusion prior'] = prior
    curves = [(folder.name.upper(), newest([folder], 'trends')) for folder in folders]
    sections['Learning curves'] = ''.join(f'<details open><summary>{name}: every term and metric by step</summary>'
                                          f'{image(latest[1].read_bytes(), name)}</details>\n'
                                          for name, latest in curves if latest)
    for name, caption in (('ablations', 'what gets worse without each piece; a dot: in every seed; a ring: better'),
                          ('ablation_canvases', 'the canvases without each piece, in numbers')):
        for path in (folder / f'{name}.png' for folder in folders):
            if path.is_file():
                sections['Ablations'] = sections.get('Ablations', '') + image(path.read_bytes(), caption)
    throughput = folders[0].parent / 'bench/canvases.png'
    if throughput.is_file():
        sections['Throughput'] = image(throughput.read_bytes(), 'the full-size encoder, two sizes of the canvas')
    sections['Provenance'] = provenance(folders)
    anchors = {heading: heading.lower().replace(' ', '-') for heading in sections}
    links = ' '.join(f'<a href="#{anchor}">{heading}</a>' for heading, anchor in anchors.items())
    body = ''.join(f'<h2 id="{anchors[heading]}">{heading}</h2>\n{html}' for heading, html in sections.items())
    page = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Text, picture, text: report</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>'
            f'<h1>Text → picture → text</h1>\n<p>{summary}.</p>\n'
            f'<nav>{links}</nav>\n{body}</body></html>\n')
    path = folders[0].parent / 'report.html'
    temporary = path.with_suffix('.tmp')
    temporary.write_text(page, encoding='utf-8')
    os.replace(temporary, path)
    return path


def main():
    if ',' in out and not Path(out).is_dir():
        runtime.fail(f'--out={out}: a report is of one chain, so this is one folder')
    folders = sorted(path for path in Path(out).glob('p*') if path.is_dir())
    folders = [folder for folder in folders
               if (plot.drawable(folder) or (folder / 'gate.json').is_file()) and not is_control(folder)]
    if not folders:
        runtime.fail(f'no run folder with anything to draw in {out}/; a phase makes one: python p1_canvas.py')
    print(f'wrote {write(folders)}')


if __name__ == '__main__':
    main()
