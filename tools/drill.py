"""Fault drill: kill -9 at random moments of every phase, resume, and compare with the run that nobody disturbed.

Each kill hits a tiny run of one phase (the sizes of runs/smoke.sh, a checkpoint every fourth step), of P2 on two ranks,
all of whose processes it takes, or of P1 until it has prepared a corpus from a file. Its moment is drawn evenly over
the time that the undisturbed run took, importing and drawing of figures included; every third run is killed a second
time while it resumes; what had ended before its moment is no kill. What must hold: every file in the folder can be
read; and after --resume=true the final weights, averages, optimizer state and random state are those of the undisturbed
run, bit for bit, and so are the log and the gate.

Writes: out_dir/straight/, out_dir/killed<i>/ (removed when all is well); exits with 1 if anything differs
    python -m tools.drill --kills=50
"""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import plot
import runtime
from runs.presets import PRESETS
from tools.launch import SCRIPTS

out_dir = 'out/drill'
kills = 50                # over all cases
cases = 'p1,p2,p3,p4,p5,p6,ranks,corpus'
seed = 0                  # of the cases and moments
config = runtime.configure(globals())

ROOT = Path(__file__).resolve().parents[1]
PHASE = {phase: phase for phase in SCRIPTS} | {'ranks': 'p2', 'corpus': 'p1'}      # of each case
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
CORPUS, LINES = 'drill_corpus', 200_000
STATE = 'step', 'arch', 'nets', 'ema', 'optimizer', 'rng', 'metrics', 'history', 'origins', 'state'


def command(case, folder):
    """The command line of a phase that starts from the undisturbed phase before it."""
    phase = PHASE[case]
    before = [f'--init_from={out_dir}/straight/p{int(phase[1]) - 1}/ckpt.pt'] if phase != 'p1' else []
    return [sys.executable, *(TORCHRUN if case == 'ranks' else []), str(ROOT / SCRIPTS[phase]),
            *PRESETS['smoke'][phase].split(), *before, f'--out_dir={folder}', '--max_steps=8', '--lr_steps=8',
            '--eval_every=4', '--resume=true', *(['--unet_steps=2'] if phase == 'p6' else []),
            *([f'--corpus={out_dir}/{CORPUS}.txt'] if case == 'corpus' else [])]


def with_children(pid):
    """A process and all that it has started (Linux)."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:                                        # it has ended
        children = []
    return [pid, *(one for child in children for one in with_children(int(child)))]


def run(words, seconds=None):
    """Run a command to its end, or kill it after so many seconds -> (exit status, what it said last)."""
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for pid in with_children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = process.communicate()[0]
    return process.returncode, (said.strip().splitlines() or [''])[-1]


def corpora(unfinished):
    """Folders of the drill's own corpus, as it was prepared; unfinished: where that was cut short."""
    return [path for path in Path('out/data').glob(f'{CORPUS}_*') if (path.suffix == '.tmp') == unfinished]


def same(a, b):
    """Whether two nested checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or a != a and b != b


def wrong_with(folder, straight, status, said):
    """What is not as it must be in the folder of a run that was killed and has gone on to its end; '' if nothing."""
    if status:
        return f'went on to exit status {status}: {said}'
    a, b = (torch.load(f'{path}/ckpt.pt', weights_only=True) for path in (straight, folder))
    differs = [key for key in STATE if not same(a[key], b[key])]
    differs += [name for name in ('metrics.jsonl', 'gate.json')
                if Path(straight, name).read_text() != Path(folder, name).read_text()]
    return ', '.join(differs) + ' differs' if differs else ''


def unreadable(folder):
    """The first file of a folder that cannot be read, and why; '' if all can, or there are none yet. A log may end in
    half a line."""
    read = {'.pt': lambda path: torch.load(path, weights_only=True), '.npz': lambda path: dict(np.load(path)),
            '.json': lambda path: json.loads(path.read_text()), '.jsonl': plot.read_lines, '.png': plt.imread}
    for path in Path(folder).rglob('*'):
        try:
            read.get(path.suffix, str)(path)
        except (Exception, SystemExit) as error:      # torch raises a dozen different types
            return f'{path} is unreadable after the kill: {error}'
    return ''


def main():
    if kills < 1:
        runtime.fail(f'--kills={kills}: expects at least 1')
    drawn = cases.split(',')
    if not PHASE.keys() >= {*drawn}:
        runtime.fail(f'--cases={cases}: expects some of {", ".join(PHASE)}, separated by commas')
    for old in (Path(out_dir, 'straight'), *Path(out_dir).glob('killed[0-9]*'), *Path('out/data').glob(f'{CORPUS}_*')):
        shutil.rmtree(old, ignore_errors=True)
    rand, took, corpus = random.Random(seed), {}, Path(out_dir, f'{CORPUS}.txt')
    corpus.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_text(corpus, ''.join(f'line {n} of {rand.randrange(1000)}\n' for n in range(LINES)))
    last = max(PHASE[case] for case in drawn)
    for case in (case for case in PHASE if case in drawn or case < last and case in SCRIPTS):
        began = time.time()
        status, said = run(command(case, f'{out_dir}/straight/{case}'))
        took[case] = time.time() - began
        if status:
            runtime.fail(f'{case} does not even run undisturbed: {said}', status=1)
        if case == 'corpus':
            took[case] = corpora(unfinished=False)[0].stat().st_mtime - began
        print(f'{case} undisturbed: {took[case]:.1f} s', flush=True)
    table, bad, i = Counter(), 0, 0
    while sum(table[case, 'kills'] for case in drawn) < kills:
        case, folder = rand.choice(drawn), f'{out_dir}/killed{i}'
        moments, hits, wrong = [rand.uniform(0, took[case]) for _ in range(1 + (i % 3 == 2))], 0, ''
        os.utime(corpus)                                   # so it counts as another file and is prepared again
        for moment in moments:
            began = time.monotonic()
            if run(command(case, folder), moment)[0] != -signal.SIGKILL:
                if not hits:                               # it had ended: the machine is faster now
                    took[case] = min(took[case], time.monotonic() - began)
                break
            hits, wrong = hits + 1, wrong or unreadable(folder)
        if case == 'corpus':
            table[case, 'while writing the corpus'] += bool(corpora(unfinished=True))
        saved = Path(folder, 'ckpt.pt').exists()
        wrong = wrong or wrong_with(folder, f'{out_dir}/straight/{case}', *run(command(case, folder)))
        table[case, 'kills'] += hits
        if hits:
            table[case, 'runs'] += 1
            table[case, 'with a checkpoint'] += saved
            table[case, 'as undisturbed'] += not wrong
        bad, i = bad + bool(wrong), i + 1
        print(f"{case} killed after {', '.join(f'{moment:.1f}' for moment in moments[:hits]) or 0} s: "
              f"{wrong or 'as undisturbed'}", flush=True)
        if not wrong:
            shutil.rmtree(folder, ignore_errors=True)
        for path in corpora(unfinished=False) + corpora(unfinished=True):
            shutil.rmtree(path)
    for case in drawn:
        print(case, ', '.join(f'{name} {count}' for (of, name), count in table.items() if of == case))
    if bad:
        runtime.fail(f'{bad} of {i} runs differ from the undisturbed ones', status=1)
    print(f'all {i} runs ended as the undisturbed ones, bit for bit')


if __name__ == '__main__':
    main()
