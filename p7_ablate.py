"""P7 · Take the pieces away, one at a time.

An ablation is a set of overrides of the phase scripts, so each is run as an ordinary command line. It branches off the
baseline of its seed at the first phase that it changes; a finished run is never repeated, an unfinished one goes on.
The table says for every target metric how far it drops, in standard deviations of the baseline, and whether the worst
seed of the one is still better than the best seed of the other. A piece whose removal changes nothing is its most
useful line.

Cost: on 2 CPU cores one seed of the whole table takes about three hours, `--only='copy suppression,round trip'` twenty
minutes after the baseline; stop it any time (Ctrl-C) and start the same command again.

Reads:  nothing (it runs P1 to P5)      Writes: out/p7/<ablation>/seed<k>/p1 ... p5, ablations.md, ablations.png
    python p7_ablate.py --dry_run=true
    python p7_ablate.py --seeds=3
    python p7_ablate.py --throughput=true        # sentences a second and peak memory of two canvas sizes
"""
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import p1_canvas
import plot
import priors
import runtime

out_dir = 'out/p7'        # the runs, the table and the figure
seeds = 3                 # runs of each ablation, seeds 0, 1, ...
only = ''                 # ablations separated by commas; '' is all of them. The baseline is always there.
preset = 'cpu'            # cpu: the ablation size below; gpu: the plan's size, fewer steps; smoke: two steps, for tests
jobs = 0                  # runs at the same time; 0: one a GPU, or two on a CPU (a thread each beats two threads)
dry_run = False           # list the commands and the estimated time, run nothing
throughput = False        # measure 32x32x6 against 48x48x8 instead
device = 'auto'
config = runtime.configure(globals())

HERE = Path(__file__).parent
# The sizes of runs/cpu.sh with about half its steps, and P4 without its controls.
PRIORS = '--lambda_cov=0.5 --lambda_var=0.5 --lambda_tv=0.05 --lambda_wavelet=0.05'
PRESETS = {
    'cpu': {
        'p1': '--num_scenes=20000 --vocab_size=1024 --query_grid=8 --patch=4 --dim=128 --layers=3 --heads=4 '
              '--hidden=256 --cross_layers=2 --cross_hidden=256 --rec_dim=128 --rec_layers=2 --dropout=0.0 '
              f'--batch_size=64 --learning_rate=2e-3 --warmup_steps=50 --prior_samples=32 {PRIORS} '
              '--max_steps=500 --eval_every=100',
        'p2': f'--batch_size=16 --rec_samples=48 --prior_samples=32 --learning_rate=1e-3 --warmup_steps=50 {PRIORS} '
              '--max_steps=1000 --eval_every=250',
        'p3': f'--batch_size=16 --rec_samples=48 --prior_samples=32 --learning_rate=5e-4 --warmup_steps=20 {PRIORS} '
              '--max_steps=150 --eval_every=50',
        'p4': '--dec_dim=128 --dec_layers=2 --dec_heads=4 --dec_hidden=256 --dropout=0.0 --batch_size=64 '
              '--controls=false --learning_rate=2e-3 --warmup_steps=50 --max_steps=400 --eval_every=400',
        'p5': '--batch_size=16 --dec_samples=64 --generated=16 --prior_samples=32 --learning_rate=1e-3 '
              f'--warmup_steps=20 {PRIORS} --max_steps=150 --eval_every=50'},
    'gpu': {'p1': '--max_steps=4000', 'p2': '--max_steps=4000', 'p3': '--max_steps=1000',
            'p4': '--max_steps=3000 --controls=false', 'p5': '--max_steps=1000'},
    'smoke': {
        'p1': '--num_scenes=300 --vocab_size=1024 --query_grid=8 --patch=4 --dim=32 --layers=1 --heads=2 --hidden=64 '
              '--cross_layers=1 --cross_hidden=64 --rec_dim=32 --rec_layers=1 --batch_size=8 '
              '--max_steps=2 --eval_every=1',
        'p2': '--batch_size=4 --readout_hidden=32 --z_dim=32 --max_steps=2 --eval_every=1',
        'p3': '--batch_size=4 --max_steps=2 --eval_every=1',
        'p4': '--batch_size=8 --dec_dim=32 --dec_layers=1 --dec_heads=2 --dec_hidden=64 --controls=false --max_steps=2',
        'p5': '--batch_size=4 --generated=4 --max_steps=2 --eval_every=1'}}
MINUTES = {'cpu': {'p1': 4, 'p2': 9, 'p3': 2, 'p4': 3, 'p5': 4}, 'gpu': {}, 'smoke': {}}     # of one job, measured
SCRIPTS = {'p1': 'p1_canvas.py', 'p2': 'p2_contrast.py', 'p3': 'p3_jitter.py', 'p4': 'p4_decoder.py',
           'p5': 'p5_roundtrip.py'}


def ablation(words, phases):
    """{phase: words} for a piece that is switched off in several phases at once."""
    return {phase: words for phase in phases.split()}


CONTRAST, PRIOR = 'p2 p3 p5', 'p1 p2 p3 p5'
ABLATIONS = {
    'baseline': {},
    'spectrum': ablation('--lambda_spectrum=0', PRIOR),
    'tv': ablation('--lambda_tv=0', PRIOR),
    'wavelet': ablation('--lambda_wavelet=0', PRIOR),
    'gradkurt': ablation('--lambda_gradkurt=0', PRIOR),
    'cov': ablation('--lambda_cov=0', PRIOR),
    'var': ablation('--lambda_var=0', PRIOR),
    'InfoNCE': ablation('--lambda_nce=0', CONTRAST) | {'p2': '--lambda_nce=0 --staged=false'},
    'round trip': {'p5': '--lambda_cycle=0'},
    'copy suppression': {'p5': '--lambda_copy=0'},
    'jitter': ablation('--lambda_inv=0 --jitter_prob=0', 'p3 p5'),
    'counterfactual negatives': ablation('--negatives=0', CONTRAST) | {'p2': '--negatives=0 --staged=false'},
    'masking of false negatives': ablation('--mask_false_negatives=false', CONTRAST),
    'pyramid readout': {'p2': '--pyramid=false'},
    # what is ours and not the plan's
    'reading (ours)': ablation('--lambda_rec=0', 'p1 p2 p3'),
    'common (ours)': ablation('--lambda_common=0', PRIOR),
    'lattice (ours)': ablation('--lambda_lattice=0', PRIOR),
    'stages (ours)': {'p2': '--staged=false'},
    'anchors (ours)': ablation('--anchors=false', CONTRAST),
    'paraphrase training (ours)': ablation('--paraphrase_share=0', 'p4 p5')}

# Target metrics: label, how to read it from the metrics of a P5 checkpoint; +1: more is better, -1: less is.
TARGETS = (
    ('R@1', lambda m: m['r1'], 1), ('R@5', lambda m: m['r5'], 1),
    ('worst-family gap', lambda m: min(v for k, v in m.items() if k.startswith('gap_')), 1),
    ('Graph F1', lambda m: m['graph_f1'], 1), ('ROUGE-L', lambda m: m['rouge_l'], -1),
    ('round-trip cosine', lambda m: m['cosine'], 1), ('content accuracy', lambda m: m['content_accuracy'], 1),
    ('cosine at 2 px', lambda m: m['jitter_cosine'], 1),
    ('|slope - 2|', lambda m: float(np.mean([abs(a - 2) for a in m['alpha']])), -1),
    ('TV', lambda m: m['tv'], -1), ('kurtosis', lambda m: min(m['kurtosis']), 1),
    ('correlation', lambda m: m['max_correlation'], -1), ('share of the sentence', lambda m: m['share_total'], 1))


def runs(names):
    """All runs as (name, seed, phase, folder, the checkpoint that it starts from or None, command), baselines first.
    What comes before the first phase that an ablation changes is the baseline's."""
    found = []
    for name in ['baseline', *(n for n in names if n != 'baseline')]:
        for seed in range(seeds):
            before, own = None, name == 'baseline'
            for phase, script in SCRIPTS.items():
                own = own or phase in ABLATIONS[name]
                folder = Path(out_dir, (name if own else 'baseline').replace(' ', '_'), f'seed{seed}', phase)
                if own:
                    words = PRESETS[preset][phase].split()
                    steps = next((w.partition('=')[2] for w in words if w.startswith('--max_steps=')), None)
                    words += [f'--lr_steps={steps}'] * bool(steps) + ABLATIONS[name].get(phase, '').split()
                    command = [sys.executable, str(HERE / script), f'--out_dir={folder}', f'--seed={seed}',
                               '--ema_decay=0.99', '--resume=true', f'--device={device}',
                               *([f'--init_from={before}'] if before else []), *words]
                    found.append((name, seed, phase, folder, before, command))
                before = folder / 'ckpt.pt'
    return found


def finished(folder):
    return (folder / 'gate.json').is_file()


def work(todo):
    """Run what is not finished, `jobs` at a time, each as soon as the run before it has ended. Ctrl-C stops all of
    them; they save. Raises SystemExit(1), after one line, when a run fails: its log says why."""
    gpus = torch.cuda.device_count() if device in ('auto', 'cuda') else 0
    slots = list(range(jobs or gpus or 2))
    threads = max(1, (os.cpu_count() or 1) // len(slots))
    running, total = {}, len(todo)
    try:
        while todo or running:
            for slot in [slot for slot in slots if slot not in running]:
                ready = next((run for run in todo if run[4] is None or finished(run[4].parent)), None)
                if ready is None:
                    break
                todo.remove(ready)
                name, seed, phase, folder, _, command = ready
                folder.mkdir(parents=True, exist_ok=True)
                print(f'{time.strftime("%H:%M")} {name}, seed {seed}, {phase} begins; '
                      f'{len(todo)} of {total} runs wait', flush=True)
                environment = (os.environ | {'OMP_NUM_THREADS': str(threads)}
                               | ({'CUDA_VISIBLE_DEVICES': str(slot % gpus)} if gpus else {}))
                with open(folder / 'run.log', 'a', encoding='utf-8') as log:
                    running[slot] = folder, subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            for slot, (folder, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode:
                        runtime.fail(f'a run ended with status {process.returncode}; see {folder}/run.log', status=1)
            time.sleep(0.2)
    finally:                                                     # the terminal's Ctrl-C reaches the runs as well
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def metrics_of(folder):
    """The last held-out metrics of a run, as logged; a list metric stays a list."""
    last = {}
    for row in plot.read_lines(folder / 'metrics.jsonl'):
        last = {key[4:]: value for key, value in row.items() if key.startswith('val/')} or last
    return last


def collect(names):
    """{ablation: (seeds, targets) array} of the ablations of which at least one seed is finished."""
    found = {}
    for name in names:
        folders = [Path(out_dir, name.replace(' ', '_'), f'seed{seed}', 'p5') for seed in range(seeds)]
        rows = [[read(metrics_of(folder)) for _, read, _ in TARGETS] for folder in folders if finished(folder)]
        if rows:
            found[name] = np.array(rows, dtype=float)
    return found


def effects(base, other):
    """Drops of other (n, targets) below base (m, targets): in standard deviations of the baseline (positive is worse),
    and whether every seed of the one is on the same side of every seed of the other (+1 worse, -1 better, 0 neither).
    With three seeds each, chance alone separates a given metric one time in ten."""
    sign = np.array([s for *_, s in TARGETS])
    drop = sign * (base.mean(0) - other.mean(0)) / np.maximum(base.std(0, ddof=1), 1e-9)
    worse, better = (sign * base).min(0) > (sign * other).max(0), (sign * base).max(0) < (sign * other).min(0)
    return drop, worse.astype(int) - better


def table(found):
    """The ablation table as Markdown: mean ± sd, the drop in baseline sds, bold where the seeds do not overlap."""
    base = found['baseline']
    lines = [f'Target metrics of P5 on the test split, mean ± sd over n seeds. In brackets the drop in standard '
             'deviations of the baseline (n = ' + str(len(base)) + '); **bold** where every seed is worse than every '
             'seed of the baseline, *italic* where every one is better.', '',
             '| without | n | ' + ' | '.join(label for label, *_ in TARGETS) + ' | worse in |',
             '|---' * (len(TARGETS) + 3) + '|']
    for name, values in found.items():
        few = len(base) < 2 or len(values) < 2
        drop, side = ((np.zeros(len(TARGETS)), np.zeros(len(TARGETS), int)) if name == 'baseline' or few else
                      effects(base, values))
        cells = []
        for k in range(len(TARGETS)):
            spread = f' ± {values[:, k].std(ddof=1):.2g}' if len(values) > 1 else ''
            mark = {1: '**', -1: '*', 0: ''}[int(side[k])]
            cells.append(f'{mark}{values[:, k].mean():.3g}{spread}{mark}'
                         + ('' if name == 'baseline' or few else f' [{drop[k]:+.1f}]'))
        verdict = ('' if name == 'baseline' else 'n < 2' if few else
                   f'{(side > 0).sum()}' if (side > 0).any() else '0: changes nothing for the worse')
        lines.append(f'| {name} | {len(values)} | ' + ' | '.join(cells) + f' | {verdict} |')
    return '\n'.join(lines) + '\n'


def chart(found):
    """The drops as a heat map: ablations by target metrics, in standard deviations of the baseline, a dot where the
    seeds do not overlap. The colour ends at 5."""
    base, names = found['baseline'], [name for name, values in found.items() if name != 'baseline' and len(values) > 1]
    if len(base) < 2 or not names:
        return None
    both = [effects(base, found[name]) for name in names]
    drops, sides = (np.stack(part) for part in zip(*both))
    fig, axes = plot.figure(9, 1.6 + 0.28 * len(names))
    ax = axes[0, 0]
    image = ax.imshow(drops, cmap='RdBu_r', vmin=-5, vmax=5, aspect='auto')
    ax.set_yticks(range(len(names)), [f'without {name}' for name in names])
    ax.set_xticks(range(len(TARGETS)), [label for label, *_ in TARGETS], rotation=40, ha='right')
    for i, k in zip(*np.nonzero(sides)):
        ax.plot(k, i, '.', color=plot.INK)
    ax.set_title('What each piece is for')
    fig.colorbar(image, label='worse by (sd of the baseline)', extend='both')
    return plot.save(fig, Path(out_dir) / 'ablations.png')


# ---- throughput -----------------------------------------------------------------------------------------------------

def measure(size, channels, batch):
    """Sentences a second of the encoder (forward; forward and backward with the priors) and peak memory,
    in this process."""
    where = runtime.find_device(device)
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
        with torch.no_grad(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == 'cuda'):
            encoder(x)

    def backward():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == 'cuda'):
            V = encoder(x)
        priors.image_prior_loss(priors.image_prior_terms(V), weights).backward()

    rates = timed(forward), timed(backward)
    peak = (torch.cuda.max_memory_allocated() if where.type == 'cuda' else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {'size': size, 'channels': channels, 'batch': batch, 'forward': rates[0], 'backward': rates[1],
            'gigabytes': peak / 2**30}


def measure_all():
    """Each canvas and batch in a process of its own, or the peaks would add up; a batch that does not
    fit is left out."""
    rows = []
    for size, channels in ((32, 6), (48, 8)):
        for batch in (8, 32, 128, 512) if torch.cuda.is_available() else (2, 8, 32):
            code = (f'import json, p7_ablate; p7_ablate.device = {device!r}; '
                    f'print(json.dumps(p7_ablate.measure({size}, {channels}, {batch})))')
            done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
            if done.returncode:
                print(f'{size}x{size}x{channels}, batch {batch}: {done.stderr.strip().splitlines()[-1][:100]}')
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            print(f"{size}x{size}x{channels}  batch {batch:4d}  forward {row['forward']:8.1f} sentences/s  "
                  f"forward + backward {row['backward']:8.1f}  peak {row['gigabytes']:.2f} GiB", flush=True)
    best = {(row['size'], kind): max(r[kind] for r in rows if r['size'] == row['size'])
            for row in rows for kind in ('forward', 'backward')}
    if (48, 'forward') in best:
        print(f"48x48x8 over 32x32x6: forward {best[48, 'forward'] / best[32, 'forward']:.2f}, "
              f"forward + backward {best[48, 'backward'] / best[32, 'backward']:.2f} of the sentences a second")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    runtime.write_json(Path(out_dir) / 'throughput.json', rows)


def main():
    if preset not in PRESETS:
        runtime.fail(f'--preset={preset}: expects one of {", ".join(PRESETS)}')
    if throughput:
        return measure_all()
    names = [name.strip() for name in only.split(',') if name.strip()] or list(ABLATIONS)
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown or seeds < 1:
        runtime.fail(f'--only={only} --seeds={seeds}: expects at least one seed and of {", ".join(ABLATIONS)}')
    names = ['baseline', *(name for name in names if name != 'baseline')]
    todo = [run for run in runs(names) if not finished(run[3])]
    minutes = [MINUTES[preset].get(phase) for _, _, phase, *_ in todo]
    estimate = 'no estimate' if None in minutes else f'about {sum(minutes) / (jobs or 2) / 60:.1f} hours on 2 cores'
    print(f'{len(todo)} runs to do ({estimate}), {len(runs(names)) - len(todo)} finished')
    if dry_run:
        for *_, command in todo:
            print(' '.join(['python', Path(command[1]).name, *command[2:]]))
        return
    work(todo)
    found = collect(names)
    Path(out_dir, 'ablations.md').write_text(table(found), encoding='utf-8')
    chart(found)
    print(table(found))


if __name__ == '__main__':
    main()
