"""What goes wrong while a phase runs: a loss that is not a number, Ctrl-C at any point of a step, a rank that dies; and
strange command lines and corpora. Each ends in one clear line or goes on, and nothing saved is lost. tools/drill.py,
which kills at random moments, is the longer version."""
import ctypes
import errno
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
import english
import grammar
import model
import p1_canvas
import plot
import priors
import runtime
from tools import drill

ROOT = Path(__file__).parent.parent
MODULES = {path.name[:2]: importlib.import_module(path.stem) for path in runtime.scripts('p6')}
SIZES = {
    'p1': '--num_scenes=300 --vocab_size=1024 --query_grid=8 --patch=4 --dim=16 --layers=1 --heads=2 --hidden=32 '
          '--cross_layers=1 --cross_hidden=32 --rec_dim=16 --rec_layers=1 --batch_size=4 --prior_gate=0',
    'p2': '--batch_size=4 --readout_hidden=16 --z_dim=16', 'p3': '--batch_size=4',
    'p4': '--batch_size=4 --dec_dim=16 --dec_layers=1 --dec_heads=2 --dec_hidden=32',
    'p5': '--batch_size=4 --generated=4 --best_of_k=2',
    'p6': '--batch_size=4 --unet_dim=8 --unet_steps=1 --unet_batch=4 --buffer_size=16 --refresh=8 --sample_steps=2 '
          '--drawn=4'}


def run(phase, out, *words, patch):
    """A tiny run of a phase in this process, from the phase before it in out/; `patch` undoes the settings."""
    module, before = MODULES[phase], f'p{int(phase[1]) - 1}' if phase != 'p1' else ''
    origin = [f'--init_from=out/{before}/ckpt.pt'] if before else []
    argv = [*SIZES[phase].split(), *origin, f'--out_dir={out}', '--max_steps=3', '--lr_steps=3', '--warmup_steps=1',
            '--log_every=1', '--eval_every=1', '--device=cpu', *words]
    for name in ('config', *module.config):
        patch.setattr(module, name, getattr(module, name))
    patch.setattr(module, '__name__', '__main__')          # so it reads the checkpoint before it, as a program does
    module.config = runtime.configure(vars(module), argv, before)
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

def poison(value, which):
    """The same value (a tensor, a tuple or dict of them) with one that is not a number; which: of a tuple, or of losses
    in a row."""
    if isinstance(value, tuple):
        return *value[:which], poison(value[which], 0), *value[which + 1:]
    if isinstance(value, dict):
        first = next(iter(value))
        return value | {first: poison(value[first], 0)}
    if value.dim() == 1:
        return value * torch.where(torch.arange(len(value)) == which, math.nan, 1.0)
    return value * math.nan


def other_words(*given):
    """Whether a call of reconstruction() is about two sentences of each canvas. The second, a paraphrase, is spoilt."""
    return given[3].dim() == 3


def canvas_only(*given):
    """Whether a call of reconstruction() is about this control decoder of P4."""
    return given[0].memory_kind == 'canvas'


def z_only(*given):
    return given[0].memory_kind == 'z'


def no_canvas(*given):
    return given[0].memory_kind == 'none'


P2, P3, P4, P5, P6 = (MODULES[f'p{k}'] for k in range(2, 7))
TERMS = [                     # phase, where a term of its loss comes from, the name of the term, more: flags, which of
                              # several values, or which calls
    *(('p1', priors, f'{name}_loss', name) for name in priors.PRIORS), ('p1', p1_canvas, 'reconstruction', 'rec'),
    ('p2', P2, 'contrast', 'nce'), ('p2', P2, 'reconstruction', 'rec'), ('p2', priors, 'tv_loss', 'tv'),
    ('p2', P2, 'contrast', 'nce', '--grad_accum=2'), ('p2', P2, 'reconstruction', 'rec', '--grad_accum=2'),
    ('p2', P2, 'vicreg', 'vicreg', '--lambda_vicreg=1'), ('p2', P2, 'barlow', 'barlow', '--lambda_barlow=1'),
    ('p3', P3, 'jitter', 'inv'), ('p3', P3, 'contrast', 'nce'), ('p3', P3, 'reconstruction', 'rec'),
    ('p3', priors, 'lattice_loss', 'lattice'), ('p5', priors, 'var_loss', 'var'), ('p6', priors, 'cov_loss', 'cov'),
    ('p4', P4, 'reconstruction', 'paraphrase', other_words), ('p5', P5, 'reconstruction', 'para', other_words),
    ('p4', P4, 'reconstruction', 'loss'), ('p5', P5, 'round_trip', 'cycle'), ('p5', P5, 'round_trip', 'copy', 1),
    ('p5', P5, 'contrast', 'nce'), ('p5', P5, 'reconstruction', 'again'), ('p5', P5, 'jitter', 'inv'),
    ('p6', P6, 'diffusion_loss', 'diffusion'), ('p6', P6, 'diffusion_loss', 'diffusion', '--unet_steps=2'),
    ('p6', P6, 'prior_loss', 'prior'), ('p6', P6, 'contrast', 'nce'),
    *(('p4', P4, 'reconstruction', one.__name__.replace('_', ' '), one) for one in (canvas_only, z_only, no_canvas)),
    ('p6', P5, 'round_trip', 'cycle')]


@pytest.mark.parametrize('phase, module, name, term, more', [(*row, '')[:5] for row in TERMS],
                         ids=['-'.join(getattr(word, '__name__', str(word)) for word in (row[0], *row[2:]))
                              for row in TERMS])
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_last_checkpoint_is_good(
        here, monkeypatch, capsys, phase, module, name, term, more):
    """From the second optimizer step on. The line names the term; the checkpoint before it can be read, is finite and
    can be resumed."""
    steps, ascend, really = [], torch.optim.AdamW.step, getattr(module, name)
    which = more if isinstance(more, int) else int(callable(more))
    calls = more if callable(more) else lambda *_: True
    words = [more] if more and isinstance(more, str) else []
    out = '_'.join(['poisoned', phase, name, term, *words])

    def step(*given, **more):
        steps.append(1)
        return ascend(*given, **more)

    def poisoned(*given, **more):
        value = really(*given, **more)
        return poison(value, which) if steps and torch.is_grad_enabled() and calls(*given) else value
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(module, name, poisoned)
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        run(phase, out, *words, patch=own)
    line = one_line(capsys.readouterr().err)
    assert f'{term} is nan' in line
    assert stop.value.code == runtime.DIVERGED and f'last good checkpoint: {out}/ckpt.pt (step 1)' in line
    checkpoint = load(out)
    assert checkpoint['step'] == 1
    assert all(p.isfinite().all() for net in checkpoint['nets'].values() for p in net.values())
    monkeypatch.setattr(module, name, really)
    with monkeypatch.context() as own:
        run(phase, out, '--resume=true', *words, patch=own)
    assert load(out)['step'] == 3


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

PLACES = {                    # phase, owner, function, flags
    'the batch': ('p1', data.Corpus, 'take'), 'forward': ('p1', model.TextEncoder, 'forward'),
    'the priors': ('p1', priors, 'image_prior_terms'), 'backward': ('p1', torch.Tensor, 'backward'),
    'the optimizer': ('p1', torch.optim.AdamW, 'step'), 'the average': ('p1', runtime.EMA, 'update'),
    'the log': ('p1', runtime.Run, 'log'), 'evaluation': ('p1', p1_canvas, 'evaluate_canvas'),
    'saving': ('p1', runtime, 'write_checkpoint'), 'replacing the file': ('p1', os, 'replace'),
    'a cached part': ('p2', model.TextEncoder, 'forward', '--grad_accum=2'),
    'the loss of all': ('p2', P2, 'contrast', '--grad_accum=2'),
    'mining': ('p2', P2, 'mine_pairs', '--mine_every=1', '--staged=false'),
    'jitter': ('p3', P3, 'jitter'), 'a control': ('p4', P4, 'reconstruction'),
    'generation': ('p5', model.TextDecoder, 'generate'), 'the U-Net': ('p6', P6, 'diffusion_loss'),
    'the U-Net alone': ('p6', P6, 'diffusion_loss', '--unet_steps=2'), 'the buffer': ('p6', P6, 'encode'),
    'the prior': ('p6', P6, 'prior_loss')}


@pytest.mark.parametrize('place', PLACES)
def test_ctrl_c_anywhere_in_a_step_saves_and_goes_on_bit_for_bit(here, monkeypatch, capsys, place):
    phase, owner, name, *words = PLACES[place]
    straight, out = '_'.join(['ctrl_c/straight', phase, *words]), f'ctrl_c/{place.replace(" ", "_")}'
    if not Path(straight, 'gate.json').exists():
        with monkeypatch.context() as own:
            run(phase, straight, *words, patch=own)
    really, calls = getattr(owner, name), []

    def interrupted(*given, **more):
        if Path(out, 'ckpt.pt').exists() and not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return really(*given, **more)
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        own.setattr(owner, name, interrupted)
        run(phase, out, *words, patch=own)
    assert calls and stop.value.code == 130
    assert 'go on with the same command and --resume=true' in capsys.readouterr().out
    with monkeypatch.context() as own:
        run(phase, out, '--resume=true', *words, patch=own)
    a, b = load(straight), load(out)
    for key in drill.STATE:
        assert drill.same(a[key], b[key]), key


# ---- a disk or a folder that refuses, a predecessor that was swapped ------------------------------------------------

SMALL_FILES = """import resource, runpy, sys
import plot
plot.evaluation = plot.trends = lambda *_: None
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))      # a file that grows beyond it is an OSError, EFBIG
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_disk_that_is_full_while_a_corpus_is_prepared_is_one_line(here):
    Path('many.txt').write_text('\n'.join(f'line number {n} of many' for n in range(3000)))
    Path('small_files.py').write_text(SMALL_FILES)
    done = subprocess.run([sys.executable, 'small_files.py', str(ROOT / 'p1_canvas.py'), *SIZES['p1'].split(),
                           '--corpus=many.txt', '--out_dir=full', '--device=cpu'], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, timeout=300)
    assert done.returncode == 2 and 'File too large' in one_line(done.stderr.splitlines()[-1] + '\n')
    assert 'Traceback' not in done.stderr and not list(Path('out/data').glob('many*')), 'and nothing is left of it'


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize('what', ['folder', 'corpus'])
def test_a_folder_that_may_not_be_written_is_one_line(here, monkeypatch, capsys, number, what):
    """Simulated: both kinds of refusal, and while a corpus is written."""
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), 'somewhere')
    Path('few.txt').write_text('\n'.join(f'line number {n} of few' for n in range(30)))
    monkeypatch.setattr(*((runtime.tempfile, 'TemporaryFile') if what == 'folder' else (data, 'write_split')), refuse)
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
        run('p1', f'refused/{what}', '--corpus=few.txt', patch=own)
    line = one_line(capsys.readouterr().err)
    assert stop.value.code == 2 and 'cannot write' in line and os.strerror(number) in line
    assert not list(Path('out/data').glob('few*'))


def obey_permissions():
    """Root does too, from the next program on: PR_CAPBSET_DROP, CAP_DAC_OVERRIDE (Linux)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_folder_that_is_read_only_is_one_line_and_stays_as_it_is(here, monkeypatch):
    """A folder to make a run in, and one that holds a run which is to go on."""
    with monkeypatch.context() as own:
        run('p1', 'locked/p1', '--max_steps=1', patch=own)
    held = {path: path.read_bytes() for path in Path('locked').rglob('*') if path.is_file()}
    for folder in ('locked/p1', 'locked'):
        Path(folder).chmod(0o555)
    try:
        for out in ('locked/new', 'locked/p1'):
            done = subprocess.run([sys.executable, MODULES['p1'].__file__, *SIZES['p1'].split(), f'--out_dir={out}',
                                   '--resume=true', '--device=cpu'], capture_output=True, text=True, timeout=300,
                                  preexec_fn=obey_permissions)
            line = one_line(done.stderr)
            assert done.returncode == 2 and 'Permission denied' in line and out in line
    finally:
        for folder in ('locked', 'locked/p1'):
            Path(folder).chmod(0o755)
    assert {path: path.read_bytes() for path in Path('locked').rglob('*') if path.is_file()} == held


def test_what_does_not_fit_the_run_in_its_folder_is_refused_and_changes_nothing(here, monkeypatch, capsys):
    """Resumed after the phase before it was trained on another corpus; and with a checkpoint that was cut short."""
    with monkeypatch.context() as own:
        run('p2', 'swapped/p2', patch=own)
    checkpoint = load('swapped/p2')
    whole, before = Path('swapped/p2/ckpt.pt').read_bytes(), sorted(Path('swapped/p2').glob('*.json*'))
    for damage in ('tokens', 'cut'):
        if damage == 'tokens':
            checkpoint['state']['tokenizer'] = checkpoint['state']['tokenizer'][:-1]
            torch.save(checkpoint, 'swapped/p2/ckpt.pt')
        else:
            Path('swapped/p2/ckpt.pt').write_bytes(whole[:len(whole) // 2])
        held = {path: path.read_bytes() for path in before}
        with pytest.raises(SystemExit) as stop, monkeypatch.context() as own:
            run('p2', 'swapped/p2', '--resume=true', patch=own)
        line = one_line(capsys.readouterr().err)
        assert stop.value.code == 2 and ('other token ids' if damage == 'tokens' else 'truncated') in line
        assert {path: path.read_bytes() for path in before} == held and len(held) == 3, 'log, gate and run.json stay'


# ---- ranks ----------------------------------------------------------------------------------------------------------

DIES = '''"""A phase under torchrun of which a rank is killed at the beginning of step 2."""
import os, runpy, signal, sys
import plot, runtime
cosine_lr = runtime.cosine_lr


def dies(step, *rest):
    if step == 2 and os.environ['RANK'] == os.environ['DIES']:
        os.kill(os.getpid(), signal.SIGKILL)
    return cosine_lr(step, *rest)


plot.evaluation = plot.trends = lambda *_: None
runtime.cosine_lr = dies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.parametrize('phase, more, rank', [('p1', [], 1), ('p2', ['--init_from=out/p1/ckpt.pt'], 0)])
def test_a_rank_that_dies_ends_all_and_the_run_goes_on_later(here, monkeypatch, phase, more, rank):
    Path('dies.py').write_text(DIES)
    dead = f'dead/{phase}'
    words = [MODULES[phase].__file__, *SIZES[phase].split(), *more, f'--out_dir={dead}', '--max_steps=3',
             '--lr_steps=3', '--warmup_steps=1', '--log_every=1', '--eval_every=1', '--device=cpu']
    done = subprocess.run([sys.executable, *drill.TORCHRUN, 'dies.py', *words],
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(ROOT), 'DIES': str(rank)})
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(said) == 1 and 'has lost another rank' in said[0] and f'{dead}/ckpt.pt (step 2)' in said[0]
    assert load(dead)['step'] == 2
    with monkeypatch.context() as own:
        run(phase, dead, '--resume=true', patch=own)
    assert load(dead)['step'] == 3


def test_a_disk_that_is_full_ends_both_ranks_and_the_run_goes_on_later(here, monkeypatch):
    with monkeypatch.context() as own:
        run('p1', 'full/p1', '--max_steps=1', patch=own)
    Path('small_files.py').write_text(SMALL_FILES)
    done = subprocess.run([sys.executable, *drill.TORCHRUN, 'small_files.py', MODULES['p1'].__file__,
                           *SIZES['p1'].split(), '--out_dir=full/p1', '--max_steps=3', '--lr_steps=3', '--resume=true',
                           '--eval_every=1000', '--device=cpu'],
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode and 'cannot save full/p1/ckpt.pt' in said[0] and 'File too large' in said[0]
    assert all('has lost another rank' in line for line in said[1:]), 'what the other rank has to say'
    assert load('full/p1')['step'] == 1 and not Path('full/p1/ckpt.pt.tmp').exists()
    with monkeypatch.context() as own:
        run('p1', 'full/p1', '--resume=true', patch=own)
    assert load('full/p1')['step'] == 3


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


def test_a_batch_that_two_ranks_cannot_share_is_said_under_torchrun(here):
    done = subprocess.run([sys.executable, *drill.TORCHRUN, MODULES['p1'].__file__, '--batch_size=3', '--device=cpu',
                           '--out_dir=never'], capture_output=True, text=True, timeout=300)
    said = {line for line in done.stderr.splitlines() if line.startswith('error: ')}
    assert done.returncode and len(said) == 1 and 'batch_size 3 does not divide by 2 ranks' in said.pop()
    assert not Path('never').exists()


# ---- strange command lines and corpora ------------------------------------------------------------------------------

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200,
                derandomize=True)
VALUES = some.integers().map(str) | some.floats().map(str) | some.sampled_from(
    ['true', 'False', '', 'nan', '1e999', '-inf', '0x10', '1_000', '٣', 'None']) | some.text(max_size=12)


def usual_settings():
    """{phase: all settings of it, those of the phases before it among them}, nothing said."""
    usual = {}
    for phase, module in MODULES.items():
        before = f'p{int(phase[1]) - 1}' if phase != 'p1' else ''
        usual[phase] = runtime.configure(dict(vars(module)), [], before, usual.get(before))
    return usual


USUAL = usual_settings()
COMMENTS = {key: comment for path in runtime.scripts('p6') for key, comment in runtime.assignments(path).items()
            if comment}


def commands(phase):
    """(phase, words): command lines of a phase, near misses and nonsense among them."""
    keys = some.sampled_from([*USUAL[phase]]) | some.text(max_size=8)
    word = some.tuples(some.sampled_from(['--', '-', '']), keys, some.sampled_from(['=', ' ', '==', '']), VALUES)
    return some.tuples(some.just(phase), some.lists(word.map(''.join), max_size=4))


@FUZZ
@given(some.one_of(map(commands, MODULES)))
def test_any_command_line_is_taken_or_refused_in_one_line(capsys, command):
    phase, words = command
    usual, script, before = USUAL[phase], MODULES[phase], f'p{int(phase[1]) - 1}' if phase != 'p1' else ''
    module = {'__file__': script.__file__, '__name__': 'fuzz', '__doc__': '', **script.config}
    try:
        config = runtime.configure(module, [word for word in words if word not in ('--help', '-h')], before,
                                   USUAL.get(before))
    except SystemExit as stop:
        assert stop.code == 2
        one_line(capsys.readouterr().err)
        return
    assert config.keys() == usual.keys() == config.origins.keys()
    for key, value in config.items():
        assert type(value) is type(usual[key]) and (not isinstance(value, float) or math.isfinite(value))
        if bounds := runtime.BOUNDS.match(COMMENTS.get(key, '')):
            least, low, high = bounds.groups()
            assert float(least or low) <= value <= float(high or 'inf'), key


ODD = [(key, value) for key, usual in {
    'channels': (6,), 'size': (16, 24, 32), 'query_grid': (4, 8), 'patch': (2, 4), 'dim': (8, 16, 18), 'layers': (2,),
    'heads': (2, 4), 'hidden': (8,), 'cross_layers': (2,), 'cross_hidden': (8,), 'slots': (2,), 'rec_dim': (16, 24),
    'rec_layers': (2,)}.items() for value in (*usual, -1, 0, 1, 3, 5, 7)] + [
        ('dropout', value) for value in (-0.1, 0.5, 1.0, 2.0)]


@settings(max_examples=100, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.lists(some.sampled_from(ODD), max_size=3).map(dict))
def test_any_sizes_make_a_model_or_are_refused_in_one_line(capsys, sizes):
    usual = {'vocab_size': 300, 'size': 16, 'query_grid': 8, 'patch': 4, 'dim': 16, 'layers': 1, 'heads': 2,
             'hidden': 8, 'cross_layers': 1, 'cross_hidden': 8, 'rec_dim': 16, 'rec_layers': 1, 'dropout': 0.0}
    try:
        words = [f'--{key}={value}' for key, value in (usual | sizes).items()]
        config = runtime.configure(dict(vars(p1_canvas)), words)
        if error := model.size_error(config):
            runtime.fail(error)
    except SystemExit as stop:
        assert stop.code == 2
        one_line(capsys.readouterr().err)
        return
    nets, x = model.build(config, 'encoder', 'auxiliary'), torch.tensor([[5, 6, data.EOS], [7, data.EOS, data.PAD]])
    V = nets['encoder'](x)
    assert V.shape == (2, config.channels, config.size, config.size)
    loss = p1_canvas.reconstruction(nets['auxiliary'], V, None, x) + sum(priors.image_prior_terms(V).values())
    loss.backward()
    assert loss.isfinite()


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
def test_any_corpus_is_read_or_refused_in_one_line(tmp_path, capsys, monkeypatch, lines, sound, kind):
    """With thirty good lines before it, whatever comes after is read or left out; without them, one line says so."""
    path, good = tmp_path / f'c.{kind}', GOOD if kind == 'txt' else GOOD_JSON
    path.write_bytes(b'\n'.join([good, *lines] if sound else lines))
    said = []
    monkeypatch.setattr(english, 'find_wordnet', lambda: None)
    try:
        parts, families = data.read_corpus(path, said.append)
    except SystemExit as stop:
        assert stop.code == 2 and not sound
        assert 'at least 20' in one_line(capsys.readouterr().err)
        return
    parts = [[*rows] for rows in parts.values()]
    assert sound and len(said) <= 13 and all('\n' not in line and len(line) < 400 for line in said)
    assert sum(map(len, parts)) >= 30 and min(map(len, parts)) >= 3
    for groups, meanings, _ in itertools.chain(*parts):
        assert len(groups) == len(meanings) == 1 + len(families) <= 9 and groups[0]
        assert [bool(group) for group in groups] == [bool(id) for id in meanings]
        assert all(len(group) <= 8 for group in groups)
        assert all(grammar.normalize(line) == line and 0 < len(line) <= 2000 for group in groups for line in group)
