"""For the tests: fake digits as IDX files, the scripts called in this process, and what must be installed for that."""
import gzip
import importlib
import signal
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
CONFIG = FOLDER / 'configs' / '5_asymmetric_resnet8_autoencoder.yaml'
NAME = 'asymmetric_resnet8_autoencoder'
SMALL = {'data.train_samples': 100, 'data.val_samples': 20, 'training.device': 'cpu', 'training.batch_size': 50,
         'model.latent_dim': 8, 'self_supervised.augmentations_per_sample': 4, 'output.save_every_n_epochs': 1}
MAP = ('--max-points', '60', '--l2-normalize', '--umap-n-neighbors', '8')
# The repository's own tests run without these: the suite of this folder is then skipped, and says so.
PACKAGES = ('yaml', 'sklearn', 'umap', 'mlxtend', 'onnx', 'onnxscript', 'onnxruntime', 'matplotlib', 'tqdm')
MISSING = [package for package in PACKAGES if not find_spec(package)]
NOT_TESTED = MISSING and (f'grounding/ IS NOT TESTED, missing: {", ".join(MISSING)}: '
                          'pip install -r grounding/requirements.txt')


def fake_digits(number, seed):
    """images (N, 28, 28) uint8 and labels (N,): class c is a bar of its own place and slant, with noise; shuffled.

    The bars have soft edges: as in MNIST, more than half of the ink is grey, so that it can be brightened.
    """
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(number) % 10).astype(np.uint8)
    y, x = np.mgrid[:28, :28] - 13.5
    angle = labels[:, None, None] * np.pi / 10
    jitter = generator.normal(0, 0.7, (2, number, 1, 1))
    along = x * np.cos(angle) + y * np.sin(angle) + jitter[0]
    across = -x * np.sin(angle) + y * np.cos(angle) + jitter[1] - labels[:, None, None] % 3
    bars = 255 * (10 - abs(along)).clip(0, 1) * (3 - abs(across)).clip(0, 2) / 2
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
