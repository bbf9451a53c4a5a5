"""The table of this folder's README: six experiments x seeds, trained, analysed and put side by side, mean ± sd.

A run whose files are all there is not repeated, so a table that was interrupted goes on; delete --out to start anew.

Reads:  the configs, MNIST from data.root
Writes: --out/seedN/<experiment name>*.{pt,json}, --out/results.json
    python grounding/results.py --data_root data/mnist --seeds 0,1,2
"""
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
COLUMNS = {'parameters': 0, 'kNN accuracy': 3, 'raw pixels': 3, 'PCA': 3, 'manifold score': 3, 'trustworthiness': 3,
           'continuity': 3, 'neighborhood hit': 3, 'silhouette': 3, 'interpolation': 3, 'dimension': 1,
           'training, s': 0}                                                   # column -> decimals


def seeds(text):
    """argparse type: '0,1,2' -> [0, 1, 2]."""
    return [int(seed) for seed in text.split(',')]


def run(config, trainer, seed, args):
    """Train and analyse one experiment with one seed, each script in its own process; returns (source, row)."""
    name = settings.load_yaml(config)['experiment']['name']
    folder = Path(args.out) / f'seed{seed}'
    paths = {'checkpoint_path': folder / f'{name}.pt', 'report_path': folder / f'{name}_training.json',
             'analysis_path': folder / f'{name}_analysis.json',
             'manifold_analysis_path': folder / f'{name}_manifold_metrics.json'}
    overrides = [*args.set, f'experiment.seed={seed}', 'output.save_every_n_epochs=0',
                 *(f'output.{key}={path}' for key, path in paths.items())]
    common = ['--config', config, *(word for text in overrides for word in ('--set', text))]
    if args.data_root:
        common += ['--data_root', args.data_root]
    for script, product in ((trainer, 'checkpoint_path'), ('analyze_autoencoder.py', 'analysis_path'),
                            ('analyze_manifold.py', 'manifold_analysis_path')):
        if not paths[product].exists():
            print(f'== {script} {Path(config).name} seed {seed}', flush=True)
            status = subprocess.run([sys.executable, FOLDER / script, *common]).returncode
            if status:
                raise SystemExit(status)       # the step has said why
    training = read_json(paths['report_path'], trainer)
    analysis = read_json(paths['analysis_path'], 'analyze_autoencoder.py')
    manifold = read_json(paths['manifold_analysis_path'], 'analyze_manifold.py')
    accuracy = {space.split('-')[0]: r['knn_accuracy'] for space, r in analysis['spaces'].items()}
    return training['data'], dict(zip(COLUMNS, (
        training['parameters']['total'], accuracy['latent'], accuracy['raw pixels'], accuracy['PCA'],
        *(manifold[key] for key in ('manifold_score', 'trustworthiness', 'continuity', 'neighborhood_hit', 'silhouette',
                                    'interpolation_smoothness', 'intrinsic_dimension')), training['seconds'])))


def cell(values, decimals):
    """'mean ± sd' of the seeds' values; one number where they agree; a dash where one is missing."""
    if None in values:
        return '–'
    mean, sd = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f'{mean:,.{decimals}f}' + (f' ± {sd:,.{decimals}f}' if sd else '')


def main():
    p = settings.Parser(__doc__)
    p.add_argument('--data_root', help='folder of the four MNIST files, instead of data.root')
    p.add_argument('--seeds', type=seeds, default=[0, 1, 2], help='0,1,2')
    p.add_argument('--out', default='artifacts/results')
    p.add_argument('--set', action='append', default=[], metavar='SECTION.KEY=VALUE', help='for every experiment')
    args = p.parse_args()
    table, sources = {}, {}
    for config, trainer in zip(CONFIGS, TRAINERS):
        rows = []
        for seed in args.seeds:
            source, row = run(str(config), trainer, seed, args)
            sources.setdefault(source, []).append(config.name[0])
            rows.append(row)
        table[config.stem] = {column: [row[column] for row in rows] for column in COLUMNS}
    lines = ['; '.join(f'{source} (experiments {", ".join(sorted(set(e)))})' for source, e in sources.items()),
             f'seeds {", ".join(map(str, args.seeds))}; mean ± sd', '',
             '| experiment | ' + ' | '.join(COLUMNS) + ' |', '|---|' + '---|' * len(COLUMNS)]
    lines += [f'| {stem} | ' + ' | '.join(cell(values[c], decimals) for c, decimals in COLUMNS.items()) + ' |'
              for stem, values in table.items()]
    print('\n'.join(lines))
    settings.write_json(Path(args.out) / 'results.json', {'data': sources, 'seeds': args.seeds, 'table': table})


if __name__ == '__main__':
    main()
