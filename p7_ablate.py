"""P7 · Take the pieces away, one at a time.

An ablation is a set of overrides of the phase scripts, so each is run as an ordinary command line. It branches off the
baseline of its seed at the first phase that it changes; an unfinished run goes on, a finished one is repeated only if
its checkpoint is gone and something still starts from it. The table says for every target metric how far it drops, in
standard deviations of the baseline, and whether every seed without the piece is worse than every seed with it, by more
than what counts as a difference. A piece whose removal shows nowhere is its most useful line. `--only=slopes` asks
whether 1/f^2 is the right target of the spectrum, in a table of its own.

Cost: on 2 CPU cores three seeds of the plan's pieces take one night (eight hours), one seed of two pieces that only P5
has (`--seeds=1 --only='copy suppression,round trip'`) twenty minutes; stop it any time (Ctrl-C) and start the same
command again.

Reads:  nothing (it runs P1 to P5, for slopes also P6)
Writes: out/p7/<preset>/<ablation>/seed<k>/p1 ... p6, out/p7/ablations.md, ablations.json, ablations.png,
        ablation_canvases.png, slopes.md, gate.json
    python p7_ablate.py --dry_run=true
    python p7_ablate.py --seeds=3
"""
import itertools
import json
import math
import re
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import p6_diffusion
import plot
import runtime
from runs.presets import PRESETS
from tools import launch
from tools.launch import MINUTES, SCRIPTS, Run, diverged, ended, own_settings, settings, sources_of, to_do

out_dir = 'out/p7'        # the runs, the table and the figure
seeds = 3                 # runs of each ablation, seeds 0, 1, ...
only = 'plan'             # plan: its pieces, masking and readout; ours: what departs from it; slopes: other target
                          # slopes; all; or names separated by commas. The baseline is always there.
preset = 'cpu'            # cpu: a small model; gpu: the plan's, fewer steps; smoke: two steps, for tests (the ablation
                          # sizes of runs/presets.py). The table and the figures are of the one that ran last
jobs = 0                  # runs at the same time; 0: one a GPU, or two on a CPU (a thread each beats two threads)
dry_run = False           # list the commands and the estimated time, run nothing
draw_only = False         # draw the tables and the figure of what has ended, run nothing
device = 'auto'
config = runtime.configure(globals())

HERE = Path(__file__).parent
# {name: {phase: words}}: what is switched off, in the first phase that has it; later phases take that over.
ABLATIONS = {
    'baseline': {},
    **{name: {'p1': f'--lambda_{name}=0'} for name in ('spectrum', 'tv', 'wavelet', 'gradkurt', 'cov', 'var')},
    # nothing ends a stage without a contrast, and an untrained z finds no pairs
    'InfoNCE': {'p2': '--lambda_nce=0 --staged=false --mine_every=0', 'p3': '--mine_at_start=false'},
    'round trip': {'p5': '--lambda_cycle=0'},
    'copy suppression': {'p5': '--lambda_copy=0'},
    'jitter': {'p3': '--lambda_inv=0 --jitter_prob=0'},
    # nor without counterfactuals: compared with 'stages (ours)', which has none either
    'counterfactual negatives': {'p2': '--negatives=0 --staged=false'},
    'masking of false negatives': {'p2': '--mask_false_negatives=false'},
    'pyramid readout': {'p2': '--pyramid=false'},
    # what is ours and not the plan's. Without stages z is asked from step 250 on which scenes it confuses, with them
    # from some 750 on, and knows less then; without var what holds the size of a canvas goes, which common can grow.
    'stages (ours)': {'p2': '--staged=false'},
    'stages and mined pairs (ours)': {'p2': '--staged=false --mine_every=0', 'p3': '--mine_at_start=false'},
    'var and common (ours)': {'p1': '--lambda_var=0 --lambda_common=0'},
    'all hard negatives (ours)': {'p2': '--negatives=0 --staged=false --mine_every=0', 'p3': '--mine_at_start=false'},
    # nothing to wait for: the priors are there from step 0
    'reading (ours)': {'p1': '--lambda_rec=0'},
    'common (ours)': {'p1': '--lambda_common=0'},
    'lattice (ours)': dict.fromkeys(('p1', 'p3', 'p5'), '--lambda_lattice=0'),      # P3 and P5 set it themselves
    'mined pairs (ours)': {'p2': '--mine_every=0', 'p3': '--mine_at_start=false'},
    'anchors (ours)': {'p2': '--anchors=false'},
    'paraphrase training (ours)': {'p4': '--paraphrase_share=0'}}
AGAINST = {'counterfactual negatives': 'stages (ours)'}     # what a row is compared with, if not with the baseline
SLOPES = {f'slope {alpha}': alpha for alpha in (1.2, 1.6, 2.4)}               # the baseline's is 2
PLAN = [name for name in ABLATIONS if name != 'baseline' and '(ours)' not in name]
ABLATIONS |= {name: {'p1': f'--alpha={alpha}'} for name, alpha in SLOPES.items()}
GROUPS = {'all': list(ABLATIONS), 'ours': [name for name in ABLATIONS if '(ours)' in name], 'slopes': list(SLOPES),
          'plan': PLAN}

# Target metrics: label, how to read it from the metrics of a P5 checkpoint; +1: more is better, -1: less is, 0: shown
# only; a difference that is too small to matter. A canvas of less contrast has less total variation, so that is read at
# unit variance. (The wavelet prior of trained canvases and of Gaussian fields, 0.78 and 0.80, differ by less than its
# resolution, as it turned out: that column cannot react.)
TARGETS = (
    ('R@1', lambda m: m['r1'], 1, 0.002), ('R@5', lambda m: m['r5'], 1, 0.002),
    ('R@1 with own counterfactuals', lambda m: m['r1_hard'], 1, 0.002),
    ('worst-family gap', lambda m: min(v for k, v in m.items() if k.startswith('gap_')), 1, 0.005),
    ('Graph F1', lambda m: m['graph_f1'], 1, 0.005), ('Graph F1, one sample', lambda m: m['graph_f1_one'], 1, 0.005),
    ('ROUGE-L', lambda m: m['rouge_l'], -1, 0.005), ('round-trip cosine', lambda m: m['cosine'], 1, 0.005),
    ('content accuracy', lambda m: m['content_accuracy'], 1, 0.002),
    ('cosine at 2 px', lambda m: m['jitter_cosine'], 1, 0.005), ('slope', lambda m: np.mean(m['alpha']), 0, 0.02),
    ('|slope - 2|', lambda m: np.mean([abs(a - 2) for a in m['alpha']]), -1, 0.02),
    ('TV', lambda m: m['tv_normalised'], -1, 0.02), ('wavelet prior', lambda m: m['prior_wavelet'], -1, 0.02),
    ('kurtosis', lambda m: min(m['kurtosis']), 0, 0.1),
    ('kurtosis below 6', lambda m: max(0, 6 - min(m['kurtosis'])), -1, 0.1),
    ('correlation', lambda m: m['max_correlation'], -1, 0.02), ('lattice', lambda m: m['lattice'], -1, 0.05),
    ('share of the sentence', lambda m: m['share_total'], 1, 0.005))


def home(name, seed):
    """The folder of an ablation's chain."""
    return Path(out_dir, preset, re.sub(r'\W+', '_', name).strip('_'), f'seed{seed}')


def words_of(name, phase):
    """The words that make a phase of an ablation what it is; as many sentences a step without counterfactuals as with
    them."""
    words, changes = PRESETS[f'ablation_{preset}'.removesuffix('_cpu')][phase], ABLATIONS[name].get(phase, '')
    if '--negatives=0' in ABLATIONS[name].get('p2', ''):
        usual = settings(*((p, tuple(words_of('baseline', p).split())) for p in SCRIPTS if p <= phase))
        contrasts = phase in ('p2', 'p3', 'p5')
        changes += f" --batch_size={usual.batch_size * (1 + usual.negatives if contrasts else 1)}"
    return f'{words} {changes}'


def runs(names, of_seeds=None):
    """All runs of these ablations, baselines first, of the seeds asked for or of these. What comes before the first
    phase that an ablation changes is the baseline's and stands there only."""
    listed, prior = [], not SLOPES.keys().isdisjoint(names)     # slopes are also judged by P6's U-Net
    for name in ['baseline', *(n for n in names if n != 'baseline')]:
        for seed in range(seeds) if of_seeds is None else of_seeds:
            before, branched, chain = None, name == 'baseline', []
            for phase, script in SCRIPTS.items():
                if phase == 'p6' and not (prior and name in ('baseline', *SLOPES)):
                    continue
                branched = branched or phase in ABLATIONS[name]
                words = words_of(name if branched else 'baseline', phase).split()
                words += [f'--seed={seed}', '--ema_decay=0.99'] if phase == 'p1' else []
                folder = home(name if branched else 'baseline', seed) / phase
                chain.append((phase, tuple(words)))
                if branched:
                    origin = [f'--init_from={before}'] if before else []
                    listed.append(Run(name, seed, phase, folder, before, [
                        sys.executable, str(HERE / script), f'--out_dir={folder}', *origin, '--resume=true',
                        f'--device={device}', *words], settings(*chain)))
                before = folder / 'ckpt.pt'
    return listed


def metrics_of(folder):
    """The last held-out metrics of a run, as logged; a list metric stays a list."""
    last = {}
    for row in plot.read_lines(folder / 'metrics.jsonl'):
        last = {key[4:]: value for key, value in row.items() if key.startswith('val/')} or last
    return last


def values_of(metrics, columns):
    """The columns (label, function of the metrics, ...) of a run as floats; what was not finite (null in the log) is
    nan."""
    values = []
    for _, read, *_ in columns:
        try:
            values.append(float(read(metrics)))
        except TypeError:                                    # a null, or a list with one
            values.append(math.nan)
    return values


def seeds_there():
    """The seeds of which anything has been run."""
    return sorted({int(path.name[4:]) for path in Path(out_dir, preset).glob('*/seed*')})


def made_by(sources):
    """A line under a table: which runs it is made of; nothing under an empty one."""
    if not sources:
        return ''
    made = '; '.join(f'{commit} on {hardware}' for commit, hardware in sorted(sources))
    several = ' **The runs are of several commits, machines or dtypes.**' if len(sources) > 1 else ''
    return f'\nPreset `{preset}`, made by {made}.{several}\n'


def collect():
    """({ablation: (seeds, targets) array}, {ablation: [metrics of a run, ...]}, sources) of all runs that are there,
    whatever was asked for; a chain that diverged is nan in the array and has no metrics. sources: {(commit, hardware
    and dtype)}. Left out, and named: what has other settings, and seeds whose baseline has not ended well."""
    found, logged, sources = {'baseline': {}}, {}, set()
    for name in (name for name in ABLATIONS if name not in SLOPES):
        for seed in seeds_there():
            chain = [run for run in runs([name], [seed]) if run.name == name]
            done = ended(chain[-1])
            if not (done or any(map(diverged, chain))):
                continue
            if not all(map(own_settings, chain)) or not (done if name == 'baseline' else seed in found['baseline']):
                print(f'note: {name}, seed {seed} is not in the table: other settings, or its baseline is not')
                continue
            found.setdefault(name, {})[seed] = [math.nan] * len(TARGETS)
            if done:
                logged.setdefault(name, []).append(metrics_of(chain[-1].folder))
                found[name][seed] = values_of(logged[name][-1], TARGETS)
            sources |= sources_of(chain)
    return {name: np.array(list(rows.values())) for name, rows in found.items() if rows}, logged, sources


SIGN, RESOLUTION = (np.array(column) for column in list(zip(*TARGETS))[2:])
ALPHA = 0.05              # of the permutation test: with three seeds each it takes the most extreme labelling of 20


def base_of(name, found):
    """What an ablation is compared with, (n, targets): the baseline or, if its removal takes another piece along, what
    lacks that alone; no rows if that has not been run."""
    return found.get(AGAINST.get(name, 'baseline'), found['baseline'][:0])


def effects(base, other):
    """Drops of other (n, targets) below base (m, targets): in standard deviations of the baseline (positive is worse;
    the sd is at least the metric's resolution), and whether the seeds lie apart by more than the resolution (+1 all
    worse, -1 all better, 0 neither). nan is worse than anything, and in the baseline nothing to compare with."""
    drop = SIGN * (base.mean(0) - other.mean(0)) / np.maximum(base.std(0, ddof=1), RESOLUTION)
    ours, theirs = (np.where(np.isnan(values), -np.inf, SIGN * values) for values in (base, other))
    side = (ours.min(0) > theirs.max(0) + RESOLUTION).astype(int) - (ours.max(0) + RESOLUTION < theirs.min(0))
    nothing = (SIGN == 0) | np.isnan(base).any(0)
    return np.where(nothing, 0, np.nan_to_num(drop, nan=np.inf)), np.where(nothing, 0, side)


def p_value(base, other):
    """Permutation test of "some target metric is worse by more than its resolution": other is first brought nearer by
    that much; then the share of all labellings of the same runs whose largest t statistic (pooled sd, at least the
    resolution) is at least this labelling's. The maximum over the metrics allows for there being many of them (max-T,
    Westfall & Young 1993). Runs of one seed share what comes before the branch, and of that the test makes nothing: it
    misses what is small. nan is 10 worse than anything."""
    scores, (m, n) = SIGN * np.concatenate([base, other + SIGN * RESOLUTION]), (len(base), len(other))
    worst = np.min(scores, 0, where=~np.isnan(scores), initial=1e3) - 10 * np.abs(SIGN)
    scores = np.where(np.isnan(scores), worst, scores)
    largest = []
    for chosen in itertools.combinations(range(m + n), n):
        ablated = np.isin(range(m + n), chosen)
        ours, theirs = scores[~ablated], scores[ablated]
        variance = ((m - 1) * ours.var(0, ddof=1) + (n - 1) * theirs.var(0, ddof=1)) / (m + n - 2)
        error = np.sqrt(np.maximum(variance, RESOLUTION ** 2) * (1 / m + 1 / n))
        largest.append(((ours.mean(0) - theirs.mean(0)) / error).max())
    return float(np.mean(np.array(largest) >= largest[-1] - 1e-9))                 # the last labelling is the true one


def mean_sd(column):
    """mean ± sd of the values of a column that are finite."""
    kept = column[np.isfinite(column)]
    spread = f' ± {kept.std(ddof=1):.2g}' if len(kept) > 1 else ''
    return f'{kept.mean():.3g}{spread}' if len(kept) else '–'


LEGEND = ('Target metrics of P5 on the test split, mean ± sd over n seeds; in brackets how much worse, in standard '
          'deviations of the baseline (n = {m}; where that is less than the resolution of the metric, the smallest '
          'difference that counts, in units of it). **Bold**: every seed is worse than every seed of the baseline, beyond '
          'that resolution (by chance {chance:.2g} of {directed} metrics if n is {m}, more if it is less); *italic*: every '
          'one is better. p: permutation test of "some metric is worse", of which at most one row in twenty has 0.05 by '
          'chance; what it does not find may still be there. Each prior but var has a statistic of its own here, which '
          'must react first: |slope - 2|, TV, wavelet prior (which cannot: a Gaussian field is nearer than its '
          'resolution), kurtosis, correlation. Where z collapses its cosines rise, and a canvas without variance has '
          'little TV: read them beside R@1. '
          + ' '.join(f'{name} is compared with {other}, which it implies.' for name, other in AGAINST.items()))


def table(found, sources):
    """The ablation table as Markdown: mean ± sd, the drop in baseline sds, bold where the seeds lie apart."""
    m, directed = len(found['baseline']), int(np.abs(SIGN).sum())
    lines = [LEGEND.format(m=m, directed=directed, chance=directed / math.comb(2 * m, m)), '',
             '| without | n | ' + ' | '.join(label.replace('|', '\\|') for label, *_ in TARGETS) + ' | worse in | p |',
             '|---' * (len(TARGETS) + 4) + '|']
    for name, values in found.items():
        base, n = base_of(name, found), len(values)
        compared = name != 'baseline' and min(len(base), n) > 1
        lost = int(np.isnan(values).all(1).sum())
        drop, side = effects(base, values) if compared else (np.zeros(len(TARGETS)), np.zeros(len(TARGETS), int))
        cells = [f'{n}, {lost} diverged' if lost else n]
        for k, column in enumerate(values.T):
            mark = {1: '**', -1: '*', 0: ''}[int(side[k])]
            cells.append(f'{mark}{mean_sd(column)}{mark}'
                         + (f' [{np.clip(drop[k], -99, 99):+.1f}]' if compared and SIGN[k] else ''))
        if compared:
            cells += [(side > 0).sum(), f'{p_value(base, values):.2f}']
        else:
            few = 'n < 2' + (f' of {AGAINST[name]}' if name in AGAINST and n > 1 else '')
            cells += ['' if name == 'baseline' else few, '']
        lines.append(f'| {name} | ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n' + made_by(sources)


SLOPE_COLUMNS = (
    ('slope reached', lambda m: np.mean(m['alpha'])),
    ('diffusion loss', lambda m: np.mean([m[f'diffusion_{q}'] for q in p6_diffusion.QUARTERS])),
    ('over a Wiener filter\'s, mean of the quarters of t',
     lambda m: np.mean([m[f'diffusion_{q}'] / m[f'wiener_{q}'] for q in p6_diffusion.QUARTERS])),
    ('drawn canvases that parse', lambda m: m['drawn_parsed']),
    ('random phases that parse', lambda m: m['phases_parsed']),
    ('R@1', lambda m: m['r1']), ('R@1 with own counterfactuals', lambda m: m['r1_hard']),
    ('worst-family gap', lambda m: min(v for k, v in m.items() if k.startswith('gap_'))),
    ('content accuracy', lambda m: m['content_accuracy']),
    ('cross-entropy of content tokens', lambda m: m['ce_content']), ('Graph F1', lambda m: m['graph_f1']))


def slopes_table():
    """Markdown: a row a target slope, mean ± sd over the seeds that have ended. A steeper spectrum is easier to denoise
    whatever is painted: read the diffusion loss beside that of the Wiener filter, which knows the spectrum alone."""
    lines = ['| target slope | n | ' + ' | '.join(label for label, _ in SLOPE_COLUMNS) + ' |',
             '|---' * (len(SLOPE_COLUMNS) + 2) + '|']
    queue, sources = runs(list(SLOPES), seeds_there()), set()
    for name, target in sorted([('baseline', 2.0), *SLOPES.items()], key=lambda pair: pair[1]):
        chains = [[run for run in queue if (run.name, run.seed) == (name, seed)] for seed in seeds_there()]
        done = [chain for chain in chains if ended(chain[-1]) and all(map(own_settings, chain))]
        values = np.array([values_of(metrics_of(chain[-1].folder), SLOPE_COLUMNS) for chain in done])
        if done:
            lines.append(f'| {target} | {len(done)} | ' + ' | '.join(map(mean_sd, values.T)) + ' |')
            sources = sources.union(*map(sources_of, done))
    return '\n'.join(lines) + '\n' + made_by(sources)


def gate(found):
    """P7's criterion (the plan's): dropping a piece makes at least one target metric worse, measurably. A row each that
    has three seeds, as what it is compared with, and one that says whether all have."""
    rows = []
    for name in PLAN:
        base, values = base_of(name, found), found.get(name, [])
        if min(len(base), len(values)) < 3:
            continue
        drop, side = effects(base, values)
        worse = [TARGETS[k][0] for k in np.argsort(-drop) if side[k] > 0]
        p = p_value(base, values)
        rows.append((f'without {name}: some target metric is worse', f'p <= {ALPHA}', p, p <= ALPHA,
                     'every seed worse in ' + (', '.join(worse[:4]) or 'none')))
    return [('pieces with three seeds', f'>= {len(PLAN)}', len(rows), len(rows) >= len(PLAN)), *rows]


def charts(found, logged):
    """The heat map of the drops, of all ablations of two seeds and more, and the statistics of the canvases: what they
    are drawn from is written down first, so that plot.py draws them without the runs."""
    names = [name for name, v in found.items() if name != 'baseline' and min(len(v), len(base_of(name, found))) > 1]
    directed = np.flatnonzero(SIGN)
    parts = [effects(base_of(name, found), found[name]) for name in names]
    statistics = 'alpha', 'kurtosis', 'tv_normalised', 'correlation'
    runtime.write_text(Path(out_dir, 'ablations.json'), json.dumps({
        'names': names, 'targets': [TARGETS[k][0] for k in directed],
        'drops': [np.clip(drop[directed], -99, 99).tolist() for drop, _ in parts],
        'sides': [side[directed].tolist() for _, side in parts],
        'canvases': {name: [{key: m[key] for key in statistics} for m in runs] for name, runs in logged.items()}}))
    plot.ablations(Path(out_dir))


def main():
    if preset not in ('cpu', 'gpu', 'smoke') or min(seeds, jobs + 1) < 1:
        runtime.fail(f'--preset={preset} --seeds={seeds} --jobs={jobs}: expects cpu, gpu or smoke, at least one seed, '
                     'and jobs that are not negative')
    names = list(GROUPS.get(only) or [name.strip() for name in only.split(',')])
    if not set(names) <= set(ABLATIONS):
        runtime.fail(f'--only={only}: expects {", ".join(GROUPS)} or some of {", ".join(ABLATIONS)}')
    names += [AGAINST[name] for name in names if name in AGAINST and AGAINST[name] not in names]
    failed, stopped = [], False
    if dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)        # `| head` is no error
    if not draw_only:
        lock, gpus = None if dry_run else launch.only_driver(out_dir), launch.visible_gpus(device)
        chain, slots = runs(names), jobs or len(gpus) or 2
        queue, lost = to_do(chain), [run for run in chain if diverged(run)]
        hours = max(sum(MINUTES[run.phase] for run in queue) / slots, launch.longest(queue, MINUTES)) / 60
        print(f'{len(queue)} runs to do, {slots} at a time' + f', about {hours:.1f} hours' * (preset == 'cpu')
              + f'; {len(chain) - len(queue)} have ended or are not needed'
              + ''.join(f'\n{run.name}, seed {run.seed} diverged in {run.phase} (a finding; delete '
                        f'{run.folder}/diverged.txt to try again)' for run in lost))
        if dry_run:
            for run in queue:
                print(shlex.join(['python', Path(run.command[1]).name, *run.command[2:]]))
            return
        try:
            failed = launch.work(queue, slots, gpus, lock)
        except KeyboardInterrupt:
            stopped = True
    found, logged, sources = collect()
    if 'baseline' in found:
        text = table(found, sources)
        runtime.write_text(Path(out_dir, 'ablations.md'), text)
        charts(found, logged)
        print(text)
        runtime.write_gate(SimpleNamespace(master=True, dir=Path(out_dir), phase='p7', say=print), gate(found))
    elif draw_only:
        runtime.fail(f'{Path(out_dir, preset)} holds no baseline that has ended: nothing to draw')
    if not SLOPES.keys().isdisjoint(names):
        text = slopes_table()
        runtime.write_text(Path(out_dir, 'slopes.md'), text)
        print(text)
    if failed:
        runtime.fail(f'{len(failed)} runs failed or wait for one that did: '
                     + ', '.join(sorted({f'{run.name} (seed {run.seed})' for run in failed})), status=1)
    if stopped:
        runtime.fail('stopped; the same command goes on from here', status=130)


if __name__ == '__main__':
    main()
