"""Tests of P7: what it runs and in which order, its statistics, and one ablation from end to end."""
import json
import math
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import p6_diffusion
import p7_ablate
import runtime
from tools import launch

ROOT = Path(__file__).parent.parent
NAMES = 'cpu', 'gpu', 'smoke'      # of the presets of P7


def run(words):
    """A command line in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', list(words))
        runpy.run_path(words[0], run_name='__main__')


def test_an_ablation_branches_off_the_baseline_where_it_changes_something(monkeypatch):
    monkeypatch.setattr(p7_ablate, 'seeds', 2)
    queue = p7_ablate.runs(['copy suppression', 'jitter', 'tv'])
    folders = {(run.name, run.seed, run.phase): run.folder for run in queue}
    assert [sum(key[0] == name for key in folders) for name in ('baseline', 'copy suppression', 'jitter', 'tv')] == [
        10, 2, 6, 10]
    for run in queue:
        assert run.settings.seed == run.seed and f'--out_dir={run.folder}' in run.command
        assert (f'--seed={run.seed}' in run.command) == (run.phase == 'p1'), 'the others take it over'
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


def keys_of(words):
    return [word.removeprefix('--').partition('=')[0] for word in words.split()]


@pytest.mark.parametrize('preset', NAMES)
def test_every_override_is_a_setting_of_its_phase(preset, monkeypatch):
    monkeypatch.setattr(p7_ablate, 'preset', preset)
    baseline = [(phase, tuple(p7_ablate.words_of('baseline', phase).split())) for phase in p7_ablate.SCRIPTS]
    for name, changes in p7_ablate.ABLATIONS.items():
        for phase, words in changes.items():
            *earlier, (_, usual) = baseline[:list(p7_ablate.SCRIPTS).index(phase) + 1]
            without = launch.settings(*earlier, (phase, usual))
            for word in words.split():
                (key,) = keys_of(word)
                changed = launch.settings(*earlier, (phase, (*usual, word)))
                assert changed[key] != without[key], f'{name}, {phase}: {word} is what the preset says already'


@pytest.mark.parametrize('preset', NAMES)
def test_what_is_switched_off_stays_off_to_the_end(preset, monkeypatch):
    """A phase takes from the checkpoint before it what it does not set itself, so one word in one phase is enough."""
    monkeypatch.setattr(p7_ablate, 'preset', preset)
    queue = p7_ablate.runs(list(p7_ablate.ABLATIONS), [0])
    usual = {run.phase: run.settings for run in queue if run.name == 'baseline'}
    for name, changes in p7_ablate.ABLATIONS.items():
        chain = [run for run in queue if run.name == name]
        assert [run.phase for run in chain][-1] == ('p6' if name in ('baseline', *p7_ablate.SLOPES) else 'p5')
        for words in changes.values():
            for key in keys_of(words):
                values = {run.phase: run.settings[key] for run in chain if key in run.settings}
                assert len(set(values.values())) == 1, f'{name}: {key} is {values}'
        words = {key for words in changes.values() for key in keys_of(words)} | {'out_dir', 'init_from', 'device'}
        more = {'batch_size'} if 'negatives' in words else set()
        for run in chain:          # and nothing else differs
            differs = {key for key in run.settings if run.settings[key] != usual[run.phase][key]}
            assert differs <= words | more, f'{name}, {run.phase}: {differs - words}'


def test_without_negatives_as_many_sentences_a_step(monkeypatch):
    for preset, batch in ('cpu', 48), ('gpu', 768), ('smoke', 12):
        monkeypatch.setattr(p7_ablate, 'preset', preset)
        for name in 'counterfactual negatives', 'all hard negatives (ours)':
            queue = p7_ablate.runs([name], [0])
            usual, sizes = ({run.phase: run.settings for run in queue if run.name == of} for of in ('baseline', name))
            assert [*sizes] == ['p2', 'p3', 'p4', 'p5']
            for phase, settings in sizes.items():
                assert settings.negatives == 0 and usual[phase].negatives == 2
            for phase in 'p2', 'p3', 'p5':
                assert sizes[phase].batch_size == batch == 3 * usual[phase].batch_size
            assert sizes['p4'].batch_size == usual['p4'].batch_size, 'P4 has no counterfactuals anyway'


def test_effects_by_hand():
    n = len(p7_ablate.TARGETS)
    directed = np.abs(p7_ablate.SIGN)
    base = np.tile(np.array([[1.0], [2.0], [3.0]]), n)                                # mean 2, sd 1
    for shift, expected in ((-4.0, 1), (4.0, -1), (-1.5, 0)):                         # the last: the seeds overlap
        drop, side = p7_ablate.effects(base, base + shift * p7_ablate.SIGN)
        assert drop == pytest.approx(-shift * directed) and (side == expected * directed).all()
    lost = base.copy()
    lost[0, 0] = math.nan
    assert p7_ablate.effects(base, lost)[1].tolist() == [0] * n and p7_ablate.effects(base, lost[:1])[1][0] == 1
    small = 2 * p7_ablate.RESOLUTION * p7_ablate.SIGN
    assert p7_ablate.effects(base * 0, base * 0 - small)[0] == pytest.approx(2 * directed), 'no spread'
    assert (p7_ablate.effects(base, base * np.nan)[1] == directed).all(), 'an ablation that diverged'
    tiny = base * 0 - 0.99 * p7_ablate.RESOLUTION * p7_ablate.SIGN
    assert not p7_ablate.effects(base * 0, tiny)[1].any() and not p7_ablate.effects(tiny, base * 0)[1].any()
    drop, side = p7_ablate.effects(lost, base)
    assert drop[0] == side[0] == 0 and not np.isnan(drop).any(), 'nothing to compare with'
    lost[1, 0] = math.nan
    assert p7_ablate.effects(lost, base + 9 * p7_ablate.SIGN)[1][0] == 0


def test_p_value_by_hand():
    n, rng = len(p7_ablate.TARGETS), np.random.default_rng(1)
    base, same = rng.normal(size=(3, n)), rng.normal(size=(3, n))
    one_worse = same.copy()
    one_worse[:, 4] -= 1000 * p7_ablate.SIGN[4]
    shown_only = same.copy()
    shown_only[:, list(p7_ablate.SIGN).index(0)] += 1000
    assert p7_ablate.p_value(base, one_worse) == 1 / 20, 'the most extreme of all labellings'
    assert p7_ablate.p_value(base, shown_only) == p7_ablate.p_value(base, same) > 1 / 20
    assert p7_ablate.p_value(base, base - 1e6 * (one_worse - same)) == 1.0, 'better is not worse'
    assert p7_ablate.p_value(base * 0, base * 0 - 0.99 * p7_ablate.RESOLUTION * p7_ablate.SIGN) == 1.0
    assert p7_ablate.p_value(base * 0, base * 0 - 1.01 * p7_ablate.RESOLUTION * p7_ablate.SIGN) == 1 / 20
    assert p7_ablate.p_value(base, base * math.nan) == 1 / 20
    lost = base.copy()
    lost[2] = math.nan
    assert p7_ablate.p_value(base, lost) > 1 / 20, 'one of three diverged'
    nowhere = base.copy()
    nowhere[:, 0] = math.nan
    assert p7_ablate.p_value(nowhere, nowhere) == 1.0, 'what nobody has measured'
    # By chance it is small as often as it says: 1/20 of the time at most.
    small = [p7_ablate.p_value(*rng.normal(size=(2, 3, n))) <= 1 / 20 for _ in range(400)]
    assert 0.01 < np.mean(small) < 0.09
    R = p7_ablate.RESOLUTION        # worse in truth, by less than what counts
    small = [p7_ablate.p_value(rng.normal(0, 0.2 * R, (3, n)), rng.normal(-0.9 * R * p7_ablate.SIGN, 0.2 * R, (3, n)))
             <= 1 / 20 for _ in range(200)]
    assert np.mean(small) < 0.09


def test_target_values_of_a_log_with_holes():
    metrics = {'r1': 0.5, 'r5': None, 'r1_hard': 0.4, 'gap_colour': 0.3, 'gap_count': 0.1, 'graph_f1': 0.9,
               'graph_f1_one': 0.5, 'rouge_l': 0.3,
               'cosine': 0.9, 'content_accuracy': 1.0, 'jitter_cosine': 0.9, 'alpha': [1.5, None], 'tv_normalised': 1.0,
               'kurtosis': [5.0, 7.0], 'max_correlation': 0.1, 'lattice': 1.0, 'prior_wavelet': 0.8, 'share_total': 0.9}
    values = dict(zip((label for label, *_ in p7_ablate.TARGETS), p7_ablate.values_of(metrics, p7_ablate.TARGETS)))
    assert math.isnan(values['R@5']) and math.isnan(values['|slope - 2|'])
    assert values['R@1'] == 0.5 and values['worst-family gap'] == 0.1 and values['kurtosis'] == 5.0
    assert values['kurtosis below 6'] == 1.0


def test_ablations_run_once_and_make_a_table(small, monkeypatch, capsys):
    monkeypatch.chdir(small.folder)
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)          # one thread, as all tests have
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
    for phase in 'p1', 'p2', 'p3', 'p4', 'p5':
        Path(f'out/p7/smoke/baseline/seed0/{phase}/ckpt.pt').unlink()
    Path('out/p7').rename('out/elsewhere')
    run([*words, '--seeds=1', '--out_dir=out/elsewhere'])
    assert capsys.readouterr().out.startswith('0 runs to do'), 'known by its settings, not by its words'
    facts = Path('out/elsewhere/smoke/copy_suppression/seed0/p5/run.json')
    facts.write_text(facts.read_text().replace('"max_steps": 2', '"max_steps": 3'))
    with pytest.raises(SystemExit) as stop:
        run([*words, '--seeds=1', '--out_dir=out/elsewhere'])
    assert stop.value.code == 2 and 'other settings' in capsys.readouterr().err
    run([*words, '--draw_only=true', '--out_dir=out/elsewhere'])
    out = capsys.readouterr().out
    assert '| baseline | 1 |' in out and '| copy suppression' not in out and 'note: copy suppression, seed 0' in out
    with pytest.raises(SystemExit) as stop:
        run([*words, '--draw_only=true', '--out_dir=out/nowhere'])
    assert stop.value.code == 2 and 'nothing to draw' in capsys.readouterr().err


def test_two_drivers_never_share_a_folder(tmp_path, capsys):
    first = launch.only_driver(tmp_path / 'p7')
    with pytest.raises(SystemExit) as stop:
        launch.only_driver(tmp_path / 'p7')
    assert stop.value.code == 2 and 'another p7_ablate.py' in capsys.readouterr().err
    first.close()
    launch.only_driver(tmp_path / 'p7')


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
                + (f'print("error: step 3: loss is nan"); sys.exit({runtime.DIVERGED})\n'
                   if run.name == 'InfoNCE' and run.phase == 'p3' else '')
                + '[(folder / name).write_text("{}") for name in ("gate.json", "ckpt.pt")]\n')
        path = tmp_path / f'{run.name}_{run.phase}.py'
        path.write_text(code)
        return run._replace(command=[sys.executable, str(path), *run.command[2:]])
    chain = p7_ablate.runs(['jitter', 'copy suppression', 'InfoNCE'])
    queue = [stand_in(run) for run in chain]
    failed = launch.work(queue, 2, [], launch.only_driver('p7'))
    assert {(run.name, run.phase) for run in failed} == {('jitter', phase) for phase in ('p3', 'p4', 'p5')}
    ran = {(run.name, run.phase) for run in queue if (run.folder / 'gate.json').exists()}
    assert {(run.name, run.phase) for run in queue} - ran == {(name, phase) for name in ('jitter', 'InfoNCE')
                                                              for phase in ('p3', 'p4', 'p5')}
    out = capsys.readouterr().out
    assert 'jitter, seed 0, p3 FAILED' in out and 'InfoNCE, seed 0, p3 DIVERGED' in out
    assert [(run.name, run.phase) for run in p7_ablate.to_do(chain)] == [('jitter', p) for p in ('p3', 'p4', 'p5')], (
        'what diverged would do so again')
    monkeypatch.setattr(p7_ablate, 'values_of', lambda metrics, columns: [1.0] * len(columns))
    found, *_ = p7_ablate.collect()
    assert np.isnan(found['InfoNCE']).all() and found['copy suppression'].tolist() == found['baseline'].tolist()
    assert set(found) == {'baseline', 'InfoNCE', 'copy suppression'} and p7_ablate.table(found, set())


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_driver_leaves_nothing_running(tmp_path, monkeypatch, number):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    waits = 'import sys, time, pathlib; pathlib.Path(sys.argv[1], "began").write_text(""); time.sleep(60)'
    queue = [run._replace(command=[sys.executable, '-c', waits, str(run.folder)])
             for run in p7_ablate.runs(['tv'], [0]) if run.phase == 'p1']
    begun, processes, start, before = [run.folder / 'began' for run in queue], [], launch.start, signal.getsignal(15)

    def started(*words):
        processes.append(start(*words))
        return processes[-1]

    def stop():
        while not all(path.exists() for path in begun):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(launch, 'start', started)
    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        launch.work(queue, 2, [], launch.only_driver(tmp_path))
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_each_of_several_runs_has_a_gpu_of_its_own_and_a_cpu_has_none(tmp_path, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert launch.visible_gpus('auto') == ['0', '1'] and launch.visible_gpus('cpu') == []
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert launch.visible_gpus('cuda') == ['3', '5']
    says = 'import os; print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])'
    run, lock = launch.Run('tv', 0, 'p1', tmp_path, None, [sys.executable, '-c', says]), launch.only_driver(tmp_path)
    for slot, gpus, seen in ((0, ['3', '5'], '3'), (1, ['3', '5'], '5'), (2, ['3', '5'], '3'), (1, [], '3,5')):
        assert launch.start(run, slot, 7, gpus, lock).wait() == 0
        assert (tmp_path / 'run.log').read_text().splitlines()[-1] == f'{seen} 7'


def test_what_waits_for_what_takes_as_long_as_the_longest_chain():
    queue = p7_ablate.runs(['tv', 'copy suppression'], [0])
    minutes = dict.fromkeys(p7_ablate.SCRIPTS, 1) | {'p2': 10}
    assert launch.longest(queue, minutes) == 14 and launch.longest([], minutes) == 0


def test_only_seeds_whose_baseline_has_ended_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    monkeypatch.setattr(p7_ablate, 'metrics_of', lambda folder: int(folder.parent.name[4:]))
    monkeypatch.setattr(p7_ablate, 'values_of', lambda seed, columns: [float(seed)] * len(columns))
    folders = {(run.name, run.seed, run.phase): run for run in p7_ablate.runs(['tv'], range(4))}
    for name, seed, phase, file in (('baseline', 1, 'p5', 'gate.json'), ('baseline', 2, 'p2', 'diverged.txt'),
                                    ('baseline', 3, 'p5', 'gate.json'), ('tv', 0, 'p5', 'gate.json'),
                                    ('tv', 1, 'p5', 'gate.json'), ('tv', 2, 'p5', 'gate.json'),
                                    ('tv', 3, 'p3', 'diverged.txt')):
        folders[name, seed, phase].folder.mkdir(parents=True, exist_ok=True)
        (folders[name, seed, phase].folder / file).write_text('')
    run = folders['baseline', 1, 'p5']
    facts = {'config': run.settings, 'commit': None, 'hardware': 'cpu, 2 threads',
             'dtype': 'torch.float32'}
    (run.folder / 'run.json').write_text(json.dumps(facts))
    found, logged, sources = p7_ablate.collect()
    assert found['baseline'][:, 0].tolist() == [1.0, 3.0] and sources == {('no git', 'cpu, float32')}
    assert found['tv'][0, 0] == 1.0 and np.isnan(found['tv'][1]).all() and len(found['tv']) == 2
    assert logged == {'baseline': [1, 3], 'tv': [1]}
    said = capsys.readouterr().out
    assert [f'note: {who} is not' in said for who in ('baseline, seed 2', 'tv, seed 0', 'tv, seed 2')] == [True] * 3
    assert '2, 1 diverged' in p7_ablate.table(found, sources)


def test_slopes_table(tmp_path, monkeypatch):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    metrics = {f'val/{kind}_{q}': value for kind, value in (('diffusion', 0.2), ('wiener', 0.3))
               for q in p6_diffusion.QUARTERS}
    metrics |= {'val/alpha': [1.0, 1.4], 'val/drawn_parsed': 0.5, 'val/phases_parsed': 0.4, 'val/r1': 0.9,
                'val/r1_hard': 0.8, 'val/gap_colour': 0.4, 'val/gap_count': 0.3, 'val/ce_content': 0.01,
                'val/content_accuracy': 1.0, 'val/graph_f1': 0.7}
    for seed in (0, 2):
        folder = p7_ablate.home('slope 1.2', seed) / 'p6'
        folder.mkdir(parents=True)
        (folder / 'gate.json').write_text('[]'), (folder / 'ckpt.pt').write_text('')
        row = {'step': 1, **metrics, 'val/r1': 0.9 + 0.1 * (seed == 2)}
        (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    rows = p7_ablate.slopes_table().splitlines()
    assert len(rows) == 3 and rows[0].count('|') == rows[1].count('|') == rows[2].count('|')
    assert rows[2].startswith('| 1.2 | 2 | 1.2 ± 0 | 0.2 ± 0 | 0.667 ± 0 | 0.5 ± 0 | 0.4 ± 0 | 0.95 ± 0.071 |')
    assert '| 0.3 ± 0 | 1 ± 0 |' in rows[2], 'the worst family'
    run = next(run for run in p7_ablate.runs(['slope 1.2'], [0]) if run.name == 'slope 1.2' and run.phase == 'p6')
    facts = {'config': run.settings, 'commit': 'abcdef0123', 'hardware': 'cpu',
             'dtype': 'torch.bfloat16'}
    (run.folder / 'run.json').write_text(json.dumps(facts))
    assert 'made by abcdef0 on cpu, bfloat16' in p7_ablate.slopes_table().splitlines()[-1]
    made = p7_ablate.home('slope 1.2', 2) / 'p1'
    made.mkdir()
    (made / 'run.json').write_text(json.dumps({'config': {'alpha': 2.0}}))
    assert p7_ablate.slopes_table().splitlines()[2].startswith('| 1.2 | 1 |'), 'a chain that began otherwise'


def test_ablation_table_gate_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(p7_ablate, 'out_dir', str(tmp_path))
    n = len(p7_ablate.TARGETS)
    base = np.random.default_rng(0).normal(1.0, 0.1, (3, n))
    found = {'baseline': base, 'InfoNCE': base - 2 * p7_ablate.SIGN, 'tv': base.copy(), 'cov': base[:1]}
    text = p7_ablate.table(found, {('abc1234', 'cpu')})
    lines = {line.split('|')[1].strip(): line for line in text.splitlines() if line.startswith('| ')}
    directed = int(np.abs(p7_ablate.SIGN).sum())
    assert lines['InfoNCE'].count('**') == 2 * directed and lines['InfoNCE'].endswith(f'| {directed} | 0.05 |')
    assert lines['tv'].endswith('| 0 | 1.00 |') and lines['cov'].endswith('| n < 2 |  |')
    alone = {'stages (ours)': base, 'counterfactual negatives': base[:1]}
    assert '| n < 2 |' in p7_ablate.table({'baseline': base} | alone, set()), 'of its own'
    assert 'abc1234 on cpu' in text and 'several' not in text
    assert 'several' in p7_ablate.table(found, {('abc1234', 'cpu'), ('def5678', 'cpu')})
    more = {'stages (ours)': base - 9 * p7_ablate.SIGN, 'counterfactual negatives': base - 9 * p7_ablate.SIGN}
    (row,) = [row for row in p7_ablate.gate(found | more) if 'counterfactual negatives' in row[0]]
    assert row[2] == 1.0 and not row[3], 'no worse than without stages, which it implies'
    assert '| n < 2 of stages (ours) |' in p7_ablate.table({'baseline': base, 'counterfactual negatives': base}, set())
    rows = p7_ablate.gate(found | {name: base.copy() for name in more if name in p7_ablate.AGAINST})
    assert [row[3] for row in rows] == [False, False, True], 'few pieces yet; tv, which changes nothing; InfoNCE'
    assert rows[0][2] == 2 and rows[0][1] == f'>= {len(p7_ablate.PLAN)}' == '>= 13'
    run = {'alpha': [1.9, 2.1], 'kurtosis': [5.0, 6.0], 'tv_normalised': 1.0, 'correlation': [[1.0, 0.1], [0.1, 1.0]]}
    lost = run | {'alpha': [None, 2.0]}
    p7_ablate.charts(found, {'baseline': [run, run], 'tv': [run], 'var': [lost]})
    figures = tmp_path / 'ablations.png', tmp_path / 'ablation_canvases.png'
    first = [path.read_bytes() for path in figures]
    for path in figures:
        path.unlink()
    p7_ablate.plot.redraw(tmp_path)                                # without the runs
    assert [path.read_bytes() for path in figures] == first and first[0][:4] == first[1][:4] == b'\x89PNG'
    assert p7_ablate.plot.statistics_figure({'var': [lost]}) is None, 'nothing finite'
