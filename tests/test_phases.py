"""Tests of the phases: the chain P1 to P6 by its command lines, bad input, kill and resume, ranks, options; sample.py.

Figures take most of the time of a tiny run and the held-out sentences most of the rest, so the corpus is prepared with
64 held-out scenes, and only the chain itself draws. The functions of the phases are tested in test_losses.py.
"""
import csv
import importlib
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import data
import english
import grammar
import p2_contrast
import p5_roundtrip
import plot
import priors
import runtime
import sample
from model import CONTROLS, SIZES, size_error
from runs.presets import PRESETS
from tools import report
from tools.drill import same

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.name[:2]: path for path in runtime.scripts('p6')}
PHASES = tuple(SCRIPTS)
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


def open_once(*words, really=dist.init_process_group, **more):
    """All phases share one process group: torchrun's store hangs at the barrier of a second one."""
    if not dist.is_initialized():
        really(*words, **more)


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
    text = re.sub(r'\$\(settings (p\d)\)', lambda call: PRESETS['smoke'][call[1]], (ROOT / 'runs/smoke.sh').read_text())
    lines = [shlex.split(line) for line in text.splitlines() if re.match(r'python p\d', line)]
    return {words[1][:2]: [str(ROOT / words[1]), *(w for w in words[2:] if not re.match('--(out_dir|init_from)=', w))]
            for words in lines}


WORDS = smoke_words()


@pytest.fixture(scope='module')
def chain(small):
    """The chain P1 to P6, as runs/smoke.sh has it but for P2's temperature, in the folder of the small corpus: .folder
    and .output by phase."""
    output = {}
    for phase, before in zip(PHASES, (None, *PHASES)):
        more = [f'--init_from=out/{before}/ckpt.pt'] if before else EXACT
        more = [*more, '--temperature=0.1'] if phase == 'p2' else more
        done = process(*WORDS[phase], f'--out_dir=out/{phase}', *more, '--max_steps=2', cwd=small.folder)
        assert done.returncode == 0, done.stderr
        output[phase] = done
    return SimpleNamespace(folder=small.folder, output=output)


@pytest.fixture
def here(chain, monkeypatch):
    """Works in the folder of the chain, without figures and without WordNet."""
    monkeypatch.chdir(chain.folder)
    monkeypatch.setattr(english, 'find_wordnet', lambda: None)
    monkeypatch.setattr(data, 'HELD_OUT_SIZE', 64)
    for name in ('evaluation', 'trends', 'samples_table'):
        monkeypatch.setattr(plot, name, lambda *_: None)
    return chain


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
           'p5': {'samples', 'attention'}, 'p6': {'samples', 'drawn', 'attention'}}
NETS = {'p1': {'encoder', 'auxiliary'}, 'p2': {'encoder', 'auxiliary', 'readout'},
        'p3': {'encoder', 'auxiliary', 'readout'}, 'p5': {'encoder', 'readout', 'decoder'},
        'p4': {'encoder', 'readout', 'decoder', 'canvas only', 'z only', 'no canvas'},
        'p6': {'encoder', 'readout', 'decoder', 'unet'}}
FROZEN = {'p4': {'encoder', 'readout'}}
STATE = {'p1': {'rec_mean', 'priors_from'}, 'p2': {'stage', 'beaten', 'pairs'}, 'p6': {'buffer', 'mean', 'std'}}


@pytest.mark.parametrize('phase', PHASES)
def test_chain_checkpoint(chain, phase):
    checkpoint = load(chain.folder / f'out/{phase}')
    assert checkpoint.keys() == {'phase', 'step', 'arch', 'config', 'origins', 'commit', 'metrics', 'history', 'state',
                                 'nets', 'ema', 'optimizer', 'rng'}
    assert checkpoint['state'].keys() == {'tokenizer'} | STATE.get(phase, set())
    assert checkpoint['arch'] == {key: value for key, value in checkpoint['config'].items() if key in SIZES}
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
    tokenizer = data.Tokenizer.load(checkpoint['state']['tokenizer'])
    assert tokenizer.decode(tokenizer.encode('a red cube')) == 'a red cube' and tokenizer.size <= 1024


@pytest.mark.parametrize('phase', PHASES)
def test_chain_run_folder(chain, phase):
    folder = chain.folder / f'out/{phase}'
    facts, checkpoint = json.loads((folder / 'run.json').read_text()), load(folder)
    assert all(facts[key] == checkpoint[key] for key in ('phase', 'config', 'origins', 'commit'))
    assert (ROOT / facts['argv'][0]).is_file() and facts['argv'][0].startswith(phase)
    assert facts['world'] == 1 and facts['dtype'] == 'torch.float32'
    assert facts['versions'].keys() >= {'python', 'torch', 'numpy'} and facts['hardware'] and facts['started']

    log = rows(folder / 'metrics.jsonl')
    kinds = [(row['step'], {name.split('/')[0] for name in row if name != 'step'}) for row in log]
    begins = [(1, {'val'})] * (phase == 'p6')                      # where its encoder begins to move
    assert kinds == [(0, {'val'}), (0, {'train'}), *begins, (1, {'train'}), (2, {'val'})]
    for row in log:
        if 'train/loss' in row:                                    # P6 begins with the U-Net alone
            alone = 'unet_' * (phase == 'p6' and row['step'] == 0)
            assert {'train/loss', f'train/{alone}grad_norm', f'train/{alone}lr'} <= row.keys()
            assert not alone or not {'train/grad_norm', 'train/lr'} & row.keys()
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
    slow = expected & ({'tsne'} if phase == 'p4' else {'tsne', 'attention'})     # drawn at the end only
    numbered = {f'{name}_{step:06d}' for name in expected - slow - {'samples'} for step in steps}
    assert names == numbered | {f'{name}_000002' for name in slow} | expected & {'samples'}


def test_chain_samples(chain):
    said, samples = (rows(chain.folder / f'out/{phase}/samples.jsonl') for phase in ('p4', 'p5'))
    assert len(said) == len(samples) == 64
    assert all(row.keys() == {'input', 'said'} for row in said)
    assert all(row.keys() == {'input', 'paraphrase', 'f1', 'rouge_l', 'cosine'} for row in samples)
    assert all(grammar.parse(row['input']) for row in said + samples)


def test_chain_says_what_it_inherits(chain):
    for phase, before in zip(PHASES[1:], PHASES):
        out = chain.output[phase].stdout
        assert f'from out/{before}/ckpt.pt ({before}, step 2): vocab_size 1024, channels 6, size 32' in out
        assert f"note: {before.upper()}'s gate failed (" in out and '; going on' in out


def test_chain_keeps_a_value_until_a_later_phase_sets_another(here, capsys):
    """P2's temperature holds through P6; one that P5 sets instead holds from there."""
    def settings(folder):
        checkpoint, facts = load(folder), json.loads(Path(folder, 'run.json').read_text())
        assert facts['config'] == checkpoint['config'] and facts['origins'] == checkpoint['origins']
        return checkpoint['config']['temperature'], checkpoint['origins']['temperature']

    assert runtime.defaults(SCRIPTS['p2'])['temperature'] != 0.1
    for phase in PHASES[1:]:
        assert settings(f'out/{phase}') == (0.1, 'p2'), phase
        taken, = re.findall('^settings taken over, where not the usual: (.*)', here.output[phase].stdout, re.M)
        assert ('temperature 0.1 (p2)' in taken.split(', ')) == (phase > 'p2'), 'P2 does not take it over'
        assert 'device cpu (p1)' in taken and 'max_steps' not in taken and 'dim 32' not in taken
    run(tiny('p5', 'later/p5', '--temperature=0.2'))
    said = capsys.readouterr().out
    run(tiny('p6', 'later/p6', init_from='later/p5/ckpt.pt'))
    assert 'temperature' not in said and 'temperature 0.2 (p5)' in capsys.readouterr().out
    assert settings('later/p5') == settings('later/p6') == (0.2, 'p5')
    before, now = load('out/p6')['config'], load('later/p6')['config']
    differ = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    assert differ == {'temperature', 'out_dir', 'init_from', 'eval_every'}


def test_help_shows_what_a_phase_takes_over_and_where_it_was_set(here, capsys):
    """After its own keys; without the checkpoint before it the scripts' own values, and which one is missing."""
    def help_of(*words):
        with pytest.raises(SystemExit) as stop:
            run([str(SCRIPTS['p3']), *words, '--help'])
        said = capsys.readouterr()
        assert stop.value.code == 0 and said.err == '' and max(map(len, said.out.splitlines())) <= 120
        return said.out

    listed, heading, inherited = help_of().partition(
        '\nFrom out/p2/ckpt.pt, unless given here; in brackets the phase that set it:\n')
    config, keys = load('out/p2')['config'], runtime.defaults(SCRIPTS['p3'])
    assert heading and re.findall(r'^  --(\w+)=', listed, re.M) == [*keys]
    assert re.findall(r'^  --(\w+)=', inherited, re.M) == [key for key in config if key not in keys]
    for row in (r'--temperature=0\.1 +\[p2\] *', r'--dim=32 +\[p1\] D, width of the token states',
                r'--seed=0 +\[p1\] weights, batches', r'--negatives=2 +\[p2\] 0 to 6: counterfactuals'):
        assert re.search(f'^  {row}', inherited, re.M), row
    for row in r'--max_shift=2 +>= 0: px', r'--learning_rate=0\.0001 +>= 0: the peak':      # as P1 explains it
        assert re.search(f'^  {row}', listed, re.M), row
    usual, heading, inherited = help_of('--init_from=nowhere/ckpt.pt').partition(
        "\nFrom nowhere/ckpt.pt (not there yet: the scripts' own values), ")
    assert heading and usual.startswith('P3 ') and re.findall(r'^  --(\w+)=', usual, re.M) == [*keys]
    assert re.findall(r'^  --(\w+)=', inherited, re.M) == [key for key in config if key not in keys]
    for row in (r'--temperature=0\.07 +\[p2\]', r'--dim=384 +\[p1\] D'):
        assert re.search(f'^  {row}', inherited, re.M), row


@pytest.mark.parametrize('phase, word, made', [
    ('p2', '--dim=64', 'p1'), ('p2', '--vocab_size=512', 'p1'), ('p3', '--z_dim=64', 'p2'),
    ('p4', '--pyramid=false', 'p2'), ('p5', '--dec_layers=2', 'p4'), ('p6', '--channels=3', 'p1')])
def test_a_size_of_nets_that_are_there_is_refused_in_one_line(here, capsys, phase, word, made):
    key, _, _ = word.removeprefix('--').partition('=')
    before = load(f'out/p{int(phase[1]) - 1}')['arch'][key]
    with pytest.raises(SystemExit) as stop:
        run(tiny(phase, 'sizes', word))
    assert stop.value.code == 2 and not Path('sizes').exists()
    assert capsys.readouterr().err == (f'error: {word}: the nets of the phase before have {key} '
                                       f'{runtime.as_text(before)}; set it where they are made, in {made}\n')
    with pytest.raises(SystemExit) as stop:                    # the same size again is none that changes
        run(tiny(phase, 'sizes', f'--{key}={runtime.as_text(before)}', '--seed=one'))
    assert '--seed=one: expects a whole number' in capsys.readouterr().err


def test_a_checkpoint_older_than_the_scripts_is_refused_in_one_line(here, capsys):
    """It lacks a setting that an earlier script lists now."""
    checkpoint = load('out/p2')
    for key in ('lambda_common', 'anchors'):                   # of P1 and of P2
        del checkpoint['config'][key]
    torch.save(checkpoint, 'older.pt')
    for more in ([], ['--anchors=true', '--lambda_common=1'], ['--help']):
        with pytest.raises(SystemExit) as stop:
            run(tiny('p3', 'out/bad', *more, init_from='older.pt'))
        line = capsys.readouterr().err
        assert stop.value.code == 2 and not Path('out/bad/ckpt.pt').exists()
        assert line == ('error: older.pt is older than the scripts: it has no lambda_common, anchors; run the phases '
                        'again\n')


@pytest.mark.parametrize('phase', PHASES)
def test_chain_table_of_metrics(chain, phase):
    """metrics.csv: a row an evaluation, a column a metric, one for each entry of a list."""
    folder = chain.folder / f'out/{phase}'
    table = list(csv.DictReader(open(folder / 'metrics.csv', newline='')))
    log = [row for row in rows(folder / 'metrics.jsonl') if any(name.startswith('val/') for name in row)]
    assert len(table) == len(log) == (3 if phase == 'p6' else 2)
    for cells, row in zip(table, log):
        values = {}
        for name, value in row.items():
            name = name.removeprefix('val/')
            values |= {f'{name}/{k}': entry for k, entry in enumerate(value)} if isinstance(value, list) else {
                name: value}
        assert {name: cell for name, cell in cells.items() if cell} == {
            name: 'nan' if value is None else str(value) for name, value in values.items()}
    assert [cells['step'] for cells in table] == [str(row['step']) for row in log]


def test_presets_are_command_lines_of_nets_that_fit():
    """Every preset through all phases: each word sets a setting, each size can be made."""
    modules = {phase: vars(importlib.import_module(path.stem)) for phase, path in SCRIPTS.items()}
    for name, preset in PRESETS.items():
        config = None
        for phase, module in modules.items():
            words = preset.get(phase, '').split()
            config = runtime.configure(dict(module), words, f'p{int(phase[1]) - 1}' if config else '', config)
            assert size_error(config) == '', (name, phase)
            assert config.max_steps >= 1 and config.batch_size % config.grad_accum == 0


def test_chain_is_drawn_again_from_its_files(chain, tmp_path, capsys):
    """The last figures of every phase; what only a run in progress knows is not needed."""
    before = {}
    for phase in PHASES:
        shutil.copytree(chain.folder / f'out/{phase}', tmp_path / phase, ignore=shutil.ignore_patterns('*.pt'))
        pictures = sorted((tmp_path / phase / 'plots').glob('*.png'))
        before[phase] = {path.name for path in pictures if path.stem == 'samples' or path.stem.endswith('_000002')}
        for path in pictures:
            path.unlink()
    run([str(ROOT / 'plot.py'), f'--out={tmp_path}'])
    assert capsys.readouterr().out.count('drew ') == len(PHASES)
    after = {phase: {path.name for path in (tmp_path / phase / 'plots').glob('*.png')} for phase in PHASES}
    assert after == before and all(before.values())


def test_chain_gates_as_one_table(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain.folder)
    run([str(ROOT / 'plot.py'), '--out=out', '--gates=true'])
    table = capsys.readouterr().out
    assert 'criteria pass' in table and all(f'\n{phase} ' in table for phase in PHASES)
    assert (chain.folder / 'out/gates.png').read_bytes()[:4] == b'\x89PNG'


def test_report_of_the_chain(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain.folder)
    run([str(ROOT / 'tools/report.py'), '--out=out'])
    assert capsys.readouterr().out == 'wrote out/report.html\n'
    text = Path('out/report.html').read_text(encoding='utf-8')
    assert re.findall('<h2 id="[a-z-]+">([^<]+)</h2>', text) == [
        'Gates', 'Latent health', 'Semantics', 'Decoder', 'Qualitative', 'Diffusion prior', 'Learning curves',
        'Provenance']
    failed = sum(not row['pass'] for phase in PHASES
                 for row in json.loads(Path(f'out/{phase}/gate.json').read_text())['criteria'])
    assert text.count('>FAIL</span>') == failed > 0
    for caption in report.CAPTIONS.values():
        assert caption in text, caption
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', text), 'one file, nothing outside it'
    shown = {title for _, _, panels, _ in report.DASHBOARDS for title in panels}
    assert shown <= {title for title, *_ in plot.PANELS}


def test_trends_keep_the_colour_of_a_term_and_show_the_control(tmp_path, monkeypatch):
    """The same term in the loss and among the priors, and another run of it, whatever else a panel holds."""
    figures = []
    monkeypatch.setattr(plot, 'save', lambda fig, path: figures.append(fig))
    for name, more in (('p6', 0.0), ('control', 1.0)):
        (tmp_path / name).mkdir()
        rows = [{'step': step, 'train/wavelet': 2.0 + more, 'train/tv': 1.0 + more, 'val/prior_tv': 3.0 + more,
                 'val/prior_var': 1.0 + more} for step in (0, 10)]
        (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'p6/run.json').write_text(json.dumps({'config': {'control': 'where/it/once/was/control'}}))
    plot.trends(tmp_path / 'p6')                                              # the control is found beside it
    loss, priors = figures[0].axes
    assert [ax.get_ylabel() for ax in (loss, priors)] == ['as defined, where above 0', 'as each is defined']
    colour = {(ax, line.get_label()): line.get_color() for ax in (loss, priors) for line in ax.lines}
    assert colour[loss, 'tv'] == colour[priors, 'tv'] != colour[priors, 'var'] != colour[loss, 'wavelet']
    for ax in loss, priors:
        dotted = {line.get_color(): line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ':'}
        solid = {line.get_color(): line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == '-'}
        assert len(solid) == 2 and dotted == {colour: value + 1 for colour, value in solid.items()}


def test_trends_keep_what_is_trained_in_sight(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, 'save', lambda fig, path: figures.append(fig))
    rows = [{'step': step, 'train/loss': 0.5, 'train/nce': 0.4, 'train/var': 4e4} for step in (0, 10)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    plot.trends(tmp_path)
    low, high = figures[0].axes[0].get_ylim()
    assert low < 0.4 and 0.5 < high < 4e4


def test_a_damaged_log_is_one_line(tmp_path, capsys):
    for line in (b'\0\0', b'{"step": 5, "tr{"step": 6}', b'\xff', b'3'):
        (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 0, "val/r1": 0.5}\n' + line + b'\n{"step": 7')
        with pytest.raises(SystemExit) as stop:
            plot.trends(tmp_path)
        assert stop.value.code == 2 and 'metrics.jsonl, line 2: ' in capsys.readouterr().err
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "said": "\u2028"}\n{"step": 7')
    assert plot.read_lines(tmp_path / 'metrics.jsonl') == [{'step': 0, 'said': '\u2028'}], 'the last is being written'


def test_an_evaluation_leaves_the_pictures_of_others_and_draws_no_nan(tmp_path):
    theirs = {'compare_2026.png', 'montage_000500 (copy).png', 'step_000005 (copy).npz'}
    (tmp_path / 'plots').mkdir()
    for name in theirs | {'montage_000900.png'}:
        (tmp_path / 'plots' / name).write_bytes(b'x')
    plot.evaluation(tmp_path, 0, {'alpha_image': torch.full((4, 2), math.nan)})
    assert len(list((tmp_path / 'plots').iterdir())) == 4, 'nothing is drawn, nothing goes'
    plot.evaluation(tmp_path, 0, {'alpha_image': torch.rand(40, 2)})
    assert {path.name for path in (tmp_path / 'plots').iterdir()} == theirs | {'slopes_000000.png', 'step_000000.npz'}


def test_bench_canvases_are_drawn_again_from_their_file(tmp_path, capsys):
    rows = [{'size': size, 'channels': 6, 'batch': batch, 'forward': 10 / batch, 'backward': 5 / size,
             'forward_gigabytes': batch / 16, 'gigabytes': batch / 8} for size in (32, 48) for batch in (2, 8)]
    (tmp_path / 'canvases.json').write_text(json.dumps(rows))
    run([str(ROOT / 'plot.py'), f'--run={tmp_path}'])
    assert (tmp_path / 'canvases.png').read_bytes()[:4] == b'\x89PNG' and 'drew' in capsys.readouterr().out


def test_report_shows_the_prior_without_its_control_and_p7_and_bench(chain, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(chain.folder / 'out', folder)
    shutil.copytree(folder / 'p6', folder / 'p6_control')
    about = json.loads((folder / 'p6_control/run.json').read_text())
    about['config']['lambda_prior'] = 0.0
    (folder / 'p6_control/run.json').write_text(json.dumps(about))
    (folder / 'p7').mkdir()
    (folder / 'p7/gate.json').write_text(json.dumps({'phase': 'p7', 'pass': False, 'criteria': [
        {'name': 'dropping tv shows', 'target': '>= 1', 'measured': 0, 'pass': False}]}))
    (folder / 'bench').mkdir()
    for name in 'p7/ablations.png', 'p7/ablation_canvases.png', 'bench/canvases.png':
        shutil.copy(folder / 'p1/plots/slopes_000002.png', folder / name)
    run([str(ROOT / 'tools/report.py'), f'--out={folder}'])
    text = (folder / 'report.html').read_text(encoding='utf-8')
    assert 'P6_CONTROL' not in text and 'P6: ' in text and 'dropping tv shows' in text
    assert '<h2 id="ablations">' in text and 'what gets worse without each piece' in text
    assert 'the canvases without each piece' in text
    assert '<h2 id="throughput">' in text and 'two sizes of the canvas' in text


def test_report_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (('cut', '{"phase": "p1", "cri'), ('other', '{"phase": "p1"}'), ('null', 'null')):
        Path(name, 'p1').mkdir(parents=True)
        Path(name, 'p1/gate.json').write_text(content)
    for words, hint in (([], 'no run folder'), (['--out=a,b'], 'this is one folder'),
                        (['--run=p1'], "unknown setting '--run=p1'"), (['--gates=true'], 'unknown setting'),
                        (['--out=cut'], 'cut/p1/gate.json: lacks JSON'),
                        (['--out=other'], 'other/p1/gate.json: lacks criteria'),
                        (['--out=null'], 'null/p1/gate.json: lacks JSON')):
        with pytest.raises(SystemExit) as stop:
            run([str(ROOT / 'tools/report.py'), *words])
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


@pytest.fixture(scope='module')
def bad_files(chain):
    """Files that no phase can use, in the folder of the chain."""
    folder = chain.folder
    whole = (folder / 'out/p1/ckpt.pt').read_bytes()
    files = {'truncated.pt': whole[:len(whole) // 2], 'nothing.pt': b'',
             'pickle.pt': pickle.dumps(Hostile(), protocol=2), 'empty.txt': b'',
             'blank.txt': b'\n \n' * 40, 'one.txt': b'a red cube\n', 'long.txt': b'red ' * 2 ** 18,
             'bad.txt': b'\xff\xfe\n...\n' * 40,
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
    ('p1', ['--corpus=one.txt'], 'at least 20'), ('p1', ['--corpus=long.txt'], 'at least 20'),
    ('p1', ['--heads=5'], 'expects a multiple of 10'), ('p1', ['--query_grid=7'], 'expects a divisor'),
    ('p1', ['--dropout=2'], 'expects 0 to 1'), ('p5', ['--dropout=2'], 'expects 0 to 1'),
    ('p4', ['--dec_heads=3'], 'expects a multiple of 6'),
    ('p1', ['--corpus=blank.txt'], 'only 0 different good sentences'),
    ('p1', ['--corpus=bad.txt'], 'only 0 different good sentences'),
    ('p1', ['--corpus=bad.jsonl'], 'only 0 different good sentences on 80 lines'),
    ('p1', ['--complexity=2', '--simple_share=2'], 'expects 0 to 1'),
    ('p1', ['--complexity=9'], 'complexity'), ('p1', ['--complexity=0'], 'complexity'),
    ('p1', ['--vocab_size=100'], '--vocab_size=100: expects 260'), ('p2', ['--prior_samples=0'], 'at least 1'),
    ('p2', ['--negatives=7'], 'expects 0 to 6'), ('p4', ['--negatives=-1'], 'expects 0 to 6'),
    ('p2', ['--leave_out=color'], 'expects nothing or one of colour'),
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

@pytest.mark.parametrize('phase, more', [('p1', []), ('p2', ['--staged=false', '--mine_every=1']), ('p4', [])])
def test_kill_9_then_resume_goes_on_bit_for_bit(here, phase, more):
    """Killed in step 3, after the checkpoint of step 2 and an optimizer step past it; dropout, and P2's mined pairs."""
    words = tiny(phase, f'straight/{phase}', *EXACT, '--max_steps=4', '--eval_every=2', *more)
    run(words)
    again = [*words, f'--out_dir=killed/{phase}']
    Path('driver.py').write_text(DRIVER)
    done = process('driver.py', json.dumps([again]), cwd=here.folder, KILL_AT='3')
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = rows(f'killed/{phase}/metrics.jsonl')
    assert load(f'killed/{phase}')['step'] == 2 and killed[-1]['step'] == 2 and 'train/loss' in killed[-1]
    run([*again, '--resume=true'])

    a, b = load(f'straight/{phase}'), load(f'killed/{phase}')
    for key in ('step', 'nets', 'ema', 'optimizer', 'rng', 'metrics', 'state', 'history'):
        assert same(a[key], b[key]), key
    for name in ('metrics.jsonl', 'metrics.csv', 'gate.json'):
        assert Path(f'straight/{phase}', name).read_text() == Path(f'killed/{phase}', name).read_text()


# ---- ranks and micro-steps ------------------------------------------------------------------------------------------

# Fewer rows for priors and reading than the batch has, so that it matters which ones. Untrained decoders say no four
# tokens of the input in a row, but one (P6 looks for four, as its P5 did: its copy term would be 0 whatever is done).
RANKS = {'p1': ['--batch_size=8', '--prior_gate=0.0', '--prior_ramp=1', '--prior_samples=4', '--joined=0.4',
                '--random_tokens=0.2'],
         'p2': ['--batch_size=8', '--rec_samples=24', '--prior_samples=16'],
         'p3': ['--batch_size=8', '--rec_samples=16', '--prior_samples=4'],
         'p4': ['--batch_size=8', '--joined=0.4', '--random_tokens=0.2'],
         'p5': ['--batch_size=8', '--generated=8', '--best_of_k=2', '--copy_ngram=1', '--dec_samples=16',
                '--prior_samples=8'],
         'p6': ['--batch_size=8', '--prior_rows=4', '--refresh=6', '--max_steps=3']}    # step 2 reads what step 1 wrote


TERMS = {'p1': ('loss', 'rec', *priors.PRIORS), 'p2': ('nce', 'rec', 'swaps_beaten', *priors.PRIORS),
         'p3': ('nce', 'rec', 'inv', *priors.PRIORS), 'p4': ('loss', 'paraphrase', *CONTROLS),
         'p5': ('nce', 'again', 'para', 'inv', 'cycle', 'copy', *priors.PRIORS),
         'p6': ('diffusion', 'prior', 'unet_grad_norm', 'nce', 'again', 'para', 'inv', 'cycle', *priors.PRIORS)}


IN_FOUR = 'p2', 'p5'         # two ranks of two micro-steps each; the others' parts would be too small for the priors

THROUGH_STAGES = ('--stage1_ends=-1', '--stage2_ends=-1', '--look_every=1', '--mine_every=3', '--max_steps=5')


def rank_words(phase, out, *words):
    dry = ['--dropout=0', *['--dec_dropout=0'] * (phase >= 'p4')]      # the drawn masks would differ between ranks
    return tiny(phase, f'{out}/{phase}', *EXACT, *dry, *RANKS[phase], *words)


@pytest.fixture(scope='module')
def two_ranks(chain):
    """Every phase under one torchrun of two gloo ranks, which spares four times the imports."""
    (chain.folder / 'driver.py').write_text(DRIVER)
    done = process('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'driver.py',
                   json.dumps([rank_words(phase, 'two') for phase in PHASES]
                              + [rank_words(phase, 'four', '--grad_accum=2') for phase in IN_FOUR]
                              + [rank_words('p2', 'two_staged', *THROUGH_STAGES)]), cwd=chain.folder)
    assert done.returncode == 0, done.stderr


def trained(folder, name):
    """What a run logged of its training steps."""
    return [row[f'train/{name}'] for row in rows(Path(folder) / 'metrics.jsonl') if f'train/{name}' in row]


def test_micro_steps_read_the_same_few_scenes(here, capsys):
    """One scene of two is read; where that does not divide a part it is said in one line."""
    few = '--batch_size=16', '--rec_samples=8', '--prior_samples=8'
    run(rank_words('p2', 'few', *few))
    run(rank_words('p2', 'few_parts', *few, '--grad_accum=2'))
    for name in ('grad_norm', *TERMS['p2']):
        assert trained('few_parts/p2', name) == pytest.approx(trained('few/p2', name), rel=1e-4, abs=1e-5), name
    with pytest.raises(SystemExit) as stop:
        run(rank_words('p2', 'refused', '--batch_size=16', '--rec_samples=5', '--grad_accum=2'))
    assert stop.value.code == 2 and '--rec_samples=5: one of 3 scenes' in capsys.readouterr().err


@pytest.mark.parametrize('phase', PHASES)
def test_ranks_and_micro_steps_take_the_step_of_one_process(here, two_ranks, phase):
    run(rank_words(phase, 'one'))
    run(rank_words(phase, 'parts', '--grad_accum=2'))
    one, two, parts = (trained(f'{out}/{phase}', 'grad_norm') for out in ('one', 'two', 'parts'))
    assert len(one) == 2 and one[0] != one[1]
    assert two == pytest.approx(one, rel=1e-4), 'two ranks'
    assert parts == pytest.approx(one, rel=1e-4), 'two micro-steps'
    cuts = ('two', 'parts', 'four') if phase in IN_FOUR else ('two', 'parts')
    for name in TERMS[phase]:
        expected = trained(f'one/{phase}', name)
        assert any(expected), f'{name} is 0 whatever is done'
        for cut in cuts:
            assert trained(f'{cut}/{phase}', name) == pytest.approx(expected, rel=1e-4, abs=1e-5), (cut, name)
    ends = {cut: rows(f'{cut}/{phase}/metrics.jsonl')[-1] for cut in ('one', *cuts)}      # of the trained weights
    for name in ('ce',) if phase == 'p4' else ('tv', 'alpha', 'kurtosis'):
        for cut in cuts:
            assert ends[cut][f'val/{name}'] == pytest.approx(ends['one'][f'val/{name}'], rel=1e-3), (cut, name)
    if phase == 'p6':
        assert len(trained('one/p6', 'unet_grad_norm')) == 3
        one, *others = (load(f'{out}/p6')['state']['buffer'] for out in ('one', 'two', 'parts'))
        for buffer in others:
            assert torch.allclose(buffer, one, rtol=1e-3, atol=1e-3)
        run(rank_words(phase, 'shorter', '--max_steps=2'))
        same = (load('shorter/p6')['state']['buffer'] == one).all(3).all(2).all(1)
        assert same[:6].all() and not same[6:12].any() and same[12:].all(), 'a step replaces the oldest'


def test_stages_end_and_pairs_are_mined_on_two_ranks_as_on_one(here, two_ranks, capsys):
    run(rank_words('p2', 'one_staged', *THROUGH_STAGES))
    said = capsys.readouterr().out
    assert 'step 0: stage 2 begins' in said and 'step 1: stage 3 begins' in said
    one, two = (load(f'{out}/p2')['state'] for out in ('one_staged', 'two_staged'))
    assert one['stage'] == two['stage'] == 2 and torch.equal(one['pairs'], two['pairs'])
    for name in ('nce', 'grad_norm'):
        expected = trained('one_staged/p2', name)
        assert len(expected) == 5 and trained('two_staged/p2', name) == pytest.approx(expected, rel=1e-3), name


# ---- the plan to the letter, and other options ----------------------------------------------------------------------

OPTIONS = {
    'P1 of the plan': ('p1', ['--lambda_rec=0.0', '--lambda_common=0.0', '--lambda_lattice=0.0', '--blur_steps=2',
                              '--coordinate_steps=2', '--smoothing=true']),
    'coordinates for a step only': ('p1', ['--coordinate_steps=1', '--prior_gate=0.0', '--query_grid=32', '--dim=16']),
    'slots': ('p1', ['--slots=3']),
    'as on English': ('p1', ['--aligned=true', '--gist=4', '--joined=0.5', '--random_tokens=0.1']),
    'P2 of the plan': ('p2', ['--staged=false', '--anchors=false', '--negatives=0', '--lambda_vicreg=0.1',
                              '--lambda_barlow=0.1', '--pyramid=false', '--mask_false_negatives=false',
                              '--mine_every=0']),
    'P3 of the plan': ('p3', ['--lambda_rec=0.0', '--anchors=false', '--mine_at_start=false']),
    'no family left out': ('p2', ['--leave_out=', '--negatives=3', '--lambda_rec=0.0']),
    'P4 of the plan': ('p4', ['--paraphrase_share=0.0']),
    'P4 alone': ('p4', ['--controls=false', '--vocab_mask=false']),
    'P5 of the plan': ('p5', ['--paraphrase_share=0.0', '--negatives=1', '--best_of_k=1', '--mine_at_start=false']),
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
    pairs = load('mined')['state']['pairs']
    assert pairs.shape[1] == 2 and (pairs[:, 0] != pairs[:, 1]).all() and load('plain')['state']['pairs'] is None
    mined, plain = trained('mined', 'nce'), trained('plain', 'nce')
    assert mined[0] == plain[0] and mined[1] != plain[1], 'there is nothing to search at step 0'


def test_three_things_come_in_after_two(here, capsys, monkeypatch):
    words = tiny('p1', 'three/p1', '--complexity=2', '--num_scenes=60', '--max_steps=1', '--lr_steps=1')
    run(words)
    easy = [f'--{name}=-1' for name in ('stage1_ends', 'stage2_ends', 'more_come_in')]
    drawn, draw = [], data.Corpus.draw

    def noted(corpus, *rest, **more):
        scenes, generator = draw(corpus, *rest, **more)
        drawn.append(set(scenes.tolist()))
        return scenes, generator
    monkeypatch.setattr(data.Corpus, 'draw', noted)
    run(tiny('p2', 'three/p2', '--max_steps=6', '--lr_steps=6', '--look_every=1', *easy, init_from='three/p1/ckpt.pt'))
    news = re.findall(r'step \d+: (stage .*)', capsys.readouterr().out)
    assert news == ['stage 2 begins, free paraphrases to canonical',
                    'stage 3 begins, free paraphrases of the fewest things', 'stage 4 begins, canonical paraphrases',
                    'stage 5 begins, free paraphrases to canonical', 'stage 6 begins, free paraphrases of all scenes']
    checkpoint = load('three/p2')
    assert checkpoint['state']['stage'] == 5 and checkpoint['config']['complexity'] == 2
    train = data.load(checkpoint['config']).splits['train']
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
    assert ('a tagger makes some' in out) == name.endswith('.txt')
    run(tiny('p2', folder / 'p2', '--drop_words=0.2', '--mask_words=0.1', '--turn_words=0.5',
             init_from=folder / 'p1/ckpt.pt'))
    checkpoint = load(folder / 'p2')
    assert checkpoint['config']['corpus'] == name and len(trained(folder / 'p2', 'nce')) == 2
    assert all(math.isfinite(checkpoint['metrics'][key]) for key in ('r1', 'r5', 'paraphrase_cosine', 'rec_ce'))
    config = runtime.Config(checkpoint['config'])
    stage, = p2_contrast.curriculum(config, data.load(config).splits['train'])
    assert config.staged and stage.form == 'any', 'without canonical forms there are no stages'
    assert checkpoint['state']['stage'] == 0
    families = {'own.txt': english.FAMILIES, 'own.jsonl': ('counterfactual 1', 'colour', 'mood')}[name]
    measured = [family for family in families if f'wins_{family}' in checkpoint['metrics']]
    names = [row['name'] for row in json.loads((folder / 'p2/gate.json').read_text())['criteria']]
    assert measured and len(names) == 4 + 2 * len(measured) + 1 + 8, '8 of the canvas'
    assert names[4:-9] == [f'{kind}, {family} +' for family in measured for kind in ('gap', 'wins')]
    assert names[-9] == 'R@1, above TF-IDF +'
    if name.endswith('.jsonl'):
        for phase in PHASES[2:]:
            run(tiny(phase, folder / phase, init_from=folder / f'p{int(phase[1]) - 1}/ckpt.pt'))
            criteria = json.loads((folder / phase / 'gate.json').read_text())['criteria']
            assert criteria and not any('Graph F1' in row['name'] for row in criteria), 'there is no checker for it'


def test_p1_learns_from_sentences_of_any_script(here):
    """Long ones are cut, joined and spoilt on the way."""
    lines = ('लड़की ने {} किताबें पढ़ीं।', '红色的球{}在桌子上。', 'القطة {} على السجادة؟', 'Кот {} сидел на ковре!',
             '🟥 cube {} 🔵')
    Path('scripts.txt').write_text('\n'.join(line.format(n) for line in lines for n in range(10, 20)), encoding='utf-8')
    run(tiny('p1', 'own/scripts', '--corpus=scripts.txt', '--max_length=16', '--joined=0.5', '--random_tokens=0.2'))
    assert len(trained('own/scripts', 'rec')) == 2 and load('own/scripts')['metrics']['rec_ce'] > 0


def test_a_control_of_p6(here, capsys):
    run(tiny('p6', 'p6/control', '--lambda_prior=0'))
    control, start = load('p6/control'), load('out/p5')
    log = rows('p6/control/metrics.jsonl')
    assert [row['step'] for row in log] == [1, 1, 2], 'the control begins where the encoder begins to move'
    assert all(torch.equal(control['nets']['unet'][key], value) for key, value in control['ema']['unet'].items())
    assert not all(torch.equal(control['nets']['encoder'][key], value)
                   for key, value in start['ema']['encoder'].items())
    assert not Path('p6/control/gate.json').exists()
    assert len(control['state']['buffer']) == 1, 'which nobody reads'
    run(tiny('p6', 'p6/no_weight', '--lambda_prior=1e-30'))
    for name in ('encoder', 'readout', 'decoder'):
        for key, value in load('p6/no_weight')['nets'][name].items():
            assert torch.equal(value, control['nets'][name][key]), 'the same steps on the same batches'
    run(tiny('p6', 'p6/with', '--control=p6/control', '--t_high=0.8'))       # the control has no t
    names = [row['name'] for row in json.loads(Path('p6/with/gate.json').read_text())['criteria']]
    assert 'paraphrase distance falls by, against the control +' in names
    table = report.control_table(Path('p6/with'), Path('out/p5'))
    assert re.findall('<th>(.*?)</th>', table) == ['test scenes', 'before', 'with the prior', 'without']
    for label, name in (('distance of paraphrases', 'paraphrase_distance'), ('gap, argument swap', 'gap_argument swap'),
                        ('R@1 with own counterfactuals in the pool', 'r1_hard')):
        row, = re.findall(f'<tr.*?>(<td.*?>{label}</td>.*?)</tr>', table)
        values = [load(folder)['metrics'][name] for folder in ('out/p5', 'p6/with', 'p6/control')]
        assert re.findall('<td.*?>(.*?)</td>', row)[1:] == [f'{value:.3f}' for value in values]
    start['metrics']['r1'] += 0.5
    torch.save(start, 'p6/other.pt')
    shutil.copy('out/p5/ckpt.pt', 'p6/same.pt')
    for words, hint in ((['--control=nowhere'], '--lambda_prior=0 --out_dir=nowhere'),
                        (['--control=p6/with'], 'is no control'),
                        (['--control=p6/control', '--seed=5'], 'seed differs'),
                        (['--control=p6/control', '--encoder_scale=1'], 'encoder_scale differs'),
                        (['--control=p6/control', '--init_from=p6/other.pt'], 'what it began with differs'),
                        (['--control=p6/control', '--init_from=p6/same.pt', '--seed=5'], 'settings; seed differs'),
                        (['--t_low=0.5'], 't_low=0.5'), (['--unet_steps=2'], 'no encoder moves'),
                        (['--refresh=65'], 'buffer_size=64'), (['--unet_dim=12'], 'multiple of 8')):
        with pytest.raises(SystemExit) as stop:
            run(tiny('p6', 'p6/none', *words))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count('\n') == 1 and hint in error, error


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
    assert model.cut == 1 and np.array_equal(z, model.encode((line for line in TYPED), batch_size=2)), 'any iterable'
    alone = np.concatenate([model.encode([sentence]) for sentence in TYPED])
    assert alone == pytest.approx(z, abs=1e-5), 'neither the company nor the padding matters'
    assert model.encode([]).shape == (0, 32)
    V, again = model.read(TYPED)
    assert V.shape == (7, 6, 32, 32) and again.numpy() == pytest.approx(z, abs=1e-5)


def test_nearest_counterfactuals_differ_in_one_thing():
    sentence = 'two red cubes are under a blue ball'
    found = sample.counterfactuals(sentence, random.Random(0).random, True)
    assert {family for family, _ in found} == set(grammar.FAMILIES) and len(found) > 30
    assert len({other for _, other in found}) == len(found)
    for family, other in found:
        if family == 'colour':      # the other words stay as they are
            assert sum(a != b for a, b in zip(other.split(), sentence.split(), strict=True)) == 1, other
    assert all(grammar.meaning(grammar.parse(other)) != grammar.meaning(grammar.parse(sentence)) for _, other in found)
    assert sample.counterfactuals('nobody was there', random.random, True) == []
    found = sample.counterfactuals('A man is holding a dog.', random.Random(0).random, False)
    assert dict(found)['argument swap'] == 'a dog is holding a man', 'of ordinary English'


def test_encode_wants_a_list(model):
    with pytest.raises(TypeError, match='a list of sentences'):
        model.encode('a red cube')


def test_a_line_without_end_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, 'LONGEST_LINE', 10)
    path = tmp_path / 'long.txt'
    path.write_text('a red cube on a ball\nshort\n123456789\n1234567890\nlast')
    assert list(sample.lines_of(path)) == ['a red cube', 'short', '123456789', '1234567890', 'last']


def test_a_file_that_shrinks_while_it_is_embedded_is_said(here, model, monkeypatch, capsys):
    monkeypatch.setattr(sample, 'lines_of', lambda path, lengths=iter((5, 2)): iter(['a red cube'] * next(lengths)))
    with pytest.raises(SystemExit):
        sample.embed_file(model, 'shrinks.txt', 'short.npy', with_canvas=False)
    assert '2 of 5 were embedded' in capsys.readouterr().err and not Path('short.npy').exists()


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


def test_embedding_leaves_other_files_alone_and_nothing_behind(here, model, monkeypatch, capsys):
    Path('mine.tmp').write_text('a red cube\n')
    sample.embed_file(model, 'mine.tmp', 'mine.npy', with_canvas=False)
    assert Path('mine.tmp').read_text() == 'a red cube\n' and np.load('mine.npy').shape == (1, 32)
    Path('own.npy').write_text('a red cube\n')
    with pytest.raises(SystemExit):
        sample.embed_file(model, 'own.npy', 'own.npy', with_canvas=False)
    assert 'would replace the sentences' in capsys.readouterr().err and Path('own.npy').read_text() == 'a red cube\n'
    before = sorted(Path().iterdir())
    monkeypatch.setattr(sample, 'fill', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample.embed_file(model, 'mine.tmp', 'stopped.npy', with_canvas=True)
    assert sorted(Path().iterdir()) == before


def test_sample_speaks(here, capsys):
    words = [str(ROOT / 'sample.py'), '--init_from=out/p6/ckpt.pt', '--device=cpu', '--figures=shown']
    run([*words, '--text=Two red cubes are under a blue ball', '--text2=a blue ball is on two red cubes', '--draw=2',
         '--walk=3'])
    out = capsys.readouterr().out
    assert out.startswith('model        out/p6/ckpt.pt (P6, step 2)\n')
    for start in ('read as      two red cubes are under a blue ball\n', 'said again ', 'paraphrase ',
                  'nearest of ', 'cosine ', '        0.00 ', '        0.50 ', '        1.00 ',
                  'the checker reads '):
        assert start in out
    names = {path.name for path in Path('shown').iterdir()}
    assert names == {'two_red_cubes_are_under_a_blue_ball.png', 'drawn.png'}
    run([*words, '--text=nobody was there'])
    out = capsys.readouterr().out
    assert 'not of the built-in grammar' in out and '\ncut ' not in out
    run([*words, '--text=' + 'red ' * 300])
    assert '\ncut          only its first 63 tokens' in capsys.readouterr().out
    run([*words, '--text=' + '\U0001d4d0' * 90])
    assert all(len(path.name.encode()) < 255 for path in Path('shown').iterdir())


def test_sample_takes_the_newest_model_that_has_ended(tmp_path, monkeypatch):
    """Of P5 and P6 in out/ and the one that comes with the repository, which stands in for all when there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, '__file__', str(tmp_path / 'here/sample.py'))
    shipped, p5, p6 = tmp_path / 'here/pretrained/model.pt', Path('out/p5/ckpt.pt'), Path('out/p6/ckpt.pt')
    assert sample.newest() == shipped, 'the one whose absence is said'

    def make(path, age):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
        os.utime(path, (1e9 - age, 1e9 - age))
    make(p5, 5)
    assert sample.newest() == shipped, 'P5 has not ended'
    p5.with_name('gate.json').write_text('{}')
    assert sample.newest() == p5
    make(p6, 9)
    p6.with_name('gate.json').write_text('{}')
    assert sample.newest() == p5
    make(p6, 4)
    assert sample.newest() == p6
    make(shipped, 3)
    assert sample.newest() == shipped
    make(p5, 2)
    assert sample.newest() == p5


@pytest.mark.parametrize('words, message', [
    (['--model=klingon'], '--model=klingon: pretrained/ has english\n'),
    (['--model=english', '--init_from=out/p6/ckpt.pt'], '--model=english --init_from=out/p6/ckpt.pt: expects one of')])
def test_sample_names_the_models_that_it_has(here, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run([str(ROOT / 'sample.py'), '--text=a cat', '--figures=', *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_sample_reads_ordinary_english_with_the_model_that_comes_with_it(here, capsys):
    run([str(ROOT / 'sample.py'), '--model=english', '--text=She put the slippers under the bed.', '--figures=',
         '--paraphrases=0', '--device=cpu'])
    out, said = capsys.readouterr().out, 'she put the slippers under the bed'
    assert f'read as      {said}\nsaid again   {said}\nnearest of' in out and 'paraphrase' not in out


def test_sample_speaks_without_being_told_which_model(here, capsys):
    run([str(ROOT / 'sample.py'), '--text=a red cube is on a blue ball', '--figures=', '--device=cpu'])
    assert capsys.readouterr().out.startswith('model        out/p6/ckpt.pt (P6, step 2)\nread as      a red cube')


@pytest.mark.parametrize('phase', ['p5', 'p6'])
def test_a_model_needs_little_of_a_checkpoint(here, phase):
    """What comes with the repository: averaged weights in half precision, and none of what training needs."""
    checkpoint = load(f'out/{phase}')
    small = {key: checkpoint[key] for key in ('phase', 'step', 'arch', 'config', 'state')}
    small['ema'] = {name: {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
                    for name, state in checkpoint['ema'].items()}
    torch.save(small, 'model.pt')
    whole, half = (sample.TextCanvas(path, 'cpu', 'float32') for path in (f'out/{phase}/ckpt.pt', 'model.pt'))
    assert half.step == whole.step == 2 and half.config == whole.config and half.has_prior == (phase == 'p6')
    assert all(p.dtype == torch.float32 for p in half.nets.parameters())
    z, expected = (model.encode(['a red cube is on a blue ball']) for model in (half, whole))
    assert z == pytest.approx(expected, abs=1e-2) and not np.array_equal(z, expected)
    assert len(half.say(half.read(['a red cube'])[0])) == 1


def test_rouge_l_of_sample_is_rouge_scores():
    rand, words = random.Random(0), 'a red cube is on the blue ball 2'.split()
    for _ in range(200):
        a, b = (' '.join(rand.choices(words, k=rand.randrange(9))) for _ in range(2))
        assert sample.rouge_l(a, b) == pytest.approx(p5_roundtrip.ROUGE.score(a, b)['rougeL'].fmeasure), (a, b)
        assert sample.rouge_l(a, b) == pytest.approx(RougeScorer(['rougeL']).score(a, b)['rougeL'].fmeasure), (a, b)
    assert p5_roundtrip.ROUGE.score('красный куб', 'красный куб')['rougeL'].fmeasure == 1.0, 'a copy in any script'


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
    (['--text=a', '--init_from=out/p1/ckpt.pt'], 'not of p5 or p6'),
    (['--draw=2', '--init_from=out/p5/ckpt.pt'], 'no diffusion prior'),
    (['--embed=nowhere.txt'], 'no such file'), (['--embed=empty.txt'], 'the file is empty'),
    (['--embed=good.txt', '--out=z.txt'], 'ends in .npy'), (['--text=a', '--paraphrases=-1'], 'at least 0'),
    (['--draw=-1'], 'at least 0'), (['--embed=good.txt', '--out=folder.npy'], 'name of a file'),
    (['--text=a', '--top_p=7'], 'at most 1'), (['--text=a', '--walk=1'], 'at least 2'),
    (['--text2=a'], 'compared with --text'),
    (['--text=a', '--init_from=out/p6/ckpt.pt', '--figures=good.txt'], '--figures=good.txt: ')])
def test_sample_refuses_in_one_line(here, bad_files, capsys, words, hint):
    Path('good.txt').write_text('a red cube\n')
    Path('folder.npy').mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        run([str(ROOT / 'sample.py'), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1 and hint in error
