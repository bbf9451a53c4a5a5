"""What goes wrong while a phase runs: a loss that is not a number, Ctrl-C at any point of a step, a rank that dies; and
strange command lines and corpora. Each ends in one clear line or goes on, and nothing saved is lost. drill.py, which
kills at random moments, is the longer version."""
import importlib
import itertools
import json
import math
import os
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import data
import model
import p1_canvas
import plot
import priors
import runtime

ROOT = Path(__file__).parent
MODULES = {phase: importlib.import_module(name) for phase, name in (
    ('p1', 'p1_canvas'), ('p2', 'p2_contrast'), ('p3', 'p3_jitter'), ('p4', 'p4_decoder'), ('p5', 'p5_roundtrip'),
    ('p6', 'p6_diffusion'))}
SIZES = {
    'p1': '--num_scenes=300 --vocab_size=1024 --query_grid=8 --patch=4 --dim=16 --layers=1 --heads=2 --hidden=32 '
          '--cross_layers=1 --cross_hidden=32 --rec_dim=16 --rec_layers=1 --batch_size=4 --prior_gate=0',
    'p2': '--batch_size=4 --readout_hidden=16 --z_dim=16', 'p3': '--batch_size=4',
    'p4': '--batch_size=4 --dec_dim=16 --dec_layers=1 --dec_heads=2 --dec_hidden=32',
    'p5': '--batch_size=4 --generated=4 --best_of_k=2',
    'p6': '--batch_size=4 --unet_dim=8 --unet_steps=1 --unet_batch=4 --buffer_size=16 --sample_steps=2 --drawn=4'}


def run(phase, out, *words, patch):
    """A tiny run of a phase in this process, from the phase before it in out/; `patch` undoes the settings."""
    module = MODULES[phase]
    before = [f'--init_from=out/p{int(phase[1]) - 1}/ckpt.pt'] if phase != 'p1' else []
    argv = [*SIZES[phase].split(), *before, f'--out_dir={out}', '--max_steps=3', '--lr_steps=3', '--warmup_steps=1',
            '--log_every=1', '--eval_every=1', '--device=cpu', *words]
    for name in ('config', *module.config):
        patch.setattr(module, name, getattr(module, name))
    module.config = runtime.configure(vars(module), argv)
    module.main()


@pytest.fixture(scope='module')
def chain(small):
    """P1 to P5 after two steps each, in the folder of the small corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small.folder)
        quiet(patch)
        for phase in list(SIZES)[:-1]:
            with pytest.MonkeyPatch.context() as own:
                run(phase, f'out/{phase}', '--max_steps=2', '--eval_every=1000', patch=own)
    return small.folder


def quiet(patch):
    """No figures, few held-out scenes."""
    patch.setattr(data, 'HELD_OUT_SIZE', 64)
    for name in ('evaluation', 'trends', 'samples_table'):
        patch.setattr(plot, name, lambda *_: None)


@pytest.fixture
def here(chain, monkeypatch):
    """Works in the folder of the chain; the handlers of signals that a run puts in place are undone."""
    monkeypatch.chdir(chain)
    quiet(monkeypatch)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield chain
    for number, handler in before.items():
        signal.signal(number, handler)


def load(folder):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def one_line(text):
    assert text.startswith('error: ') and text.count('\n') == 1 and text.endswith('\n'), text
    return text


# ---- a loss that is not a number ------------------------------------------------------------------------------------

def poison(value):
    """The same value (a tensor, a tuple or dict of them) with one that is not a number."""
    if isinstance(value, tuple):
        return poison(value[0]), *value[1:]
    if isinstance(value, dict):
        first = next(iter(value))
        return value | {first: poison(value[first])}
    return value * math.nan


TERMS = [                     # phase, where a term of its loss comes from
    *(('p1', priors, f'{name}_loss') for name in priors.PRIORS), ('p1', p1_canvas, 'reconstruction'),
    ('p2', MODULES['p2'], 'contrast'), ('p2', MODULES['p2'], 'reconstruction'), ('p3', MODULES['p3'], 'jitter'),
    ('p3', MODULES['p3'], 'contrast'), ('p4', MODULES['p4'], 'reconstruction'), ('p5', MODULES['p5'], 'round_trip'),
    ('p5', MODULES['p5'], 'contrast'), ('p5', MODULES['p5'], 'reconstruction'), ('p6', MODULES['p6'], 'diffusion_loss'),
    ('p6', MODULES['p6'], 'prior_loss')]


@pytest.mark.parametrize('phase, module, name', TERMS, ids=[f'{phase}-{name}' for phase, _, name in TERMS])
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_last_checkpoint_is_good(
        here, monkeypatch, capsys, phase, module, name):
    """From the second optimizer step on. The checkpoint before it can be read, is finite and can be resumed."""
    steps, ascend, really = [], torch.optim.AdamW.step, getattr(module, name)

    def step(*given, **more):
        steps.append(1)
        return ascend(*given, **more)
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(module, name, lambda *given, **more: (poison if steps and torch.is_grad_enabled() else
                                                              lambda value: value)(really(*given, **more)))
    out = f'nan/{phase}_{name}'
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        run(phase, out, patch=own)
    line = one_line(capsys.readouterr().err)
    assert stop.value.code == 1 and 'nan' in line and f'last good checkpoint: {out}/ckpt.pt (step 1)' in line
    checkpoint = load(out)
    assert checkpoint['step'] == 1
    assert all(p.isfinite().all() for net in checkpoint['nets'].values() for p in net.values())
    monkeypatch.setattr(module, name, really)
    with monkeypatch.context() as own:
        run(phase, out, '--resume=true', patch=own)
    assert load(out)['step'] == 3


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

PLACES = {'the batch': (data.Corpus, 'take'), 'forward': (model.TextEncoder, 'forward'),
          'the priors': (priors, 'image_prior_terms'), 'backward': (torch.Tensor, 'backward'),
          'the optimizer': (torch.optim.AdamW, 'step'), 'the average': (runtime.EMA, 'update'),
          'the log': (runtime.Run, 'log'), 'evaluation': (p1_canvas, 'canvas_metrics'),
          'saving': (runtime, 'write_checkpoint'), 'replacing the file': (os, 'replace')}


@pytest.mark.parametrize('place', PLACES)
def test_ctrl_c_anywhere_in_a_step_saves_and_goes_on_bit_for_bit(here, monkeypatch, capsys, place):
    words = ('p1', 'ctrl_c/straight')
    if not Path('ctrl_c/straight/gate.json').exists():
        with monkeypatch.context() as own:
            run(*words, patch=own)
    owner, name = PLACES[place]
    really, calls = getattr(owner, name), []

    def interrupted(*given, **more):
        if Path(out, 'ckpt.pt').exists() and not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return really(*given, **more)
    out = f'ctrl_c/{place.replace(" ", "_")}'
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        own.setattr(owner, name, interrupted)
        run('p1', out, patch=own)
    assert calls and stop.value.code == 130 and 'go on with --resume=true' in capsys.readouterr().out
    with monkeypatch.context() as own:
        run('p1', out, '--resume=true', patch=own)
    a, b = load('ctrl_c/straight'), load(out)
    for nets in ('nets', 'ema'):
        assert all(torch.equal(a[nets][net][key], b[nets][net][key]) for net in a[nets] for key in a[nets][net])


# ---- ranks ----------------------------------------------------------------------------------------------------------

DIES = '''"""A phase under torchrun whose rank 1 is killed at the beginning of step 2."""
import os, runpy, signal, sys
import plot, runtime
cosine_lr = runtime.cosine_lr


def dies(step, *rest):
    if step == 2 and os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    return cosine_lr(step, *rest)


plot.evaluation = plot.trends = lambda *_: None
runtime.cosine_lr = dies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_a_rank_that_dies_ends_all_and_the_run_goes_on_later(here, monkeypatch):
    Path('dies.py').write_text(DIES)
    words = [str(ROOT / 'p1_canvas.py'), *SIZES['p1'].split(), '--out_dir=dead', '--max_steps=3', '--lr_steps=3',
             '--warmup_steps=1', '--log_every=1', '--eval_every=1', '--device=cpu']
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           'dies.py', *words], env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(said) == 1 and 'has lost another rank' in said[0] and 'dead/ckpt.pt (step 2)' in said[0]
    assert load('dead')['step'] == 2
    with monkeypatch.context() as own:
        run('p1', 'dead', '--resume=true', patch=own)
    assert load('dead')['step'] == 3


@pytest.mark.parametrize('words, world, hint', [
    (['--batch_size=0'], 1, '--batch_size=0: expects at least 1'),
    (['--batch_size=3'], 2, 'batch_size 3 does not divide by 2 ranks'),
    (['--grad_accum=3'], 1, 'does not divide')])
@pytest.mark.parametrize('phase', MODULES)
def test_batches_that_cannot_be_cut(here, monkeypatch, capsys, phase, words, world, hint):
    monkeypatch.setenv('WORLD_SIZE', str(world))
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        run(phase, 'never', *words, patch=own)
    assert stop.value.code == 2 and hint in one_line(capsys.readouterr().err) and not Path('never').exists()


# ---- strange command lines and corpora ------------------------------------------------------------------------------

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200,
                derandomize=True)
KEYS = some.sampled_from([*p1_canvas.config]) | some.text(max_size=8)
VALUES = some.integers().map(str) | some.floats().map(str) | some.sampled_from(
    ['true', 'False', '', 'nan', '1e999', '-inf', '0x10', '1_000', '٣', 'None']) | some.text(max_size=12)
WORD = some.tuples(some.sampled_from(['--', '-', '']), KEYS, some.sampled_from(['=', ' ', '==', '']), VALUES)
WORDS = some.lists(WORD.map(''.join), max_size=4)


@FUZZ
@given(WORDS)
def test_any_command_line_is_taken_or_refused_in_one_line(capsys, words):
    module = {'__file__': p1_canvas.__file__, '__name__': 'fuzz', '__doc__': '', **p1_canvas.config}
    try:
        found = runtime.configure(module, [word for word in words if word not in ('--help', '-h')])
    except SystemExit as stop:
        assert stop.code == 2
        one_line(capsys.readouterr().err)
        return
    assert found.keys() == p1_canvas.config.keys()
    for key, value in found.items():
        assert type(value) is type(p1_canvas.config[key]) and (not isinstance(value, float) or math.isfinite(value))
        assert value >= runtime.MINIMUM.get(key, value)


SENTENCES = some.text(alphabet=string.ascii_letters + ' .ßé日', min_size=1, max_size=20)
GOOD = b'\n'.join(b'the number %d is a good one' % n for n in range(30))
GOOD_JSON = b'\n'.join(json.dumps({'original': f'number {n} is good'}).encode() for n in range(30))
JSON = some.recursive(some.none() | some.booleans() | some.floats() | some.text(max_size=10),
                      lambda inner: some.lists(inner, max_size=3) | some.dictionaries(
                          some.sampled_from(['original', 'paraphrases', 'counterfactuals', 'colour', 'x']), inner,
                          max_size=4), max_leaves=8)
LINES = some.lists(some.binary(max_size=40) | SENTENCES.map(str.encode) | JSON.map(lambda row: json.dumps(row).encode())
                   | some.just(b'x' * 1_000_000) | some.just(b'a ' * 500_000), max_size=6)


@FUZZ
@given(LINES, some.booleans(), some.sampled_from(['txt', 'jsonl']))
def test_any_corpus_is_read_or_refused_in_one_line(tmp_path, capsys, lines, sound, kind):
    """With thirty good lines before it, whatever comes after is read or left out; without them, one line says so."""
    path, good = tmp_path / f'c.{kind}', GOOD if kind == 'txt' else GOOD_JSON
    path.write_bytes(b'\n'.join([good, *lines] if sound else lines))
    said = []
    try:
        parts = data.read_corpus(path, said.append)
    except SystemExit as stop:
        assert stop.code == 2 and not sound
        assert 'at least 20' in one_line(capsys.readouterr().err)
        return
    parts = [[*rows] for rows in parts.values()]
    assert sound and len(said) <= 11 and all('\n' not in line and len(line) < 400 for line in said)
    assert sum(map(len, parts)) >= 30 and min(map(len, parts)) >= 3
    for groups, meanings, _ in itertools.chain(*parts):
        assert len(groups) == len(meanings) == len(data.VARIANTS) and groups[0]
        assert [bool(group) for group in groups] == [bool(id) for id in meanings]
        assert all(len(group) <= 8 for group in groups)
        assert all(data.normalize(line) == line and 0 < len(line) <= 2000 for group in groups for line in group)
