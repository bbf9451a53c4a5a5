"""A folder of fake digits, and one small autoencoder trained and exported from it by the real scripts."""
import gzip
import importlib
import os
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent
CONFIG = FOLDER / 'configs' / '5_asymmetric_resnet8_autoencoder.yaml'
NAME = 'asymmetric_resnet8_autoencoder'
SMALL = {'data.train_samples': 100, 'data.val_samples': 20, 'training.device': 'cpu', 'training.batch_size': 50,
         'model.latent_dim': 8, 'self_supervised.augmentations_per_sample': 4, 'output.save_every_n_epochs': 1}
MAP = ('--max-points', '60', '--l2-normalize', '--umap-n-neighbors', '8')


def fake_digits(number, seed):
    """images (N, 28, 28) uint8 and labels (N,): class c is a bar of its own place and slant, with noise; shuffled."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(number) % 10).astype(np.uint8)
    y, x = np.mgrid[:28, :28] - 13.5
    angle = labels[:, None, None] * np.pi / 10
    jitter = generator.normal(0, 0.7, (2, number, 1, 1))
    along = x * np.cos(angle) + y * np.sin(angle) + jitter[0]
    across = -x * np.sin(angle) + y * np.cos(angle) + jitter[1] - labels[:, None, None] % 3
    bars = 255 * ((abs(along) < 9) & (abs(across) < 2))
    return (bars + generator.integers(0, 20, bars.shape)).clip(0, 255).astype(np.uint8), labels


def write_idx(folder, split, images, labels, compressed=False):
    """Write the two IDX files of a split ('train' or 't10k')."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {'images-idx3': struct.pack('>4I', 0x803, *images.shape) + images.tobytes(),
                'labels-idx1': struct.pack('>2I', 0x801, len(labels)) + labels.tobytes()}
    for name, content in contents.items():
        path = folder / f'{split}-{name}-ubyte'
        if compressed:
            path.with_name(path.name + '.gz').write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


def call(script, *options):
    """Run a script's main() in this process, with these command-line options."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [f'{script}.py', *map(str, options)]
    try:
        importlib.import_module(script).main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)


def options(data_root, config=CONFIG, **changes):
    """Options that make a config small; changes: section__key=value."""
    settings = SMALL | {key.replace('__', '.'): value for key, value in changes.items()}
    return ['--config', config, '--data_root', data_root,
            *(word for key, value in settings.items() for word in ('--set', f'{key}={value}'))]


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
    """300 + 100 fake digits as the four IDX files."""
    root = tmp_path_factory.mktemp('mnist')
    write_idx(root, 'train', *fake_digits(300, seed=0))
    write_idx(root, 't10k', *fake_digits(100, seed=1), compressed=True)
    return root


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data_root):
    """Experiment 5, small: a folder with artifacts/ from training, both ONNX exports, the cloud and the assets."""
    root, before = tmp_path_factory.mktemp('root'), os.getcwd()
    os.chdir(root)
    try:
        common = options(data_root, training__epochs=2)
        call('train_covnet', *common)
        call('export_encoder_onnx', *common)
        call('export_decoder_onnx', *common)
        call('generate_latent_points', *common, *MAP)
        call('export_interactive_assets', *common, *MAP, '--projection-k', 5)
    finally:
        os.chdir(before)
    return SimpleNamespace(root=root, artifacts=root / 'artifacts', options=common)
