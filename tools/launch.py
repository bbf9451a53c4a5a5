"""Many command lines of the phase scripts that wait for each other, several at a time: which are still to be done, and
doing them. What p7_ablate.py needs that is not its idea.
"""
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import runtime

SCRIPTS = {path.name[:2]: path.name for path in runtime.scripts('p6')}
MINUTES = {'p1': 2.5, 'p2': 15, 'p3': 2.5, 'p4': 3, 'p5': 3.5, 'p6': 6}   # sizes of `ablation`, beside one other run


class Run(NamedTuple):
    """One phase of one chain: a name and a seed to be called by, its folder (what it prints goes to run.log there), the
    checkpoint that it starts from (None for P1), its command line, and the settings that this makes."""
    name: str
    seed: int
    phase: str
    folder: Path
    before: Path | None
    command: list
    settings: runtime.Config = {}


def diverged(run):
    """Whether a run has ended in a loss that is not finite. `work` takes note of it, for it would end so again."""
    return (run.folder / 'diverged.txt').is_file()


def ended(run):
    """Whether a run has ended with all its steps."""
    return (run.folder / 'gate.json').is_file()


def finished(run):
    """Whether a run has ended and others can start from it."""
    return ended(run) and (run.folder / 'ckpt.pt').is_file()


@cache
def settings(*chain):
    """The settings of the last of some phases that are run one after the other, each from the one before; chain: of
    (phase, words of its command line), words a tuple."""
    *earlier, (phase, words) = chain
    module = vars(importlib.import_module(SCRIPTS[phase].removesuffix('.py')))
    before = settings(*earlier) if earlier else None
    return runtime.configure(dict(module), words, after=earlier[-1][0] if earlier else '', inherited=before)


def own_settings(run):
    """Whether the folder of a run holds nothing, or a run of these settings, wherever that stood and began."""
    facts = run.folder / 'run.json'
    if not facts.is_file():
        return True
    made = json.loads(facts.read_text(encoding='utf-8'))['config']
    usual = settings(*((phase, ()) for phase in SCRIPTS if phase <= run.phase))
    return all(made.get(key, usual[key]) == value for key, value in run.settings.items()    # what is missing is newer
               if key not in ('out_dir', 'init_from', 'resume', 'device'))


def to_do(chain):
    """The runs of chain, a list of what comes before first, that are still to be done: the last ones of a branch that
    have not ended, and what these start from; nothing that comes after one that diverged. So checkpoints may be deleted
    once nothing unfinished needs them. SystemExit(2), after one line, if a folder holds a run of other settings."""
    found, inner, wanted, hopeless = [], {run.before for run in chain}, set(), set()
    for run in chain:
        if not own_settings(run):
            runtime.fail(f'{run.folder} holds a run of other settings; use another --out_dir')
        if diverged(run) or run.before in hopeless:
            hopeless.add(run.folder / 'ckpt.pt')
    for run in reversed(chain):
        checkpoint = run.folder / 'ckpt.pt'
        done = checkpoint in hopeless or ended(run) and (checkpoint not in wanted or checkpoint.is_file())
        if not done and (checkpoint in wanted or checkpoint not in inner):
            found.append(run)
            wanted.add(run.before)
    return found[::-1]


def sources_of(chain):
    """{(commit, hardware and dtype)} of the runs of a chain."""
    found = set()
    for path in (run.folder / 'run.json' for run in chain):
        if path.is_file():
            about = json.loads(path.read_text(encoding='utf-8'))
            hardware = re.sub(r', \d+ threads', '', about['hardware'])
            found.add((runtime.short(about['commit']), f"{hardware}, {about['dtype'].removeprefix('torch.')}"))
    return found


def longest(queue, minutes):
    """Minutes of the longest chain of runs in queue, each of which waits for the one before it; minutes: by phase."""
    until = {}
    for run in queue:
        until[run.folder / 'ckpt.pt'] = until.get(run.before, 0) + minutes[run.phase]
    return max(until.values(), default=0)


def start(run, slot, threads, gpus, lock):
    """The process of a run, which holds on to the lock; what it prints goes to run.log in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {'OMP_NUM_THREADS': str(threads)}
    if gpus:
        environment['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
    with open(run.folder / 'run.log', 'a', encoding='utf-8') as log:
        return subprocess.Popen(run.command, stdout=log, stderr=log, env=environment, pass_fds=[lock.fileno()])


def visible_gpus(device):
    """The GPUs that this program may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    count = torch.cuda.device_count() if device in ('auto', 'cuda') else 0
    return os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(count)))).split(',') if count else []


def work(queue, slots, gpus, lock):
    """Run all of queue, `slots` at a time, each once the run that it starts from has ended -> the runs that failed, and
    those that wait for them in vain. One that diverges is a finding, and no failure. gpus as from visible_gpus().
    Ctrl-C and SIGTERM stop the processes, which save, and raise KeyboardInterrupt."""
    cores = os.cpu_count() or 1
    waiting, running, failed, total = list(queue), {}, [], len(queue)
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            pending = {run.folder for run in waiting} | {run.folder for run, _ in running.values()}
            for slot in [slot for slot in range(slots) if slot not in running]:
                able = [run for run in waiting if run.before is None or run.before.parent not in pending]
                if able:
                    waiting.remove(ready := able[0])
                    alone = len(able) == 1 and not running        # what nothing can run beside takes all cores
                    threads = max(1, cores // (1 if alone else slots))
                    running[slot] = ready, start(ready, slot, threads, gpus, lock)
                    print(f'{time.strftime("%H:%M")} {ready.name}, seed {ready.seed}, {ready.phase} begins; '
                          f'{len(waiting)} of {total} runs wait', flush=True)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode or not finished(run):
                        words = 'FAILED'
                        if process.returncode == runtime.DIVERGED:
                            words, log = 'DIVERGED', run.folder / 'run.log'
                            runtime.write_text(run.folder / 'diverged.txt', log.read_text().splitlines()[-1] + '\n')
                        print(f'{run.name}, seed {run.seed}, {run.phase} {words}; see {run.folder}/run.log', flush=True)
                        lost = [run]                         # and all that start from it, which come in order
                        for other in waiting:
                            if other.before and other.before.parent in {r.folder for r in lost}:
                                lost.append(other)
                        failed += lost if words == 'FAILED' else []
                        waiting = [other for other in waiting if other not in lost]
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, usual)
    return failed


def only_driver(folder):
    """The lock of a folder, which ends with its process and with those that it started: two drivers would run the same
    things twice. SystemExit(2), after one line, if there is another."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = open(Path(folder, 'lock'), 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        runtime.fail(f'another p7_ablate.py, or a run that it left behind, is at work in {folder}')
    return lock
