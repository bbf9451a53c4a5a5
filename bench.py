"""How many sentences a second, and how much memory, at two canvas sizes: 32x32x6 against 48x48x8, full-size encoder.

Writes: out/bench/throughput.json; prints a line a batch size, and the ratio of the best
    python bench.py
"""
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import p1_canvas
import priors
import runtime

out_dir = 'out/bench'
device = 'auto'           # cuda, mps or cpu
config = runtime.configure(globals())

HERE = Path(__file__).parent


def measure(size, channels, batch):
    """Sentences a second of the full-size encoder (forward; forward and backward with the priors) and peak memory (on a
    CPU of the whole process, Linux only), in this process."""
    where = runtime.find_device(device)
    bf16 = runtime.find_dtype('auto', where) == torch.bfloat16
    arch = ({name: getattr(p1_canvas, name) for name in p1_canvas.SIZES}
            | {'size': size, 'query_grid': size, 'channels': channels})
    encoder = p1_canvas.build(arch)['encoder'].to(where)
    x = torch.randint(4, 700, (batch, 20), device=where)
    weights = p1_canvas.weights(p1_canvas.config)

    def timed(step):
        step()
        if where.type == 'cuda':
            torch.cuda.synchronize()
        began, n = time.perf_counter(), 0
        while n < 3 or time.perf_counter() - began < 5:
            step()
            n += 1
            if where.type == 'cuda':
                torch.cuda.synchronize()
        return batch * n / (time.perf_counter() - began)

    def forward():
        with torch.no_grad(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            encoder(x)

    def backward():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            V = encoder(x)
        priors.image_prior_loss(priors.image_prior_terms(V), weights).backward()

    rates = timed(forward), timed(backward)
    peak = (torch.cuda.max_memory_allocated() if where.type == 'cuda' else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {'size': size, 'channels': channels, 'batch': batch, 'forward': rates[0], 'backward': rates[1],
            'gigabytes': peak / 2**30}


def main():
    """Each canvas and batch in a process of its own, or the peaks would add up; a batch that does not
    fit is left out."""
    rows = []
    for size, channels in ((32, 6), (48, 8)):
        for batch in (8, 32, 128, 512) if runtime.find_device(device).type == 'cuda' else (2, 8, 32):
            code = (f'import json, bench; bench.device = {device!r}; '
                    f'print(json.dumps(bench.measure({size}, {channels}, {batch})))')
            done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ['killed: out of memory?'])[-1]
                print(f'{size}x{size}x{channels}  batch {batch:4d}  {why[:100]}')
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            print(f"{size}x{size}x{channels}  batch {batch:4d}  forward {row['forward']:8.1f} sentences/s  "
                  f"forward + backward {row['backward']:8.1f}  peak {row['gigabytes']:.2f} GiB", flush=True)
    for kind, label in (('forward', 'forward'), ('backward', 'forward + backward')):
        small, large = (max((row for row in rows if row['size'] == size), key=lambda row: row[kind], default=None)
                        for size in (32, 48))
        if small and large:
            print(f'{label}: 48x48x8 (best at batch {large["batch"]}) does {large[kind] / small[kind]:.2f} of the '
                  f'sentences a second of 32x32x6 (best at batch {small["batch"]})')
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    runtime.write_json(Path(out_dir) / 'throughput.json', rows)


if __name__ == '__main__':
    main()
