"""Tests of runtime.py: settings, schedule, EMA, checkpoints that survive, resuming bit for bit, ranks, gates."""
import csv
import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import runtime

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.name[:2]: path for path in runtime.scripts('p6')}

SETTINGS = '''"""A toy script.

Reads: nothing.
"""
from math import pi

steps = 10                   # optimizer steps
learning_rate = 1e-3         # peak, AdamW; what there is to say about it takes more than one line of the script, and of
                             # the help too
# a heading is no part of it
compile = True
name = 'a#b'                 # a '#' in a value starts no comment
batch_size = 4               # >= 1: sentences a step
max_steps = 7                # >= 0
share = 0.5                  # 0 to 1: of the rest
_hidden = 3
table = {'x': 1}


def helper():
    inner = 5
    return inner
'''

TOY = '''"""A toy phase: the loop that every phase has, on a net of one layer."""
import time

import torch
import runtime

out_dir = 'out'          # run folder
resume = False           # go on from the checkpoint there
seed = 3                 # of everything
batch_size = 8           # rows a step
grad_accum = 1           # micro-steps
max_steps = 12           # stop here
device = 'cpu'           # where
dtype = 'float32'        # of matrix products
compile = True           # CUDA only
pause = 0.0              # seconds a step, so that a test can interrupt
config = runtime.configure(globals())


def main():
    run = runtime.start('p9', config, {'width': 4})
    nets = {'net': torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))}
    optimizer, ema = runtime.adamw(nets, 1e-2, 0.1), runtime.EMA(nets, 0.9)
    state = {'metrics': {}, 'mean': torch.zeros(())}
    start = runtime.resume(run, nets, optimizer, ema, state)
    for step in run.steps(start, max_steps):
        if step % 4 == 0 or step == max_steps:
            with ema.weights():
                state['metrics'] = {'noisy': nets['net'](torch.randn(8, 4)).mean(), 'rows': [step, torch.randn(())]}
            run.log(step, state['metrics'], prefix='val')
        if step % 4 == 0 or step == max_steps or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if step == max_steps:
            break
        for group in optimizer.param_groups:
            group['lr'] = runtime.cosine_lr(step, 1e-2, 3, 20) * group['scale']
        loss = nets['net'](torch.randn(batch_size, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        state['mean'] = state['mean'].lerp(loss.detach(), 0.1)
        run.log(step, {'loss': loss}, prefix='train')
        print('did', step, flush=True)
        time.sleep(pause)


if __name__ == '__main__':
    main()
'''

RANKS = '''"""Two ranks: gather and average_gradients against one process; averaged log; a signal that one rank gets."""
import os
import signal

import torch
import runtime

out_dir = 'out'
seed = 0
batch_size = 8
grad_accum = 1
device = 'cpu'
dtype = 'float32'
config = runtime.configure(globals())


def contrast(z, ids):
    """A loss of all pairs of rows, and ids that only a gather can have put in order."""
    return torch.nn.functional.cross_entropy(z @ z.T, ids.roll(1))


def main():
    run = runtime.start('p9', config)
    assert run.world == 2
    nets = {'net': torch.nn.Linear(4, 3).double()}
    x = torch.randn(batch_size, 4, dtype=torch.float64)
    mine = runtime.local_slice(run, batch_size)

    z = nets['net'](x)
    (contrast(z, torch.arange(batch_size)) + z.square().mean()).backward()
    whole = [p.grad.clone() for p in nets['net'].parameters()]

    nets['net'].zero_grad()
    z = nets['net'](x[mine])
    ids = runtime.gather(torch.arange(batch_size)[mine], run)
    assert ids.tolist() == list(range(batch_size))
    (contrast(runtime.gather(z, run), ids) + z.square().mean()).backward()
    alone = [p.grad.clone() for p in nets['net'].parameters()]
    runtime.average_gradients(nets, run)
    shared = [p.grad for p in nets['net'].parameters()]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(whole, shared))
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(alone, shared))

    run.log(0, {'loss': torch.tensor(float(run.rank)), 'rows': batch_size}, prefix='train')
    seen = []
    for step in run.steps(0, 5):
        seen.append(run.interrupted)
        if run.interrupted:
            break
        if step == 2 and run.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [False, False, False, True], seen
    try:
        runtime.save(run, 3, nets, runtime.adamw(nets, 0.1, 0.1), runtime.EMA(nets, 0.9), {'metrics': {}})
    except SystemExit as stop:
        assert stop.code == 130
        print('all is well')


if __name__ == '__main__':
    main()
'''


def python(*words, cwd, **options):
    """Start a Python program that can import this repository."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def script(tmp_path):
    """Globals of a module with settings, imported afresh."""
    path = tmp_path / 'toy_settings.py'
    path.write_text(SETTINGS)
    spec = importlib.util.spec_from_file_location('toy_settings', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def full_config(folder, phase, *words, inherited=None):
    """The settings of a phase as its script has them, the words on top."""
    module = vars(importlib.import_module(SCRIPTS[phase].stem))
    before = f'p{int(phase[1]) - 1}' if phase > 'p1' else ''
    return runtime.configure(dict(module), [f'--out_dir={folder}', '--dtype=float32', *words], before, inherited)


def make_run(folder, phase='p9', **settings):
    config = {'out_dir': str(folder), 'resume': False, 'dtype': 'float32', 'compile': False, **settings}
    folder.mkdir(exist_ok=True)
    return runtime.Run(phase, runtime.Config(config), torch.device('cpu'), arch={'width': 3})


def make_nets(width=3):
    return {'net': nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))}


def trained(folder, steps=2, **settings):
    """A run with nets, optimizer and EMA that have done a few steps."""
    run, nets = make_run(folder, **settings), make_nets()
    optimizer, ema = runtime.adamw(nets, 1e-2, 0.1), runtime.EMA(nets, 0.9)
    for step in range(steps):
        optimizer.zero_grad()
        nets['net'](torch.randn(5, 2)).square().sum().backward()
        optimizer.step()
        ema.update(step)
    return run, nets, optimizer, ema


def stops(capsys, function, *words, status=2):
    """Call a function that must end the program: returns the one line it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*words)
    assert stop.value.code == status
    line = capsys.readouterr().err
    assert line.startswith('error: ') and line.count('\n') == 1 and line.endswith('\n')
    return line


# ---- settings -------------------------------------------------------------------------------------------------------

def test_configure_takes_the_script_s_own_plain_globals(script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['other.py', '--steps=99'])
    config = runtime.configure(script)
    assert config == {'steps': 10, 'learning_rate': 1e-3, 'compile': True, 'name': 'a#b', 'batch_size': 4,
                      'max_steps': 7, 'share': 0.5}
    assert config.steps == 10 and config.origins == dict.fromkeys(config, 'to')
    with pytest.raises(AttributeError, match='stepz'):
        config.stepz
    assert script['steps'] == 10, 'importing a script must not read the command line'
    script['__name__'] = '__main__'
    assert runtime.configure(script)['steps'] == 99


@pytest.mark.parametrize('word, key, value', [
    ('--steps=1e4', 'steps', 10000), ('--steps=-3', 'steps', -3), ('--steps=9007199254740993', 'steps', 2 ** 53 + 1),
    ('--learning_rate=3', 'learning_rate', 3.0), ('--learning_rate=2e-4', 'learning_rate', 2e-4),
    ('--compile=false', 'compile', False), ('--compile=True', 'compile', True), ('--name=a=b', 'name', 'a=b'),
    ('--name=3', 'name', '3'), ('--name=', 'name', ''), ('--max_steps=0', 'max_steps', 0), ('--share=1', 'share', 1.0)])
def test_configure_converts(script, word, key, value):
    config = runtime.configure(script, [word])
    assert config[key] == value == script[key] and type(config[key]) is type(value)


@pytest.mark.parametrize('word, hint', [
    ('--learning_rat=1', '--learning_rate=0.001'), ('--bach_size=1', '--batch_size=4'), ('--inner=1', 'unknown'),
    ('--pi=3', 'unknown'), ('--_hidden=3', 'unknown'), ('--compile', '--compile=true'), ('steps=3', '--steps=10'),
    ('stray', 'unknown'), ('--steps=1.5', 'a whole number'), ('--steps=true', 'a whole number'),
    ('--steps=', 'a whole number'), ('--steps=inf', 'a whole number'), ('--learning_rate=nan', 'a finite number'),
    ('--learning_rate=fast', 'a finite number'), ('--learning_rate=1' + '0' * 400, 'a finite number'),
    ('--compile=1', 'true or false'), ('--batch_size=0', 'at least 1'), ('--max_steps=-1', 'at least 0'),
    ('--share=1.01', '0 to 1'), ('--share=-1', '0 to 1')])
def test_configure_refuses_in_one_line(script, capsys, word, hint):
    before = dict(script)
    assert hint in stops(capsys, runtime.configure, script, [word])
    assert script == before


def test_help_lists_keys_with_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.configure(script, ['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[0] == 'A toy script.'
    assert "  --name=a#b             a '#' in a value starts no comment" in lines
    assert '  --compile=true' in lines and 'heading' not in ' '.join(lines)
    at = lines.index('  --learning_rate=0.001  peak, AdamW; what there is to say about it takes more than one line of '
                     'the script, and of the')
    assert lines[at + 1] == 25 * ' ' + 'help too' and max(map(len, lines)) <= 120
    assert not any('--inner' in line or '--pi' in line or '--table' in line for line in lines)


def test_help_into_a_pipe_that_closes(tmp_path):
    (tmp_path / 'p9_toy.py').write_text(TOY)
    process = python('p9_toy.py', '--help', cwd=tmp_path)
    process.stdout.close()                                 # long before the program has begun to print
    assert process.stderr.read() == '' and process.wait() == 0
    process.stderr.close()


def test_command_line_stops_with_status_2(tmp_path):
    (tmp_path / 'p9_toy.py').write_text(TOY)
    code, out, err = finish(python('p9_toy.py', '--batch_sise=4', cwd=tmp_path))
    assert (code, out) == (2, '')
    assert err == "error: unknown setting '--batch_sise=4'; the nearest is --batch_size=8, --help lists all\n"


# ---- settings of the phases -----------------------------------------------------------------------------------------

# What a setting must be at least, and at most.
LEAST = dict.fromkeys((
    'max_steps', 'warmup_steps', 'learning_rate', 'weight_decay', 'dropout', 'dec_dropout', 'ema_decay', 'top_p',
    'jitter_prob', 'paraphrase_share', 'slots', 'gist', 'max_shift', 'cutout', 'negatives', 'random_tokens', 'joined',
    'drop_words', 'mask_words', 'turn_words'), 0) | dict.fromkeys((
        'batch_size', 'grad_accum', 'eval_every', 'log_every', 'look_every', 'prior_samples', 'rec_samples',
        'dec_samples', 'generated', 'best_of_k', 'paraphrases', 'num_scenes', 'query_grid', 'patch', 'layers', 'heads',
        'hidden', 'cross_layers', 'cross_hidden', 'rec_layers', 'z_dim', 'readout_hidden', 'dec_layers', 'dec_heads',
        'dec_hidden', 'unet_batch', 'prior_rows', 'sample_steps', 'drawn'), 1) | {'channels': 2}
MOST = dict.fromkeys((
    'dropout', 'dec_dropout', 'ema_decay', 'top_p', 'jitter_prob', 'paraphrase_share', 'random_tokens', 'joined',
    'drop_words', 'mask_words', 'turn_words'), 1) | {'negatives': 6}


def test_the_comments_of_the_phases_bound_their_settings():
    comments = {}
    for path in SCRIPTS.values():                   # a setting without a comment has that of the phase before it
        comments |= {key: text for key, text in runtime.assignments(path).items() if text or key not in comments}
        for key in runtime.defaults(path):
            bounds = runtime.BOUNDS.match(comments[key])
            least, low, high = bounds.groups() if bounds else (None, None, None)
            stated = [float(bound) if bound else None for bound in (least or low, high)]
            assert stated == [LEAST.get(key), MOST.get(key)], (path.name, key)
            assert bounds or not re.match(r'>|\S+ to \d', comments[key]), (path.name, key)
    assert comments.keys() >= LEAST.keys() | MOST.keys()


def test_a_setting_out_of_bounds_is_refused_in_one_line_in_its_phase_and_in_later_ones(capsys, monkeypatch):
    monkeypatch.setattr(runtime, 'assignments', cache(runtime.assignments))
    inherited = None
    for phase in SCRIPTS:
        config = full_config('out', phase, inherited=inherited)
        for key in LEAST.keys() & (config.keys() if phase == 'p6' else runtime.defaults(SCRIPTS[phase]).keys()):
            outside = [(LEAST[key] - 1, f'{LEAST[key]} to {MOST[key]}' if key in MOST else f'at least {LEAST[key]}')]
            outside += [(MOST[key] + 1, f'{LEAST[key]} to {MOST[key]}')] if key in MOST else []
            for value, hint in outside:
                line = stops(capsys, lambda: full_config('out', phase, f'--{key}={value}', inherited=inherited))
                assert line == f'error: --{key}={value}: expects {hint}\n'
            for value in (LEAST[key], MOST.get(key, 10 ** 6)):
                assert full_config('out', phase, f'--{key}={value}', inherited=inherited)[key] == value
        inherited = config
    assert LEAST.keys() <= config.keys()


def test_a_phase_has_the_settings_before_it_and_what_its_command_line_says(capsys):
    first = full_config('here', 'p1', '--lambda_tv=0.2', '--seed=4', '--batch_size=8')
    assert first.origins == dict.fromkeys(first, 'p1')
    second = full_config('there', 'p2', '--seed=5', '--temperature=1', inherited=first)
    listed = runtime.defaults(SCRIPTS['p2'])
    assert second.keys() == first.keys() | listed.keys()
    assert (second.lambda_tv, second.seed, second.batch_size, second.temperature) == (0.2, 5, 8, 1.0)
    assert (second.out_dir, second.max_steps) == ('there', listed['max_steps']), 'what a script lists is not taken over'
    set_here = listed.keys() | {'seed', 'dtype'}
    assert second.origins == {key: 'p2' if key in set_here else 'p1' for key in second}
    assert first.seed == 4 and first.origins['seed'] == 'p1', 'the settings before it stay as they are'
    third = full_config('third', 'p3', inherited=second)
    assert third.temperature == 1.0 and third.origins['temperature'] == 'p2' and third.origins['lambda_tv'] == 'p1'
    line = stops(capsys, lambda: full_config('third', 'p3', '--temprature=1', inherited=second))
    assert 'the nearest is --temperature=1.0' in line
    assert 'a finite number' in stops(capsys, lambda: full_config('third', 'p3', '--temperature=', inherited=second))


@pytest.mark.parametrize('phase', SCRIPTS)
def test_importing_a_phase_reads_no_command_line_and_no_checkpoint(tmp_path, monkeypatch, phase):
    def refuse(*_, **__):
        raise AssertionError('a checkpoint is read')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, 'load_checkpoint', refuse)
    monkeypatch.setattr(torch, 'load', refuse)
    for name in SCRIPTS:
        Path('out', name).mkdir(parents=True)
        Path('out', name, 'ckpt.pt').write_bytes(b'no checkpoint')
    monkeypatch.setattr(sys, 'argv', [str(SCRIPTS[phase]), '--max_steps=7', '--resume=true', 'stray'])
    module, values = runpy.run_path(SCRIPTS[phase], run_name=SCRIPTS[phase].stem), runtime.defaults(SCRIPTS[phase])
    assert values and {key: module[key] for key in values} == values == module['config']
    assert module['config'].origins == dict.fromkeys(values, phase)
    assert not [path for path in Path('out').rglob('*') if path.is_file() and path.name != 'ckpt.pt']


# ---- device, log ----------------------------------------------------------------------------------------------------

@pytest.fixture
def settings(tmp_path):
    return runtime.Config({'out_dir': str(tmp_path / 'out'), 'seed': 0, 'batch_size': 8, 'grad_accum': 2,
                           'device': 'cpu', 'dtype': 'auto'})


def test_run_json_is_of_the_run_that_has_begun(settings, tmp_path):
    settings['resume'], settings.origins = False, {'seed': 'p9'}
    (_, *nets), run = trained(tmp_path), runtime.start('p9', settings)
    (run.dir / 'run.json').write_text('of an earlier run')
    first = torch.rand(3)
    runtime.start('p9', settings)
    assert torch.equal(torch.rand(3), first), 'start seeds'
    assert (run.dir / 'run.json').read_text() == 'of an earlier run', 'something may still refuse'
    assert runtime.resume(run, *nets, {'metrics': {}}) == 0
    assert (run.dir / 'run.json.old').read_text() == 'of an earlier run'
    facts = json.loads((run.dir / 'run.json').read_text())
    assert facts['config'] == settings and facts['origins'] == {'seed': 'p9'}
    assert facts['versions']['torch'] == torch.__version__
    assert facts['hardware'] and facts['started'] and facts['argv'] == [Path(sys.argv[0]).name, *sys.argv[1:]]


@pytest.mark.parametrize('change, hint', [
    ({'batch_size': 9}, 'does not divide'), ({'device': 'gpu'}, '--device=gpu is not'),
    ({'device': 'cuda:77'}, '--device=cuda:77 is not'), ({'dtype': 'float16'}, 'auto, bfloat16 or float32'),
    ({'out_dir': __file__ + '/out'}, 'choose another --out_dir')])
def test_start_refuses_in_one_line(settings, capsys, change, hint):
    assert hint in stops(capsys, runtime.start, 'p9', runtime.Config(settings | change))


def test_autocast_follows_dtype(tmp_path):
    x = torch.ones(2, 2)
    for name in ('bfloat16', 'float32'):
        run = make_run(tmp_path, dtype=name)
        for _ in range(2):    # a fresh context each time
            with run.autocast():
                assert (x @ x).dtype == getattr(torch, name)
        assert (x @ x).dtype == torch.float32


def test_what_is_not_finite_is_named_with_the_step_it_began_in(tmp_path, capsys):
    run, nan = make_run(tmp_path / 'out'), torch.tensor(float('nan'))
    fine = {'loss': torch.tensor(1.0), 'tv': torch.tensor(1.0), 'lr': 0.1}
    for step, values in enumerate((fine, fine, fine | {'tv': nan}, fine | {'tv': nan, 'loss': nan}, fine)):
        run.watch(step, values)
    with pytest.raises(SystemExit) as stop:
        run.log(4, fine, prefix='train')
    assert stop.value.code == runtime.DIVERGED
    assert capsys.readouterr().err == 'error: step 2: tv is nan; last good checkpoint: none yet\n'
    assert not (tmp_path / 'out/metrics.jsonl').exists()
    with pytest.raises(SystemExit):          # other terms from here on: the ones before are looked at first
        run.watch(5, {'diffusion': torch.tensor(1.0)})


def test_log_writes_one_line_a_call(tmp_path):
    run = make_run(tmp_path)
    run.log(3, {'loss': torch.tensor(0.5), 'count': 7, 'alpha': torch.tensor([1.0, float('nan')])}, prefix='val')
    run.log(4, {'loss': 0.25}, prefix='train')
    assert [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [
        {'step': 3, 'val/loss': 0.5, 'val/count': 7, 'val/alpha': [1.0, None]}, {'step': 4, 'train/loss': 0.25}]


def test_evaluations_are_read_back_and_are_a_table(tmp_path):
    """A row an evaluation, a column a metric, one for each entry of a list, whenever it was first measured."""
    run, nan = make_run(tmp_path), math.nan
    assert runtime.evaluations(tmp_path) == []
    rows = [{'r1': 0.5, 'alpha': torch.tensor([1.0, nan])}, {'r1': torch.tensor(nan), 'alpha': [2.0, 3.0], 'gap': 0.25}]
    for step, metrics in zip((0, 7), rows):
        run.log(step, metrics, prefix='val')
        run.log(step, {'loss': 0.25}, prefix='train')
    assert repr(runtime.evaluations(tmp_path)) == repr([{'step': 0, 'r1': 0.5, 'alpha': [1.0, nan]},
                                                        {'step': 7, 'r1': nan, 'alpha': [2.0, 3.0], 'gap': 0.25}])
    assert (tmp_path / 'metrics.csv').read_text() == (
        'step,r1,alpha/0,alpha/1,gap\n0,0.5,1.0,nan,\n7,nan,2.0,3.0,0.25\n')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.csv', 'metrics.jsonl']


def test_a_training_term_that_is_not_finite_stops_the_run(tmp_path, capsys):
    end = runtime.DIVERGED
    run, nets, optimizer, ema = trained(tmp_path)
    values = {'loss': torch.tensor(float('nan')), 'tv': torch.tensor(1.0), 'cov': torch.tensor(float('inf')), 'lr': 1.0}
    line = stops(capsys, run.log, 8, values | {'cov': float('inf')}, 'train', status=end)      # nobody watched
    assert 'step 8: loss is nan, cov is inf; last good checkpoint: none yet' in line and 'tv' not in line
    run.watch(8, values)
    with pytest.raises(SystemExit):          # no checkpoint of a step that went wrong
        runtime.save(run, 9, nets, optimizer, ema, {'metrics': {}})
    assert not run.checkpoint.exists() and 'step 8: loss is nan' in capsys.readouterr().err
    line = stops(capsys, run.log, 8, values, 'train', status=end)
    assert 'step 8: loss is nan, cov is inf; last good checkpoint: none yet' in line and 'tv' not in line
    run.watched = (), None
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    run.watch(8, values)
    assert f'last good checkpoint: {run.checkpoint} (step 5)' in stops(capsys, run.log, 8, values, 'train', status=end)
    assert not (tmp_path / 'metrics.jsonl').exists()


def test_tensorboard_gets_the_scalars_and_the_figures(settings):
    pytest.importorskip('tensorboard')
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = runtime.start('p9', runtime.Config(settings | {'tensorboard': True}))
    run.log(2, {'loss': 0.5, 'alpha': torch.ones(2)}, prefix='train')
    (run.dir / 'plots').mkdir()
    for name in ('montage_000002', 'montage_000004', 'samples'):
        Image.new('RGBA', (4, 3)).save(run.dir / f'plots/{name}.png')
    nets = {'net': nn.Linear(2, 2)}
    runtime.save(run, 2, nets, runtime.adamw(nets, 0.1, 0.1), runtime.EMA(nets, 0.9), {'metrics': {}})
    run.tensorboard.flush()
    events = EventAccumulator(str(run.tensorboard.log_dir)).Reload()
    assert sorted(events.Tags()['scalars']) == ['train/alpha/0', 'train/alpha/1', 'train/loss']
    assert events.Scalars('train/loss')[0].step == 2 and events.Scalars('train/alpha/1')[0].value == 1
    assert events.Tags()['images'] == ['montage'] and [e.step for e in events.Images('montage')] == [2]


def test_tensorboard_that_is_not_installed_is_said(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    settings['tensorboard'] = True
    assert 'pip install tensorboard' in stops(capsys, runtime.start, 'p9', settings)


# ---- loop and optimisation ------------------------------------------------------------------------------------------

def test_steps_yield_first_to_last_and_show_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, 'PROGRESS_SECONDS', 0)
    run = make_run(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    seen = []
    for step in run.steps(2, 5):
        run.log(step, {'loss': 0.5}, prefix='train')
        seen.append(step)
    assert seen == [2, 3, 4, 5] and signal.getsignal(signal.SIGINT) is handler
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith('p9 step 3/5  ') and ' steps/s  ETA 00:00  loss 0.5' in line
    assert '--max_steps' in stops(capsys, list, run.steps(6, 5))


def test_cosine_lr():
    lr = [runtime.cosine_lr(step, 2.0, 4, 24) for step in range(40)]
    assert lr[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lr[14] == pytest.approx(1.1) and lr[24] == pytest.approx(0.2) and lr[39] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(lr[4:], lr[5:]))
    assert runtime.cosine_lr(0, 2.0, 0, 0) == 2.0


def test_adamw_groups():
    nets = {'a': nn.Linear(2, 3), 'b': nn.Linear(2, 3)}
    nets['b'].bias.requires_grad_(False)
    groups = runtime.adamw(nets, 0.1, 0.5, scale={'b': 0.25}).param_groups
    assert [(g['weight_decay'], g['scale'], g['lr'], g['betas']) for g in groups] == [
        (0.5, 1.0, 0.1, (0.9, 0.95)), (0.0, 1.0, 0.1, (0.9, 0.95)), (0.5, 0.25, 0.025, (0.9, 0.95))]
    expected = [nets['a'].weight, nets['a'].bias, nets['b'].weight]
    assert len(groups) == 3 and all(group['params'][0] is p for group, p in zip(groups, expected))


def test_ema_is_the_recursion_it_says():
    nets = {'net': nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))}
    nets['net'].append(nets['net'][0])    # a tied layer has two keys
    ema, weight = runtime.EMA(nets, 0.3), nets['net'][0].weight
    expected = weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            weight += 1.0
        nets['net'](torch.randn(4, 2))
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    state = ema.state_dict()['net']
    assert torch.allclose(state['0.weight'], expected) and torch.equal(state['0.weight'], state['2.weight'])
    assert state['1.num_batches_tracked'] == 6 and torch.equal(state['1.running_mean'], nets['net'][1].running_mean)


def test_ema_weights_leave_no_trace(tmp_path):
    _, nets, _, ema = trained(tmp_path)
    before = {key: value.clone() for key, value in nets['net'].state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), ema.weights():
        assert all(torch.equal(value, ema.state_dict()['net'][key]) for key, value in nets['net'].state_dict().items())
        assert not torch.equal(nets['net'][0].weight, before['0.weight'])
        torch.rand(3)
        1 / 0
    assert all(torch.equal(value, before[key]) for key, value in nets['net'].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_compiles_nothing():
    class Net(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()
    compiled, net = [], Net(4, 3)
    net.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward, dynamic=False)
    ema = runtime.EMA({'net': net}, 0.9)
    net(torch.ones(2, 4))
    with ema.weights():
        for rows in (2, 3, 5):
            net(torch.ones(rows, 4))
    assert len(compiled) == 1
    net(torch.ones(3, 4))
    assert len(compiled) == 2
    torch._dynamo.reset()


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def test_save_then_resume_restores_everything(tmp_path):
    run, nets, optimizer, ema = trained(tmp_path)
    run.history = [{'phase': 'p8', 'step': 1, 'config': {}, 'metrics': {}, 'pass': True}]
    optimizer.param_groups[0]['lr'] = 0.0123
    run.config.origins = {'resume': 'p8'}
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {'alpha': torch.tensor([2.0])}, 'bank': [1],
                                                'mean': torch.tensor(3.0)})
    expected = torch.rand(4)
    (tmp_path / 'metrics.jsonl').write_text('{"step": 4}\n{"step": 5}\n{"step": 6}\n{"ste')

    again, fresh, fresh_optimizer, fresh_ema = trained(tmp_path, steps=0, resume=True)
    state = {'metrics': {}, 'bank': None, 'mean': torch.tensor(0.0), 'later': 7}      # what came after it was saved
    assert runtime.resume(again, fresh, fresh_optimizer, fresh_ema, state) == again.saved_step == 5
    assert torch.equal(torch.rand(4), expected) and again.history == run.history
    assert state == {'metrics': {'alpha': [2.0]}, 'bank': [1], 'mean': torch.tensor(3.0), 'later': 7}
    checkpoint = runtime.load_checkpoint(run.checkpoint, 'p9', '')
    assert checkpoint['arch'] == {'width': 3} and checkpoint['origins'] == {'resume': 'p8'}
    assert checkpoint['config'] == run.config and type(checkpoint['config']) is dict
    assert checkpoint['state'].keys() == {'bank', 'mean'}
    for old, new in ((nets['net'].state_dict(), fresh['net'].state_dict()),
                     (ema.state_dict()['net'], fresh_ema.state_dict()['net'])):
        assert all(torch.equal(old[key], new[key]) for key in old)
    old, new = optimizer.state_dict()['state'], fresh_optimizer.state_dict()['state']
    assert all(torch.equal(old[i][key], new[i][key]) for i in old for key in old[i]) and old
    assert fresh_optimizer.param_groups[0]['lr'] == 0.0123, 'or a run killed after its last step saves another rate'
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 4}\n'


def test_resume_without_a_checkpoint_starts_afresh(tmp_path, capsys):
    assert runtime.resume(*trained(tmp_path, resume=True), {'metrics': {}}) == 0
    assert 'starts afresh' in capsys.readouterr().out


def test_starting_over_keeps_the_old_run(tmp_path, capsys):
    run, nets, optimizer, ema = trained(tmp_path)
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    runtime.write_gate(run, [('a', '> 1', 2.0, True)])
    run.log(5, {'r': 0.5}, prefix='val')
    assert runtime.resume(*trained(tmp_path), {'metrics': {}}) == 0
    assert 'kept as ckpt.pt.old' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'ckpt.pt.old', 'gate.json.old', 'metrics.csv.old', 'metrics.jsonl.old']
    assert runtime.load_checkpoint(tmp_path / 'ckpt.pt.old', 'p9', '')['step'] == 5
    runtime.save(run, 0, nets, optimizer, ema, {'metrics': {}})                 # forgotten again
    assert runtime.resume(*trained(tmp_path), {'metrics': {}}) == 0
    assert 'kept as ckpt.pt.old2' in capsys.readouterr().out
    kept = [runtime.load_checkpoint(tmp_path / f'ckpt.pt{ending}', 'p9', '')['step'] for ending in ('.old', '.old2')]
    assert kept == [5, 0]


def test_each_rank_goes_on_with_its_own_random_state(tmp_path, monkeypatch):
    run, nets, optimizer, ema = trained(tmp_path)
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(runtime.random_state(run))

    def gathered(into, own):
        into[:] = states
    monkeypatch.setattr(runtime.dist, 'all_gather_object', gathered)
    monkeypatch.setattr(runtime.dist, 'barrier', lambda: None)
    run.world = 2
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    for rank, world, expected in ((0, 2, 0), (1, 2, 1), (0, 1, None), (1, 4, None)):
        run, *rest = trained(tmp_path, resume=True)
        run.rank, run.world, run.master, run.config['seed'] = rank, world, False, 0
        torch.manual_seed(99)
        runtime.resume(run, *rest, {'metrics': {}})
        assert [torch.equal(torch.get_rng_state(), state['cpu']) for state in states] == [
            expected == i for i in range(2)]


def test_a_disk_that_refuses_is_one_line_wherever_it_is_written_to(tmp_path, capsys):
    run = make_run(tmp_path)
    run.on_error(OSError, OSError(28, 'No space left on device', 'out/p1/plots/montage.png'), None)
    error = capsys.readouterr().err
    assert error.startswith('error: cannot write out/p1/plots/montage.png: No space left') and error.count('\n') == 1
    run.on_error(ValueError, ValueError('a bug'), None)
    assert 'ValueError: a bug' in capsys.readouterr().err, 'a mistake of ours is still shown whole'


def test_resume_refuses_other_sizes(tmp_path, capsys):
    run, nets, optimizer, ema = trained(tmp_path)
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    wide = make_nets(width=4)
    line = stops(capsys, runtime.resume, make_run(tmp_path, resume=True), wide, runtime.adamw(wide, 0.1, 0.1),
                 runtime.EMA(wide, 0.9), {'metrics': {}})
    assert 'does not fit' in line


def killed(*_):
    raise KeyboardInterrupt


def full(*_):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    run, nets, optimizer, ema = trained(tmp_path)
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, killed)
        runtime.save(run, 6, nets, optimizer, ema, {'metrics': {}})
    assert runtime.load_checkpoint(run.checkpoint, 'p9', '')['step'] == 5
    runtime.save(run, 7, nets, optimizer, ema, {'metrics': {}})
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt'], 'a leftover of the kill goes with the next save'


@pytest.mark.parametrize('where', ['fsync', 'replace', 'device'])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, capsys, where):
    run, nets, optimizer, ema = trained(tmp_path)
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    if where != 'device':
        monkeypatch.setattr(os, where, full)
    elif os.path.exists('/dev/full'):
        (tmp_path / 'ckpt.pt.tmp').symlink_to('/dev/full')
    else:
        pytest.skip('needs /dev/full')
    line = stops(capsys, lambda: runtime.save(run, 6, nets, optimizer, ema, {'metrics': {}}), status=1)
    assert 'cannot save' in line and 'No space left' in line
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
    assert runtime.load_checkpoint(run.checkpoint, 'p9', '')['step'] == 5


def test_save_refuses_weights_that_are_not_finite(tmp_path, capsys):
    (run, nets, optimizer, ema), end = trained(tmp_path), runtime.DIVERGED
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    nets['net'][0].weight.data[0, 0] = float('nan')
    line = stops(capsys, lambda: runtime.save(run, 6, nets, optimizer, ema, {'metrics': {}}), status=end)
    assert 'weights of net' in line and '(step 5)' in line
    assert runtime.load_checkpoint(run.checkpoint, 'p9', '')['step'] == 5


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_weights_of_another_version_are_refused_in_one_line(capsys):
    nets, there = {'net': torch.nn.Linear(2, 2)}, torch.nn.Linear(2, 2)
    runtime.load_weights(nets, {'phase': 'p1', 'ema': {'net': there.state_dict()}}, nets)
    assert torch.equal(nets['net'].weight, there.weight)
    for state in ({}, {'net': {'weight': there.weight}}, {'net': torch.nn.Linear(3, 2).state_dict()}):
        line = stops(capsys, runtime.load_weights, nets, {'phase': 'p1', 'ema': state}, nets)
        assert 'another version of model.py' in line


def test_load_checkpoint_refuses_in_one_line(tmp_path, capsys):
    run, nets, optimizer, ema = trained(tmp_path)
    runtime.save(run, 5, nets, optimizer, ema, {'metrics': {}})
    whole = run.checkpoint.read_bytes()
    truncated, hostile, foreign, partial = (tmp_path / f'{name}.pt'
                                            for name in ('truncated', 'hostile', 'foreign', 'partial'))
    truncated.write_bytes(whole[:len(whole) // 2])
    torch.save({'phase': 'p9', 'nets': Hostile(tmp_path / 'trace')}, hostile)
    torch.save([1, 2], foreign)
    torch.save({'phase': 'p9'}, partial)
    for path, phase, hint in ((tmp_path / 'no.pt', 'p9', 'does not exist'), (truncated, 'p9', 'truncated'),
                              (hostile, 'p9', 'no checkpoint of ours'), (foreign, 'p9', 'no checkpoint of ours'),
                              (partial, 'p9', 'no checkpoint of ours'),
                              (run.checkpoint, 'p1', 'of p9, not of p1'),
                              (run.checkpoint, ('p1', 'p2'), 'not of p1 or p2')):
        line = stops(capsys, runtime.load_checkpoint, path, phase, 'python p9_toy.py --fast=true')
        assert hint in line and str(path) in line and 'make it with: python p9_toy.py --fast=true' in line
    assert not (tmp_path / 'trace').exists()
    assert runtime.load_checkpoint(run.checkpoint, ('p1', 'p9'), '')['phase'] == 'p9'


# ---- gates ----------------------------------------------------------------------------------------------------------

def test_write_gate(tmp_path, capsys):
    run = make_run(tmp_path)
    assert runtime.write_gate(run, [('slope', '1.5 to 2.5', torch.tensor(1.9375), torch.tensor(True), 'noise 0.02')])
    capsys.readouterr()
    assert not runtime.write_gate(run, [('slope', '1.5 to 2.5', 1.94, True, 'noise 0.02'),
                                        ('tv', 'flat', 'rising', False), ('kurtosis', '> 3', float('nan'), False)])
    assert json.loads((tmp_path / 'gate.json').read_text()) == {'phase': 'p9', 'pass': False, 'criteria': [
        {'name': 'slope', 'target': '1.5 to 2.5', 'measured': 1.94, 'pass': True, 'baseline': 'noise 0.02'},
        {'name': 'tv', 'target': 'flat', 'measured': 'rising', 'pass': False},
        {'name': 'kurtosis', 'target': '> 3', 'measured': None, 'pass': False}]}
    assert capsys.readouterr().out.splitlines() == [
        'criterion  target      measured  baseline',
        'slope      1.5 to 2.5  1.94      noise 0.02  PASS',
        'tv         flat        rising                FAIL',
        'kurtosis   > 3         nan                   FAIL',
        'p9 gate: FAIL']


def test_inherit_says_how_the_gate_stood_and_keeps_the_history(tmp_path, capsys):
    path, sizes = tmp_path / 'p1/ckpt.pt', {'dim': 16, 'layers': 1}
    path.parent.mkdir()
    settings = full_config(path.parent, 'p1', '--dim=16', '--layers=1', '--corpus=', '--lambda_tv=0.2', '--dtype=auto')
    first = runtime.Run('p1', settings, torch.device('cpu'), arch=sizes)
    runtime.save(first, 5, *trained(tmp_path / 'nets')[1:], {'metrics': {'r': 0.5}})
    words = [f'--init_from={path}', '--alpha=3', '--z_dim=8']
    second = runtime.Run('p2', full_config(tmp_path / 'p2', 'p2', *words, inherited=settings), torch.device('cpu'))
    runtime.inherit(second)
    assert 'no gate.json' in capsys.readouterr().out and second.history[0]['pass'] is None
    runtime.write_gate(first, [('a', '> 1', 0.0, False), ('b', '> 1', 2.0, True)])
    capsys.readouterr()
    assert runtime.inherit(second)['step'] == 5
    assert capsys.readouterr().out.splitlines() == [
        f'from {path} (p1, step 5): dim 16, layers 1',
        'settings taken over, where not the usual: lambda_tv 0.2 (p1)',
        "note: P1's gate failed (1 of 2 criteria); going on"]
    assert second.history == [
        {'phase': 'p1', 'step': 5, 'config': settings, 'metrics': {'r': 0.5}, 'pass': False}]
    runtime.write_gate(first, [('a', '> 1', 2.0, True)])
    capsys.readouterr()
    assert runtime.previous_gate(path)['pass'] and capsys.readouterr().out == ''


# ---- whole programs -------------------------------------------------------------------------------------------------

def same(a, b):
    """Whether two nested checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_ctrl_c_saves_and_resume_continues_bit_for_bit(tmp_path):
    (tmp_path / 'p9_toy.py').write_text(TOY)
    straight = python('p9_toy.py', '--out_dir=straight', cwd=tmp_path)
    process = python('p9_toy.py', '--pause=0.2', cwd=tmp_path)
    while process.stdout.readline() not in ('did 5\n', ''):
        pass
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, '')
    assert out.splitlines()[-1] == ('interrupted: saved out/ckpt.pt at step 6; go on with the same command and '
                                    '--resume=true')
    assert finish(straight)[0] == 0
    code, out, err = finish(python('p9_toy.py', '--resume=true', cwd=tmp_path))
    assert (code, err) == (0, '') and 'resumed out/ckpt.pt at step 6' in out
    a, b = (runtime.load_checkpoint(tmp_path / name / 'ckpt.pt', 'p9', '') for name in ('straight', 'out'))
    assert a['step'] == 12
    for key in ('step', 'nets', 'ema', 'optimizer', 'rng', 'metrics', 'state'):
        assert same(a[key], b[key]), key
    for name in ('metrics.jsonl', 'metrics.csv'):
        assert (tmp_path / 'straight' / name).read_text() == (tmp_path / 'out' / name).read_text()
    table = list(csv.DictReader(open(tmp_path / 'out/metrics.csv', newline='')))
    assert [int(row['step']) for row in table] == [0, 4, 8, 12] and table[0].keys() == {
        'step', 'noisy', 'rows/0', 'rows/1'}


def test_two_ranks_take_the_step_of_one(tmp_path):
    (tmp_path / 'ranks.py').write_text(RANKS)
    code, out, err = finish(python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ranks.py',
                                   cwd=tmp_path))
    assert code == 0 and 'Warning' not in err, err
    assert out.count('all is well') == 2 and out.count('interrupted: saved out/ckpt.pt at step 3') == 1
    assert runtime.load_checkpoint(tmp_path / 'out/ckpt.pt', 'p9', '')['step'] == 3
    assert json.loads((tmp_path / 'out/metrics.jsonl').read_text()) == {'step': 0, 'train/loss': 0.5, 'train/rows': 8}
