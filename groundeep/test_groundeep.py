"""Stimuli, networks, judges, diagnostics and the command line of groundeep, at sizes that take seconds."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from groundeep import ablate, compare, diagnose, evaluate, run, stimuli
from groundeep.dbn import DBN, batches, schedule
from groundeep.joint import IMAGE, TEXT, Devices, Joint
from groundeep.rbm import difference

SMALL = {'data_seed': 0, 'side': 20, 'max_number': 5, 'train_images': 120, 'held_out_images': 50, 'frequency': 'zipf',
         'item_area': 0.015, 'size_octaves': 1.0, 'spacing_octaves': 1.0, 'text': 'words'}


@pytest.fixture(scope='module')
def arrays():
    return stimuli.generate(SMALL)


# ---- stimuli --------------------------------------------------------------------------------------------------------

def test_numbers_have_their_english_names_and_text_survives_the_code():
    assert [stimuli.number_word(n) for n in (1, 13, 20, 32, 99)] == ['one', 'thirteen', 'twenty', 'thirty-two',
                                                                     'ninety-nine']
    strings = [stimuli.number_word(n) for n in range(1, 100)] + ['7', '32']
    assert len(set(strings)) == 101 and max(map(len, strings)) <= stimuli.LENGTH
    indices = stimuli.encode_text(strings)
    assert stimuli.decode_text(indices) == strings
    hot = stimuli.one_hot(indices).reshape(101, stimuli.LENGTH, -1)
    assert (hot.sum(-1) == 1).all() and (hot.argmax(-1) == indices).all()
    assert stimuli.lexicon(3, 'mixed') == {'one': 1, 'two': 2, 'three': 3, '1': 1, '2': 2, '3': 3}


def test_every_image_holds_as_many_discs_as_it_says_and_as_its_word_says(arrays):
    words = stimuli.lexicon(5, 'words')
    for split in stimuli.SPLITS:
        numbers = arrays[f'{split}_number']
        assert (evaluate.count_components(arrays[f'{split}_image'], 20) == numbers).all()
        assert [words[s] for s in stimuli.decode_text(arrays[f'{split}_text'])] == numbers.tolist()
        assert (arrays[f'{split}_image'].sum(1) == arrays[f'{split}_area']).all()


def test_no_image_is_in_two_splits_and_the_seed_decides_all(arrays):
    seen = [{row.tobytes() for row in arrays[f'{split}_image']} for split in stimuli.SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    again, other = stimuli.generate(SMALL), stimuli.generate(SMALL | {'data_seed': 1})
    assert all((arrays[key] == again[key]).all() for key in arrays)
    assert (arrays['test_image'] != other['test_image']).any()


def test_frequencies_are_zipfian_in_training_and_even_when_held_out(arrays):
    assert np.bincount(arrays['test_number'])[1:].tolist() == [10] * 5
    rng = np.random.default_rng(0)
    counts = np.bincount(stimuli.draw_numbers(60_000, SMALL, 'train', rng))[1:] / 60_000
    np.testing.assert_allclose(counts, (1 / np.arange(1, 6)) / (1 / np.arange(1, 6)).sum(), atol=0.01)
    even = np.bincount(stimuli.draw_numbers(60_000, SMALL | {'frequency': 'uniform'}, 'train', rng))[1:] / 60_000
    np.testing.assert_allclose(even, 0.2, atol=0.01)


def test_size_and_spacing_are_those_of_dewind_and_the_discs_have_that_area():
    log_size, log_spacing, n = 11.0, 14.0, 8
    item, field = stimuli.disc_and_field(n, log_size, log_spacing)
    np.testing.assert_allclose(np.log2((n * item) * item), log_size)          # TSA x ISA
    np.testing.assert_allclose(np.log2(field * (field / n)), log_spacing)     # FA x Spar
    image = stimuli.rasterise(np.array([[0.3, -2.1]]), 20.0, 100)
    assert abs(image.sum() - np.pi * 400) < 15
    y, x = np.nonzero(image)
    assert abs(x.mean() - 49.5 - 0.3) < 0.1 and abs(y.mean() - 49.5 + 2.1) < 0.1


def test_discs_keep_their_distance_and_stay_in_the_field():
    rng = np.random.default_rng(0)
    centres = stimuli.place(20, 2.0, 25.0, rng)
    gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(20, 1)] - 4
    assert gaps.min() >= stimuli.GAP - 1e-9 and np.linalg.norm(centres, axis=1).max() <= 23
    assert stimuli.place(50, 2.0, 8.0, rng, tries=3) is None and stimuli.place(1, 3.0, 2.0, rng) is None


def test_thirty_two_discs_fit_into_36_pixels_and_into_a_hundred():
    rng = np.random.default_rng(0)
    for side in (36, 100):
        settings = {key: getattr(stimuli, key) for key in stimuli.SETTINGS} | {
            'side': side, 'max_number': 32, 'item_area': 0.0025}
        image = stimuli.dot_array(32, settings, rng)[0]
        assert image.shape == (side, side) and evaluate.count_components(image.ravel()[None], side) == [32]


def test_the_file_is_written_once_and_a_damaged_one_is_one_line(tmp_path, capsys):
    first = stimuli.load(tmp_path, SMALL)
    path, = tmp_path.glob('*.npz')
    assert path.with_suffix('.png').stat().st_size > 5000 and not list(tmp_path.glob('*.tmp'))
    stamp = path.stat().st_mtime_ns
    second = stimuli.load(tmp_path, SMALL)
    assert path.stat().st_mtime_ns == stamp and (first['val']['image'] == second['val']['image']).all()
    path.write_bytes(b'PK broken')
    for settings, message in ((SMALL, 'is damaged'), (SMALL | {'text': 'roman'}, '--text=roman'),
                              (SMALL | {'max_number': 60}, 'discs do not fit')):
        with pytest.raises(SystemExit) as stopped:
            stimuli.load(tmp_path, settings)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and message in line and line.count('\n') == 1


# ---- networks -------------------------------------------------------------------------------------------------------

def patterns(n=200):
    """Four binary patterns of 12 units with a little noise."""
    base = torch.eye(4).repeat_interleave(3, 1)
    rows = torch.arange(n) % 4
    return (base[rows] + (torch.rand(n, 12) < 0.02)).clamp(max=1), rows


@pytest.mark.parametrize('greedy', (True, False))
def test_both_ways_of_training_a_dbn_bring_patterns_back_through_two_layers(greedy):
    torch.manual_seed(0)
    v, rows = patterns()
    dbn = DBN([12, 10, 8])
    before = (dbn.reconstruct(v) - v).square().mean()
    for _, _, layers in schedule('image', 2, 150, greedy):
        for part in batches(len(v), 20, 'cpu'):
            dbn.learn(v[part], layers, lr=0.1, momentum=0.5)
    after = (dbn.reconstruct(v) - v).square().mean()
    assert after < 0.06 < 0.15 < before
    drawn = dbn.sample(200, [1.0] * 100) > 0.5
    exact = (drawn[:, None] == (torch.eye(4).repeat_interleave(3, 1) > 0)[None]).all(-1)
    assert exact.any(1).float().mean() > 0.5 and exact.any(0).sum() >= 3            # mostly patterns, and most of them


def test_a_greedy_stage_leaves_the_other_layers_alone_and_an_iterative_one_does_not():
    torch.manual_seed(0)
    v, _ = patterns()
    for layers, moved in (((0,), (True, False)), ((1,), (False, True)), ((0, 1), (True, True))):
        dbn = DBN([12, 10, 8])
        before = [rbm.W.clone() for rbm in dbn.layers]
        dbn.learn(v, layers, lr=0.1)
        assert tuple(not torch.equal(w, rbm.W) for w, rbm in zip(before, dbn.layers)) == moved
    assert schedule('a', 2, 2, True) == [('a', 0, (0,)), ('a', 1, (0,)), ('a', 0, (1,)), ('a', 1, (1,))]


def small_joint(**switches):
    torch.manual_seed(0)
    return Joint(DBN([12, 10]), DBN([0, 6], groups=2, classes=4), 20, 50, Devices(**switches))


def text_of(rows):
    """Two characters of four for each of four patterns. They go together: independent ones would need no RBM."""
    letters = torch.eye(4)
    return torch.cat((letters[rows], letters[3 - rows]), dim=1)


def test_balancing_gives_both_sub_spaces_one_variance_and_one_gradient_size():
    for on in (True, False):
        joint = small_joint(balance=on)
        parts = joint.blocks()
        variance = [joint.rbm.W[part].square().sum(0).mean() for part in parts]
        assert (abs(variance[0] / variance[1] - 1) < 0.35) == on
    joint = small_joint()
    gradient = {'W': torch.cat((torch.full((10, 20), 4.0), torch.full((6, 20), 1.0))), 'b': torch.ones(16)}
    joint.balance(gradient)
    torch.testing.assert_close(gradient['W'], torch.full((16, 20), 2.0))
    torch.testing.assert_close(gradient['b'], torch.tensor([0.5] * 10 + [2.0] * 6))


def test_gain_control_brings_the_two_latents_to_one_mean_and_variance():
    joint = small_joint(gain_rate=0.1)
    torch.manual_seed(1)
    joint.image.layers[0].W.normal_(std=2), joint.text.layers[0].W.normal_(std=0.3), joint.text.layers[0].c.fill_(-1)
    v, rows = patterns()
    def gap():
        z = [joint.latent(v, IMAGE), joint.latent(text_of(rows), TEXT)]
        mean, sd = ([f(x) for x in z] for f in (torch.mean, lambda x: x.var(0).mean().sqrt()))
        return (mean[0] - mean[1]).abs(), (sd[0] - sd[1]).abs()
    before = gap()
    for _ in range(300):
        joint.control_gain(joint.latents(v, text_of(rows)))
    after = gap()
    assert after[0] < before[0] / 3 and after[1] < before[1] / 3


def test_each_device_that_acts_on_learning_changes_what_is_learned():
    v, rows = patterns()
    learned, spread = {}, 2 * torch.randn(12, 10)
    devices = dict.fromkeys(('balance', 'warmup', 'enumeration', 'gain', 'mitigation'), True)
    for name in ('', *devices):
        joint = small_joint(**devices | ({name: False} if name else {}), warmup_epochs=1, clamp_share=0.5, gain_rate=0.5)
        joint.image.layers[0].W.copy_(spread)
        for epoch in range(3):
            for batch in range(4):
                joint.learn(v[:50], text_of(rows)[:50], batch, epoch, lr=0.05)
        assert joint.rbm.W.isfinite().all()
        learned[name] = joint.rbm.W
        assert bool(joint.rbm.fantasy_alive) == (name != 'mitigation')
        assert bool((joint.gain != 1).any()) == (name != 'gain')
    assert all(not torch.allclose(learned[''], learned[name], atol=1e-6) for name in learned if name)


def test_enumerated_texts_give_the_exact_gradient_of_the_word_given_the_image():
    joint = small_joint()
    torch.nn.init.normal_(joint.rbm.W), torch.nn.init.normal_(joint.rbm.b), torch.nn.init.normal_(joint.rbm.c)
    v, rows = patterns(20)
    z, y = joint.latent(v, IMAGE), joint.latent(text_of(rows), TEXT)
    negative = joint.expected(z, y)
    gradient = difference(joint.rbm.correlations(torch.cat((z, y), dim=1)), negative)
    for name in 'Wbc':
        getattr(joint.rbm, name).requires_grad_()
    energies = joint.word_energies(v, text_of(torch.arange(4)))
    torch.nn.functional.cross_entropy(-energies, rows, reduction='mean').backward()
    for name in 'Wbc':
        torch.testing.assert_close(gradient[name], -getattr(joint.rbm, name).grad, atol=1e-5, rtol=1e-4)


def test_hot_gibbs_is_a_schedule_of_the_generating_chain():
    assert small_joint(hot=0.3).betas(8)[0] == 0.3 and small_joint(hot_gibbs=False, hot=0.3).betas(8) == [1.0] * 8


def test_a_trained_joint_model_goes_from_images_to_texts_and_back_and_never_moves_its_clamp():
    torch.manual_seed(0)
    v, rows = patterns()
    text = text_of(rows)
    joint = small_joint(warmup_epochs=20, hot=0.7)
    for part in [part for _ in range(200) for part in batches(len(v), 50, 'cpu')]:
        joint.image.learn(v[part], (0,), lr=0.1, momentum=0.5)
        joint.text.learn(text[part], (0,), lr=0.1, momentum=0.5)
    for epoch in range(200):
        for i, part in enumerate(batches(len(v), 50, 'cpu')):
            joint.learn(v[part], text[part], i, epoch, lr=0.1, momentum=0.7)
    letters = joint.image_to_text(v, 40, keep=10).reshape(-1, 2, 4).argmax(-1)
    assert (letters == text.reshape(-1, 2, 4).argmax(-1)).all(1).float().mean() > 0.8          # chance is 1/4
    words = text_of(torch.arange(4))
    assert (joint.word_energies(v, words).argmin(1) == rows).float().mean() > 0.8
    drawn = joint.text_to_image(words.repeat(50, 1), 40) > 0.5
    right = (drawn == (torch.eye(4).repeat_interleave(3, 1).repeat(50, 1) > 0)).float().mean(1) > 0.9
    assert right.float().mean() > 0.6
    z = torch.cat((joint.latent(v[:8], IMAGE), torch.zeros(8, 6)), dim=1)
    out, p = joint.rbm.gibbs(z, joint.betas(10), joint.clamp(IMAGE))
    assert torch.equal(out[:, :10], z[:, :10]) and torch.equal(p[:, :10], z[:, :10])
    assert joint.complete(z[:, :10], IMAGE, 10, keep=4).shape == (4, 8, 6)


def test_word_energies_are_free_energies_of_pairs():
    joint = small_joint()
    joint.rbm.W.normal_(), joint.rbm.b.normal_()
    v, rows = patterns(5)
    words = text_of(torch.arange(4))
    energies = joint.word_energies(v, words)
    whole = torch.stack([joint.rbm.free_energy(joint.latents(v, word.expand(5, -1))) for word in words], dim=1)
    torch.testing.assert_close(energies - energies[:, :1], whole - whole[:, :1], atol=1e-4, rtol=1e-4)


# ---- judges, psychophysics, diagnostics ------------------------------------------------------------------------------

def test_the_counter_counts_pieces_by_their_sides_and_leaves_out_specks():
    image = np.zeros((2, 6, 6), bool)
    image[0, 0:2, 0:2] = image[0, 2:4, 2:4] = image[0, 5, 4:6] = True                # touch at a corner: two pieces
    image[0, 0, 5] = True                                                            # a speck
    assert evaluate.count_components(image.reshape(2, 36), 6).tolist() == [3, 0]


def test_scores_and_diversity():
    assert evaluate.scores([1, 3, 9, 9], [1, 2, 3, 9], upto=3) == {'exact': 1 / 3, 'near': 2 / 3}
    same, different = np.ones((1, 4, 9), bool), np.eye(9, dtype=bool)[None, :4]
    assert evaluate.diversity(same) == {'distinct': 0.25, 'distance': 0.0}
    assert evaluate.diversity(different) == {'distinct': 1.0, 'distance': 1.0}


def test_baselines_of_drawing_know_what_a_copy_and_what_a_mean_image_draw(arrays):
    train = {name: arrays[f'train_{name}'] for name in ('image', 'number')}
    found = evaluate.drawing_baselines(train, [1, 2, 3, 4, 5], 10, 20, 3, 0)
    assert found['retrieved']['exact'] == 1 and found['logistic']['exact'] < 0.7


def test_the_judge_learns_to_count(arrays):
    torch.manual_seed(0)
    x, y = torch.as_tensor(arrays['train_image']).float(), torch.as_tensor(arrays['train_number'])
    judge = evaluate.train_judge(x, y, 20, 5, epochs=50, device='cpu', batch=20)
    said = judge.count(torch.as_tensor(arrays['test_image']).float())
    assert (said == arrays['test_number']).mean() > 0.4 and set(said) <= {1, 2, 3, 4, 5}      # chance is 0.2


@pytest.mark.parametrize('w', (0.1, 0.3))
def test_the_weber_fraction_of_an_observer_is_found(w):
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 33, 4000)
    estimate = np.log2(numbers) + rng.normal(0, w / np.log(2), 4000)      # sd w on the natural logarithm of each number
    choice, ratios = evaluate.comparisons(estimate, {'number': np.log2(numbers)}, 0)
    assert abs(evaluate.weber_fraction(choice, ratios['number']) / w - 1) < 0.1


def test_choice_weights_tell_number_from_size():
    rng = np.random.default_rng(0)
    design = {name: rng.uniform(0, 3, 3000) for name in ('number', 'size', 'spacing')}
    estimate = design['number'] + 0.5 * design['size'] + rng.normal(0, 0.5, 3000)
    weights = evaluate.choice_weights(*evaluate.comparisons(estimate, design, 0))
    assert abs(weights['size'] / weights['number'] - 0.5) < 0.06 and abs(weights['spacing'] / weights['number']) < 0.06


def test_rsa_finds_the_variable_that_a_code_holds_and_a_permutation_value():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    models = {'x': np.abs(np.subtract.outer(x, x)), 'y': np.abs(np.subtract.outer(y, y)), 'flat': np.zeros((40, 40))}
    found = diagnose.rsa(diagnose.code_distances(3 * x[:, None]), models, 99, 0)
    assert found['x'][0] > 0.999 and found['x'][1] == 0.01
    assert abs(found['y'][0]) < 0.2 and found['y'][1] > 0.05 and np.isnan(found['flat']).all()
    from scipy.stats import spearmanr
    above = np.triu_indices(40, 1)
    assert abs(found['y'][0] - spearmanr(models['x'][above], models['y'][above])[0]) < 1e-9


def test_layer_statistics_of_codes_that_are_known():
    z = np.zeros((4, 4))
    z[:, 0], z[:2, 1], z[2:, 2] = 1, 1, 1
    found = diagnose.layer_statistics(z)
    assert found['dead'] == 0.25 and found['saturated'] == 0.25
    assert abs(found['cosine'] - (2 * 1 + 4 * 0.5) / 6) < 1e-9 and found['variance'] == 0.125
    assert abs(found['entropy'] - 0.5) < 1e-6


def test_alignment_is_one_for_a_rotation_and_low_for_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5))
    turned = x @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert abs(diagnose.alignment(x, 2 * turned + 1) - 1) < 1e-9
    assert diagnose.alignment(x, rng.normal(size=(300, 5))) < 0.1


def test_mds_keeps_the_distances_of_points_in_a_plane():
    points = np.random.default_rng(0).normal(size=(12, 2))
    distances = diagnose.code_distances(points)
    np.testing.assert_allclose(diagnose.code_distances(diagnose.embed(distances)), distances, atol=1e-6)


# ---- the whole ------------------------------------------------------------------------------------------------------

WORDS = ['--side=16', '--max_number=4', '--train_images=120', '--held_out_images=40', '--item_area=0.02',
         '--image_layers=20,12', '--text_hidden=8', '--joint_hidden=16', '--batch_size=20', '--image_epochs=2',
         '--text_epochs=1', '--joint_epochs=2', '--warmup_epochs=1', '--watch=12', '--samples=3', '--chain_steps=12',
         '--judge_epochs=1', '--permutations=5', '--save_every=1', '--device=cpu']


def whole(tmp_path, name, monkeypatch, *words):
    """run.main() with WORDS and more, in this process; returns the run folder."""
    folder = tmp_path / name
    for key in list(vars(run)):
        monkeypatch.setitem(vars(run), key, vars(run)[key])      # configure writes into the module; this takes it back
    config = runtime.configure(vars(run), [*WORDS, f'--out_dir={folder}', f'--folder={tmp_path}', *words])
    monkeypatch.setitem(vars(run), 'config', config)
    run.main()
    return folder


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['net']


def test_a_run_writes_everything_repeats_bit_for_bit_and_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    first = whole(tmp_path, 'a', monkeypatch)
    printed = capsys.readouterr().out
    assert 'IMG->TXT' in printed and 'Weber' in printed and 'logistic' in printed
    results = json.loads((first / 'results.json').read_text())
    assert results['judges on real images']['counter'] == 1.0
    assert set(results['rsa']) == {'image 1', 'z_img', 'z_txt', 'joint'}
    assert set(results['img_to_txt']) == {'chain', 'spelled', 'energy', 'chance', 'nearest', 'logistic on pixels',
                                          'logistic on z_img', 'logistic on joint'}
    names = {path.stem for path in (first / 'plots').glob('*.png')}
    assert names == {'filters', 'reconstructions', 'drawings', 'chains', 'rsa', 'joint_code', 'behaviour', 'trends'}
    rows = [json.loads(line) for line in (first / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [0, 1, 2, 3, 4]
    assert 'val/distinct/share' in rows[-1] and 'val/rsa log number/z_img' in rows[1]

    learn, calls = run.train_epoch, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError
        return learn(*args)
    monkeypatch.setattr(run, 'train_epoch', killed)
    with pytest.raises(MemoryError):
        whole(tmp_path, 'b', monkeypatch)
    monkeypatch.setattr(run, 'train_epoch', learn)
    second = whole(tmp_path, 'b', monkeypatch, '--resume=true')
    assert 'resumed' in capsys.readouterr().out
    one, two = weights(first), weights(second)
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = json.loads((second / 'results.json').read_text())
    assert all(results[key] == again[key] for key in ('img_to_txt', 'txt_to_img', 'rsa', 'readout'))
    assert (first / 'metrics.jsonl').read_text() == (second / 'metrics.jsonl').read_text()

    with pytest.raises(SystemExit) as stopped:
        whole(tmp_path, 'a', monkeypatch, '--resume=true', '--joint_hidden=17')
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and '--joint_hidden=16, not 17' in line and line.count('\n') == 1

    other = weights(whole(tmp_path, 'c', monkeypatch, f"--unimodal={first / 'ckpt.pt'}", '--balance=false',
                          '--resume=false', '--joint_hidden=16'))
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith(('image.', 'text.')))
    assert not torch.equal(one['rbm.W'], other['rbm.W'])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        whole(tmp_path, 'd', monkeypatch, f"--unimodal={first / 'ckpt.pt'}", '--text_hidden=9')
    assert stopped.value.code == 2 and '--text_hidden=8, not 9' in capsys.readouterr().err


@pytest.mark.parametrize('word, message', [
    ('--image_layers=20,x', '--image_layers=20,x'), ('--batch_size=500', '--batch_size=500: expects 2 to 120'),
    ('--hot=2', '--hot=2.0: expects 0 to 1'), ('--watch=41', '--watch=41'), ('--joint_lr=-1', '--joint_lr'),
    ('--frequency=rare', '--frequency=rare')])
def test_a_bad_setting_is_one_line(tmp_path, monkeypatch, capsys, word, message):
    with pytest.raises(SystemExit) as stopped:
        whole(tmp_path, 'bad', monkeypatch, word)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and line.count('\n') == 1


def test_the_command_line_refuses_an_unknown_word():
    done = subprocess.run([sys.executable, '-m', 'groundeep.run', '--joint_hiden=3'], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert '--joint_hidden=500' in done.stderr


def test_the_ablation_table_has_a_row_for_each_device_and_means_over_seeds(capsys, monkeypatch):
    switches = {word.partition('=')[0][2:] for words in ablate.ABLATIONS.values() for word in words.split()}
    assert switches == {'balance', 'warmup', 'clamp_share', 'enumeration', 'hot_gibbs', 'gain', 'mitigation'} \
        <= set(run.config)

    def result(x):
        return {'img_to_txt': {'chain': {'exact': x}, 'energy': {'exact': x}}, 'alignment': x,
                'txt_to_img': {'counter_exact': x, 'classifier_exact': x, 'distinct': x, 'distance': x},
                'rsa': {'joint': {'log number': {'rho': None}, 'overlap': {'rho': x}}}, 'readout': {'joint': {'weber': x}}}
    text = ablate.summary({'default': [result(0.2), result(0.4)]})
    assert '| default | 0.300 ± 0.141 |' in text and 'nan' in text and text.endswith('| 2 |')
    monkeypatch.setattr(ablate, 'dry_run', True)
    ablate.main()
    lines = capsys.readouterr().out.splitlines()
    assert not any(',' in name for name in ablate.ABLATIONS), 'commas separate the names of --only'
    assert len(lines) == 3 * len(ablate.ABLATIONS) and '--hot_gibbs=false' in ''.join(lines)


def test_our_rbm_is_no_worse_than_scikit_learns_on_its_digits():
    found = compare.compare(hidden=32, epochs=4, batch_size=20, learning_rate=0.05, seeds=1)
    ours, theirs = (found[name]['pseudo_log_likelihood'][0] for name in ('ours', 'theirs'))
    assert -40 < theirs < 0 and ours > theirs - 0.5       # nats a digit; compare.py gives the spread over seeds
