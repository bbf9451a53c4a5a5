"""How exactly P1's auxiliary decoder reads held-out sentences of a corpus of one's own, by how many tokens they have.

Reads: a checkpoint of P1 and the corpus that it names.  From the root of the repository:
    PYTHONPATH=. python records/2026-12-01_english/lengths.py out/english/p1/ckpt.pt
Every row of the corpus gives its first and its second sentence (of captions.jsonl the second is the longest). A sentence
counts where every token is the likeliest one after the right ones, which is when greedy free running says it exactly.
"""
import sys
from functools import partial

import torch

import data
import runtime
from metrics import encode, token_metrics
from model import build

BANDS = (1, 10), (11, 15), (16, 20), (21, 25), (26, 30), (31, 40), (41, 64)

checkpoint = torch.load(sys.argv[1], weights_only=True)
config = runtime.Config(checkpoint['config'])
text = data.load(config)
nets = build(config, 'encoder', 'auxiliary').eval()
runtime.load_weights(nets, checkpoint, nets)
autocast = partial(torch.autocast, 'cpu', dtype=torch.bfloat16)
print('tokens'.ljust(12), *(f'{low}-{high}'.rjust(12) for low, high in BANDS))
for rendering in (0, 1):
    x = text.splits['val'].fixed(1024, rendering=rendering)
    length, cells = (x != data.PAD).sum(1), []
    for low, high in BANDS:
        part = x[(length >= low) & (length <= high)]
        cells.append('-' if not len(part) else '{:.3f} ({})'.format(
            token_metrics(nets.auxiliary, encode(nets.encoder, part, autocast), None, part, text,
                          autocast)['sentence_exact'], len(part)))
    print(f'sentence {rendering + 1}'.ljust(12), *(cell.rjust(12) for cell in cells))
