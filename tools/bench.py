"""What a training step costs, phase by phase: time, sentences a second, floating-point operations, the fraction of this
machine's own matrix-product rate, where the time goes, memory.

A phase runs as its script, from a checkpoint that the phase before has just written; only the loop's clock is ours
(`clock` stands in for Run.steps). A step's operations are counted by PyTorch's FlopCounterMode: 2 m n k for each matrix
product (m, k) x (k, n) that forward and backward really do, 2 x kernel x in x out x positions for each convolution;
all else (softmax, norms, FFTs, the optimizer) counts as none, so "of peak" is what the products alone account for.
The peak is the median rate of 8192-cubed products (2048 on a CPU) in the phase's dtype, taken between the steps. "of
shapes" is the same against what the machine does at the shapes that the model really has: the time that all products
and convolutions of a step take alone, one after the other, over the step's (so products of slow shapes raise it). Then
where the step goes: attention and priors are timed alone too, forward and backward, and so is matmul, all products and
convolutions but theirs; data (scenes, renderings, their tokens) and optimizer (with clipping and the weights' average)
in a step; rest is what remains. At the end the operators of a profiled step. P2 is in its last stage, which encodes six
sentences a scene (nine before), P6 past its U-Net's own steps.

Writes: out_dir/steps_<size>.json or <what>.json, canvases.png; prints a table
    python -m tools.bench                      # steps at the sizes of runs/cpu.sh
    python -m tools.bench --size=full          # at the plan's size, batch 4 on a CPU
    python -m tools.bench --what=compiled      # at the CPU size, eager and under torch.compile
    python -m tools.bench --what=ranks         # the same steps of P1 and P2 on one process and on two
    python -m tools.bench --what=memory        # peak memory of P2 against batch size, by gradient caching (slow)
    python -m tools.bench --what=canvases      # 32x32x6 against 48x48x8, full-size encoder
    python -m tools.bench --what=corpus        # memory and time of corpora of your own, up to 10 million sentences
"""
import json
import os
import random
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import grammar
import model
import p1_canvas
import p2_contrast
import plot
import priors
import runtime
from runs.presets import PRESETS
from tools.launch import SCRIPTS, settings

out_dir = 'out/bench'
what = 'steps'            # steps, compiled, ranks, memory, canvases or corpus
size = 'cpu'              # of steps: cpu, the sizes of runs/cpu.sh; full, the plan's
phases = 'p1,p2,p3,p4,p5,p6'   # of steps and compiled; each needs those before it
steps = 7                 # timed steps of each phase; the table has their median
sentences = 10_000_000    # of corpus: of the largest; the others have a tenth and a hundredth
device = 'auto'           # cuda, mps or cpu
config = runtime.configure(globals())

ROOT = Path(__file__).resolve().parents[1]
# As much a scene as at the plan's batch of 256, where that is at least one (the priors need two canvases). What a phase
# does not say comes from the one before it.
FULL_ON_A_CPU = {'p1': '--batch_size=4 --prior_samples=2', 'p2': '--rec_samples=4', 'p3': '', 'p4': '',
                 'p5': '--dec_samples=4 --generated=1',
                 'p6': '--unet_batch=2 --buffer_size=64 --refresh=1 --prior_rows=1'}
CPU = PRESETS['cpu'] | {'p6': PRESETS['cpu']['p6'] + ' --buffer_size=64'}             # which is filled at once
KINDS = {                 # operators by what they are for; the first fitting word decides; attention only where fused
    'attention': ('fmha', 'flash', 'attention'), 'convolutions': ('conv', 'implicit'),
    'matrix products': ('mm', 'bmm', 'linear', 'nvjet', 'cutlass'), 'softmax': ('softmax',),
    'FFT': ('fft',), 'optimizer': ('adam', 'foreach', 'Optimizer'), 'random numbers': ('normal_', 'uniform', 'rand'),
    'norms': ('norm',),
    'copies and casts': ('copy', 'to_', 'cat', 'index', 'gather', 'contiguous'), 'elementwise': ('',)}


# ---- a phase's step, in a process of its own ------------------------------------------------------------------------

def settle(where):
    """Wait for the device."""
    if where.type == 'cuda':
        torch.cuda.synchronize()


def peak_rate(where, dtype):
    """Operations a second of large matrix products; on CUDA of twenty in a row, one is over before it is timed."""
    n, times = (8192, 20) if where.type == 'cuda' else (2048, 1)
    a, b = torch.randn(2, n, n, device=where, dtype=dtype)
    settle(where)
    began = time.perf_counter()
    for _ in range(times):
        a @ b
    settle(where)
    return times * 2 * n ** 3 / (time.perf_counter() - began)


def kind_of(operator):
    return next(kind for kind, words in KINDS.items() if any(word in operator for word in words))


class Look(NamedTuple):
    """What a tensor looks like."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype


def look(value):
    """A tensor as its Look, a tuple or list as the tuple of its values' looks, all else as it is; hashable."""
    if torch.is_tensor(value):
        return Look(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(look, value)) if isinstance(value, (tuple, list)) else value


def made(value, where):
    """Arguments of that look: random numbers, and what is no float is 1."""
    if isinstance(value, Look):
        n = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride))
        numbers = torch.randn(n, device=where) if value.dtype.is_floating_point else torch.ones(n, device=where)
        return numbers.to(value.dtype).as_strided(value.shape, value.stride)
    return [made(part, where) for part in value] if isinstance(value, tuple) else value


class Products(TorchDispatchMode):
    """Counts the products and convolutions of what runs under it: counts {(operator, looks of arguments): times}."""
    OPERATORS = 'mm', 'addmm', 'bmm', 'baddbmm', 'convolution', 'convolution_backward'

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, given=(), more=None):
        if operator.__name__.partition('.')[0] in self.OPERATORS:
            self.counts[operator, look(given)] += 1
        return operator(*given, **(more or {}))


def alone(function, where):
    """Seconds of a call after a first one, the mean of three in a row (twenty on CUDA)."""
    function()
    settle(where)
    began, times = time.perf_counter(), 20 if where.type == 'cuda' else 3
    for _ in range(times):
        function()
    settle(where)
    return (time.perf_counter() - began) / times


def cost_of_products(counts, where):
    """Seconds of the products that Products counted, alone."""
    return sum(times * alone(partial(operator, *made(given, where)), where)
               for (operator, given), times in counts.items())


def attention_step(grad, q, k, v, *rest):
    """One call of model.attend, with its backward if grad."""
    with torch.set_grad_enabled(grad):
        y = model.attend(*(x.detach().requires_grad_(grad) for x in (q, k, v)), *rest)[0]
        if grad:
            y.backward(torch.ones_like(y))               # a sum's gradient is one number, and its products others


def priors_step(V, alpha, cell):
    """The priors' losses on canvases V, forward and backward."""
    sum(priors.image_prior_terms(V.detach().requires_grad_(), alpha, cell).values()).backward()


def products_of(function, times):
    """What Products finds in `times` calls of a function."""
    with Products() as products:
        function()
    return Counter({product: n * times for product, n in products.counts.items()})


def measure_step(script, words, timed, compiled=False):
    """Run a phase's script for `timed` steps and a few more, to its checkpoint -> what a step costs; with timed = 0 for
    two steps -> its peak memory alone. compiled: under torch.compile, on a CPU too -> its time and memory alone."""
    measured = {'seconds': [], 'peak': [], 'data': []}
    sentences, in_data, in_optimizer, canvases, attended, watched = [], [], [], [], Counter(), False

    def clock(run, first, last):
        """Yields steps like Run.steps, none of them due for an evaluation."""
        nonlocal watched
        began = time.perf_counter()
        for step in range(1, 4 if timed else 3):                                      # compile, allocate
            yield step
        measured.update(first=time.perf_counter() - began, gigabytes=peak_gigabytes(run.device))  # without profiler
        for step in range(4, 4 + timed):
            sentences.clear(), in_data.clear()
            settle(run.device)
            runtime.barrier(run)                               # the others may still be at their matrix product
            began = time.perf_counter()
            yield step
            settle(run.device)
            measured['seconds'].append(time.perf_counter() - began)
            measured['data'].append(sum(in_data))
            measured['peak'].append(peak_rate(run.device, run.dtype))
        measured.update(sentences=sum(sentences), dtype=str(run.dtype).removeprefix('torch.'), device=str(run.device))
        if not timed or compiled:
            yield last
            return
        in_optimizer.clear()
        watched = True
        yield step + 1
        measured['optimizer'] = sum(in_optimizer)
        attended.clear()                                       # widths differ from step to step: of the one counted
        with FlopCounterMode(display=False) as counter, Products() as products:
            yield step + 2
        watched = False
        measured['operations'] = counter.get_total_flops()
        activities = [torch.profiler.ProfilerActivity.CPU] + (
            [torch.profiler.ProfilerActivity.CUDA] if run.device.type == 'cuda' else [])
        with torch.profiler.profile(activities=activities) as profile:
            yield step + 3
        spent = Counter()
        for event in profile.key_averages():
            if run.device.type == 'cuda' and (event.device_type != torch.autograd.DeviceType.CUDA
                                              or event.is_user_annotation):
                continue                             # operators carry the time of their kernels once more
            spent[kind_of(event.key)] += (event.self_device_time_total if run.device.type == 'cuda'
                                          else event.self_cpu_time_total)
        measured['where'] = {kind: spent[kind] / sum(spent.values()) for kind in KINDS}
        measured['products'] = cost_of_products(products.counts, run.device)
        pieces = {'attention': [(partial(attention_step, grad, *made(given, run.device)), times)
                                for (grad, given), times in attended.items()],
                  'priors': [(partial(priors_step, *canvases[-1]), 1)] if canvases else []}
        measured['strangers'], every = 0, products.counts.total()  # products of a piece that the step did not do
        for piece, calls in pieces.items():
            measured[piece] = sum(times * alone(function, run.device) for function, times in calls)
            for function, times in calls:                     # what is left is neither attention's nor the priors'
                counts = products_of(function, times)
                measured['strangers'] += (counts - products.counts).total()
                products.counts -= counts
        measured['left'] = products.counts.total() / every
        measured['matmul'] = cost_of_products(products.counts, run.device)
        yield last                                                                    # evaluates, saves

    def counted(forward):
        def counting(self, x, *rest, **more):
            sentences.append(len(x))
            return forward(self, x, *rest, **more)
        return counting

    def clocked(function, into):
        def clocking(*given, **more):
            if watched:
                settle(runtime.find_device(device))
            began = time.perf_counter()
            result = function(*given, **more)
            if watched:
                settle(runtime.find_device(device))
            into.append(time.perf_counter() - began)
            return result
        return clocking

    def remembered(terms):
        def remembering(V, *rest):
            canvases[:] = [(V.detach(), *rest)]
            return terms(V, *rest)
        return remembering

    def noted(attend):
        def noting(*given):
            if watched:
                attended[torch.is_grad_enabled(), look(given)] += 1
            return attend(*given)
        return noting

    def compile_anywhere(nets, run):
        torch._dynamo.config.recompile_limit = 64
        for net in nets.values():
            net.compile(dynamic=run.device.type == 'cpu')      # where widths are not rounded

    runtime.Run.steps = clock
    runtime.hardware = lambda where: f'{where}'                                        # asking for its name takes time
    if compiled:
        runtime.compile_nets = compile_anywhere
    else:
        model.TextEncoder.forward, model.attend = counted(model.TextEncoder.forward), noted(model.attend)
        for name in ('draw', 'renderings', 'negatives', 'take'):
            setattr(data.Corpus, name, clocked(getattr(data.Corpus, name), in_data))
        for owner, name in ((torch.optim.AdamW, 'step'), (runtime.EMA, 'update'),
                            (torch.nn.utils, 'clip_grad_norm_')):
            setattr(owner, name, clocked(getattr(owner, name), in_optimizer))
        priors.image_prior_terms = remembered(priors.image_prior_terms)
    data.HELD_OUT_SIZE = 16                                                          # what a phase does before its loop
    plot.evaluation = plot.trends = plot.samples_table = lambda *_: None
    sys.argv = [script, *words]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / script), run_name='__main__')
    return measured


def median(numbers):
    return sorted(numbers)[len(numbers) // 2]


def in_a_process(call, folder, ranks=1, threads=None):
    """What bench.<call> returns in a fresh process whose working folder is `folder` (the first of `ranks` processes
    that take the step together), or one line that says why it returns nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    code = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import json; from tools import bench; '
            f'print(json.dumps(bench.{call}))')
    environment = os.environ | ({'OMP_NUM_THREADS': str(threads)} if threads else {})
    if ranks > 1:
        environment |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(ranks)}
    processes = []
    for rank in range(ranks):
        numbers = {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks > 1 else {}
        processes.append(subprocess.Popen([sys.executable, '-c', code], cwd=folder, env=environment | numbers,
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    said = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        errors = [line for _, error in said for line in error.strip().splitlines()]
        return (errors or ['killed: no memory?'])[-1][:160]
    return json.loads(said[0][0].splitlines()[-1])


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def step_of(phase, words, folder, timed=None, compiled=False, **how):
    """measure_step of one phase, from the checkpoint of the phase before in `folder`."""
    before = f'p{int(phase[1]) - 1}'
    words = [*words.split(), f'--out_dir={phase}', f'--device={device}', '--eval_every=1000000', '--log_every=1000000',
             '--max_steps=100', *(['--num_scenes=500'] if phase == 'p1' else [f'--init_from={before}/ckpt.pt'])]
    timed = steps if timed is None else timed
    call = f'measure_step({SCRIPTS[phase]!r}, {words!r}, {timed}, {compiled})'
    return in_a_process(call, folder, **how)


def words_of(phase, on_a_gpu):
    """The words of a phase at `size` for steps of its last stage."""
    words = CPU if size == 'cpu' else dict.fromkeys(SCRIPTS, '') if on_a_gpu else FULL_ON_A_CPU
    return words[phase] + {'p2': ' --staged=false', 'p6': ' --unet_steps=0'}.get(phase, '')


# ---- the tables -----------------------------------------------------------------------------------------------------

PARTS = 'matmul', 'attention', 'priors', 'data', 'optimizer'


def bench_steps(on_a_gpu):
    """One row a phase: eager, and on CUDA compiled beside it."""
    rows, folder = {}, Path(out_dir).resolve() / f'steps_{size}'
    print(f"{'':12s}{'ms':>8s}{'lowest':>8s}{'highest':>8s}{'encoded/s':>10s}{'GFLOP':>7s}{'of peak':>8s}"
          f"{'of shapes':>10s}" + ''.join(f'{part:>10s}' for part in (*PARTS, 'rest')) + f"{'GiB':>6s}   operators")
    for phase in phases.split(','):
        words = words_of(phase, on_a_gpu)
        eager = step_of(phase, words + ' --compile=false', folder)
        steps_of = {phase: eager}
        if on_a_gpu and isinstance(eager, dict):       # what is inside a compiled graph cannot be counted
            compiled = step_of(phase, words, folder, compiled=True)
            kept = 'seconds', 'peak', 'first', 'gigabytes'
            steps_of[f'{phase} compiled'] = (eager | {name: compiled[name] for name in kept}
                                             if isinstance(compiled, dict) else compiled)
        for name, row in steps_of.items():
            rows[name] = row
            print_step(name, row)
    return rows


def print_step(name, row):
    if not isinstance(row, dict):
        print(f'{name:12s}{row}', flush=True)
        return
    second = median(row['seconds'])
    parts = [row[part] / second for part in PARTS if part != 'data']
    parts.insert(PARTS.index('data'), median(row['data']) / second)
    fused = row['attention'] if row['device'].startswith('cuda') else 0.0      # attention's products are in one kernel
    places = sorted(((share, kind) for kind, share in row['where'].items() if share >= 0.03), reverse=True)
    print(f"{name:12s}{1e3 * second:8.0f}{1e3 * min(row['seconds']):8.0f}{1e3 * max(row['seconds']):8.0f}"
          f"{row['sentences'] / second:10.0f}{row['operations'] / 1e9:7.0f}"
          f"{row['operations'] / second / median(row['peak']):8.0%}{(row['products'] + fused) / second:10.0%}"
          + ''.join(f'{part:10.1%}' for part in (*parts, 1 - sum(parts))) + f"{row['gigabytes']:6.1f}   "
          + ', '.join(f'{kind} {share:.0%}' for share, kind in places), flush=True)


def bench_compiled():
    """Steps at the CPU size, eager and under torch.compile, on whatever device there is."""
    folder, rows = Path(out_dir).resolve() / 'compiled', {}
    for phase in phases.split(','):
        for name, flag in (('eager', ' --compile=false'), ('compiled', '')):
            row = step_of(phase, words_of(phase, False) + flag, folder, timed=25, compiled=name == 'compiled')
            rows[f'{phase} {name}'] = row
            print(f'{phase} {name:9s}' + (row if isinstance(row, str) else
                                          f"{1e3 * median(row['seconds']):6.0f} ms a step (lowest "
                                          f"{1e3 * min(row['seconds']):.0f}, highest "
                                          f"{1e3 * max(row['seconds']):.0f}); the first three "
                                          f"{row['first']:.0f} s"), flush=True)
    return rows


def bench_ranks():
    """Weak scaling: twice the batch on two processes, one thread each, in turn; 1.0 would be perfect. The settings of
    runs/cpu.sh."""
    folder, rows = Path(out_dir).resolve() / 'ranks', {}
    for phase in ('p1', 'p2'):
        chain = ((p, tuple(words_of(p, False).split())) for p in SCRIPTS if p <= phase)
        usual, ratios = settings(*chain), []
        keys = [key for key in ('batch_size', 'prior_samples', 'rec_samples') if key in usual]
        for turn in range(3):
            for ranks in (1, 2):
                words = ' '.join([words_of(phase, False), *(f'--{key}={ranks * usual[key]}' for key in keys)])
                row = step_of(phase, f'{words} --device=cpu', folder, timed=15, ranks=ranks, threads=1)
                rows[f'{phase}, {ranks} ranks, turn {turn}'] = row
                if not isinstance(row, dict):
                    print(f'{phase}, {ranks} ranks: {row}')
                    return rows
                took = [1e3 * second for second in row['seconds']]
                print(f"{phase}, {ranks} process{'es' * (ranks > 1)}, batch {ranks * usual['batch_size']}: "
                      f"{median(took):.0f} ms a step (lowest {min(took):.0f}, highest {max(took):.0f}), one matrix "
                      f"product at {median(row['peak']) / 1e9:.0f} GFLOP/s meanwhile", flush=True)
            one, two = (median(rows[f'{phase}, {ranks} ranks, turn {turn}']['seconds']) for ranks in (1, 2))
            ratios.append(one / two)
        print(f'{phase}: weak-scaling efficiency of 2 ranks: {median(ratios):.2f} (lowest {min(ratios):.2f}, highest '
              f'{max(ratios):.2f} of {len(ratios)} turns)', flush=True)
    return rows


def peak_gigabytes(where):
    """Highest memory of this process so far: reserved on the device, or on a CPU resident (Linux)."""
    return (torch.cuda.max_memory_reserved() if where.type == 'cuda' else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2 ** 30


def measure_contrast(batch, device):
    """What the contrastive loss of `batch` scenes, three variants in two views each, adds to the peak memory, forward
    and backward, in this process: the part of P2 that gradient caching does not cut."""
    where = runtime.find_device(device)
    Z = torch.nn.functional.normalize(torch.randn(batch, 3, 2, 256, device=where), dim=-1).requires_grad_()
    meanings = torch.arange(3 * batch, device=where).view(batch, 3)
    whole = data.Batch(None, None, meanings, meanings >= 0, None, slice(0, batch))
    before = peak_gigabytes(where)
    p2_contrast.contrast(Z, whole, p2_contrast.config).backward()
    return peak_gigabytes(where) - before


def bench_memory(on_a_gpu):
    """P2's full size: peak memory of two steps when the batch grows and the micro-step does not (gradient caching),
    when the micro-step grows, and what the loss over the whole batch adds, by itself."""
    folder, rows = Path(out_dir).resolve() / 'memory', {}
    step_of('p1', '--batch_size=4 --compile=false', folder, timed=0)
    for batch, part in (((256, 64), (1024, 64), (4096, 64)) if on_a_gpu else
                        ((2, 2), (8, 2), (32, 2), (16, 8), (32, 16), (256, 16), (1024, 16), (4096, 16))):
        words = f'--batch_size={batch} --grad_accum={batch // part} --staged=false --compile=false'
        row = step_of('p2', words, folder, timed=0)
        rows[f'{batch} in parts of {part}'] = row
        print(f'batch {batch:5d} in parts of {part}: '
              + (f"peak {row['gigabytes']:.2f} GiB" if isinstance(row, dict) else row), flush=True)
    for batch in (256, 1024, 4096):
        rows[f'loss {batch}'] = row = in_a_process(f'measure_contrast({batch}, {device!r})', folder)
        print(f'batch {batch:5d}, the contrastive loss alone: '
              + (row if isinstance(row, str) else f'{row:.2f} GiB'), flush=True)
    return rows


def measure_canvas(size, channels, batch, device):
    """Sentences a second of the full-size encoder (forward; forward and backward with the priors) and peak memory (on a
    CPU of the whole process, Linux only), in this process."""
    where = runtime.find_device(device)
    bf16 = runtime.find_dtype('auto', where) == torch.bfloat16
    sizes = runtime.Config(p1_canvas.config | {'size': size, 'query_grid': size, 'channels': channels})
    encoder = model.build(sizes, 'encoder')['encoder'].to(where)
    x = torch.randint(4, 700, (batch, 20), device=where)

    def timed(step):
        step()
        settle(where)
        began, n = time.perf_counter(), 0
        while n < 3 or time.perf_counter() - began < 5:
            step()
            n += 1
            settle(where)
        return batch * n / (time.perf_counter() - began)

    def forward():
        with torch.no_grad(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            encoder(x)

    def backward():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16):
            V = encoder(x)
        p1_canvas.image_loss(V, sizes)[0].backward()

    row = {'size': size, 'channels': channels, 'batch': batch, 'forward': timed(forward)}
    row['forward_gigabytes'] = peak_gigabytes(where)              # a peak only grows: before what takes more
    return row | {'backward': timed(backward), 'gigabytes': peak_gigabytes(where)}


def bench_canvases(on_a_gpu):
    """Each canvas and batch in a process of its own, or the peaks would add up; a batch that does not
    fit is left out."""
    rows = []
    for size, channels in ((32, 6), (48, 8)):
        for batch in (8, 32, 128, 512) if on_a_gpu else (2, 8, 32, 128):
            row = in_a_process(f'measure_canvas({size}, {channels}, {batch}, {device!r})', Path(out_dir).resolve())
            if not isinstance(row, dict):
                print(f'{size}x{size}x{channels}  batch {batch:4d}  {row}')
                continue
            rows.append(row)
            print(f"{size}x{size}x{channels}  batch {batch:4d}  forward {row['forward']:8.1f} sentences/s, peak "
                  f"{row['forward_gigabytes']:.2f} GiB  forward + backward {row['backward']:8.1f}, "
                  f"{row['gigabytes']:.2f} GiB", flush=True)
    for kind, label in (('forward', 'forward'), ('backward', 'forward + backward')):
        small, large = (max((row for row in rows if row['size'] == size), key=lambda row: row[kind], default=None)
                        for size in (32, 48))
        if small and large:
            print(f'{label}: 48x48x8 (best at batch {large["batch"]}) does {large[kind] / small[kind]:.2f} of the '
                  f'sentences a second of 32x32x6 (best at batch {small["batch"]})')
    return rows


def write_corpus(path, n):
    """n sentences of the grammar, a line each, in a stream; some come twice."""
    rand = random.Random(0).random
    with open(path, 'w', encoding='utf-8') as file:
        for _ in range(n):
            file.write(grammar.render(grammar.sample_scene(rand, 1), rand) + '\n')


def measure_corpus(path, batches=200):
    """Prepare a corpus and draw batches of 256 from it, in this process: seconds, peak memory after either, bytes."""
    setting = {'corpus': path, 'num_scenes': 0, 'complexity': 1, 'simple_share': 0.5, 'data_seed': 0,
               'vocab_size': 1024, 'max_length': 64}

    def resident():                                        # MiB
        return 1024 * peak_gigabytes(torch.device('cpu'))
    before, began = resident(), time.perf_counter()
    train = data.load(setting).splits['train']
    prepared, seconds = resident(), time.perf_counter() - began
    began = time.perf_counter()
    for step in range(batches):
        scenes, generator = train.draw(256, 0, step)
        train.take(scenes, 0 * scenes, train.renderings(scenes, 0 * scenes, generator)[0])
    stored = sum(file.stat().st_size for file in data._folder(setting).iterdir())
    return {'sentences': len(train.starts) - 1, 'seconds': seconds, 'before': before, 'prepared': prepared,
            'drawn': resident(), 'batch': (time.perf_counter() - began) / batches, 'stored': stored}


def bench_corpus():
    """A corpus of one's own, ten times and a hundred times larger: MiB of resident memory (mapped files counted in),
    the time of preparing it and of a batch; then a few steps of P1 on the largest, interrupted and resumed."""
    folder, rows = Path(out_dir).resolve() / 'corpus', []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print('  sentences  prepared in   on disk   MiB of the empty process  after preparing  after 200 batches  a batch')
    for n in (sentences // 100, sentences // 10, sentences):
        path = folder / f'{n}.txt'
        write_corpus(path, n)
        row = in_a_process(f'measure_corpus({str(path)!r})', folder)
        rows.append(row)
        print(row if isinstance(row, str) else
              f"{row['sentences']:11,d}{row['seconds']:11.0f} s{row['stored'] / 2 ** 20:6.0f} MiB{row['before']:27.0f}"
              f"{row['prepared']:17.0f}{row['drawn']:19.0f}{1e3 * row['batch']:6.1f} ms", flush=True)
    for more in ('--max_steps=4', '--max_steps=8 --resume=true'):
        words = f'{words_of("p1", False)} --corpus={path} --out_dir=p1 --lr_steps=8 --log_every=1 --device={device} '
        words += more
        done = subprocess.run([sys.executable, str(ROOT / SCRIPTS['p1']), *words.split()], cwd=folder, text=True,
                              capture_output=True)
        lines = (folder / 'p1/metrics.jsonl').read_text().splitlines() if done.returncode == 0 else [done.stderr]
        print(f'p1_canvas.py {more}: status {done.returncode}; {lines[-1][:100]}', flush=True)
    return rows


def main():
    if what not in ('steps', 'compiled', 'ranks', 'memory', 'canvases', 'corpus') or size not in ('cpu', 'full'):
        runtime.fail(f'--what={what} --size={size}: expects steps, compiled, ranks, memory, canvases or '
                     'corpus, and cpu or full')
    if not set(phases.split(',')) <= set(SCRIPTS) or steps < 1 or sentences < 10_000:
        runtime.fail(f'--phases={phases} --steps={steps} --sentences={sentences}: expects phases such as p1,p2, at '
                     'least one step and 10000 sentences')
    where = runtime.find_device(device)
    on_a_gpu = where.type == 'cuda'
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {runtime.provenance(where, runtime.git_commit())}", flush=True)
    rows = {'steps': lambda: bench_steps(on_a_gpu), 'compiled': bench_compiled, 'ranks': bench_ranks,
            'memory': lambda: bench_memory(on_a_gpu), 'canvases': lambda: bench_canvases(on_a_gpu),
            'corpus': bench_corpus}[what]()
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    runtime.write_json(Path(out_dir) / (f'steps_{size}.json' if what == 'steps' else f'{what}.json'), rows)
    if what == 'canvases':
        plot.canvases(out_dir)


if __name__ == '__main__':
    main()
