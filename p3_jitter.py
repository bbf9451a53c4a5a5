"""P3 · Make the canvas survive what an image survives.

Small spatial jitter T (shifts of up to 2 px, mild blur, a small cutout) must not change what the canvas means:
L_inv pulls g(T(V(x1))) to g(V(x2)), and the auxiliary decoder has to read the jittered canvas too. Contrast and priors
go on as at the end of P2.

Reads:  out/p2/ckpt.pt      Writes: out/p3/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p3_jitter.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p3_jitter.py
"""
import torch

import data
import plot
import priors
import runtime
from metrics import (READ, canvas_arrays, canvas_gate, evaluate_meaning, held_out_table, last_evaluations, robustness,
                     shift_gate)
from model import build, embed_views, sizes
from p1_canvas import image_loss, reconstruction
from p2_contrast import contrast, mine_pairs

out_dir = 'out/p3'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p2/ckpt.pt'   # the phase before; every setting that is not here comes from it
resume = False            # go on from out_dir/ckpt.pt
# jitter
lambda_inv = 0.2          # the plan's beta
jitter_prob = 0.5         # 0 to 1: each kind of jitter hits a canvas with this probability
max_shift = 2             # >= 0: px, either way, both axes
blur_sigma = 0.8          # px
cutout = 6                # >= 0: side of the square that is cut out, px
mine_at_start = True      # the scenes that z confuses at the start fill most of the batch; false is the plan
# optimisation
learning_rate = 1e-4
warmup_steps = 100
max_steps = 3_000
lr_steps = 3_000
eval_every = 250
config = runtime.configure(globals(), after='p2')


def jitter(V, u, config):
    """T(V): u (B, 7) uniform numbers decide what happens to each canvas, so that a batch drawn once can be sliced."""
    hit = u[:, :3] < config.jitter_prob                                               # shift, blur, cutout
    dy, dx = ((u[:, k] * (2 * config.max_shift + 1)).long() - config.max_shift for k in (3, 4))
    V = priors.shift(V, dy * hit[:, 0], dx * hit[:, 0])
    V = torch.where(hit[:, 1, None, None, None], priors.gaussian_blur(V, config.blur_sigma), V)
    top, left = ((u[:, k] * (V.shape[-1] - config.cutout + 1)).long() for k in (5, 6))
    return torch.where(hit[:, 2, None, None, None], priors.cut_out(V, top, left, config.cutout), V)


def invariance(z_jittered, z):
    """L_inv = |g(T(V(x1))) - g(V(x2))|^2 over paraphrases x1, x2: the first two views of z (n, K, views, E)."""
    return (z_jittered[:, :, 0] - z[:, :, 1]).square().sum(-1).mean()


ROBUST = ('jitter_cosine', 'jitter_cosine_worst', 'blur_cosine', 'cutout_cosine', 'cutout_cosine_worst')


def robustness_arrays(metrics, before):
    """What the figure of jitter is drawn from: robustness() now and before P3."""
    return {'shift': torch.arange(float(len(metrics['shift_cosine']))),
            'shift_cosine': torch.tensor(metrics['shift_cosine']),
            'jitter_names': ['shift 2 px', 'worst shift', 'blur', 'cutout', 'worst cutout'],
            'jitter_cosine': torch.tensor([metrics[name] for name in ROBUST]),
            'shift_cosine_before': torch.tensor(before['shift_cosine'])}


def gate(metrics, before, evaluations):
    """P3's criteria (docs/PLAN.md); before: metrics of P2's checkpoint, on the same sentences if P2 had ended."""
    drop = 100 * (before['r1'] - metrics['r1'])
    return [*shift_gate(metrics, f"before {before['jitter_cosine']:.2f}"),
            ('R@1 drop, points', '<= 2', drop, drop <= 2, f"before {before['r1']:.3f}"), *canvas_gate(evaluations)]


def main():
    run = runtime.start('p3', config, sizes(config))
    previous = runtime.inherit(run)
    text = data.load(config, run, previous)
    train = text.splits['train']
    nets = build(config, 'encoder', 'auxiliary', 'readout').to(run.device)
    runtime.load_weights(nets.eval(), previous, nets)
    before = previous['metrics'] | robustness(nets, text.splits['test'].fixed(READ), config, run.autocast)
    pairs = mine_pairs(nets, train, run) if mine_at_start else None
    optimizer = runtime.adamw(nets, learning_rate, config.weight_decay)
    ema = runtime.EMA(nets, config.ema_decay)
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state()}
    start = runtime.resume(run, nets, optimizer, ema, state)
    runtime.compile_nets(nets, run)
    batch_size, parts = config.batch_size, run.world * config.grad_accum
    stride = max(1, batch_size // config.prior_samples)      # the priors see the same scenes however the batch is split

    def embed_part(part):
        """z of a part of a batch: the first thing that forward() does, for gradient caching."""
        with run.autocast():
            return embed_views(nets, part.x)

    def forward(part):
        """A part of a batch -> z (n, K, views, E), the losses that need no other sentence, and their terms."""
        x, noise = part.x.flatten(0, 2), part.draws['noise']                          # (n*K*views, T), (n, read, ...)
        read = data.spread(part.index, len(x) // len(part.x), noise.shape[1])
        with run.autocast():
            V = nets.encoder(x)
            z = nets.readout(V)
            T_V = jitter(V, part.draws['jitter'].flatten(0, 2), config)
            z_jittered = nets.readout(T_V)
            rec = (reconstruction(nets.auxiliary, T_V[read] + config.canvas_noise * noise.transpose(0, 1).flatten(0, 1),
                                  None, x[read]) if config.lambda_rec else V.new_zeros(()))
        z, z_jittered = (e.unflatten(0, part.x.shape[:3]) for e in (z, z_jittered))
        inv = invariance(z_jittered, z)
        image, terms = image_loss(priors.seen(V[read], stride, config.prior_samples // parts), config)
        loss = image + config.lambda_rec * rec + lambda_inv * inv
        return z, loss, terms | {'rec': rec, 'inv': inv}

    def loss_of_all(z, batch):
        """z of this rank's scenes -> the loss that compares all sentences of the batch, and its terms."""
        nce = contrast(runtime.gather(z, run), batch, config)
        return config.lambda_nce * nce, {'nce': nce}

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = text.splits['test' if last else 'val']      # as in P1
            with ema.weights():
                metrics, V = evaluate_meaning(nets, held_out, text, config, run.autocast)
                metrics |= robustness(nets, held_out.fixed(READ), config, run.autocast)
                arrays = canvas_arrays(nets.encoder, V, text, run.autocast)
            state['metrics'] = metrics
            run.log(step, metrics, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays | robustness_arrays(metrics, before))
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        batch = train.contrast_batch(config, run, step, pairs=pairs)
        K, views = batch.x.shape[1:3]
        read = min(K * views, max(1, config.rec_samples // batch_size))               # sentences of a scene
        batch = batch.with_draws(
            jitter=torch.rand(batch_size, K, views, 7, generator=run.generator(step, 'jitter')),
            noise=torch.randn(batch_size, read, config.channels, config.size, config.size, device=run.device,
                              generator=run.generator(step, 'noise', run.device)))
        loss, terms = runtime.contrastive_backward(forward, embed_part, loss_of_all, batch, config.grad_accum)
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values = {'loss': loss, 'grad_norm': grad_norm, 'lr': lr} | terms
        run.watch(step, values)
        if step % config.log_every == 0:
            run.log(step, values, prefix='train')

    with ema.weights():
        run.say(held_out_table(nets, text.splits, run.autocast))
    runtime.write_gate(run, gate(state['metrics'], before, last_evaluations(run.dir)))


if __name__ == '__main__':
    main()
