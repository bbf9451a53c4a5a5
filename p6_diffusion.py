"""P6 · Sharpen the canvases with a diffusion prior learnt from themselves.

A small U-Net learns to take the noise off canvases that the encoder itself has painted (a replay buffer, so no image is
ever seen). Then the encoder goes on with all losses of P5 and one more: each canvas is noised a little, denoised in one
DDIM step, and pulled to the result (L_prior; no gradient passes through the U-Net). Whether that helps is asked of a
control: the same steps on the same batches with lambda_prior=0.

Reads:  out/p5/ckpt.pt, the control's
Writes: out/p6/ckpt.pt, run.json, metrics.jsonl, gate.json, samples.jsonl, plots/
    python p6_diffusion.py --lambda_prior=0 --out_dir=out/p6_control
    python p6_diffusion.py --control=out/p6_control
    torchrun --standalone --nproc_per_node=2 p6_diffusion.py
"""
import json
import math

import torch

import data
import p4_decoder
import p5_roundtrip
import plot
import priors
import runtime
from model import UNet
from p1_canvas import GATED, canvas_metrics, encode, random_sentences
from p2_contrast import contrast, embed, held_out_sets, print_sets
from p4_decoder import free_run

out_dir = 'out/p6'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p5/ckpt.pt'   # the phase before; what goes on from it goes on with its settings
control = ''              # run folder of the same steps with lambda_prior=0; '' leaves the comparison out of the gate
resume = False            # go on from out_dir/ckpt.pt
seed = 0
# the diffusion prior
unet_dim = 48             # channels of the U-Net at 32x32; 48 makes 2.5M parameters
unet_steps = 5_000        # steps of the U-Net alone, before the encoder moves
unet_batch = 128          # canvases a step, all ranks together
unet_learning_rate = 5e-4
min_snr = 5.0             # gamma of the min-SNR weights (Hang et al. 2023); 0: every t weighs the same
buffer_size = 8192        # canvases in the replay buffer
refresh = 1               # of each scene of a batch, so many new canvases replace the oldest in the buffer
# the encoder under it
lambda_prior = 0.1        # the plan's xi: |V - DDIM_step(V_t)|^2 a pixel, V at unit variance; 0 is the control
t_low = 0.05              # t of V_t is uniform between these; 0 is no noise, 1 nothing but noise
t_high = 0.3
prior_rows = 64           # canvases a step (all ranks) that it sees, of different scenes
# sampling
sample_steps = 50         # DDIM steps from noise to a canvas
eta = 0.0                 # 0: deterministic DDIM; 1: as noisy as DDPM
drawn = 256               # canvases drawn at an evaluation
# optimisation
batch_size = 256          # scenes a step, all ranks together
grad_accum = 1            # micro-steps, by gradient caching
learning_rate = 1e-4      # of the decoder
encoder_scale = 0.2       # encoder and readout learn at this fraction of it
warmup_steps = 100        # of the U-Net, and again of the encoder when it begins to move
max_steps = 7_000         # those of the U-Net alone and those of all nets together
lr_steps = 7_000
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 1000
log_every = 50
device = 'auto'
dtype = 'auto'
compile = True
tensorboard = False
config = runtime.configure(globals())


def signal_share(t):
    """The cosine schedule (Nichol & Dhariwal 2021): the share of V_t's variance that is signal,
    t in [0, 1] any shape."""
    def f(t):
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (f(t) / f(torch.zeros_like(t))).clamp(1e-5, 1 - 1e-5)


def add_noise(V, t, noise):
    """V_t = sqrt(a) V + sqrt(1 - a) noise, with a = signal_share(t); V (B, C, H, W), t (B,)."""
    a = signal_share(t)[:, None, None, None]
    return a.sqrt() * V + (1 - a).sqrt() * noise


def denoise(V_t, predicted, t):
    """The canvas that V_t came from if `predicted` is its noise: one DDIM step to t = 0 (Song et al. 2021, eq. 12)."""
    a = signal_share(t)[:, None, None, None]
    return (V_t - (1 - a).sqrt() * predicted) / a.sqrt()


def diffusion_loss(unet, V, t, noise, min_snr=0.0):
    """Squared error of the predicted noise, mean over pixels, min(SNR, gamma) / SNR weighted over
    canvases; 1 is no skill."""
    error = (unet(add_noise(V, t, noise), t) - noise).square().mean((1, 2, 3))
    a = signal_share(t)
    snr = a / (1 - a)
    return (error * (min_snr / snr).clamp(max=1.0)).mean() if min_snr else error.mean()


def prior_loss(unet, V, t, noise):
    """|V - DDIM_step(V_t)|^2 a pixel; nothing flows through the U-Net, so its gradient in V is that of score
    distillation (Poole et al. 2022): the canvas moves to where the U-Net thinks it came from. V normalised."""
    with torch.no_grad():
        V_t = add_noise(V, t, noise)
        target = denoise(V_t, unet(V_t, t), t)
    return (V - target).square().mean()


def ddim(unet, noise, steps, eta, generator, run):
    """Canvases drawn from noise (B, C, H, W) by DDIM (Song et al. 2021, eq. 12 and 16), normalised as in training."""
    V, times = noise, torch.linspace(0.999, 0, steps + 1, device=noise.device)
    for now, then in zip(times[:-1], times[1:]):
        t = now.expand(len(V))
        with torch.no_grad(), run.autocast():
            predicted = unet(V, t)
        clean = denoise(V, predicted, t).clamp(-8, 8)              # at t near 1 the division blows errors up
        a_now, a_then = signal_share(now), signal_share(then)
        sigma = eta * ((1 - a_then) / (1 - a_now) * (1 - a_now / a_then)).clamp(min=0).sqrt()
        fresh = torch.randn(V.shape, generator=generator, device=V.device) if eta else 0.0
        V = a_then.sqrt() * clean + (1 - a_then - sigma.square()).clamp(min=0).sqrt() * predicted + sigma * fresh
    return V


def scramble(V, generator):
    """Gaussian fields with the power spectrum of each channel of each canvas: random phases. What
    1/f^2 alone looks like."""
    noise = torch.fft.rfft2(torch.randn(V.shape, generator=generator, device=V.device))
    return torch.fft.irfft2(torch.fft.rfft2(V).abs() * noise / noise.abs().clamp(min=1e-9), s=V.shape[-2:])


QUARTERS = ('t 0-25%', 't 25-50%', 't 50-75%', 't 75-100%')


@torch.no_grad()
def diffusion_metrics(unet, V, run, per=256):
    """Held-out diffusion loss by quarter of t, and that of the best linear denoiser: a Wiener filter that knows the
    mean power of each channel and frequency, which is all that a Gaussian field has. V normalised (N, C, H, W)."""
    generator, metrics = torch.Generator(V.device).manual_seed(0), {}
    power = torch.fft.fft2(V, norm='ortho').abs().square().mean(0)                    # (C, H, W)
    for k, quarter in enumerate(QUARTERS):
        rows = torch.randint(len(V), (per,), generator=generator, device=V.device)
        t = (k + torch.rand(per, generator=generator, device=V.device)) / 4
        noise = torch.randn(per, *V.shape[1:], generator=generator, device=V.device)
        with run.autocast():
            metrics[f'diffusion_{quarter}'] = diffusion_loss(unet, V[rows], t, noise).item()
        a = signal_share(t)[:, None, None, None]
        metrics[f'wiener_{quarter}'] = (a * power / (a * power + 1 - a)).mean().item()
    return metrics


def reading(nets, V, tokenizer, run, length, checked):
    """What the decoder reads in canvases V: (share that the checker can parse, distinct scenes a canvas), sentences."""
    with run.autocast():
        z = nets['readout'](V)
    texts = [tokenizer.decode(row) for row in free_run(nets['decoder'], V, z, run, length).tolist()]
    scenes = [data.parse(text) for text in texts] if checked else texts
    known = [str(scene) for scene in scenes if scene is not None]
    return len(known) / len(texts), len(set(known)) / len(texts), texts


def build(arch):
    """The nets of P5 and the U-Net from the sizes in a checkpoint."""
    return p4_decoder.build(arch, controls=False) | {'unet': UNet(arch['channels'], arch['unet_dim'])}


def gate(metrics, before, other, ways, evaluations, checked):
    """P6's criteria (DESIGN 8): against the checkpoint it began with, and against the
    control (its metrics, or None)."""
    def change(name, since):
        return metrics[name] / since[name] - 1

    def beside(name):
        return 'no control' if other is None else f'control {other[name] / before[name] - 1:+.3f}'

    worst = max(metrics[f'diffusion_{q}'] / metrics[f'wiener_{q}'] for q in QUARTERS)
    falls = -change('paraphrase_distance', before)
    rows = [('diffusion loss over that of a Wiener filter, worst quarter of t +', '< 1', worst, worst < 1,
             'no skill > 1'),
            ('spectrum prior, change', '< 0', change('prior_spectrum', before), change('prior_spectrum', before) < 0,
             beside('prior_spectrum')),
            ('TV, change', '< 0', change('prior_tv', before), change('prior_tv', before) < 0, beside('prior_tv')),
            ('paraphrase distance falls by', '>= 0.10', falls, falls >= 0.10, beside('paraphrase_distance'))]
    if other is not None:
        falls = -change('paraphrase_distance', other)
        drop = 100 * (other['r1_hard'] - metrics['r1_hard'])
        less = {name: change(name, other) for name in ('prior_spectrum', 'prior_tv')}
        rows += [(f'{label}, against the control +', '< 0', less[name], less[name] < 0)
                 for label, name in (('spectrum prior', 'prior_spectrum'), ('TV', 'prior_tv'))]
        rows += [('paraphrase distance falls by, against the control +', '>= 0.10', falls, falls >= 0.10),
                 ('R@1 with own counterfactuals, drop against the control, points', '<= 1', drop, drop <= 1,
                  f"control {other['r1_hard']:.3f}, before {before['r1_hard']:.3f}")]
    return rows + [(name if name.startswith('still') else f'still: {name}', *rest)
                   for name, *rest in p5_roundtrip.gate(ways, metrics, evaluations, checked)]


def main():
    run = runtime.start('p6', config)
    previous = runtime.inherit(run, init_from, 'p5', 'python p5_roundtrip.py')
    other = runtime.load_checkpoint(f'{control}/ckpt.pt', 'p6',
                                    f'python p6_diffusion.py --lambda_prior=0 --out_dir={control}'
                                    )['metrics'] if control else None
    knobs = run.history[-1]['config'] | {'batch_size': batch_size}     # all losses go on as in P5
    arch = previous['arch'] | {'unet_dim': unet_dim}
    splits, tokenizer = data.load(arch['data'], run)
    train, checked = splits['train'], not arch['data']['corpus']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = {name: net.to(run.device) for name, net in build(arch).items()}
    encoder, readout, decoder, unet = nets.values()
    spoken = {'encoder': encoder, 'readout': readout, 'decoder': decoder}      # the nets of P5
    for name, net in spoken.items():
        net.load_state_dict(previous['ema'][name])
    run.say(f'U-Net {runtime.count_parameters(unet) / 1e6:.1f}M parameters')
    cell = arch['size'] // arch['query_grid']
    optimizer = runtime.adamw(nets, learning_rate, weight_decay,
                              scale={'encoder': encoder_scale, 'readout': encoder_scale})
    ema = runtime.EMA(nets, ema_decay)
    # The buffer: canvases of random sentences, each channel at mean 0 and variance 1 as first measured.
    buffer = encode(encoder.eval(), random_sentences(train, buffer_size, seed, 0)[:, 0], run)
    mean, std = buffer.mean((0, 2, 3), keepdim=True), buffer.std((0, 2, 3), keepdim=True)
    buffer, oldest = (buffer - mean) / std, 0
    state = runtime.resume(run, nets, optimizer, ema)
    start, metrics, evaluations = ((state['step'], state['metrics'], state['extra']['evaluations']) if state else
                                   (0, {}, []))
    if state:
        buffer, oldest = state['extra']['buffer'].to(run.device), state['extra']['oldest']
    runtime.compile_nets(nets, run)
    before = previous['metrics']
    montage = tokenizer.pad(data.EVAL_SENTENCES, 24).to(run.device)
    length = min(arch['max_length'], train.width)
    if not lambda_prior:
        start = max(start, unet_steps)                                 # the control needs no U-Net

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            for net in nets.values():
                net.eval()
            generator = torch.Generator(run.device).manual_seed(seed)
            with ema.weights():
                metrics, ways, rows, V = p5_roundtrip.evaluate(spoken, splits['test' if last else 'val'], types,
                                                               concepts, tokenizer, run, cell, knobs)
                metrics |= diffusion_metrics(unet, (V - mean) / std, run)
                noise = torch.randn(drawn, *V.shape[1:], generator=generator, device=run.device)
                sampled = ddim(unet, noise, sample_steps, eta, generator, run) * std + mean
                kinds = {'painted': V[:drawn], 'drawn': sampled, 'random phases': scramble(V[:drawn], generator)}
                read = {kind: reading(spoken, canvases, tokenizer, run, length, checked)
                        for kind, canvases in kinds.items()}
                pictures = encode(encoder, montage, run)
            evaluations = [e for e in evaluations if e['step'] < step][-2:]      # a resumed run repeats its first one
            evaluations.append({'step': step} | {name: metrics[name] for name in GATED})
            metrics |= {f'drawn_{name}': value for name, value in canvas_metrics(sampled, cell).items()}
            metrics |= {'drawn_parsed': read['drawn'][0], 'drawn_distinct': read['drawn'][1]}
            run.log(step, metrics, prefix='val')
            if run.master:
                (run.dir / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
                plot.evaluation(run.dir, step, plot.spectra_arrays(V) | {
                    'montage': pictures, 'titles': list(data.EVAL_SENTENCES),
                    'drawn': torch.cat((sampled[:10], V[:6])), 'drawn_titles': [
                        *(f'drawn: {text}' for text in read['drawn'][2][:10]),
                        *(f'painted: {text}' for text in read['painted'][2][:6])]})
                plot.samples_table(run.dir)
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, metrics, arch, {
                'evaluations': evaluations, 'buffer': buffer, 'oldest': oldest, 'mean': mean, 'std': std,
                'tokenizer': tokenizer.state()})
        if last:
            break

        together = step >= unet_steps and max_steps > unet_steps
        lr = (runtime.cosine_lr(step - unet_steps, learning_rate, warmup_steps, lr_steps - unet_steps)
              if together else 0.0)
        unet_lr = runtime.cosine_lr(step, unet_learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = unet_lr if group['net'] == 'unet' else lr * group['scale']
        for net in nets.values():
            net.train()
        generator = torch.Generator(run.device).manual_seed(1_000_003 * seed + step)
        terms = {}

        if lambda_prior:                                               # the U-Net on the buffer
            rows = torch.randint(buffer_size, (unet_batch,), generator=generator, device=run.device)
            t = torch.rand(unet_batch, generator=generator, device=run.device)
            noise = torch.randn(unet_batch, *buffer.shape[1:], generator=generator, device=run.device)
            mine = runtime.local_slice(run, unet_batch)
            with run.autocast():
                terms['diffusion'] = diffusion_loss(unet, buffer[rows[mine]], t[mine], noise[mine], min_snr)
            terms['diffusion'].backward()

        if together:                                                   # all other nets, under the U-Net
            scenes, variants, views, valid, u, u_trip = p5_roundtrip.batch(train, seed, step, length, knobs)
            each, parts = views[0].numel(), run.world * grad_accum     # canvases of a scene
            mine = runtime.local_slice(run, batch_size)
            x = train.take(scenes[mine, :, None].expand_as(views[mine]), variants[mine, :, None].expand_as(views[mine]),
                           views[mine])
            meanings, on_device = train.meanings[scenes.to(run.device), variants.to(run.device)], valid.to(run.device)
            noise = torch.randn(batch_size, *buffer.shape[1:], generator=generator, device=run.device)[mine]
            t = t_low + (t_high - t_low) * torch.rand(batch_size, generator=generator, device=run.device)[mine]
            whole = (x, u[mine].to(run.device), u_trip[mine].to(run.device),
                     torch.arange(batch_size, device=run.device)[mine], noise, t)
            fresh = []

            def forward(part):
                *part, noise, t = part
                z, local, found, V = p5_roundtrip.local_losses(spoken, part, run, cell, parts, knobs)
                V = (V.unflatten(0, (-1, each)) - mean) / std                  # (n, each, C, H, W)
                rows = slice(None, None, max(1, batch_size // prior_rows))     # the same however the batch is split
                with run.autocast():
                    found['prior'] = (prior_loss(unet, V[rows, 0], t[rows], noise[rows])
                                      if lambda_prior else V.new_zeros(()))
                terms.update(found)
                fresh.append(V[:, :refresh].detach())
                return z, local + lambda_prior * found['prior']

            def loss_of_all(z):
                Z = runtime.gather(z, run)
                return knobs['lambda_nce'] * contrast(Z, meanings, on_device, 3, knobs['temperature'], knobs['anchors'],
                                                      knobs['mask_false_negatives']), None

            if grad_accum == 1:
                z, local = forward(whole)
                terms['nce'] = loss_of_all(z)[0]
                (terms['nce'] + local).backward()
            else:
                terms['nce'], _ = runtime.cached_backward(
                    forward, list(zip(*(t.chunk(grad_accum) for t in whole))), loss_of_all)
            new = runtime.gather(torch.cat(fresh[-grad_accum:]).flatten(0, 1), run)
            buffer[torch.arange(oldest, oldest + len(new), device=run.device) % buffer_size] = new
            oldest = (oldest + len(new)) % buffer_size
        runtime.average_gradients(nets, run)
        norms = [torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
                 for net in (unet, torch.nn.ModuleList(spoken.values()))]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        if step % log_every == 0:
            run.log(step, {'loss': terms['nce' if together else 'diffusion'], 'unet_grad_norm': norms[0],
                           'grad_norm': norms[1], 'lr': lr, 'unet_lr': unet_lr} | terms, prefix='train')

    with ema.weights():
        print_sets(run, held_out_sets(lambda x: embed(encoder, readout, x, run), splits))
    for name in QUARTERS:
        run.say(f"{name:12s} diffusion loss {metrics[f'diffusion_{name}']:.4f}   "
                f"Wiener filter {metrics[f'wiener_{name}']:.4f}")
    for kind, canvases in kinds.items():
        look = canvas_metrics(canvases, cell)
        run.say(f"{kind:14s} parsed {read[kind][0]:.3f}  distinct {read[kind][1]:.3f}  "
                f"slope {sum(look['alpha']) / len(look['alpha']):.2f}  "
                f"TV {look['tv']:.3f}  kurtosis {min(look['kurtosis']):.1f}  lattice {look['lattice']:.2f}")
    for text in read['drawn'][2][:8]:
        run.say(f'  drawn: {text}')
    runtime.write_gate(run, gate(metrics, before, other, ways, evaluations, checked))


if __name__ == '__main__':
    main()
