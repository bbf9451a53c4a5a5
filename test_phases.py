"""Tests of the phases: the chain P1 to P5 by its command lines, bad input, kill and resume, ranks, and their functions.

Figures take most of the time of a tiny run and the held-out sentences most of the rest, so the corpus is prepared with
64 held-out scenes, and only the chain itself draws.
"""
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import p1_canvas
import p2_contrast
import p3_jitter
import p4_decoder
import p5_roundtrip
import p6_diffusion
import p7_ablate
import plot
import priors
import runtime
import report
import sample
from model import PARA, TextDecoder

ROOT = Path(__file__).parent
PHASES = ('p1', 'p2', 'p3', 'p4', 'p5', 'p6')
EXACT = ('--device=cpu', '--dtype=float32')

DRIVER = '''"""Run the command lines of the first argument, a JSON list, one after the other and without figures."""
import atexit
import json
import os
import runpy
import signal
import sys

import torch.distributed as dist

import plot
import runtime

cosine_lr, kill_at = runtime.cosine_lr, int(os.environ.get('KILL_AT', -1))


def die_at(step, *rest):
    """What a phase calls at the beginning of every training step."""
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return cosine_lr(step, *rest)


def open_once(*words, really=dist.init_process_group):
    """All phases share one process group: torchrun's store hangs at the barrier of a second one."""
    if not dist.is_initialized():
        really(*words)


plot.evaluation = plot.trends = plot.samples_table = lambda *_: None
runtime.cosine_lr, dist.init_process_group = die_at, open_once
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_path(words[0], run_name='__main__')
if dist.is_initialized():                          # once, not once a phase
    atexit.unregister(dist.destroy_process_group)
    dist.destroy_process_group()
'''


def process(*words, cwd, **environment):
    """Run a Python program that can import this repository -> the finished process."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, text=True, capture_output=True,
                          timeout=900)


def smoke_words():
    """{phase: the words of its command line in runs/smoke.sh}, the script's path first, without the folders."""
    text = (ROOT / 'runs/smoke.sh').read_text().replace('\\\n', '')
    tiny = re.search(r'^tiny="(.*)"$', text, re.M)[1]
    lines = (shlex.split(line.replace('$tiny', tiny)) for line in text.splitlines() if re.match(r'python p\d', line))
    return {words[1][:2]: [str(ROOT / words[1]), *(w for w in words[2:] if not re.match('--(out_dir|init_from)=', w))]
            for words in lines}


WORDS = smoke_words()


@pytest.fixture(scope='session')
def chain(tmp_path_factory):
    """The chain P1 to P6, as runs/smoke.sh has it, in a folder of its own: .folder, .output of each phase."""
    folder = tmp_path_factory.mktemp('chain')
    output = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'HELD_OUT_SIZE', 64)
        config = {name: getattr(p1_canvas, name) for name in p1_canvas.DATA} | {'num_scenes': 300, 'vocab_size': 1024}
        with pytest.MonkeyPatch.context() as here:
            here.chdir(folder)
            data.load(config)
        for phase, before in zip(PHASES, (None, *PHASES)):
            origin = [f'--init_from=out/{before}/ckpt.pt'] if before else []
            done = process(*WORDS[phase], f'--out_dir=out/{phase}', *origin, *EXACT, '--max_steps=2', cwd=folder)
            assert done.returncode == 0, done.stderr
            output[phase] = done
        yield SimpleNamespace(folder=folder, output=output, config=config)


@pytest.fixture(scope='session')
def dry(chain):
    """Checkpoints of the chain whose nets have no dropout, dry/pN.pt: the drawn masks would differ between ranks."""
    (chain.folder / 'dry').mkdir()
    for phase in PHASES[:-1]:
        checkpoint = load(chain.folder / f'out/{phase}')
        checkpoint['arch'] |= {'dropout': 0.0, 'dec_dropout': 0.0}
        torch.save(checkpoint, chain.folder / f'dry/{phase}.pt')
    return 'dry'


@pytest.fixture
def here(chain, monkeypatch):
    """Works in the folder of the chain, without figures; the handler that runtime.start puts in place is undone."""
    monkeypatch.chdir(chain.folder)
    for name in ('evaluation', 'trends', 'samples_table'):
        monkeypatch.setattr(plot, name, lambda *_: None)
    handler = signal.getsignal(signal.SIGINT)
    yield chain
    signal.signal(signal.SIGINT, handler)


def run(words):
    """A command line in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', list(words))
        runpy.run_path(words[0], run_name='__main__')


def tiny(phase, out, *words, init_from=None):
    """Words of a tiny run of two steps without figures."""
    origin = [f'--init_from={init_from or f"out/p{int(phase[1]) - 1}/ckpt.pt"}'] if phase != 'p1' else []
    return [*WORDS[phase], f'--out_dir={out}', *origin, '--max_steps=2', '--eval_every=1000', *words]


def load(folder):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- the chain ------------------------------------------------------------------------------------------------------

FIGURES = {'p1': {'montage', 'spectra', 'slopes', 'correlation', 'gradients', 'trends'},
           'p2': {'tsne'}, 'p3': {'shift'}, 'p4': {'attention', 'token_types', 'controls', 'trends'},
           'p5': {'samples'}, 'p6': {'samples', 'drawn'}}
NETS = {'p1': {'encoder', 'decoder'}, 'p2': {'encoder', 'decoder', 'readout'},
        'p3': {'encoder', 'decoder', 'readout'}, 'p5': {'encoder', 'readout', 'decoder'},
        'p4': {'encoder', 'readout', 'decoder', 'canvas only', 'z only', 'no canvas'},
        'p6': {'encoder', 'readout', 'decoder', 'unet'}}
FROZEN = {'p4': {'encoder', 'readout'}}


@pytest.mark.parametrize('phase', PHASES)
def test_chain_checkpoint(chain, phase):
    checkpoint = load(chain.folder / f'out/{phase}')
    assert checkpoint.keys() == {'phase', 'step', 'arch', 'config', 'commit', 'metrics', 'history', 'extra', 'nets',
                                 'ema', 'optimizer', 'rng'}
    assert (checkpoint['phase'], checkpoint['step'], checkpoint['config']['out_dir']) == (phase, 2, f'out/{phase}')
    assert [entry['phase'] for entry in checkpoint['history']] == list(PHASES[:PHASES.index(phase)])
    for entry in checkpoint['history']:
        assert entry.keys() == {'phase', 'step', 'config', 'metrics', 'pass'}
        assert entry['pass'] is False and entry['metrics'] and entry['config']['max_steps'] == 2
    assert checkpoint['nets'].keys() == checkpoint['ema'].keys() == NETS[phase]
    for name, state in checkpoint['nets'].items():
        mean = checkpoint['ema'][name]
        assert mean.keys() == state.keys()
        still = all(torch.equal(mean[key], state[key]) for key in state)
        assert still == (name in FROZEN.get(phase, ())), 'an average follows behind the weights'
    tokenizer = data.Tokenizer.load(checkpoint['extra']['tokenizer'])
    assert tokenizer.decode(tokenizer.encode('a red cube')) == 'a red cube' and tokenizer.size <= 1024


@pytest.mark.parametrize('phase', PHASES)
def test_chain_run_folder(chain, phase):
    folder = chain.folder / f'out/{phase}'
    facts, checkpoint = json.loads((folder / 'run.json').read_text()), load(folder)
    assert all(facts[key] == checkpoint[key] for key in ('phase', 'config', 'commit'))
    assert facts['argv'][0].startswith(str(ROOT / phase)) and facts['world'] == 1 and facts['dtype'] == 'torch.float32'
    assert facts['versions'].keys() >= {'python', 'torch', 'numpy'} and facts['hardware'] and facts['started']

    log = rows(folder / 'metrics.jsonl')
    kinds = [(row['step'], {name.split('/')[0] for name in row if name != 'step'}) for row in log]
    begins = [(1, {'val'})] * (phase == 'p6')                      # where its encoder begins to move
    assert kinds == [(0, {'val'}), (0, {'train'}), *begins, (1, {'train'}), (2, {'val'})]
    assert all({'train/loss', 'train/grad_norm', 'train/lr'} <= row.keys() for row in log if 'train/loss' in row)
    assert {f'val/{name}': runtime.finite(value) for name, value in checkpoint['metrics'].items()} == (
        {name: value for name, value in log[-1].items() if name not in ('step', 'val/stage')})

    gate = json.loads((folder / 'gate.json').read_text())
    assert gate.keys() == {'phase', 'pass', 'criteria'} and gate['phase'] == phase and gate['pass'] is False
    lines = chain.output[phase].stdout.splitlines()
    for row in gate['criteria']:
        assert {'name', 'target', 'measured', 'pass'} <= row.keys() and type(row['pass']) is bool
        line, = [line for line in lines if line.startswith(row['name'] + '  ')]
        assert row['target'] in line and line.endswith('PASS' if row['pass'] else 'FAIL')
    assert f'{phase} gate: FAIL' in lines and chain.output[phase].stderr == ''


@pytest.mark.parametrize('phase', PHASES)
def test_chain_figures(chain, phase):
    files = list((chain.folder / f'out/{phase}/plots').glob('*.png'))
    assert all(path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and path.stat().st_size > 2000 for path in files)
    names = {path.stem for path in files}
    expected = FIGURES.get(phase, set()) | (FIGURES['p1'] if phase != 'p4' else set())
    steps = (0, 1, 2) if phase == 'p6' else (0, 2)
    numbered = {f'{name}_{step:06d}' for name in expected - {'samples'} for step in steps}
    assert names == numbered | expected & {'samples'}


def test_chain_samples(chain):
    said, samples = (rows(chain.folder / f'out/{phase}/samples.jsonl') for phase in ('p4', 'p5'))
    assert len(said) == len(samples) == 64
    assert all(row.keys() == {'input', 'said'} for row in said)
    assert all(row.keys() == {'input', 'paraphrase', 'f1', 'rouge_l', 'cosine'} for row in samples)
    assert all(data.parse(row['input']) for row in said + samples)


def test_chain_says_what_it_inherits(chain):
    for phase, before in zip(PHASES[1:], PHASES):
        out = chain.output[phase].stdout
        assert f'from out/{before}/ckpt.pt ({before}, step 2): vocab_size 1024, channels 6, size 32' in out
        assert f"note: {before.upper()}'s gate failed (" in out and '; going on' in out


def test_chain_gates_as_one_table(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain.folder)
    run([str(ROOT / 'plot.py'), '--out=out', '--gates=true'])
    table = capsys.readouterr().out
    assert 'criteria pass' in table and all(f'\n{phase} ' in table for phase in PHASES)
    assert (chain.folder / 'out/gates.png').read_bytes()[:4] == b'\x89PNG'


def test_report_of_the_chain(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain.folder)
    run([str(ROOT / 'plot.py'), '--out=out', '--html=true'])
    assert capsys.readouterr().out == 'wrote out/report.html\n'
    text = Path('out/report.html').read_text(encoding='utf-8')
    assert re.findall('<h2 id="[a-z-]+">([^<]+)</h2>', text) == [
        'Gates', 'Latent health', 'Semantics', 'Decoder', 'Qualitative', 'Learning curves', 'Provenance']
    failed = sum(not row['pass'] for phase in PHASES
                 for row in json.loads(Path(f'out/{phase}/gate.json').read_text())['criteria'])
    assert text.count('>FAIL</span>') == failed > 0
    for caption in report.CAPTIONS.values():
        assert caption in text, caption
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', text), 'one file, nothing outside it'
    shown = {title for _, _, panels, _ in report.DASHBOARDS for title in panels}
    assert shown <= {title for title, *_ in plot.PANELS}


def test_report_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, hint in (([], 'no run folder'), (['--out=a,b'], 'one folder')):
        with pytest.raises(SystemExit) as stop:
            run([str(ROOT / 'plot.py'), '--html=true', *words])
        assert stop.value.code == 2 and hint in capsys.readouterr().err


def test_gates_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, (r1, kurtosis) in enumerate(((0.5, 7.0), (0.7, 7.0), (0.9, 7.0))):
        for phase, name, measured, passed in (('p1', 'kurtosis', kurtosis, True), ('p2', 'R@1', r1, r1 >= 0.6)):
            folder = Path(f'seed{seed}', phase)
            folder.mkdir(parents=True)
            criteria = [{'name': name, 'target': '>= 0', 'measured': measured, 'pass': passed}]
            (folder / 'gate.json').write_text(json.dumps({'phase': phase, 'pass': passed, 'criteria': criteria}))
    run([str(ROOT / 'plot.py'), '--out=seed0,seed1,seed2', '--gates=true'])
    lines = [re.split(r'  +', line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ['p1', 'kurtosis', '>= 0', '7 ± 0', '7', '7', '3 of 3']
    assert lines[2] == ['p2', 'R@1', '>= 0', '0.7 ± 0.2', '0.5', '0.9', '2 of 3']
    assert lines[3] == ['criteria that pass, of 2: 1, 2, 2']
    Path('seed1/p2/gate.json').unlink()
    with pytest.raises(SystemExit):
        run([str(ROOT / 'plot.py'), '--out=seed0,seed1', '--gates=true'])
    assert 'do not have the same criteria' in capsys.readouterr().err


# ---- bad input ------------------------------------------------------------------------------------------------------

class Hostile:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return (os.mkdir, ('trace',))


@pytest.fixture(scope='session')
def bad_files(chain):
    """Files that no phase can use, in the folder of the chain."""
    folder = chain.folder
    whole = (folder / 'out/p1/ckpt.pt').read_bytes()
    files = {'truncated.pt': whole[:len(whole) // 2], 'nothing.pt': b'',
             'pickle.pt': pickle.dumps(Hostile(), protocol=2), 'empty.txt': b'',
             'blank.txt': b'\n \n' * 40, 'bad.txt': b'\xff\xfe\n...\n' * 40,
             'bad.jsonl': b'{"original": 3}\nno json\n[]\n{"paraphrases": ["a"]}\n' * 20}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({'phase': 'p1', 'nets': Hostile()}, folder / 'code.pt')


@pytest.mark.parametrize('phase, words, hint', [
    ('p1', ['--lambda_tvv=0.1'], '--lambda_tv=0.1'), ('p5', ['--best_of=3'], '--best_of_k=4'),
    ('p1', ['--dim=wide'], 'a whole number'), ('p3', ['--max_shift=1.5'], 'a whole number'),
    ('p2', ['--staged=maybe'], 'true or false'), ('p4', ['faster'], 'unknown setting'),
    ('p1', ['--batch_size=9', '--grad_accum=2'], 'does not divide'),
    ('p3', ['--init_from=nowhere/ckpt.pt'], 'make it with: python p2_contrast.py'),
    ('p2', ['--init_from=truncated.pt'], 'truncated'),
    ('p2', ['--init_from=nothing.pt'], 'make it with: python p1_canvas.py'),
    ('p3', ['--init_from=out/p1/ckpt.pt'], 'is a checkpoint of p1, not of p2'),
    ('p2', ['--init_from=out/p2/ckpt.pt'], 'is a checkpoint of p2, not of p1'),
    ('p2', ['--init_from=code.pt'], 'no checkpoint of ours'),
    ('p2', ['--init_from=pickle.pt'], 'no checkpoint of ours'),
    ('p1', ['--corpus=nowhere.txt'], 'no such file'), ('p1', ['--corpus=empty.txt'], 'on 0 lines; at least 20'),
    ('p1', ['--corpus=blank.txt'], 'only 0 different good sentences'),
    ('p1', ['--corpus=bad.txt'], 'only 0 different good sentences'),
    ('p1', ['--corpus=bad.jsonl'], 'only 0 different good sentences on 80 lines'),
    ('p1', ['--complexity=2', '--simple_share=2'], 'expects 0 to 1'),
    ('p1', ['--complexity=9'], 'complexity'), ('p1', ['--complexity=0'], 'complexity'),
    ('p1', ['--vocab_size=100'], '--vocab_size=100: expects 260'),
    ('p1', ['--vocab_size=40000'], 'to 32768')])
def test_bad_input_ends_in_one_line(here, bad_files, capsys, phase, words, hint):
    with pytest.raises(SystemExit) as stop:
        run(tiny(phase, 'out/bad', *words))
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith('error: ') and line.count('\n') == 1 and line.endswith('\n') and hint in line
    assert not Path('trace').exists() and not Path('out/bad/ckpt.pt').exists()


def test_bad_input_ends_a_program_in_one_line(chain):
    done = process(*tiny('p2', 'out/bad', init_from='nowhere.pt'), cwd=chain.folder)
    assert done.returncode == 2
    assert done.stderr == 'error: nowhere.pt does not exist; make it with: python p1_canvas.py\n'


# ---- kill and resume ------------------------------------------------------------------------------------------------

def same(a, b):
    """Whether two nested checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or a != a and b != b


@pytest.mark.parametrize('phase', ['p1', 'p4'])
def test_kill_9_then_resume_goes_on_bit_for_bit(here, phase):
    """Killed in step 3, after the checkpoint of step 2 and an optimizer step past it; with dropout."""
    words = tiny(phase, f'straight/{phase}', *EXACT, '--max_steps=4', '--eval_every=2')
    run(words)
    again = [*words, f'--out_dir=killed/{phase}']
    Path('driver.py').write_text(DRIVER)
    done = process('driver.py', json.dumps([again]), cwd=here.folder, KILL_AT='3')
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = rows(f'killed/{phase}/metrics.jsonl')
    assert load(f'killed/{phase}')['step'] == 2 and killed[-1]['step'] == 2 and 'train/loss' in killed[-1]
    run([*again, '--resume=true'])

    a, b = load(f'straight/{phase}'), load(f'killed/{phase}')
    for key in ('step', 'nets', 'ema', 'optimizer', 'rng', 'metrics', 'extra', 'history'):
        assert same(a[key], b[key]), key
    for name in ('metrics.jsonl', 'gate.json'):
        assert Path(f'straight/{phase}', name).read_text() == Path(f'killed/{phase}', name).read_text()


# ---- ranks and micro-steps ------------------------------------------------------------------------------------------

# Fewer rows for priors and reading than the batch has, so that it matters which ones. Noise on V is drawn by each rank.
RANKS = {'p1': ['--batch_size=8', '--dropout=0.0', '--canvas_noise=0.0', '--prior_gate=0.0', '--prior_ramp=1',
                '--prior_samples=4'],
         'p2': ['--batch_size=8', '--canvas_noise=0.0', '--rec_samples=24', '--prior_samples=16'],
         'p3': ['--batch_size=8', '--canvas_noise=0.0', '--rec_samples=16', '--prior_samples=4'],
         'p4': ['--batch_size=8', '--dropout=0.0'],
         'p5': ['--batch_size=8', '--generated=8', '--best_of_k=2', '--dec_samples=16', '--prior_samples=8'],
         'p6': ['--batch_size=8', '--prior_rows=4']}


TERMS = {'p1': ('loss', 'rec', *priors.PRIORS), 'p2': ('nce', 'rec', 'swaps_beaten', *priors.PRIORS),
         'p3': ('nce', 'rec', 'inv', *priors.PRIORS), 'p4': ('loss', 'paraphrase', *list(p4_decoder.CONTROLS)[1:]),
         'p5': ('nce', 'again', 'para', 'inv', 'cycle', 'copy', *priors.PRIORS),
         'p6': ('diffusion', 'prior', 'unet_grad_norm', 'nce', 'again', 'para', 'inv', 'cycle', 'copy', *priors.PRIORS)}


def rank_words(phase, out, *words):
    return tiny(phase, f'{out}/{phase}', *EXACT, *RANKS[phase], *words, init_from=f'dry/p{int(phase[1]) - 1}.pt')


@pytest.fixture(scope='session')
def two_ranks(chain, dry):
    """Every phase under one torchrun of two gloo ranks, which spares four times the imports."""
    (chain.folder / 'driver.py').write_text(DRIVER)
    done = process('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'driver.py',
                   json.dumps([rank_words(phase, 'two') for phase in PHASES]), cwd=chain.folder)
    assert done.returncode == 0, done.stderr


def trained(folder, name):
    """What a run logged of its training steps."""
    return [row[f'train/{name}'] for row in rows(Path(folder) / 'metrics.jsonl') if f'train/{name}' in row]


@pytest.mark.parametrize('phase', PHASES)
def test_ranks_and_micro_steps_take_the_step_of_one_process(here, two_ranks, phase):
    run(rank_words(phase, 'one'))
    run(rank_words(phase, 'parts', '--grad_accum=2'))
    one, two, parts = (trained(f'{out}/{phase}', 'grad_norm') for out in ('one', 'two', 'parts'))
    assert len(one) == 2 and one[0] != one[1]
    assert two == pytest.approx(one, rel=1e-4), 'two ranks'
    assert parts == pytest.approx(one, rel=1e-4), 'two micro-steps'
    for name in TERMS[phase]:
        assert trained(f'two/{phase}', name) == pytest.approx(trained(f'one/{phase}', name), rel=1e-4, abs=1e-5), name


# ---- the plan to the letter, and other options ----------------------------------------------------------------------

OPTIONS = {
    'P1 of the plan': ('p1', ['--lambda_rec=0.0', '--lambda_common=0.0', '--lambda_lattice=0.0', '--blur_steps=2',
                              '--coordinate_steps=2', '--smoothing=true']),
    'coordinates for a step only': ('p1', ['--coordinate_steps=1', '--prior_gate=0.0', '--query_grid=32', '--dim=16']),
    'slots': ('p1', ['--slots=3']),
    'P2 of the plan': ('p2', ['--staged=false', '--anchors=false', '--negatives=0', '--lambda_vicreg=0.1',
                              '--lambda_barlow=0.1', '--pyramid=false', '--mask_false_negatives=false',
                              '--mine_every=0']),
    'P3 of the plan': ('p3', ['--lambda_rec=0.0', '--anchors=false', '--mine_pairs=false']),
    'no family left out': ('p2', ['--leave_out=', '--negatives=3', '--lambda_rec=0.0']),
    'P4 of the plan': ('p4', ['--paraphrase_share=0.0']),
    'P4 alone': ('p4', ['--controls=false', '--vocab_mask=false']),
    'P5 of the plan': ('p5', ['--paraphrase_share=0.0', '--negatives=1', '--best_of_k=1', '--mine_pairs=false']),
    'P6 noisy': ('p6', ['--eta=1.0', '--min_snr=0', '--refresh=2'])}


@pytest.mark.parametrize('name', OPTIONS)
def test_options_run(here, name):
    phase, words = OPTIONS[name]
    out = f'options/{name.replace(" ", "_")}'
    run(tiny(phase, out, *words))
    norms = trained(out, 'unet_grad_norm' if phase == 'p6' else 'grad_norm')       # P6 moves its encoder later
    assert len(norms) == 2 and all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert json.loads(Path(out, 'gate.json').read_text())['criteria']


def test_p2_goes_on_with_the_pairs_that_z_confuses(here):
    for out, words in (('mined', ['--mine_every=1']), ('plain', ['--mine_every=0'])):
        run(tiny('p2', out, '--staged=false', '--max_steps=3', '--lr_steps=3', '--leave_out=', *EXACT, *words))
    pairs = load('mined')['extra']['pairs']
    assert pairs.shape[1] == 2 and (pairs[:, 0] != pairs[:, 1]).all() and load('plain')['extra']['pairs'] is None
    mined, plain = trained('mined', 'nce'), trained('plain', 'nce')
    assert mined[0] == plain[0] and mined[1] != plain[1], 'there is nothing to search at step 0'


def test_three_things_come_in_after_two(here, capsys, monkeypatch):
    words = tiny('p1', 'three/p1', '--complexity=2', '--num_scenes=60', '--max_steps=1', '--lr_steps=1')
    run(words)
    easy = [f'--{name}=-1' for name in ('stage1_ends', 'stage2_ends', 'more_come_in')]
    drawn, draw = [], data.Corpus.draw

    def noted(corpus, *rest):
        scenes, generator = draw(corpus, *rest)
        drawn.append(set(scenes.tolist()))
        return scenes, generator
    monkeypatch.setattr(data.Corpus, 'draw', noted)
    run(tiny('p2', 'three/p2', '--max_steps=6', '--lr_steps=6', *easy, init_from='three/p1/ckpt.pt'))
    news = re.findall(r'step \d+: (stage .*)', capsys.readouterr().out)
    assert news == ['stage 2 begins', 'stage 3 begins', 'stage 1 begins for scenes of more things', 'stage 2 begins',
                    'stage 3 begins']
    assert load('three/p2')['extra']['few'] is False and load('three/p2')['extra']['stage'] == 3
    train = data.load(load('three/p1')['arch']['data'])[0]['train']
    fewest, others = set(train.fewest.tolist()), set(train.others.tolist())
    assert all(scenes <= fewest for scenes in drawn[:3]) and all(scenes <= others for scenes in drawn[3:5])
    assert drawn[5] & fewest and drawn[5] & others, 'in the end all of them'


def own_corpus(path):
    """41 sentences, one or two lines that are none, and in .jsonl paraphrases and counterfactuals here and there."""
    nouns = 'dog', 'cat', 'cube', 'hen', 'owl'
    things = [f'{colour} {noun}' for colour in ('Red', 'Blue', 'Green', 'Grey') for noun in nouns]
    lines = [f'The {a} chased a {b}.' for a, b in zip(things, things[7:] + things[:7])]
    lines += [f'There is a {a} on the hill!' for a in things] + ['Nobody was there.']
    if path.suffix == '.jsonl':
        for i, line in enumerate(lines):
            row = {'original': line}
            if i % 4:
                row['paraphrases'] = [f'Look: {line}', f'I saw that {line}'][:i % 3]
            if i % 5:
                row['counterfactuals'] = [f'Not {line}'] if i % 2 else {'colour': [f'Un{line}'], 'mood': [f'Ah {line}']}
            lines[i] = json.dumps(row)
    path.write_bytes('\n'.join(lines).encode() + b'\n\xff\xfe\n{"broken\n')


@pytest.mark.parametrize('name', ['own.txt', 'own.jsonl'])
def test_a_corpus_of_one_s_own(here, capsys, name):
    own_corpus(Path(name))
    folder = Path('own', name)
    run(tiny('p1', folder / 'p1', f'--corpus={name}'))
    out = capsys.readouterr().out
    assert f'bad line left out: {name}:42: ' in out and (f'{name}:43: ' in out) == name.endswith('.jsonl')
    run(tiny('p2', folder / 'p2', init_from=folder / 'p1/ckpt.pt'))
    checkpoint = load(folder / 'p2')
    assert checkpoint['arch']['data']['corpus'] == name and len(trained(folder / 'p2', 'nce')) == 2
    assert all(math.isfinite(checkpoint['metrics'][key]) for key in ('r1', 'r5', 'paraphrase_cosine', 'rec_ce'))
    assert checkpoint['extra']['stage'] == 3, 'without canonical forms there are no stages'


# ---- one step at full size ------------------------------------------------------------------------------------------

FULL = {name: getattr(p1_canvas, name) for name in p1_canvas.SIZES}
FULL |= {name: getattr(p2_contrast, name) for name in ('z_dim', 'readout_hidden', 'pyramid')}
FULL |= {name: getattr(p4_decoder, name) for name in ('dec_dim', 'dec_layers', 'dec_heads', 'dec_hidden')}
FULL |= {'dec_dropout': p4_decoder.dropout, 'unet_dim': p6_diffusion.unet_dim}


def step_p1(nets, x, meanings):
    V = nets['encoder'](x)
    loss = p1_canvas.reconstruction(nets['decoder'], p1_canvas.noisy(V, 0.3), None, x)
    return loss + priors.image_prior_loss(priors.image_prior_terms(V), p1_canvas.weights(p1_canvas.config))


def meant(z, meanings):
    """The contrast of z (4, E): two scenes, each in two renderings."""
    return p2_contrast.contrast(z.view(2, 1, 2, -1), meanings, torch.ones(2, 1, dtype=torch.bool), 3, 0.07)


def step_p2(nets, x, meanings):
    V = nets['encoder'](x)
    return meant(nets['readout'](V), meanings) + p1_canvas.reconstruction(nets['decoder'], V, None, x)


def step_p3(nets, x, meanings):
    V = nets['encoder'](x)
    T_V = p3_jitter.jitter(V, torch.rand(len(V), 7), 0.5, 2, 0.8, 6)
    inv = (nets['readout'](T_V)[::2] - nets['readout'](V)[1::2]).square().sum(-1).mean()
    return meant(nets['readout'](V), meanings) + inv + p1_canvas.reconstruction(nets['decoder'], T_V, None, x)


def step_p4(nets, x, meanings):
    with torch.no_grad():
        V = nets['encoder'](x)
        z = nets['readout'](V)
    return sum(p1_canvas.reconstruction(nets[name], V, z, x) for name in p4_decoder.CONTROLS)


def step_p5(nets, x, meanings):
    V = nets['encoder'](x)
    z = nets['readout'](V)
    cycle, copy = p5_roundtrip.round_trip(nets, x[:2], V[:2], z[:2], 2, 0.9, torch.rand(2, 2, 8), 4)
    para = p1_canvas.reconstruction(nets['decoder'], V, z, x[torch.arange(4) ^ 1], PARA)
    return meant(z, meanings) + para + cycle + copy


def step_p6(nets, x, meanings):
    for p in nets['unet'].parameters():                  # some of its layers start at zero and let nothing through
        nn.init.normal_(p, std=0.05)
    V, t = nets['encoder'](x), torch.rand(4)
    noise = torch.randn_like(V)
    predict = partial(p6_diffusion.noise_in, nets['unet'])
    loss = p6_diffusion.diffusion_loss(predict, V.detach(), t, noise, 5.0)
    return loss + p6_diffusion.prior_loss(predict, V, t, noise) + step_p5(nets, x, meanings)


def full_nets(phase):
    if phase == 'p1':
        return p1_canvas.build(FULL)
    if phase == 'p6':
        return p6_diffusion.build(FULL)
    return p4_decoder.build(FULL, controls=phase == 'p4') if phase in ('p4', 'p5') else p2_contrast.build(FULL)


@pytest.mark.parametrize('phase', PHASES)
def test_a_step_at_full_size_reaches_every_parameter(here, phase):
    splits, _ = data.load(here.config)
    x = splits['train'].take(torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long), torch.tensor([2, 3, 2, 3]))
    nets = full_nets(phase)
    print(f"encoder {runtime.count_parameters(nets['encoder']) / 1e6:.2f}M parameters")
    assert 19e6 < runtime.count_parameters(nets['encoder']) < 26e6
    learning = {name: net for name, net in nets.items() if phase != 'p4' or name in p4_decoder.CONTROLS}
    optimizer = runtime.adamw(learning, 1e-4, 0.01)
    loss = {'p1': step_p1, 'p2': step_p2, 'p3': step_p3, 'p4': step_p4, 'p5': step_p5, 'p6': step_p6}[phase](
        nets, x, splits['train'].meanings[:2, :1])
    loss.backward()
    assert loss.isfinite()
    # A bias of the keys moves all scores alike; one that reads z alone has a single key and nothing to choose.
    idle = r'.*key\.bias|z only\.cross\.\d+\.(norm|attention\.(query|key))\..*'
    for name, net in learning.items():
        for key, p in net.named_parameters():
            if not re.fullmatch(idle, f'{name}.{key}'):
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, f'{name}.{key}'
    optimizer.step()
    assert all(p.isfinite().all() for net in learning.values() for p in net.parameters())


# ---- P1 -------------------------------------------------------------------------------------------------------------

GOOD_CANVAS = {'alpha': [2.0] * 6, 'alpha_hann': [2.0] * 6, 'tv': 0.5, 'kurtosis': [5.0] * 6, 'max_correlation': 0.1,
               'share_total': 0.5, 'lattice': 1.0}


def failing(criteria):
    return [i for i, row in enumerate(criteria) if not row[3]]


def test_canvas_gate():
    assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 5))
    assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS | {'alpha': [2.0] * 4 + [0.0, 9.0]}] * 3)), 'four of six'
    assert failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 2)) == [0, 1, 3], 'two evaluations are not three'
    for change, at in (({'alpha': [2.0] * 3 + [2.6] * 3}, 0), ({'alpha_hann': [1.4] * 3 + [2.0] * 3}, 1),
                       ({'tv': 0.6}, 3), ({'kurtosis': [5.0] * 5 + [3.0]}, 4), ({'max_correlation': 0.31}, 5),
                       ({'share_total': 0.19}, 6), ({'lattice': 2.1}, 7), ({'lattice': math.nan}, 7)):
        assert failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 2 + [GOOD_CANVAS | change])) == [at]
        earlier = [GOOD_CANVAS | change] + [GOOD_CANVAS] * 2
        assert failing(p1_canvas.canvas_gate(earlier)) == ([at] if at in (0, 1, 3) else []), 'slopes and TV must last'
        assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS | change] + [GOOD_CANVAS] * 3))
    assert failing(p1_canvas.canvas_gate([GOOD_CANVAS | {'tv': 0.01}] * 3)) == [2]


def test_prior_input():
    V = torch.randn(2, 6, 8, 8)
    assert torch.equal(p1_canvas.prior_input(V, 5, 5, 5), V)
    assert torch.equal(p1_canvas.prior_input(V, 4, 5, 0), priors.gaussian_blur(V, 0.8))
    both = p1_canvas.prior_input(V, 4, 0, 5)
    assert both.shape == (2, 8, 8, 8) and torch.equal(both[:, :6], V)
    assert both[0, 6, 3].tolist() == both[1, 7, :, 3].tolist() == pytest.approx(np.linspace(-1, 1, 8).tolist())


def test_reconstruction_does_not_depend_on_padding_or_on_how_the_batch_is_cut():
    V, x = torch.randn(4, 2, 8, 8), torch.randint(4, 20, (4, 8))
    x[0, 3:], x[1, 5:] = 0, 0
    decoder = TextDecoder(20, 2, 8, 2, dim=16, layers=1, heads=2, hidden=16, memory='canvas').eval()
    whole = p1_canvas.reconstruction(decoder, V, None, x)
    halves = [p1_canvas.reconstruction(decoder, v, None, F.pad(t, (0, 4))) for v, t in zip(V.chunk(2), x.chunk(2))]
    assert torch.allclose(whole, sum(halves) / 2)


# ---- P2 -------------------------------------------------------------------------------------------------------------

MEANINGS = torch.tensor([[7, 8, 9], [8, 5, 7], [4, 4, 6]])    # scene 1 is scene 0's first counterfactual, and so on
VALID = torch.tensor([[True, True, True], [True, True, True], [True, False, True]])


def by_hand(queries, keys, meanings, valid, temperature, scenes_only=False, mask=True):
    """InfoNCE written as it reads: a row against itself and all valid rows that mean something else."""
    losses = []
    for i in range(len(queries)):
        if valid[i] and not (scenes_only and i % 3):
            rivals = [j for j in range(len(keys)) if valid[j] and (j == i or not mask or meanings[j] != meanings[i])]
            scores = torch.stack([queries[i] @ keys[j] / temperature for j in rivals])
            losses.append(-scores.log_softmax(0)[rivals.index(i)])
    return torch.stack(losses).mean()


def test_contrast_hides_exactly_the_false_negatives():
    Z = F.normalize(torch.randn(3, 3, 3, 5), dim=-1).requires_grad_()
    a, b, c = Z.flatten(0, 1).unbind(1)
    ids, ok = MEANINGS.flatten(), VALID.flatten()

    def close(options, expected, stage=3):
        assert torch.allclose(p2_contrast.contrast(Z, MEANINGS, VALID, stage, 0.3, **options), expected, rtol=1e-5)
    symmetric = (by_hand(a, b, ids, ok, 0.3) + by_hand(b, a, ids, ok, 0.3)) / 2
    close({}, symmetric)
    close({}, symmetric, stage=1)
    close({'anchors': False}, by_hand(a, b, ids, ok, 0.3, scenes_only=True))
    close({'mask_false_negatives': False},
          (by_hand(a, b, ids, ok, 0.3, mask=False) + by_hand(b, a, ids, ok, 0.3, mask=False)) / 2)
    close({}, symmetric + by_hand(c, a, ids, ok, 0.3), stage=2)
    assert not torch.allclose(symmetric, by_hand(a, b, ids, ok, 0.3, mask=False), rtol=1e-3)

    # A false negative and a row that is not valid leave no trace in a loss that they are not rows of.
    first = torch.arange(9) == 0
    hidden = (ids == ids[0]) & ~first | ~ok
    grad, = torch.autograd.grad(p2_contrast.info_nce(a[:1].expand(9, -1), b, hidden[None], first, 0.3), Z)
    touched = grad[:, :, 1].abs().sum(-1).flatten() > 0
    assert touched.tolist() == [True, True, True, True, True, False, True, False, True]


def test_stage_2_does_not_move_the_canonical_rows():
    Z = F.normalize(torch.randn(3, 3, 3, 5), dim=-1).requires_grad_()
    one, two = (torch.autograd.grad(p2_contrast.contrast(Z, MEANINGS, VALID, stage, 0.3), Z)[0] for stage in (1, 2))
    assert torch.allclose(one[:, :, :2], two[:, :, :2]) and one[:, :, 2].abs().sum() == 0 < two[:, :, 2].abs().sum()


def test_swaps_beaten():
    east, north, west = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    colour, swap, attribute = (data.VARIANTS.index(name) for name in ('colour', 'argument swap', 'attribute swap'))
    Z = torch.stack([torch.stack(views).view(2, 2, 2) for views in (                # (scene, paraphrase, swap, its own)
        (east, east, west, west),                                                   # both find their own
        (east, north, north, east),                                                 # neither does
        (east, east, north, west),                                                  # the scene does, the swap does not
        (west, east, east, west))])                                                 # not a swap: does not count
    variants = torch.tensor([[0, swap], [0, attribute], [0, swap], [0, colour]])
    valid = torch.ones(4, 2, dtype=torch.bool)
    assert p2_contrast.swaps_beaten(Z, variants, valid, 3).item() == pytest.approx(3 / 6)
    valid[1, 1] = False
    assert p2_contrast.swaps_beaten(Z, variants, valid, 1).item() == pytest.approx(3 / 4)
    assert p2_contrast.swaps_beaten(Z, variants, torch.zeros_like(valid), 3).isnan(), 'no swap, no verdict'
    free = torch.cat((Z, Z[:, :, 1:].roll(1, 1)), dim=2)      # stage 2 asks the third view, here each other's sentence
    assert p2_contrast.swaps_beaten(free, variants, valid, 2) == 0


def test_retrieval_metrics():
    """With unit queries e_i the similarities are what one writes down."""
    similarity = torch.full((6, 6), 0.1).fill_diagonal_(0.5)
    similarity[1, 3] = 0.6                                    # second
    similarity[2] = torch.tensor([0.6, 0.6, 0.5, 0.6, 0.6, 0.6])   # sixth
    rivals = torch.full((6, len(data.FAMILIES)), 0.2)
    valid = torch.ones_like(rivals, dtype=torch.bool)
    rivals[3, 0] = 0.7                                        # beaten by a change of colour
    rivals[4, 4], valid[4, 4] = 0.7, False                    # would be by a swap, but has none
    negatives = torch.zeros(6, len(data.FAMILIES), 6)
    negatives[torch.arange(6), :, torch.arange(6)] = rivals
    m = p2_contrast.retrieval_metrics(torch.eye(6), similarity.T, negatives, valid)
    assert m['r1'] == pytest.approx(4 / 6) and m['r5'] == pytest.approx(5 / 6) and m['r1_hard'] == pytest.approx(3 / 6)
    assert m['paraphrase_cosine'] == pytest.approx(0.5)
    assert m['gap_colour'] == pytest.approx((5 * 0.3 - 0.2) / 6) and m['wins_colour'] == pytest.approx(5 / 6)
    assert m['gap_argument swap'] == pytest.approx(0.3) and m['wins_argument swap'] == 1
    assert m['gap'] == pytest.approx((34 * 0.3 - 0.2) / 35)
    assert {f'{kind}_{family}' for kind in ('gap', 'wins') for family in data.FAMILIES} <= m.keys()
    tied = p2_contrast.retrieval_metrics(torch.ones(6, 1), torch.ones(6, 1), torch.ones(6, 6, 1), valid & False)
    assert tied['r1'] == tied['r5'] == tied['gap'] == 0, 'a collapsed z finds nothing'
    assert not any(name.startswith(('gap_', 'wins_')) for name in tied)


def test_cached_backward_has_the_gradient_of_the_whole_batch():
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)).double()
    x, meanings = torch.randn(8, 2, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])[:, None]
    sizes = []

    def forward(part):
        z = F.normalize(net(part), dim=-1)
        return z, z[:, 0].square().sum(-1).mean() + part.mean() * z.mean()

    def loss_of_all(z):
        sizes.append(len(z))
        return p2_contrast.contrast(z[:, None], meanings, torch.ones(8, 1, dtype=torch.bool), 3, 0.2), 'log'
    torch.manual_seed(1)
    outputs = [forward(part) for part in x.chunk(4)]
    direct = loss_of_all(torch.cat([z for z, _ in outputs]))[0]
    (direct + sum(local for _, local in outputs) / 4).backward()
    state, expected = torch.get_rng_state(), [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.manual_seed(1)
    loss, log = runtime.cached_backward(forward, x.chunk(4), loss_of_all)
    assert torch.equal(loss, direct.detach()) and log == 'log' and sizes == [8, 8]
    assert all(torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12) for p, g in zip(net.parameters(), expected))
    assert torch.equal(torch.get_rng_state(), state), 'the same dropout, and no more of it'


def test_contrast_batch(here):
    corpus = data.load(here.config)[0]['train']
    for stage, views in ((1, 3), (2, 3), (3, 2)):
        scenes, variants, renderings, valid = p2_contrast.contrast_batch(corpus, 16, 0, 5, stage, 2, 'count')
        assert scenes.shape == variants.shape == valid.shape == (16, 3) and renderings.shape == (16, 3, views)
        assert valid[:, 0].all() and (variants[:, 0] == 0).all() and (variants[~valid] == 0).all()
        assert not (variants == data.VARIANTS.index('count')).any(), 'left out'
        assert (corpus.count[scenes, variants] > 0).all()
        canonical = renderings < corpus.canonical
        assert canonical[:, :, :2].all() and not canonical[:, :, 2].any() if stage < 3 else not canonical.all()
        assert (renderings[:, :, 0] != renderings[:, :, 1]).all()
    again = p2_contrast.contrast_batch(corpus, 16, 0, 5, 3, 2, 'count')
    assert torch.equal(again[2], renderings) and not torch.equal(
        p2_contrast.contrast_batch(corpus, 16, 0, 6, 3, 2, 'count')[0], scenes)


def test_confused_pairs_fill_three_quarters_of_the_batch(here):
    corpus, run = data.load(here.config)[0]['train'], SimpleNamespace(world=1)
    size = corpus.size
    angle = torch.arange(size) * (torch.pi / size)            # neighbours on a circle; 3 and 4 are nearest of all
    angle[4] = angle[3] + 1e-3
    z = torch.stack((angle.cos(), angle.sin()), dim=1)
    pairs = p2_contrast.confused_pairs(lambda x: z[:len(x)], corpus, run, share=4 / size, rows=7)
    assert pairs.shape == (4, 2) and {(3, 4), (4, 3)} <= set(map(tuple, pairs.tolist()))
    assert all(0 < abs(a - b) <= 2 for a, b in pairs.tolist())
    same = corpus.meanings[:, 0].clone()
    try:
        corpus.meanings[4, 0] = corpus.meanings[3, 0]         # now they mean the same: not confused at all
        pairs = p2_contrast.confused_pairs(lambda x: z[:len(x)], corpus, run, share=1.0)
        assert len(pairs) == size and not {(3, 4), (4, 3)} & set(map(tuple, pairs.tolist()))
        assert (corpus.meanings[pairs[:, 0], 0] != corpus.meanings[pairs[:, 1], 0]).all()
    finally:
        corpus.meanings[:, 0] = same
    scenes = p2_contrast.contrast_batch(corpus, 16, 0, 5, 3, 2, '', pairs)[0][:, 0]
    partner = dict(pairs.tolist())
    assert [partner[s] for s in scenes[:6].tolist()] == scenes[6:12].tolist()
    assert torch.equal(scenes[12:], p2_contrast.contrast_batch(corpus, 16, 0, 5, 3, 2, '')[0][12:, 0])


GOOD_MEANING = {'r1': 0.6, 'r5': 0.85, 'r1_hard': 0.85, 'gap': 0.25}
GOOD_MEANING |= {f'{kind}_{f}': value for kind, value in (('gap', 0.25), ('wins', 0.95)) for f in data.FAMILIES}


def test_semantic_gate():
    good = GOOD_MEANING
    base = {'TF-IDF': dict.fromkeys(good, 0.125)}
    criteria = p2_contrast.semantic_gate(good, base)
    assert len(criteria) == 4 + 2 * len(data.FAMILIES) and not failing(criteria)
    assert all(row[4] == 'TF-IDF 0.12' for row in criteria)
    names = ['r1', 'r5', 'r1_hard', 'gap', *(f'{kind}_{f}' for f in data.FAMILIES for kind in ('gap', 'wins'))]
    for i, name in enumerate(names):
        for value in (good[name] - 0.01, math.nan):
            assert failing(p2_contrast.semantic_gate(good | {name: value}, base)) == [i]
    few = {name: value for name, value in good.items() if not name.endswith('swap')}
    assert len(p2_contrast.semantic_gate(few, base)) == len(criteria) - 4, 'a corpus may lack families'


# ---- P3 -------------------------------------------------------------------------------------------------------------

def test_shift_is_a_slice_of_the_canvas_with_its_border_repeated():
    V, pad = torch.randn(25, 3, 7, 9), 3
    dy, dx = (d.flatten() for d in torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing='ij'))
    moved = p3_jitter.shift(V, dy, dx)
    for v, y, x, result in zip(V.numpy(), dy, dx, moved.numpy()):
        wide = np.pad(v, ((0, 0), (pad, pad), (pad, pad)), mode='edge')
        assert (result == wide[:, pad - y:pad - y + 7, pad - x:pad - x + 9]).all()


def test_cut_out():
    V = torch.randn(3, 2, 8, 8)
    top, left = torch.tensor([0, 2, 6]), torch.tensor([5, 0, 6])
    for v, y, x, result in zip(V, top, left, p3_jitter.cut_out(V, top, left, 3)):
        expected = v.clone()
        expected[:, y:y + 3, x:x + 3] = v.mean((1, 2))[:, None, None]
        assert torch.equal(result, expected)


def test_jitter_is_decided_by_u_alone():
    V, u = torch.randn(64, 2, 12, 12), torch.rand(64, 7)
    whole = p3_jitter.jitter(V, u, 0.5, 2, 0.8, 4)
    torch.manual_seed(9)
    parts = [p3_jitter.jitter(v, t, 0.5, 2, 0.8, 4) for v, t in zip(V.split(16), u.split(16))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    none = (u[:, :3] >= 0.5).all(1)
    assert none.any() and torch.equal(whole[none], V[none]) and not torch.equal(whole[~none], V[~none])
    assert torch.equal(p3_jitter.jitter(V, u, 0.0, 2, 0.8, 4), V)
    least, most = torch.zeros(1, 7), torch.full((1, 7), 1 - 2 ** -24)
    for k, change in ((0, lambda V, d: p3_jitter.shift(V, d, d)), (1, lambda V, d: priors.gaussian_blur(V, 0.8)),
                      (2, lambda V, d: p3_jitter.cut_out(V, 4 + 2 * d, 4 + 2 * d, 4))):
        for u, d in ((least, -2), (most, 2)):
            u = u.clone()
            u[:, :3] = 1.0
            u[:, k] = 0.0
            expected = change(V[:1], torch.tensor([d]))
            assert torch.allclose(p3_jitter.jitter(V[:1], u, 0.5, 2, 0.8, 4), expected, atol=1e-6)


def test_later_gates():
    before, now = {'r1': 0.90, 'jitter_cosine': 0.6}, {'r1': 0.89, 'jitter_cosine': 0.9}
    assert not failing(p3_jitter.gate(now, before, [GOOD_CANVAS] * 3))
    assert failing(p3_jitter.gate(now | {'r1': 0.87}, before, [GOOD_CANVAS] * 3)) == [1]
    lattice = [GOOD_CANVAS | {'lattice': 3.0}] * 3
    assert failing(p3_jitter.gate(now | {'jitter_cosine': 0.89}, before, lattice)) == [0, 9]

    m = {'content_accuracy': 0.9, 'content_concept': 0.9, 'shuffle_ce_rise': 0.3, 'cells_content': 3.0,
         'cells_function': 4.0, 'graph_exact': 0.85, 'graph_f1': 0.9, 'unreadable': 0.0}
    tables = {'decoder': m, 'no canvas': m}
    assert not failing(p4_decoder.gate(m, tables, True)) and len(p4_decoder.gate(m, tables, False)) == 4
    assert failing(p4_decoder.gate(m | {'cells_content': 4.0, 'graph_exact': 0.84}, tables, True)) == [3, 4]

    m |= GOOD_MEANING | {'jitter_cosine': 0.9}
    ways = {'best of k': {'graph_f1': 0.85, 'rouge_l': 0.55, 'cosine': 0.9}}
    criteria = p5_roundtrip.gate(ways, m, [GOOD_CANVAS] * 3, True)
    assert not failing(criteria) and len(p5_roundtrip.gate(ways, m, [GOOD_CANVAS] * 3, False)) == len(criteria) - 1
    ways = {'best of k': {'graph_f1': 0.84, 'rouge_l': 0.56, 'cosine': 0.89}}
    assert failing(p5_roundtrip.gate(ways, m | {'r1': 0.5}, [GOOD_CANVAS] * 3, True)) == [0, 1, 2, 3 + 8]


# ---- P4 and P5 ------------------------------------------------------------------------------------------------------

def test_shuffle_canvas_keeps_the_pixels_and_loses_their_places():
    V = torch.randn(3, 2, 4, 4)
    shuffled = p4_decoder.shuffle_canvas(V)
    sums, sums_shuffled = (v.flatten(2).sum(1).sort(-1)[0] for v in (V, shuffled))
    assert torch.equal(sums, sums_shuffled), 'the channels of a pixel stay together'
    assert not torch.equal(shuffled, V) and torch.equal(shuffled[1:2], p4_decoder.shuffle_canvas(V[1:2]))


def test_graph_metrics():
    original = 'a red cube is on a blue ball'
    texts = ['a blue ball is under a red cube', 'a blue ball is on a red cube', 'red red red']
    m = p4_decoder.graph_metrics(texts, [original] * 3)
    assert m['graph_f1'] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert m['graph_exact'] == pytest.approx(1 / 3) == m['unreadable']


def test_paraphrase_metrics():
    original = 'a red cube is on a blue ball'
    m = p5_roundtrip.paraphrase_metrics([original, 'nothing of that'], [original] * 2, [1.0, 0.5])
    assert (m['rouge_l'], m['cosine'], m['distinct'], m['graph_exact']) == (0.5, 0.75, 0.5, 0.5)


def test_copied_marks_the_tokens_that_complete_an_n_gram():
    x = torch.tensor([[10, 11, 12, 13, data.EOS, 0], [20, 21, 22, 20, 21, data.EOS]])
    y = torch.tensor([[9, 10, 11, 12, 13, data.EOS, 0, 0], [21, 20, 21, 22, 22, 20, 21, data.EOS]])
    for n, first, second in ((2, [2, 3, 4], [2, 3, 5, 6]), (3, [3, 4], [3, 6]), (4, [4], [])):
        marked = [row.nonzero()[:, 0].tolist() for row in p5_roundtrip.copied(y, x, n)]
        assert marked == [first, second], n


def test_copy_suppression():
    x, y = torch.tensor([[10, 11, 12, 13, data.EOS]]), torch.tensor([[9, 10, 11, 12, data.EOS]])
    logits = torch.randn(1, 5, 16, requires_grad=True)
    assert p5_roundtrip.copy_suppression(logits.log_softmax(-1), y, x + 20, 3) == 0
    loss = p5_roundtrip.copy_suppression(logits.log_softmax(-1), y, x, 3)
    p = logits.softmax(-1)[0, 3, 12]
    assert loss.item() == pytest.approx(-math.log(1 - p.item()) / 5, rel=1e-5)
    loss.backward()
    assert logits.grad[0, 3, 12] > 0 and logits.grad[0, [0, 1, 2, 4]].abs().sum() == 0
    certain = torch.full((1, 5, 16), -50.0).scatter(2, y[:, :, None], 0.0)
    assert p5_roundtrip.copy_suppression(certain, y, x, 3).isfinite()


def test_straight_through_is_one_hot_forward_and_soft_backward():
    y, w = torch.tensor([[5, 7, data.EOS, data.PAD]]), torch.randn(1, 4, 9)
    logits = torch.randn(1, 4, 9, requires_grad=True)
    hard = p5_roundtrip.straight_through(logits, y)
    assert torch.allclose(hard[:, :3], F.one_hot(y[:, :3], 9).float(), atol=1e-6) and (hard[:, 3] == 0).all()
    grad, = torch.autograd.grad((hard * w).sum(), logits)
    soft, = torch.autograd.grad((logits.softmax(-1) * w).sum(), logits)
    assert torch.allclose(grad[:, :3], soft[:, :3]) and (grad[:, 3] == 0).all() and grad[:, :3].abs().sum() > 0


def test_candidates_of_a_batch_are_those_of_its_rows():
    """Drawn by u alone: cutting the batch for ranks changes no sentence."""
    arch = FULL | {'vocab_size': 40, 'dim': 16, 'layers': 1, 'heads': 2, 'hidden': 16, 'cross_hidden': 16,
                   'cross_layers': 1, 'query_grid': 4, 'size': 16, 'patch': 4, 'z_dim': 8, 'readout_hidden': 8,
                   'dec_dim': 16, 'dec_layers': 1, 'dec_heads': 2, 'dec_hidden': 16}
    nets = p4_decoder.build(arch, controls=False)
    for net in nets.values():
        net.eval()
    V, u = torch.randn(4, 6, 16, 16), torch.rand(4, 3, 10)
    z = nets['readout'](V).detach()
    y, cosine = p5_roundtrip.candidates(nets, V, z, 3, 10, 0.9, u)
    assert y.shape == (4, 3, 10) and cosine.shape == (4, 3) and len(y.flatten(0, 1).unique(dim=0)) > 6
    parts = [p5_roundtrip.candidates(nets, V[i:i + 2], z[i:i + 2], 3, 10, 0.9, u[i:i + 2]) for i in (0, 2)]
    assert torch.equal(torch.cat([part for part, _ in parts]), y)
    assert torch.allclose(torch.cat([c for _, c in parts]), cosine, atol=1e-5)
    again = nets['readout'](nets['encoder'](y[:, 1]))
    assert torch.allclose((again * z).sum(-1), cosine[:, 1], atol=1e-5)


# ---- P6 -------------------------------------------------------------------------------------------------------------

def test_signal_share_is_the_cosine_schedule():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = p6_diffusion.signal_share(t)
    assert (a.diff() < 0).all() and a[0] == pytest.approx(1 - 1e-5) and a[-1] == pytest.approx(1e-5)
    by_hand = [(math.cos((x + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
               for x in (0.25, 0.5, 0.75)]
    assert a[[25, 50, 75]].tolist() == pytest.approx(by_hand, rel=1e-9)


def test_add_noise_keeps_the_variance_and_denoise_undoes_it():
    V, noise, t = torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.linspace(0, 0.98, 64)
    V_t = p6_diffusion.add_noise(V, t, noise)
    assert V_t.var((1, 2, 3)).tolist() == pytest.approx([1.0] * 64, abs=0.2)
    torch.testing.assert_close(p6_diffusion.denoise(V_t, noise, t), V, atol=1e-3, rtol=1e-3)


def test_a_net_that_says_nothing_leaves_the_linear_guess():
    """On white canvases of unit variance sqrt(1 - a) V_t is off by a of the noise's variance, whatever t."""
    V, noise, t = torch.randn(64, 2, 16, 16), torch.randn(64, 2, 16, 16), torch.linspace(0.1, 0.99, 64)
    guess = partial(p6_diffusion.noise_in, lambda V_t, t: torch.zeros_like(V_t))
    error = (guess(p6_diffusion.add_noise(V, t, noise), t) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(error, p6_diffusion.signal_share(t), atol=0.12, rtol=0)


def test_diffusion_loss_weighs_by_min_snr():
    """A net that predicts nothing has error |noise|^2; what is left is the weight."""
    t, noise = torch.tensor([0.02, 0.5, 0.9]), torch.ones(3, 1, 4, 4)
    nothing = lambda V_t, t: torch.zeros_like(V_t)
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise).item() == pytest.approx(1.0)
    a = p6_diffusion.signal_share(t)
    weights = [min(snr, 5.0) / snr for snr in (a / (1 - a)).tolist()]
    assert weights[0] < 0.02 and weights[1:] == [1.0, 1.0]
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise, 5.0).item() == pytest.approx(sum(weights) / 3)


def test_prior_loss_pulls_towards_the_denoised_canvas_and_nothing_flows_through_the_net():
    net = nn.Conv2d(2, 2, 1)
    V, t, noise = torch.randn(3, 2, 8, 8, requires_grad=True), torch.tensor([0.1, 0.2, 0.3]), torch.randn(3, 2, 8, 8)
    p6_diffusion.prior_loss(lambda V_t, t: net(V_t), V, t, noise).backward()
    with torch.no_grad():
        V_t = p6_diffusion.add_noise(V, t, noise)
        target = p6_diffusion.denoise(V_t, net(V_t), t)
    torch.testing.assert_close(V.grad, 2 * (V.detach() - target) / V.numel())
    assert all(p.grad is None for p in net.parameters())


CPU = SimpleNamespace(device=torch.device('cpu'), autocast=lambda: torch.autocast('cpu', enabled=False))


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_ddim_with_a_perfect_net(eta):
    """The best prediction is known for one canvas (it comes back) and for Gaussian pixels (their variance does)."""
    generator = torch.Generator().manual_seed(0)
    noise, only = torch.randn(32, 2, 8, 8, generator=generator), torch.randn(1, 2, 8, 8, generator=generator)

    def knows_it(V_t, t):
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return (V_t - a.sqrt() * only) / (1 - a).sqrt()

    def gaussian(V_t, t):
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return (1 - a).sqrt() * V_t / (a * 0.25 + 1 - a)                              # pixels of variance 0.25

    torch.testing.assert_close(p6_diffusion.ddim(knows_it, noise, 20, eta, generator, CPU),
                               only.expand(32, -1, -1, -1), atol=0.02, rtol=0)
    assert p6_diffusion.ddim(gaussian, noise, 200, eta, generator, CPU).var().item() == pytest.approx(0.25, rel=0.1)


def test_wiener_filter_is_the_best_on_gaussian_fields():
    """On fields of known power the closed form is what that filter measures, and no skill is 1 at t = 1."""
    generator = torch.Generator().manual_seed(0)
    fy, fx = torch.fft.fftfreq(16)[:, None], torch.fft.rfftfreq(16)
    amplitude = 1 / (0.1 + torch.hypot(fy, fx))
    V = torch.fft.irfft2(torch.fft.rfft2(torch.randn(4000, 2, 16, 16, generator=generator)) * amplitude, s=(16, 16))
    V = V / V.std()
    power = torch.fft.fft2(V, norm='ortho').abs().square().mean(0)

    def wiener(V_t, t):
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return torch.fft.ifft2((1 - a).sqrt() / (a * power + 1 - a) * torch.fft.fft2(V_t)).real

    metrics = p6_diffusion.diffusion_metrics(wiener, V, CPU, per=2000)
    for quarter in p6_diffusion.QUARTERS:
        assert metrics[f'diffusion_{quarter}'] == pytest.approx(metrics[f'wiener_{quarter}'], rel=0.03)
    assert metrics['wiener_t 0-25%'] > 0.5 > 0.2 > metrics['wiener_t 75-100%'] > 0


def test_scramble_keeps_the_spectrum_and_loses_the_picture():
    V = torch.randn(5, 2, 16, 16).cumsum(-1)
    scrambled = p6_diffusion.scramble(V, torch.Generator().manual_seed(0))
    torch.testing.assert_close(priors.radial_power(scrambled)[0], priors.radial_power(V)[0], rtol=1e-3, atol=1e-3)
    assert (scrambled - V).abs().mean() > 0.5 * V.std()


def test_prior_gate_asks_the_control():
    quarters = {f'{kind}_{q}': value for q in p6_diffusion.QUARTERS
                for kind, value in (('diffusion', 0.2), ('wiener', 0.3))}
    before = {'prior_spectrum': 1.0, 'prior_tv': 1.0, 'prior': 1.0, 'paraphrase_distance': 0.5, 'r1': 0.95, 'r5': 1.0,
              'r1_hard': 0.9, 'gap_colour': 0.3, 'gap_count': 0.3}
    m = GOOD_MEANING | quarters | before | {'prior_spectrum': 0.8, 'prior_tv': 0.9, 'prior': 0.9,
                                            'paraphrase_distance': 0.4, 'jitter_cosine': 0.9,
                                            'content_accuracy': 0.9, 'shuffle_ce_rise': 0.3}
    ways = {'best of k': {'graph_f1': 0.85, 'rouge_l': 0.55, 'cosine': 0.9}}

    def fails(other, **changed):
        criteria = p6_diffusion.gate(m | changed, before, other, ways, [GOOD_CANVAS] * 3, True)
        return [name for name, _, _, passed, *_ in criteria if not passed]

    control = before | {'prior_spectrum': 0.9, 'prior_tv': 0.95, 'prior': 0.95}
    assert not fails(control)
    assert fails(None) == ['compared with a control (--control) +']
    assert fails(control | {'prior_spectrum': 0.7, 'paraphrase_distance': 0.43}) == [
        'spectrum prior, change, against the control +', 'paraphrase distance falls by, against the control +']
    assert fails(control | {'r5': 1.0}, r5=0.98) == [
        'retrieval, largest drop of the three R, points', 'retrieval, largest drop of the three R, points, against the '
        'control +']
    assert fails(control, gap_count=0.27) == [
        'family gaps, largest drop +', 'family gaps, largest drop, against the control +']
    assert fails(control, **{'diffusion_t 0-25%': 0.31}, prior_tv=1.1, paraphrase_distance=0.46) == [
        'diffusion loss over that of a Wiener filter, worst quarter of t +', 'TV, change',
        'paraphrase distance falls by', 'TV, change, against the control +',
        'paraphrase distance falls by, against the control +']


def test_control(here, capsys):
    run(tiny('p6', 'p6/control', '--lambda_prior=0'))
    control, start = load('p6/control'), load('out/p5')
    log = rows('p6/control/metrics.jsonl')
    assert [row['step'] for row in log] == [1, 1, 2], 'the control begins where the encoder begins to move'
    assert all(torch.equal(control['nets']['unet'][key], value) for key, value in control['ema']['unet'].items())
    assert not all(torch.equal(control['nets']['encoder'][key], value)
                   for key, value in start['ema']['encoder'].items())
    assert not Path('p6/control/gate.json').exists()
    run(tiny('p6', 'p6/with', '--control=p6/control'))
    names = [row['name'] for row in json.loads(Path('p6/with/gate.json').read_text())['criteria']]
    assert 'paraphrase distance falls by, against the control +' in names
    capsys.readouterr()
    for words, hint in ((['--control=nowhere'], '--lambda_prior=0 --out_dir=nowhere'),
                        (['--control=p6/with'], 'is no control'),
                        (['--control=p6/control', '--seed=5'], 'seed differs'),
                        (['--t_low=0.5'], 't_low=0.5'), (['--unet_steps=2'], 'no encoder moves'),
                        (['--buffer_size=2'], 'buffer_size=2'), (['--unet_dim=12'], 'multiple of 8')):
        with pytest.raises(SystemExit) as stop:
            run(tiny('p6', 'p6/none', *words))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count('\n') == 1 and hint in error, error


# ---- P7 -------------------------------------------------------------------------------------------------------------

def test_an_ablation_branches_off_the_baseline_where_it_changes_something(monkeypatch):
    monkeypatch.setattr(p7_ablate, 'seeds', 2)
    queue = p7_ablate.runs(['copy suppression', 'jitter', 'tv'])
    folders = {(run.name, run.seed, run.phase): run.folder for run in queue}
    assert [sum(key[0] == name for key in folders) for name in ('baseline', 'copy suppression', 'jitter', 'tv')] == [
        10, 2, 6, 10]
    for run in queue:
        assert f'--seed={run.seed}' in run.command and f'--out_dir={run.folder}' in run.command
        assert (run.before is None) == (run.phase == 'p1')
        if run.before:
            phase = run.before.parent.name
            home = run.name if (run.name, run.seed, phase) in folders else 'baseline'
            assert phase == f'p{int(run.phase[1]) - 1}' and run.before.parent == folders[home, run.seed, phase]
            assert f'--init_from={run.before}' in run.command
    words = {(run.name, run.phase): run.command for run in queue}
    assert '--lambda_copy=0' in words['copy suppression', 'p5'] and '--jitter_prob=0' in words['jitter', 'p3']
    assert '--jitter_prob=0' not in words['jitter', 'p4'] and '--lr_steps=1000' in words['tv', 'p2']
    assert words['tv', 'p1'].index('--lambda_tv=0') > words['tv', 'p1'].index('--lambda_tv=0.05'), 'the later word wins'


@pytest.mark.parametrize('preset', p7_ablate.PRESETS)
def test_every_override_is_a_setting_of_its_phase(preset):
    for name, changes in p7_ablate.ABLATIONS.items():
        for phase, script in p7_ablate.SCRIPTS.items():
            module = vars({'p1': p1_canvas, 'p2': p2_contrast, 'p3': p3_jitter, 'p4': p4_decoder,
                           'p5': p5_roundtrip}[phase])
            words = [*p7_ablate.PRESETS[preset][phase].split(), *changes.get(phase, '').split()]
            settings = dict(module)
            changed = runtime.configure(settings, words)
            assert changes.get(phase) is None or changed != {k: module[k] for k in changed}, (name, phase)


def test_effects_by_hand():
    n = len(p7_ablate.TARGETS)
    base = np.tile(np.array([[1.0], [2.0], [3.0]]), n)                                # mean 2, sd 1
    for shift, expected in ((-4.0, 1), (4.0, -1), (-1.5, 0)):                         # the last: the seeds overlap
        drop, side = p7_ablate.effects(base, base + shift * p7_ablate.SIGN)
        assert drop == pytest.approx(-shift) and (side == expected).all()
    lost = base.copy()
    lost[0, 0] = math.nan
    assert p7_ablate.effects(base, lost)[1].tolist() == [0] * n and p7_ablate.effects(base, lost[:1])[1][0] == 1
    assert p7_ablate.effects(base * 0, base * 0 - 0.002 * p7_ablate.SIGN)[0] == pytest.approx(2.0), 'no spread at all'
    assert p7_ablate.by_chance(3, 3) == pytest.approx(n / 20)


def test_target_values_of_a_log_with_holes():
    metrics = {'r1': 0.5, 'r5': None, 'gap_colour': 0.3, 'gap_count': 0.1, 'graph_f1': 0.9, 'rouge_l': 0.3,
               'cosine': 0.9, 'content_accuracy': 1.0, 'jitter_cosine': 0.9, 'alpha': [1.5, None], 'tv': 1.0,
               'kurtosis': [5.0, 7.0], 'max_correlation': 0.1, 'share_total': 0.9}
    values = dict(zip((label for label, *_ in p7_ablate.TARGETS), p7_ablate.target_values(metrics)))
    assert math.isnan(values['R@5']) and math.isnan(values['|slope - 2|'])
    assert values['R@1'] == 0.5 and values['worst-family gap'] == 0.1 and values['kurtosis'] == 5.0


def test_ablations_run_once_and_make_a_table(here, capsys):
    words = [str(ROOT / 'p7_ablate.py'), '--out_dir=out/p7', '--only=copy suppression', '--preset=smoke',
             '--device=cpu']
    run([*words, '--seeds=1', '--dry_run=true'])
    out = capsys.readouterr().out
    assert out.startswith('6 runs to do') and out.count('\npython p') == 6 and not Path('out/p7').exists()
    run([*words, '--seeds=1'])
    out = capsys.readouterr().out
    assert '| baseline | 1 |' in out and '| copy suppression | 1 |' in out and '| n < 2 |' in out
    ends = {path: path.stat().st_mtime_ns for path in Path('out/p7/smoke').glob('*/seed0/p5/ckpt.pt')}
    assert len(ends) == 2
    run([*words, '--seeds=1'])
    assert capsys.readouterr().out.startswith('0 runs to do')
    assert all(path.stat().st_mtime_ns == end for path, end in ends.items())
    for more, hint in (['--only=the moon'], 'copy suppression'), (['--seeds=0'], 'at least one seed'):
        with pytest.raises(SystemExit) as stop:
            run([*words, *more])
        assert stop.value.code == 2 and hint in capsys.readouterr().err
    facts = Path('out/p7/smoke/baseline/seed0/p3/run.json')
    facts.write_text(facts.read_text().replace('--max_steps=2', '--max_steps=3'))
    with pytest.raises(SystemExit) as stop:
        run([*words, '--seeds=1'])
    assert stop.value.code == 2 and 'other settings' in capsys.readouterr().err


def test_a_failing_ablation_stops_only_what_waits_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    for name, value in (('out_dir', 'p7'), ('seeds', 1), ('jobs', 2), ('device', 'cpu')):
        monkeypatch.setattr(p7_ablate, name, value)
    def stand_in(run):
        """A program that writes what a finished run has, or fails."""
        code = ('import sys, json, pathlib; folder = pathlib.Path(sys.argv[1].partition("=")[2])\n'
                + ('sys.exit(1)\n' if run.name == 'jitter' and run.phase == 'p3' else '')
                + '[(folder / name).write_text("{}") for name in ("gate.json", "ckpt.pt")]\n')
        path = tmp_path / f'{run.name}_{run.phase}.py'
        path.write_text(code)
        return run._replace(command=[sys.executable, str(path), *run.command[2:]])
    queue = [stand_in(run) for run in p7_ablate.runs(['jitter', 'copy suppression'])]
    failed = p7_ablate.work(queue)
    signal.signal(signal.SIGTERM, handler)
    assert [(run.name, run.phase) for run in failed] == [('jitter', phase) for phase in ('p3', 'p4', 'p5')]
    assert all((run.folder / 'gate.json').exists() for run in queue if run.name != 'jitter')
    assert 'jitter, seed 0, p3 FAILED' in capsys.readouterr().out


def test_ablation_table_gate_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    n = len(p7_ablate.TARGETS)
    base = np.random.default_rng(0).normal(1.0, 0.1, (3, n))
    found = {'baseline': base, 'InfoNCE': base - 2 * p7_ablate.SIGN, 'tv': base.copy(), 'cov': base[:1]}
    lines = {line.split('|')[1].strip(): line for line in p7_ablate.table(found).splitlines() if line.startswith('| ')}
    assert lines['InfoNCE'].count('**') == 2 * n and lines['InfoNCE'].endswith(f'| {n} |')
    assert lines['tv'].endswith('| 0 |') and lines['cov'].endswith('| n < 2 |')
    assert [row[3] for row in p7_ablate.gate(found)] == [True, False], 'what changes nothing fails, one seed is no row'
    p7_ablate.chart(found)
    assert (tmp_path / 'ablations.png').read_bytes()[:4] == b'\x89PNG'


# ---- sample.py ------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(here):
    return sample.TextCanvas('out/p6/ckpt.pt', 'cpu', 'float32')


TYPED = ['a red cube is on a blue ball', 'A red cube is on a blue ball.', '', '?!', 'zebra \x00 ünïcödé', 'red ' * 300,
         'two green discs are under a white box']


def test_encode_is_the_convention_of_embedding_benchmarks(model):
    z = model.encode(TYPED, batch_size=2, show_progress_bar=False)
    assert z.shape == (7, 32) and z.dtype == np.float32 and np.linalg.norm(z, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(z[0], z[1]) and np.array_equal(z[2], z[3]), 'as typed, and no words at all'
    assert model.cut == 1
    alone = np.concatenate([model.encode([sentence]) for sentence in TYPED])
    assert alone == pytest.approx(z, abs=1e-5), 'neither the company nor the padding matters'
    assert model.encode([]).shape == (0, 32)
    V, again = model.read(TYPED)
    assert V.shape == (7, 6, 32, 32) and again.numpy() == pytest.approx(z, abs=1e-5)


def test_embed_a_file(here, model, monkeypatch, capsys):
    monkeypatch.setattr(sample, 'CHUNK', 3)
    Path('lines.txt').write_bytes(b'A red cube is on a blue ball!\r\n\n\xff\xfe a ball\nred\ngreen\n\n' + b'red ' * 300)
    sample.embed_file(model, 'lines.txt', 'deep/z.npy', with_canvas=True)
    z, V = np.load('deep/z.npy'), np.load('deep/z_canvas.npy')
    assert z.shape == (7, 32) and z.dtype == np.float32 and V.shape == (7, 6, 32, 32) and V.dtype == np.float16
    expected = model.encode(['a red cube is on a blue ball', '', 'a ball', 'red', 'green', '', 'red ' * 300])
    assert z == pytest.approx(expected, abs=1e-5)
    assert '7 lines, 2 of them without words, 1 cut at 64 tokens' in capsys.readouterr().out
    assert sorted(path.name for path in Path('deep').iterdir()) == ['z.npy', 'z_canvas.npy']


def test_sample_speaks(here, capsys):
    words = [str(ROOT / 'sample.py'), '--init_from=out/p6/ckpt.pt', '--device=cpu', '--figures=shown']
    run([*words, '--text=Two red cubes are under a blue ball', '--text2=a blue ball is on two red cubes', '--draw=2',
         '--walk=3'])
    out = capsys.readouterr().out
    for start in ('read as      two red cubes are under a blue ball\n', 'said again ', 'paraphrase ',
                  'nearest counterfactual ', 'cosine ', '        0.00 ', '        0.50 ', '        1.00 ',
                  'the checker reads '):
        assert start in out
    names = {path.name for path in Path('shown').iterdir()}
    assert names == {'two_red_cubes_are_under_a_blue_ball.png', 'drawn.png'}
    run([*words, '--text=nobody was there'])
    assert 'not of the built-in grammar' in capsys.readouterr().out


def test_rouge_l_of_sample_is_rouge_scores():
    rand, words = random.Random(0), 'a red cube is on the blue ball 2'.split()
    for _ in range(200):
        a, b = (' '.join(rand.choices(words, k=rand.randrange(9))) for _ in range(2))
        assert sample.rouge_l(a, b) == pytest.approx(p5_roundtrip.ROUGE.score(a, b)['rougeL'].fmeasure), (a, b)


def test_a_cold_start_of_sample_imports_neither_matplotlib_nor_sklearn():
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import sample; print(*sys.modules)'
    modules = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split()
    assert 'torch' in modules and not {'matplotlib', 'sklearn', 'scipy', 'nltk', 'rouge_score'} & set(modules)


def test_sample_answers_until_an_empty_line(here, monkeypatch, capsys):
    lines = iter(['a red cube is on a blue ball', ''])
    monkeypatch.setattr('builtins.input', lambda prompt: next(lines))
    run([str(ROOT / 'sample.py'), '--init_from=out/p5/ckpt.pt', '--interactive=true', '--figures='])
    assert capsys.readouterr().out.count('read as') == 1


@pytest.mark.parametrize('words, hint', [
    ([], 'nothing to do'), (['--text=a', '--init_from=nowhere.pt'], 'bash runs/cpu.sh'),
    (['--text=a', '--init_from=out/p1/ckpt.pt'], 'not of p5 or p6'), (['--draw=2'], 'no diffusion prior'),
    (['--embed=nowhere.txt'], 'no such file'), (['--embed=empty.txt'], 'the file is empty'),
    (['--embed=good.txt', '--out=z.txt'], 'ends in .npy'), (['--text=a', '--paraphrases=0'], 'at least 1')])
def test_sample_refuses_in_one_line(here, bad_files, capsys, words, hint):
    Path('good.txt').write_text('a red cube\n')
    with pytest.raises(SystemExit) as stop:
        run([str(ROOT / 'sample.py'), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1 and hint in error
