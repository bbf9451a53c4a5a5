"""P3 · Make the canvas survive what an image survives.

Small spatial jitter T (shifts of up to 2 px, mild blur, a small cutout) must not change what the canvas means:
L_inv pulls g(T(V(x1))) to g(V(x2)), and the throwaway decoder has to read the jittered canvas too. Contrast and priors
go on as at the end of P2.

Reads:  out/p2/ckpt.pt      Writes: out/p3/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p3_jitter.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p3_jitter.py
"""
import torch
from torch import nn

import data
import plot
import priors
import runtime
from p1_canvas import canvas_arrays, canvas_gate, encode, last_three, reading_noise, reconstruction, weights
from p2_contrast import build, confused_pairs, contrast, embed, embed_batch, evaluate, say_held_out

out_dir = 'out/p3'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p2/ckpt.pt'   # the phase before
resume = False            # go on from out_dir/ckpt.pt
seed = 0
# jitter
lambda_inv = 0.2          # the plan's beta
jitter_prob = 0.5         # each kind of jitter hits a canvas with this probability
max_shift = 2             # px, either way, both axes
blur_sigma = 0.8          # px
cutout = 6                # side of the square that is cut out, px
# what goes on from P2
lambda_nce = 1.0
temperature = 0.07
negatives = 2
anchors = True
mask_false_negatives = True
mine_pairs = True         # the scenes that z confuses at the start fill most of the batch; false is the plan
leave_out = 'count'
lambda_spectrum = 0.5
lambda_tv = 0.1
lambda_wavelet = 0.1
lambda_gradkurt = 0.05
lambda_cov = 0.05
lambda_var = 0.05
lambda_common = 1.0
lambda_lattice = 0.05
lambda_rec = 1.0          # 0 is the plan to the letter
canvas_noise = 0.3
alpha = 2.0
prior_samples = 64
rec_samples = 128
# optimisation
batch_size = 256          # scenes a step, all ranks together; each brings (1 + negatives) x 2 sentences
grad_accum = 1            # micro-steps, by gradient caching
learning_rate = 1e-4
warmup_steps = 100
max_steps = 3_000
lr_steps = 3_000
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 250
log_every = 25
device = 'auto'
dtype = 'auto'
compile = True
tensorboard = False
config = runtime.configure(globals())


def shift(V, dy, dx):
    """Move each canvas by whole pixels; the border is repeated. V (B, C, H, W), dy, dx (B,) int64."""
    B, C, H, W = V.shape
    rows = (torch.arange(H, device=V.device) - dy[:, None]).clamp(0, H - 1)           # (B, H)
    columns = (torch.arange(W, device=V.device) - dx[:, None]).clamp(0, W - 1)        # (B, W)
    V = V.gather(2, rows[:, None, :, None].expand(B, C, H, W))
    return V.gather(3, columns[:, None, None, :].expand(B, C, H, W))


def cut_out(V, top, left, side):
    """Replace a side x side square of each canvas by the canvas's own channel means. top, left (B,) int64."""
    H, W = V.shape[-2:]
    inside = lambda start, n: ((torch.arange(n, device=V.device) >= start[:, None])
                               & (torch.arange(n, device=V.device) < start[:, None] + side))
    hole = inside(top, H)[:, None, :, None] & inside(left, W)[:, None, None, :]       # (B, 1, H, W)
    return torch.where(hole, V.mean((2, 3), keepdim=True), V)


def jitter(V, u, probability, max_shift, blur_sigma, cutout):
    """T(V): u (B, 7) uniform numbers decide what happens to each canvas, so that a batch drawn once can be sliced."""
    hit = u[:, :3] < probability                                                      # shift, blur, cutout
    dy, dx = ((u[:, k] * (2 * max_shift + 1)).long() - max_shift for k in (3, 4))
    V = shift(V, dy * hit[:, 0], dx * hit[:, 0])
    V = torch.where(hit[:, 1, None, None, None], priors.gaussian_blur(V, blur_sigma), V)
    top, left = ((u[:, k] * (V.shape[-1] - cutout + 1)).long() for k in (5, 6))
    return torch.where(hit[:, 2, None, None, None], cut_out(V, top, left, cutout), V)


def robustness(encoder, readout, x, run, max_shift, blur_sigma, cutout):
    """Cosine of g(V) with g(T(V)) on held-out x (N, T): by shift from 0 px on (mean over eight directions), at
    2 px (also the worst of the eight), under blur, and under cutouts in sixteen places."""
    with torch.no_grad():
        V = encode(encoder, x, run)

        def cosine(changed):
            with run.autocast():
                return (readout(changed) * z).sum(-1).mean().item()

        with run.autocast():
            z = readout(V)
        directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        whole = torch.ones(len(V), dtype=torch.long, device=V.device)
        at = [[cosine(shift(V, whole * dy * px, whole * dx * px)) for dy, dx in directions]
              for px in range(max(4, max_shift) + 1)]
        places = torch.linspace(0, V.shape[-1] - cutout, 4).long().tolist()
        cuts = [cosine(cut_out(V, whole * top, whole * left, cutout)) for top in places for left in places]
    curve = [sum(c) / len(c) for c in at]
    return {'shift_cosine': curve, 'jitter_cosine': curve[2], 'jitter_cosine_worst': min(at[2]),
            'blur_cosine': cosine(priors.gaussian_blur(V, blur_sigma)), 'cutout_cosine': sum(cuts) / len(cuts),
            'cutout_cosine_worst': min(cuts)}


ROBUST = ('jitter_cosine', 'jitter_cosine_worst', 'blur_cosine', 'cutout_cosine', 'cutout_cosine_worst')


def shift_gate(m, beside=''):
    """What shifts of two pixels leave of z, as a row of a gate."""
    return [('cosine after shifts of 2 px', '>= 0.90', m['jitter_cosine'], m['jitter_cosine'] >= 0.9, beside)]


def gate(metrics, before, evaluations):
    """P3's criteria (DESIGN 8); before: metrics of P2's checkpoint, on the same sentences if P2 had ended."""
    drop = 100 * (before['r1'] - metrics['r1'])
    return [*shift_gate(metrics, f"before {before['jitter_cosine']:.2f}"),
            ('R@1 drop, points', '<= 2', drop, drop <= 2, f"before {before['r1']:.3f}"), *canvas_gate(evaluations)]


def main():
    data.check_families(leave_out, negatives)
    run = runtime.start('p3', config)
    previous = runtime.inherit(run, init_from, 'p2', 'python p2_contrast.py')
    arch = previous['arch']
    splits, tokenizer = data.load(arch['data'], run, previous)
    train = splits['train']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = nn.ModuleDict(build(arch)).to(run.device)
    encoder, decoder, readout = nets.values()
    runtime.load_weights(nets.eval(), previous, nets)
    cell, V_shape = arch['size'] // arch['query_grid'], (arch['channels'], arch['size'], arch['size'])
    before = {'r1': previous['metrics']['r1'],
              **robustness(encoder, readout, splits['test'].fixed(512), run, max_shift, blur_sigma, cutout)}
    pairs = (confused_pairs(lambda x: embed(encoder, readout, x, run), train, run)
             if mine_pairs and train.canonical else None)      # as in P2
    optimizer = runtime.adamw(nets, learning_rate, weight_decay)
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics = (state['step'], state['metrics']) if state else (0, {})
    evaluations = state['extra']['evaluations'] if state else []
    runtime.compile_nets(nets, run)
    stride = max(1, batch_size // prior_samples)      # the priors see the same scenes however the batch is split

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = splits['test' if last else 'val']      # as in P1
            with ema.weights():
                metrics, V = evaluate(encoder, readout, decoder if lambda_rec else None, held_out, types, concepts,
                                      run, cell)
                metrics |= robustness(encoder, readout, held_out.fixed(512), run, max_shift, blur_sigma, cutout)
                arrays = canvas_arrays(encoder, V, tokenizer, run)
            evaluations = last_three(evaluations, step, metrics)
            run.log(step, metrics, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays | {
                    'shift': torch.arange(float(len(metrics['shift_cosine']))),
                    'shift_cosine': torch.tensor(metrics['shift_cosine']),
                    'jitter_names': ['shift 2 px', 'worst shift', 'blur', 'cutout', 'worst cutout'],
                    'jitter_cosine': torch.tensor([metrics[key] for key in ROBUST]),
                    'shift_cosine_before': torch.tensor(before['shift_cosine'])})
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, metrics, arch,
                         {'evaluations': evaluations, 'tokenizer': tokenizer.state()})
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        scenes, variants, views, valid = train.contrast_batch(batch_size, seed, step, 3, negatives, leave_out, pairs)
        u = torch.rand(*views.shape, 7, generator=torch.Generator().manual_seed(1_000_003 * seed + step + data.SALT))
        mine = runtime.local_slice(run, batch_size)
        x = train.take(scenes[mine, :, None], variants[mine, :, None], views[mine])       # (n, K, views, T)
        u, scenes, variants, valid = (t.to(run.device, non_blocking=True) for t in (u[mine], scenes, variants, valid))
        meanings = train.meanings[scenes, variants]
        index, parts = torch.arange(batch_size, device=run.device)[mine], run.world * grad_accum
        each = views[0].numel()                                                           # sentences of a scene
        read = min(each, max(1, rec_samples // batch_size))                               # of which some are read
        noise = reading_noise((batch_size, read), V_shape, seed, step, run)[mine]
        terms = {}

        def forward(part):
            """(x (n, K, views, T), u (n, K, views, 7), which scenes, noise (n, read, C, H, W)) -> z (n, K, views, E),
            the losses that need no other sentence, and their terms."""
            x, u, index, noise = part
            flat = x.flatten(0, 2)
            with run.autocast():
                V = encoder(flat)
                z = readout(V)
                T_V = jitter(V, u.flatten(0, 2), jitter_prob, max_shift, blur_sigma, cutout)
                jittered = readout(T_V).unflatten(0, x.shape[:3])
                some = data.spread(index, each, read)
                noise = canvas_noise * noise.transpose(0, 1).flatten(0, 1)
                rec = (reconstruction(decoder, T_V[some] + noise, None, flat[some]) if lambda_rec else
                       V.new_zeros(()))
            z = z.unflatten(0, x.shape[:3])
            inv = (jittered[:, :, 0] - z[:, :, 1]).square().sum(-1).mean()            # |g(T(V(x1))) - g(V(x2))|^2
            found = priors.image_prior_terms(priors.seen(V[some], stride, prior_samples // parts), alpha, cell)
            local = priors.image_prior_loss(found, weights(config)) + lambda_rec * rec + lambda_inv * inv
            return z, local, found | {'rec': rec, 'inv': inv}

        def loss_of_all(z):
            Z = runtime.gather(z, run)
            terms['nce'] = contrast(Z, meanings, valid, 3, temperature, anchors, mask_false_negatives, mine)
            return lambda_nce * terms['nce']

        loss, local_terms = runtime.contrastive_backward(
            forward, lambda part: embed_batch(encoder, readout, part, run), (x, u, index, noise), grad_accum,
            loss_of_all)
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values = {'loss': loss, 'grad_norm': grad_norm, 'lr': lr} | terms | local_terms
        run.watch(step, values)
        if step % log_every == 0:
            run.log(step, values, prefix='train')

    with ema.weights():
        say_held_out(encoder, readout, splits, run)
    runtime.write_gate(run, gate(metrics, before, evaluations))


if __name__ == '__main__':
    main()
