"""Take the devices away, one at a time (one is added): runs of run.py over seeds, in one table.

An ablation is an override of run.py, so each is run as an ordinary command line in a folder of its own. A finished run
is never repeated and an unfinished one goes on, so the same command may be stopped and started again. All runs of the
table share their stimuli; seeds differ in weights, batches and chains. The devices are in the joint model alone, so the
runs of a seed take the image DBN and the text RBM of its first run.

Reads:  nothing (it runs run.py)      Writes: out_dir/<ablation>/seed<k>/, ablations.md, ablations.json
    python -m groundeep.ablate --dry_run=true
    python -m groundeep.ablate --seeds=3
    python -m groundeep.ablate --override='--joint_epochs=20 --image_epochs=20'
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

import runtime

out_dir = 'out/groundeep/ablate'
seeds = 3                 # runs of each ablation, seeds 0, 1, ...
only = ''                 # ablations separated by commas; '' is all. The baseline is always there.
override = ''             # words for run.py that every run gets
dry_run = False           # list the commands, run nothing
config = runtime.configure(globals())

# After half of the joint epochs every other batch is free: collapse mitigation acts there.
FREE_PHASE = '--clamp_share=0.5'
ABLATIONS = {
    'default': '',
    'no balancing': '--balance=false',
    'no clamping': '--warmup=false',
    'no enumeration of texts': '--enumeration=false',
    'no hot Gibbs': '--hot_gibbs=false',
    'a free phase': FREE_PHASE,
    'a free phase without mitigation': f'{FREE_PHASE} --mitigation=false',
    'with gain control': '--gain=true',
    'none of them': '--balance=false --warmup=false --enumeration=false --hot_gibbs=false --mitigation=false',
    'all of them': f'{FREE_PHASE} --gain=true'}

# Columns: label, how to read it from results.json.
COLUMNS = {
    'named by chain': lambda r: r['img_to_txt']['chain']['exact'],
    'named by free energy': lambda r: r['img_to_txt']['energy']['exact'],
    'drawn, counter': lambda r: r['txt_to_img']['counter_exact'],
    'drawn, classifier': lambda r: r['txt_to_img']['classifier_exact'],
    'distinct': lambda r: r['txt_to_img']['distinct'],
    'distance': lambda r: r['txt_to_img']['distance'],
    'RSA log n, joint': lambda r: r['rsa']['joint']['log number']['rho'],
    'RSA overlap, joint': lambda r: r['rsa']['joint']['overlap']['rho'],
    'Weber, joint': lambda r: r['readout']['joint']['weber'],
    'alignment': lambda r: r['alignment']}


def command(name, seed):
    """The words of one run, and its folder."""
    folder, first = (Path(out_dir) / each.replace(' ', '_').replace(',', '') / f'seed{seed}'
                     for each in (name, 'default'))
    words = [sys.executable, '-m', 'groundeep.run', f'--out_dir={folder}', f'--seed={seed}',
             *shlex.split(override), *shlex.split(ABLATIONS[name])]
    if folder != first:
        words.append(f"--unimodal={first / 'ckpt.pt'}")
    return words, folder


def summary(results):
    """Markdown of {ablation: [results of its seeds]}: mean ± standard deviation (n - 1) of each column."""
    lines = ['| | ' + ' | '.join(COLUMNS) + ' | n |', '|---' * (len(COLUMNS) + 2) + '|']
    for name, found in results.items():
        cells = []
        for read in COLUMNS.values():
            values = np.array([np.nan if read(r) is None else read(r) for r in found], dtype=float)
            cells.append(f'{values.mean():.3f}' + (f' ± {values.std(ddof=1):.3f}' if len(values) > 1 else ''))
        lines.append(f"| {name} | {' | '.join(cells)} | {len(found)} |")
    return '\n'.join(lines)


def main():
    names = [name.strip() for name in only.split(',') if name.strip()]
    for name in names:
        if name not in ABLATIONS:
            runtime.fail(f'--only={only}: {name!r} is none of {", ".join(ABLATIONS)}')
    if seeds < 1:
        runtime.fail(f'--seeds={seeds}: expects at least 1')
    names = [name for name in ABLATIONS if not names or name in names or name == 'default']
    results = {name: [] for name in names}
    # Seed by seed, so that a table that is stopped early holds as many runs of one ablation as of another.
    for seed in range(seeds):
        for name in names:
            words, folder = command(name, seed)
            if dry_run:
                print(shlex.join(words[1:]))
                continue
            done = folder / 'results.json'
            if not done.is_file():
                print(f'{name}, seed {seed}', flush=True)
                resume = ['--resume=true'] if (folder / 'ckpt.pt').is_file() else []
                status = subprocess.run([*words, *resume]).returncode
                if status:
                    runtime.fail(f'{name}, seed {seed}: run.py ended with status {status}', status=status)
            results[name].append(json.loads(done.read_text(encoding='utf-8')))
    if dry_run:
        return
    text = summary(results)
    for path, content in (('ablations.md', text), ('ablations.json', json.dumps(
            {name: [{label: read(r) for label, read in COLUMNS.items()} for r in found]
             for name, found in results.items()}, indent=2))):
        temporary = Path(out_dir) / (path + '.tmp')
        temporary.write_text(content + '\n', encoding='utf-8')
        os.replace(temporary, Path(out_dir) / path)
    print(text)


if __name__ == '__main__':
    main()
