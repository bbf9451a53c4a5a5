"""P6 · Sharpen the canvases with a diffusion prior learnt from themselves.

A small U-Net learns to take the noise off canvases that the encoder itself has painted (a replay buffer, so no image is
ever seen). Then the encoder goes on with all losses of P5 and one more: each canvas is noised a little, denoised in one
DDIM step, and pulled to the result (L_prior; no gradient passes through the U-Net). Whether that helps is asked of a
control: the same steps on the same batches with lambda_prior=0. `python -m tools.report` shows all three side by side.

Reads:  out/p5/ckpt.pt, the control's
Writes: out/p6/ckpt.pt, run.json, metrics.jsonl, gate.json (not the control), samples.jsonl, plots/
    python p6_diffusion.py --lambda_prior=0 --out_dir=out/p6_control
    python p6_diffusion.py --control=out/p6_control
    torchrun --standalone --nproc_per_node=2 p6_diffusion.py
"""
import json
import math
from functools import partial

import torch

import data
import p5_roundtrip
import plot
import priors
import runtime
from grammar import meaning, parse
from metrics import (READ, attention_arrays, canvas_arrays, canvas_metrics, encode, free_run, held_out_table,
                     last_evaluations)
from model import build, embed_views, sizes
from p2_contrast import contrast, mine_pairs
from p5_roundtrip import draw_batch, local_losses

out_dir = 'out/p6'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p5/ckpt.pt'   # the phase before; every setting that is not here comes from it
control = ''              # run folder of the same steps with lambda_prior=0; '' leaves the comparison out of the gate
resume = False            # go on from out_dir/ckpt.pt
# the diffusion prior
unet_dim = 48             # channels of the U-Net at 32x32; 48 makes 2.5M parameters
unet_steps = 5_000        # steps of the U-Net alone, before the encoder moves
unet_batch = 128          # >= 1: canvases a step, all ranks together
unet_learning_rate = 5e-4
min_snr = 5.0             # gamma of the min-SNR weights (Hang et al. 2023); 0: every t weighs the same
buffer_size = 8192        # canvases in the replay buffer
refresh = 32              # new canvases a joint step (all ranks) that replace the oldest in the buffer
# the encoder under it
lambda_prior = 0.1        # the plan's xi: |V - DDIM_step(V_t)|^2 a pixel, V in units of the first canvases' standard
                          # deviations; 0 is the control
t_low = 0.05              # t of V_t is uniform between these; 0 is no noise, 1 nothing but noise
t_high = 0.3
prior_rows = 64           # >= 1: canvases a step (all ranks) that it sees, of different scenes
# sampling
sample_steps = 50         # >= 1: DDIM steps from noise to a canvas
eta = 0.0                 # 0: deterministic DDIM; 1: as noisy as DDPM
drawn = 256               # >= 1: canvases drawn at an evaluation
# optimisation
learning_rate = 1e-4      # >= 0: of the decoder; encoder and readout learn at encoder_scale of it
warmup_steps = 100        # >= 0: of the U-Net, and again of the encoder when it begins to move
max_steps = 7_000         # >= 0: those of the U-Net alone and those of all nets together
lr_steps = 7_000
eval_every = 1000
config = runtime.configure(globals(), after='p5')


def alpha_bar(t):
    """The cosine schedule (Nichol & Dhariwal 2021): the share of V_t's variance that is signal,
    t in [0, 1] any shape."""
    def f(t):
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (f(t) / f(torch.zeros_like(t))).clamp(1e-5, 1 - 1e-5)


def q_sample(V, t, noise):
    """V_t = sqrt(a) V + sqrt(1 - a) noise, with a = alpha_bar(t); V (B, C, H, W), t (B,)."""
    a = alpha_bar(t)[:, None, None, None]
    return a.sqrt() * V + (1 - a).sqrt() * noise


def predict_x0(V_t, eps, t):
    """The canvas that V_t came from if `eps` is its noise: one DDIM step to t = 0 (Song et al. 2021, eq. 12)."""
    a = alpha_bar(t)[:, None, None, None]
    return (V_t - (1 - a).sqrt() * eps) / a.sqrt()


def predict_eps(unet, V_t, t):
    """The noise in V_t as the net sees it, whose output is the velocity sqrt(a) noise - sqrt(1 - a) V (Salimans & Ho
    2022): it corrects sqrt(1 - a) V_t, the best linear guess for white canvases. Near t = 1 that is nearly all."""
    a = alpha_bar(t)[:, None, None, None]
    return (1 - a).sqrt() * V_t + a.sqrt() * unet(V_t, t)


def diffusion_loss(predict, V, t, noise, min_snr=0.0):
    """Squared error of the predicted noise, mean over pixels, min(SNR, gamma) / SNR weighted over canvases. Without
    that weight a guess of no noise has 1."""
    error = (predict(q_sample(V, t, noise), t) - noise).square().mean((1, 2, 3))
    a = alpha_bar(t)
    snr = a / (1 - a)
    return (error * (min_snr / snr).clamp(max=1.0)).mean() if min_snr else error.mean()


def prior_loss(predict, V, t, noise):
    """|V - DDIM_step(V_t)|^2 a pixel; nothing flows through `predict`, so its gradient in V is that of score
    distillation (Poole et al. 2022): the canvas moves to where the U-Net thinks it came from. V normalised as the
    buffer was, so a canvas that shrinks stays so."""
    with torch.no_grad():
        V_t = q_sample(V, t, noise)
        target = predict_x0(V_t, predict(V_t, t), t)
    return (V - target).square().mean()


def ddim(predict, noise, steps, eta, generator, autocast):
    """Canvases drawn from noise (B, C, H, W) by DDIM (Song et al. 2021, eq. 12 and 16), normalised as in training."""
    V, times = noise, torch.linspace(0.999, 0, steps + 1, device=noise.device)
    for now, then in zip(times[:-1], times[1:]):
        t = now.expand(len(V))
        with torch.no_grad(), autocast():
            eps = predict(V, t)
        x0, a_now, a_then = predict_x0(V, eps, t), alpha_bar(now), alpha_bar(then)
        sigma = eta * ((1 - a_then) / (1 - a_now) * (1 - a_now / a_then)).clamp(min=0).sqrt()
        fresh = torch.randn(V.shape, generator=generator, device=V.device) if eta else 0.0
        V = a_then.sqrt() * x0 + (1 - a_then - sigma.square()).clamp(min=0).sqrt() * eps + sigma * fresh
    return V


QUARTERS = ('t 0-25%', 't 25-50%', 't 50-75%', 't 75-100%')


@torch.no_grad()
def diffusion_metrics(predict, V, autocast, per=256):
    """Held-out diffusion loss by quarter of t, and that of a Wiener filter: the best that is done one channel at a time
    with nothing but the mean power of each frequency, here that of these very canvases. V normalised (N, C, H, W)."""
    generator, metrics = torch.Generator(V.device).manual_seed(0), {}
    power = torch.fft.fft2(V, norm='ortho').abs().square().mean(0)                    # (C, H, W)
    for k, quarter in enumerate(QUARTERS):
        rows = torch.randint(len(V), (per,), generator=generator, device=V.device)
        t = (k + torch.rand(per, generator=generator, device=V.device)) / 4
        noise = torch.randn(per, *V.shape[1:], generator=generator, device=V.device)
        with autocast():
            metrics[f'diffusion_{quarter}'] = diffusion_loss(predict, V[rows], t, noise).item()
        a = alpha_bar(t)[:, None, None, None]
        metrics[f'wiener_{quarter}'] = (a * power / (a * power + 1 - a)).mean().item()
    return metrics


def reading(nets, V, tokenizer, autocast, length, checked):
    """What the decoder reads in canvases V -> {'parsed': share that the checker reads, 'distinct': meanings a canvas},
    sentences. In a corpus of one's own every sentence counts as a meaning."""
    with autocast():
        z = nets['readout'](V)
    said = [tokenizer.decode(row) for row in free_run(nets['decoder'], V, z, autocast, length).tolist()]
    scenes = [parse(sentence) for sentence in said] if checked else []
    meanings = [meaning(scene) for scene in scenes if scene is not None] if checked else said
    read = {'parsed': len(meanings) / len(said)} if checked else {}
    return read | {'distinct': len(set(meanings)) / len(said)}, said


def evaluate_prior(nets, V, state, text, config, length, autocast):
    """The diffusion prior on held-out canvases V: its loss by quarter of t, and canvases drawn from noise beside
    painted ones and beside Gaussian fields -> metrics, what the figure of drawn canvases is made of."""
    generator = torch.Generator(V.device).manual_seed(config.seed)
    noise = torch.randn(config.drawn, *V.shape[1:], generator=generator, device=V.device)
    predict = partial(predict_eps, nets['unet'])
    sampled = (ddim(predict, noise, config.sample_steps, config.eta, generator, autocast) * state['std']
               + state['mean'])
    metrics, said = diffusion_metrics(predict, (V - state['mean']) / state['std'], autocast), {}
    painted = V[:config.drawn]
    kinds = {'drawn': sampled, 'painted': painted, 'phases': priors.random_phases(painted, generator)}
    for kind, canvases in kinds.items():
        read, said[kind] = reading(nets, canvases, text.tokenizer, autocast, length, text.checked)
        statistics = canvas_metrics(canvases, config.size // config.query_grid) | read
        metrics |= {f'{kind}_{name}': value for name, value in statistics.items()}
    titles = [f'drawn: {t}' for t in said['drawn'][:10]] + [f'painted: {t}' for t in said['painted'][:6]]
    return metrics, {'drawn': torch.cat((sampled[:10], V[:6])), 'drawn_titles': titles}


def relative(metrics, since, name):
    """By which share a metric has changed; priors can be negative, and a distance 0 where nothing has a paraphrase."""
    return (metrics[name] - since[name]) / max(1e-9, abs(since[name]))


def gate(metrics, before, control_metrics, ways, evaluations, checked):
    """P6's criteria (docs/PLAN.md): against the checkpoint it began with (its metrics), and against the control (its
    metrics, or None). The plan asks for the first; only the second tells the prior from the extra steps."""
    worst = max(metrics[f'diffusion_{q}'] / metrics[f'wiener_{q}'] for q in QUARTERS)
    rows = [('diffusion loss over that of a Wiener filter, worst quarter of t +', '< 1', worst, worst < 1,
             'no skill > 1')]
    for since, label in ((before, ''), (control_metrics, ', against the control +')):
        if since is None:
            rows.append(('compared with a control (--control) +', '>= 1', 0, False))
            continue
        names = ('prior_spectrum', 'prior_tv', 'prior', 'paraphrase_distance')
        change = {name: relative(metrics, since, name) for name in names}
        beside = {name: f'control {relative(control_metrics, before, name):+.3f}'
                  if control_metrics and since is before else '' for name in names}
        rows += [(f'{text}, change{label}', '< 0', change[name], change[name] < 0, beside[name]) for text, name in (
            ('spectrum prior', 'prior_spectrum'), ('TV', 'prior_tv'), ('weighted sum of all priors', 'prior'))]
        falls = -change['paraphrase_distance']
        rows.append((f'paraphrase distance falls by{label}', '>= 0.10', falls, falls >= 0.10,
                     beside['paraphrase_distance']))
        drop = 100 * max(since[name] - metrics[name] for name in ('r1', 'r5', 'r1_hard'))
        rows.append((f'retrieval, largest drop of the three R, points{label}', '<= 1', drop, drop <= 1))
        gaps = [(since[name] - metrics[name], name[4:]) for name in since if name.startswith('gap_')]
        if gaps:
            drop, family = max(gaps)
            rows.append((f'family gaps, largest drop{label or " +"}', '<= 0.02', drop, drop <= 0.02, family))
    return rows + [(name if name.startswith('still') else f'still: {name}', *rest)
                   for name, *rest in p5_roundtrip.gate(ways, metrics, evaluations, checked)]


# What a control need not share.
FREE_OF_CONTROL = ('out_dir', 'init_from', 'control', 'resume', 'eval_every', 'log_every', 'tensorboard', 'compile',
                   'lambda_prior', 't_low', 't_high', 'prior_rows', 'min_snr', 'unet_learning_rate', 'unet_batch',
                   'buffer_size', 'refresh', 'sample_steps', 'eta', 'drawn')


def load_control(folder, previous):
    """The metrics of the control: a run of the same settings without the prior, from the same checkpoint of P5, that
    has ended. SystemExit(2), after one line, if it is none."""
    checkpoint = runtime.load_checkpoint(f'{folder}/ckpt.pt', 'p6',
                                         f'python p6_diffusion.py --lambda_prior=0 --out_dir={folder}')
    settings = checkpoint['config']
    differs = [key for key in config if key not in FREE_OF_CONTROL and config[key] != settings.get(key)]
    if repr(checkpoint['history'][-1]['metrics']) != repr(previous['metrics']):       # nan is not nan
        differs.append('what it began with')
    if settings['lambda_prior'] or differs or checkpoint['step'] != settings['max_steps']:
        runtime.fail(f'--control={folder} is no control of this run: it must have ended, with --lambda_prior=0 and '
                     f'otherwise the same settings; {", ".join(differs) or "lambda_prior or the last step"} differs')
    return checkpoint['metrics']


def check_settings(world):
    """Settings that would end in a traceback, or silently in nonsense, end in one line here."""
    if not 0 <= t_low <= t_high <= 0.9:
        runtime.fail(f'--t_low={t_low} --t_high={t_high}: expects 0 <= t_low <= t_high <= 0.9')
    if unet_dim < 8 or unet_dim % 8 or unet_batch % world:
        runtime.fail(f'--unet_dim={unet_dim} --unet_batch={unet_batch}: expects a multiple of 8, and one of the '
                     f'{world} ranks')
    if not 1 <= refresh <= buffer_size:
        runtime.fail(f'--refresh={refresh} --buffer_size={buffer_size}: expects at least one new canvas, and room for '
                     'all of them')
    if not unet_steps < min(max_steps, lr_steps):
        runtime.fail(f'--unet_steps={unet_steps}: expects fewer than max_steps and lr_steps, or no encoder moves')


def main():
    run = runtime.start('p6', config, sizes(config))
    check_settings(run.world)
    previous = runtime.inherit(run)
    before, control_metrics = previous['metrics'], load_control(control, previous) if control else None
    if previous['step'] != previous['config']['max_steps']:
        runtime.fail(f'{init_from} is of a run that has not ended: python p5_roundtrip.py --resume=true')
    text = data.load(config, run, previous)
    train = text.splits['train']
    nets = build(config, 'encoder', 'readout', 'decoder', 'unet').to(run.device)
    p5_nets, predict = torch.nn.ModuleDict(list(nets.items())[:3]), partial(predict_eps, nets.unet)
    runtime.load_weights(p5_nets.eval(), previous, p5_nets)
    pairs = mine_pairs(p5_nets, train, run) if config.mine_at_start else None
    run.say(f'U-Net {runtime.count_parameters(nets.unet) / 1e6:.1f}M parameters')
    optimizer = runtime.adamw(nets, learning_rate, config.weight_decay,
                              scale={'encoder': config.encoder_scale, 'readout': config.encoder_scale})
    ema = runtime.EMA(nets, config.ema_decay)
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state()}
    start = runtime.resume(run, nets, optimizer, ema, state)
    if 'buffer' not in state:      # canvases of random sentences, each channel at mean 0, variance 1 as first measured
        first = train.sentences(buffer_size if lambda_prior else 1, config.seed, 0)[:, 0]  # nobody reads the control's
        V = encode(p5_nets.encoder.eval(), first, run.autocast)
        mean, std = V.mean((0, 2, 3), keepdim=True), V.std((0, 2, 3), keepdim=True)
        state |= {'buffer': (V - mean) / std, 'mean': mean, 'std': std}
    buffer, mean, std = (state[name].to(run.device) for name in ('buffer', 'mean', 'std'))
    state |= {'buffer': buffer, 'mean': mean, 'std': std}
    runtime.compile_nets(nets, run)
    length, batch_size = min(config.max_length, train.width), config.batch_size

    def unet_loss(generator):
        """The diffusion loss of this rank's share of random canvases in the buffer."""
        picked = torch.randint(len(buffer), (unet_batch,), generator=generator, device=run.device)
        t = torch.rand(unet_batch, generator=generator, device=run.device)
        noise = torch.randn(unet_batch, *buffer.shape[1:], generator=generator, device=run.device)
        rows = runtime.local_slice(run, unet_batch)
        with run.autocast():
            return diffusion_loss(predict, buffer[picked[rows]], t[rows], noise[rows], min_snr)

    def embed_part(part):
        """z of a part of a batch: the first thing that forward() does, for gradient caching."""
        with run.autocast():
            return embed_views(p5_nets, part.x)

    def forward(part):
        """A part of a batch -> z (n, K, views, E), the losses that need no other sentence, and their terms."""
        z, loss, terms, V = local_losses(p5_nets, part, config, run.world * config.grad_accum, run.autocast)
        prior = V.new_zeros(())
        if lambda_prior:
            V = (V.unflatten(0, (len(part.x), -1))[:, 0] - mean) / std         # (n, C, H, W): the first of each scene
            rows = slice(None, None, max(1, batch_size // prior_rows))         # the same ones however it is split
            with run.autocast():
                prior = prior_loss(predict, V[rows], part.draws['prior_t'][rows], part.draws['prior_noise'][rows])
        return z, loss + lambda_prior * prior, terms | {'prior': prior}

    def loss_of_all(z, batch):
        """z of this rank's scenes -> the loss that compares all sentences of the batch, and its terms."""
        nce = contrast(runtime.gather(z, run), batch, config)
        return config.lambda_nce * nce, {'nce': nce}

    # The U-Net alone, on canvases of P5's encoder. The control has none to train.
    for step in run.steps(start, unet_steps) if lambda_prior and start < unet_steps else ():
        if step == unet_steps:
            break
        if step % eval_every == 0:
            nets.eval()
            with ema.weights():
                V = encode(nets.encoder, text.splits['val'].fixed(READ), run.autocast)
                state['metrics'], arrays = evaluate_prior(nets, V, state, text, config, length, run.autocast)
                arrays |= canvas_arrays(nets.encoder, V, text, run.autocast)
            run.log(step, state['metrics'], prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        if step % eval_every == 0 or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)

        lr = runtime.cosine_lr(step, unet_learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr if group['net'] == 'unet' else 0.0
        nets.train()
        loss = unet_loss(run.generator(step, 'diffusion', run.device))
        loss.backward()
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.unet.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values = {'loss': loss, 'diffusion': loss, 'unet_grad_norm': grad_norm, 'unet_lr': lr}
        run.watch(step, values)
        if step % config.log_every == 0:
            run.log(step, values, prefix='train')

    # All nets together: the losses of P5, the pull of the prior, and the U-Net on a buffer that follows the encoder.
    for step in run.steps(max(start, unet_steps), max_steps):
        last = step == max_steps
        due = step % eval_every == 0 or step == unet_steps or last
        if due:
            nets.eval()
            held_out = text.splits['test' if last else 'val']      # as in P1
            with ema.weights():
                metrics, ways, rows, V = p5_roundtrip.evaluate(p5_nets, held_out, text, config, run.autocast)
                arrays = canvas_arrays(nets.encoder, V, text, run.autocast)
                if lambda_prior:
                    prior_metrics, prior_arrays = evaluate_prior(nets, V, state, text, config, length, run.autocast)
                    metrics, arrays = metrics | prior_metrics, arrays | prior_arrays
                if last:
                    arrays |= attention_arrays(nets, V[:4], held_out.fixed(4), text, run.autocast)
            state['metrics'] = metrics
            run.log(step, metrics, prefix='val')
            if run.master:
                runtime.write_text(run.dir / 'samples.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
                plot.evaluation(run.dir, step, arrays)
                plot.samples_table(run.dir)
                plot.trends(run.dir)
        if due or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step - unet_steps, learning_rate, warmup_steps, lr_steps - unet_steps)
        unet_lr = runtime.cosine_lr(step, unet_learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = unet_lr if group['net'] == 'unet' else lr * group['scale']
        nets.train()
        batch, diffusion = draw_batch(train, config, run, step, length, pairs), {}
        if lambda_prior:
            generator = run.generator(step, 'diffusion', run.device)
            diffusion['diffusion'] = unet_loss(generator)
            diffusion['diffusion'].backward()
            t = t_low + (t_high - t_low) * torch.rand(batch_size, generator=generator, device=run.device)
            noise = torch.randn(batch_size, *buffer.shape[1:], generator=generator, device=run.device)
            batch = batch.with_draws(prior_t=t, prior_noise=noise)
        loss, terms = runtime.contrastive_backward(forward, embed_part, loss_of_all, batch, config.grad_accum)
        if lambda_prior:
            # New canvases for the oldest, of random sentences: those of the batch are mostly the ones that z confuses.
            with runtime.eagerly():
                x = train.sentences(refresh, config.seed, step, purpose='buffer')[:, 0]
                V = encode(nets.encoder.eval(), x, run.autocast)
            oldest = (step - unet_steps) * refresh + torch.arange(refresh, device=run.device)
            buffer[oldest % len(buffer)] = (V - mean) / std
        runtime.average_gradients(nets, run)
        grad_norm, unet_grad_norm = (torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
                                     for net in (p5_nets, nets.unet))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values = {'loss': loss, 'unet_grad_norm': unet_grad_norm, 'lr': lr, 'grad_norm': grad_norm,
                  'unet_lr': unet_lr} | diffusion | terms
        run.watch(step, values)
        if step % config.log_every == 0:
            run.log(step, values, prefix='train')

    with ema.weights():
        run.say(held_out_table(nets, text.splits, run.autocast))
    if lambda_prior:
        runtime.write_gate(run, gate(state['metrics'], before, control_metrics, ways, last_evaluations(run.dir),
                                     text.checked))
    else:
        run.say('this was the control: it has no prior and no gate of its own')


if __name__ == '__main__':
    main()
