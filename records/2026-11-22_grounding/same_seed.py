"""Pairs of trainings of one seed with a UMAP between the two, in one process, on the fake digits of the tests.

    OMP_NUM_THREADS=1 python records/2026-11-22_grounding/same_seed.py grounding 10
"""
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))    # the folder of grounding, of this commit or another

import numpy as np
import torch

from latents import umap_map
from small_run import NAME, call, fake_digits, options, write_idx

root = Path(tempfile.mkdtemp())
os.chdir(root)
write_idx(root / 'digits', 'train', *fake_digits(300, seed=0))
write_idx(root / 'digits', 't10k', *fake_digits(100, seed=1))
common = options(root / 'digits', training__epochs=1, training__batch_size=20, training__learning_rate=0.003,
                 output__save_every_n_epochs=0)


def train():
    """(threads, training loss, md5 of the weights)."""
    with contextlib.redirect_stdout(io.StringIO()):
        call('train_covnet', *common)
    report = json.loads((root / 'artifacts' / f'{NAME}_training.json').read_text())
    weights = torch.load(root / 'artifacts' / f'{NAME}.pt', weights_only=True)['model'].values()
    digest = hashlib.md5(b''.join(value.numpy().tobytes() for value in weights)).hexdigest()[:12]
    return report['threads'], report['epochs'][0]['train_loss'], digest


same, pairs = 0, int(sys.argv[2])
for i in range(pairs):
    first = train()
    umap_map(np.random.default_rng(i).normal(size=(60, 8)), 3, 8, 0.1, 0)
    second = train()
    same += first == second
    print(i, *first, '|', *second, 'same' if first == second else 'DIFFER', flush=True)
print(f'{same} of {pairs} pairs equal to the bit')
