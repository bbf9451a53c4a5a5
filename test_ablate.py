"""Tests of P7: what it runs and in which order, its statistics, and one ablation from end to end."""
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import p1_canvas
import p2_contrast
import p3_jitter
import p4_decoder
import p5_roundtrip
import p6_diffusion
import p7_ablate
import runtime
from test_phases import ROOT, run


@pytest.fixture(autouse=True)
def sigterm():
    """p7_ablate.work has a handler of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


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
    assert '--jitter_prob=0' not in words['jitter', 'p4']
    (steps,) = [word for word in words['tv', 'p2'] if word.startswith('--max_steps=')]
    assert steps.replace('max', 'lr') in words['tv', 'p2'], 'the cosine ends with the run'
    queue = p7_ablate.runs(['slope 1.2', 'tv'])
    assert len(queue) == 2 * (6 + 6 + 5)
    assert {run.name for run in queue if run.phase == 'p6'} == {'baseline', 'slope 1.2'}
    assert words['tv', 'p1'].index('--lambda_tv=0') > words['tv', 'p1'].index('--lambda_tv=0.05'), 'the later word wins'


@pytest.mark.parametrize('preset', p7_ablate.PRESETS)
def test_every_override_is_a_setting_of_its_phase(preset):
    for name, changes in p7_ablate.ABLATIONS.items():
        for phase, script in p7_ablate.SCRIPTS.items():
            module = vars({'p1': p1_canvas, 'p2': p2_contrast, 'p3': p3_jitter, 'p4': p4_decoder,
                           'p5': p5_roundtrip, 'p6': p6_diffusion}[phase])
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
    values = dict(zip((label for label, *_ in p7_ablate.TARGETS), p7_ablate.values_of(metrics, p7_ablate.TARGETS)))
    assert math.isnan(values['R@5']) and math.isnan(values['|slope - 2|'])
    assert values['R@1'] == 0.5 and values['worst-family gap'] == 0.1 and values['kurtosis'] == 5.0


def test_ablations_run_once_and_make_a_table(small, monkeypatch, capsys):
    monkeypatch.chdir(small.folder)
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


def test_only_what_the_table_still_needs_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(p7_ablate, 'seeds', 1)
    chain = p7_ablate.runs(['copy suppression', 'jitter'])

    def left():
        return [(run.name, run.phase) for run in p7_ablate.to_do(chain)]

    def end(name, phase, files=('gate.json', 'ckpt.pt')):
        folder = next(run.folder for run in chain if (run.name, run.phase) == (name, phase))
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / file).write_text('{}')
    assert left() == [(run.name, run.phase) for run in chain]
    for phase in ('p1', 'p2', 'p3'):
        end('baseline', phase)
    assert left() == [('baseline', 'p4'), ('baseline', 'p5'), ('copy suppression', 'p5'),
                      *(('jitter', phase) for phase in ('p3', 'p4', 'p5'))]
    end('baseline', 'p4', ['gate.json'])
    assert left()[0] == ('baseline', 'p4'), 'its checkpoint is wanted'
    end('baseline', 'p5', ['gate.json']), end('copy suppression', 'p5', ['gate.json'])
    assert left() == [('jitter', phase) for phase in ('p3', 'p4', 'p5')], 'nothing starts from P4 any more'
    end('jitter', 'p5', ['gate.json'])
    assert left() == []


def test_a_failing_ablation_stops_only_what_waits_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
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
    assert [(run.name, run.phase) for run in failed] == [('jitter', phase) for phase in ('p3', 'p4', 'p5')]
    assert all((run.folder / 'gate.json').exists() for run in queue if run.name != 'jitter')
    assert 'jitter, seed 0, p3 FAILED' in capsys.readouterr().out


def test_slopes_table(tmp_path, monkeypatch):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    metrics = {f'val/{kind}_{q}': value for kind, value in (('diffusion', 0.2), ('wiener', 0.3))
               for q in p6_diffusion.QUARTERS}
    metrics |= {'val/alpha': [1.0, 1.4], 'val/drawn_parsed': 0.5, 'val/r1': 0.9, 'val/r1_hard': 0.8,
                'val/content_accuracy': 1.0, 'val/graph_f1': 0.7}
    for seed in (0, 2):
        folder = p7_ablate.home('slope 1.2', seed) / 'p6'
        folder.mkdir(parents=True)
        (folder / 'gate.json').write_text('[]'), (folder / 'ckpt.pt').write_text('')
        row = {'step': 1, **metrics, 'val/r1': 0.9 + 0.1 * (seed == 2)}
        (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    rows = p7_ablate.slopes_table().splitlines()
    assert len(rows) == 3 and rows[0].count('|') == rows[1].count('|') == rows[2].count('|')
    assert rows[2].startswith('| 1.2 | 2 | 1.200 ± 0.000 | 0.200 ± 0.000 | 0.300 ± 0.000 | 0.500 ')
    assert '| 0.950 ± 0.071 |' in rows[2]


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
