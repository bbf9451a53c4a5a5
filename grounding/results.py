"""The table of this folder's README: six experiments x seeds, trained, analysed and put side by side, mean ± sd.

Seed after seed, so that a table that is interrupted is whole up to a seed. A run whose files are all there is not
repeated: the same command goes on where it stopped, and ends in one line where a file was made with other settings or
other digits (delete it, or give another --out). With --table it only prints.
One thread and an idle machine make the training times comparable: OMP_NUM_THREADS=1 python grounding/results.py …

Reads:  the configs, MNIST from data.root
Writes: --out/seedN/<experiment name>*.{pt,json}; without --table --out/results.json
    python grounding/results.py --data_root data/mnist --seeds 0,1,2
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import settings
from latents import read_json

FOLDER = Path(__file__).resolve().parent
CONFIGS = sorted((FOLDER / 'configs').glob('*.yaml'))
TRAINERS = ('train_naive_autoencoder.py', 'train_naive_covnet_autoencoder.py', 'train_naive_covnet_autoencoder.py',
            'train_covnet.py', 'train_covnet.py', 'train_covnet.py')           # of configs 0 to 5
COLUMNS = {'parameters': 0, 'kNN accuracy': 4, 'manifold score': 3, 'trustworthiness': 3, 'continuity': 3,
           'neighborhood hit': 3, 'silhouette': 3, 'interpolation': 3, 'intrinsic dimension': 1,
           'steps': 0, 'seconds': 0, 'CPU-seconds': 0}                         # column -> decimals
PARTS = ('manifold_score', 'trustworthiness', 'continuity', 'neighborhood_hit', 'silhouette',
         'interpolation_smoothness', 'intrinsic_dimension')
AIM = 0.96              # kNN accuracy of experiment 1


def numbers(text):
    """argparse type: '0,1,2' -> [0, 1, 2]."""
    try:
        found = [int(number) for number in text.split(',')]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list such as 0,1,2')
    return found


def run(config, trainer, seed, args):
    """Train and analyse one experiment with one seed, each script in its own process.

    Returns {'latent', 'raw pixels', 'PCA': {column: value}, 'data': what data it saw, 'train digits', 'made on'}, or
    None when --table forbids to make what is missing.
    """
    name = settings.load_yaml(config)['experiment']['name']
    folder = Path(args.out) / f'seed{seed}'
    paths = {'checkpoint_path': folder / f'{name}.pt', 'report_path': folder / f'{name}_training.json',
             'analysis_path': folder / f'{name}_analysis.json',
             'manifold_analysis_path': folder / f'{name}_manifold_metrics.json'}
    overrides = [*args.set, f'experiment.seed={seed}', 'output.save_every_n_epochs=0',
                 *(f'output.{key}={json.dumps(str(path))}' for key, path in paths.items())]
    common = ['--config', config, *(word for text in overrides for word in ('--set', text))]
    if args.data_root:
        common += ['--data_root', args.data_root]
    asked = settings.load_config(settings.parser('').parse_args(common))
    for script, product in ((trainer, 'checkpoint_path'), ('analyze_autoencoder.py', 'analysis_path'),
                            ('analyze_manifold.py', 'manifold_analysis_path')):
        if paths[product].exists():
            continue
        if args.table:
            return None
        print(f'== {script} {Path(config).name} seed {seed}', flush=True)
        status = subprocess.run([sys.executable, FOLDER / script, *common]).returncode
        if status:
            raise SystemExit(status)       # the step has said why
    training = read_json(paths['report_path'], trainer)
    if training['config'] != asked:
        settings.fail(f'{paths["report_path"]} was made with other settings; delete {folder}/{name}*, or give '
                      'another --out')
    analysis = read_json(paths['analysis_path'], 'analyze_autoencoder.py')
    manifold = read_json(paths['manifold_analysis_path'], 'analyze_manifold.py')
    if not training['data'] == analysis['data'] == manifold['data']:
        settings.fail(f'{folder}: the files of {name} saw different digits; delete them, or give another --out')
    accuracy = {space: r['knn_accuracy'] for space, r in analysis['spaces'].items()}
    measures = {'latent': manifold} | manifold['baselines']
    rows = {space: dict(zip(COLUMNS, (None, accuracy[space], *(measures[space][part] for part in PARTS),
                                      None, None, None)))
            for space in accuracy}
    rows['latent'] |= {'parameters': training['parameters']['total'], 'steps': training['steps'],
                       'seconds': training['seconds'], 'CPU-seconds': training['cpu_seconds']}
    return rows | {'data': training['data'], 'train digits': training['train_digits'],
                   'made on': {key: training[key] for key in ('device', 'threads', 'torch')}}


def cell(values, decimals):
    """'mean ± sd' of the seeds' values; one number where they agree; a dash where one is missing."""
    if None in values:
        return '–'
    mean, sd = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f'{mean:,.{decimals}f}' + (f' ± {sd:,.{decimals}f}' if sd else '')


def table(found):
    """Lines of Markdown; found: {config stem: {seed: what run() returns}}. Baselines that are the same digits in the
    same space are printed once, before the experiments that they belong to."""
    lines = ['| experiment | seeds | ' + ' | '.join(COLUMNS) + ' |', '|---|' + '---|' * (len(COLUMNS) + 1)]
    printed = set()
    for stem, by_seed in found.items():
        for space in ('raw pixels', 'PCA', 'latent'):
            cells = [cell([rows[space][c] for rows in by_seed.values()], decimals) for c, decimals in COLUMNS.items()]
            key = (space, *cells, *by_seed)
            if key in printed:
                continue
            printed.add(key)
            digits = next(iter(by_seed.values()))['train digits']
            title = f'**{stem}**' if space == 'latent' else f'{space}, {digits:,} digits'
            lines.append(f'| {title} | {len(by_seed)} | ' + ' | '.join(cells) + ' |')
    return lines


def aims(found):
    """Lines that say PASS or FAIL for what the experiments are expected to show, as means over the seeds they share."""
    def mean(number, space='latent', seeds=None):
        by_seed = found[CONFIGS[number].stem]
        return float(np.mean([by_seed[seed][space]['kNN accuracy'] for seed in seeds or by_seed]))

    def line(passed, text):
        return f'- {"PASS" if passed else "FAIL"}: {text}'

    lines, here = [], [n for n, path in enumerate(CONFIGS) if path.stem in found]
    if 1 in here:
        value, pixels, pca = (mean(1, space) for space in ('latent', 'raw pixels', 'PCA'))
        lines += [line(value >= AIM, f'experiment 1, kNN accuracy {value:.4f}; at least {AIM:.2f}'),
                  line(value > pixels, f'experiment 1, kNN accuracy {value:.4f}; raw pixels {pixels:.4f}'),
                  line(value > pca, f'experiment 1, kNN accuracy {value:.4f}; PCA {pca:.4f}')]
    for n in (4, 5):
        if 2 in here and n in here:
            shared = sorted(set(found[CONFIGS[2].stem]) & set(found[CONFIGS[n].stem]))
            if shared:
                ours, plain = mean(n, seeds=shared), mean(2, seeds=shared)
                lines.append(line(ours > plain, f'experiment {n}, kNN accuracy {ours:.4f}; experiment 2 {plain:.4f} '
                                                f'(n = {len(shared)})'))
    return lines


def main():
    p = settings.Parser(__doc__)
    p.add_argument('--data_root', help='folder of the four MNIST files, instead of data.root')
    p.add_argument('--seeds', type=numbers, default=[0, 1, 2], help='0,1,2')
    p.add_argument('--experiments', type=numbers, default=list(range(len(CONFIGS))), help='0,1,2,3,4,5')
    p.add_argument('--out', default='artifacts/results')
    p.add_argument('--table', action='store_true', help='train nothing: the table of what is there')
    p.add_argument('--set', action='append', default=[], metavar='SECTION.KEY=VALUE', help='for every experiment')
    args = p.parse_args()
    if max(args.experiments) >= len(CONFIGS):
        settings.fail(f'--experiments {max(args.experiments)}: they are numbered 0 to {len(CONFIGS) - 1}')
    chosen = sorted(set(args.experiments))
    found = {CONFIGS[n].stem: {} for n in chosen}
    for seed in args.seeds:
        for n in chosen:
            rows = run(str(CONFIGS[n]), TRAINERS[n], seed, args)
            if rows:
                found[CONFIGS[n].stem][seed] = rows
    found = {stem: by_seed for stem, by_seed in found.items() if by_seed}
    if not found:
        settings.fail(f'--out {args.out}: no finished run is there; leave --table away to train')
    sources = {}                                # which data, in words -> the experiments that saw it
    for stem, by_seed in found.items():
        for rows in by_seed.values():
            sources.setdefault(rows['data'], set()).add(stem[0])
    lines = ['; '.join(f'{source} (experiments {", ".join(sorted(which))})' for source, which in sources.items()),
             'mean ± sd over the seeds', '', *table(found), '', *aims(found)]
    print('\n'.join(lines))
    if args.table:
        return
    settings.write_json(Path(args.out) / 'results.json', {
        'lines': lines, 'runs': found, 'python': platform.python_version(), 'cores': os.cpu_count(),
        'machine': platform.machine()})


if __name__ == '__main__':
    main()
