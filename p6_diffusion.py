"""P6 · Sharpen the canvases with a diffusion prior learnt from themselves.

A small U-Net learns to take the noise off canvases that the encoder itself has painted (a replay buffer, so no image is
ever seen). Then the encoder goes on with all losses of P5 and one more: each canvas is noised a little, denoised in one
DDIM step, and pulled to the result (L_prior; no gradient passes through the U-Net). Whether that helps is asked of a
control: the same steps on the same batches with lambda_prior=0.

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
from torch import nn

import data
import p4_decoder
import p5_roundtrip
import plot
import priors
import runtime
from model import build_unet
from p1_canvas import canvas_arrays, canvas_metrics, encode, last_three
from p2_contrast import confused_pairs, contrast, embed, embed_batch, say_held_out
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
refresh = 32              # new canvases a joint step (all ranks) that replace the oldest in the buffer
# the encoder under it
lambda_prior = 0.1        # the plan's xi: |V - DDIM_step(V_t)|^2 a pixel, V in units of the first canvases' standard
                          # deviations; 0 is the control
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


def noise_in(unet, V_t, t):
    """The noise in V_t as the net sees it, whose output is the velocity sqrt(a) noise - sqrt(1 - a) V (Salimans & Ho
    2022): it corrects sqrt(1 - a) V_t, the best linear guess for white canvases. Near t = 1 that is nearly all."""
    a = signal_share(t)[:, None, None, None]
    return (1 - a).sqrt() * V_t + a.sqrt() * unet(V_t, t)


def diffusion_loss(predict, V, t, noise, min_snr=0.0):
    """Squared error of the predicted noise, mean over pixels, min(SNR, gamma) / SNR weighted over canvases. Without
    that weight a guess of no noise has 1."""
    error = (predict(add_noise(V, t, noise), t) - noise).square().mean((1, 2, 3))
    a = signal_share(t)
    snr = a / (1 - a)
    return (error * (min_snr / snr).clamp(max=1.0)).mean() if min_snr else error.mean()


def prior_loss(predict, V, t, noise):
    """|V - DDIM_step(V_t)|^2 a pixel; nothing flows through `predict`, so its gradient in V is that of score
    distillation (Poole et al. 2022): the canvas moves to where the U-Net thinks it came from. V normalised as the
    buffer was, so a canvas that shrinks stays so."""
    with torch.no_grad():
        V_t = add_noise(V, t, noise)
        target = denoise(V_t, predict(V_t, t), t)
    return (V - target).square().mean()


def ddim(predict, noise, steps, eta, generator, run):
    """Canvases drawn from noise (B, C, H, W) by DDIM (Song et al. 2021, eq. 12 and 16), normalised as in training."""
    V, times = noise, torch.linspace(0.999, 0, steps + 1, device=noise.device)
    for now, then in zip(times[:-1], times[1:]):
        t = now.expand(len(V))
        with torch.no_grad(), run.autocast():
            predicted = predict(V, t)
        clean = denoise(V, predicted, t)
        a_now, a_then = signal_share(now), signal_share(then)
        sigma = eta * ((1 - a_then) / (1 - a_now) * (1 - a_now / a_then)).clamp(min=0).sqrt()
        fresh = torch.randn(V.shape, generator=generator, device=V.device) if eta else 0.0
        V = a_then.sqrt() * clean + (1 - a_then - sigma.square()).clamp(min=0).sqrt() * predicted + sigma * fresh
    return V


QUARTERS = ('t 0-25%', 't 25-50%', 't 50-75%', 't 75-100%')


@torch.no_grad()
def diffusion_metrics(predict, V, run, per=256):
    """Held-out diffusion loss by quarter of t, and that of a Wiener filter: the best that is done one channel at a time
    with nothing but the mean power of each frequency, here that of these very canvases. V normalised (N, C, H, W)."""
    generator, metrics = torch.Generator(V.device).manual_seed(0), {}
    power = torch.fft.fft2(V, norm='ortho').abs().square().mean(0)                    # (C, H, W)
    for k, quarter in enumerate(QUARTERS):
        rows = torch.randint(len(V), (per,), generator=generator, device=V.device)
        t = (k + torch.rand(per, generator=generator, device=V.device)) / 4
        noise = torch.randn(per, *V.shape[1:], generator=generator, device=V.device)
        with run.autocast():
            metrics[f'diffusion_{quarter}'] = diffusion_loss(predict, V[rows], t, noise).item()
        a = signal_share(t)[:, None, None, None]
        metrics[f'wiener_{quarter}'] = (a * power / (a * power + 1 - a)).mean().item()
    return metrics


def reading(nets, V, tokenizer, run, length, checked):
    """What the decoder reads in canvases V -> {'parsed': share that the checker reads, 'distinct': meanings a canvas},
    sentences. In a corpus of one's own every sentence counts as a meaning."""
    with run.autocast():
        z = nets['readout'](V)
    texts = [tokenizer.decode(row) for row in free_run(nets['decoder'], V, z, run, length).tolist()]
    scenes = [data.parse(text) for text in texts] if checked else []
    meanings = [data.meaning(scene) for scene in scenes if scene is not None] if checked else texts
    read = {'parsed': len(meanings) / len(texts)} if checked else {}
    return read | {'distinct': len(set(meanings)) / len(texts)}, texts


def build(arch):
    """The nets of P5 and the U-Net from the sizes in a checkpoint."""
    return p4_decoder.build(arch, controls=False) | {'unet': build_unet(arch)}


def evaluate(nets, V, mean, std, tokenizer, run, cell, length, checked, knobs):
    """The diffusion prior on held-out canvases V: its loss by quarter of t, and canvases drawn from noise beside
    painted ones and beside Gaussian fields -> (metrics, {kind: sentences}, drawn canvases)."""
    n, generator = knobs['drawn'], torch.Generator(run.device).manual_seed(knobs['seed'])
    noise = torch.randn(n, *V.shape[1:], generator=generator, device=run.device)
    predict = partial(noise_in, nets['unet'])
    sampled = ddim(predict, noise, knobs['sample_steps'], knobs['eta'], generator, run) * std + mean
    metrics, texts = diffusion_metrics(predict, (V - mean) / std, run), {}
    shown = {'drawn': sampled, 'painted': V[:n], 'phases': priors.random_phases(V[:n], generator)}
    for kind, canvases in shown.items():
        read, texts[kind] = reading(nets, canvases, tokenizer, run, length, checked)
        metrics |= {f'{kind}_{name}': value for name, value in (canvas_metrics(canvases, cell) | read).items()}
    return metrics, texts, sampled


def gate(metrics, before, control_metrics, ways, evaluations, checked):
    """P6's criteria (DESIGN 8): against the checkpoint it began with (its metrics), and against the control (its
    metrics, or None). The plan asks for the first; only the second tells the prior from the extra steps."""
    worst = max(metrics[f'diffusion_{q}'] / metrics[f'wiener_{q}'] for q in QUARTERS)
    rows = [('diffusion loss over that of a Wiener filter, worst quarter of t +', '< 1', worst, worst < 1,
             'no skill > 1')]
    for since, label in ((before, ''), (control_metrics, ', against the control +')):
        if since is None:
            rows.append(('compared with a control (--control) +', '>= 1', 0, False))
            continue
        names = ('prior_spectrum', 'prior_tv', 'prior', 'paraphrase_distance')
        change = {name: (metrics[name] - since[name]) / abs(since[name]) for name in names}     # priors can be negative
        beside = {name: f'control {(control_metrics[name] - before[name]) / abs(before[name]):+.3f}'
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
ITS_OWN = ('out_dir', 'init_from', 'control', 'resume', 'eval_every', 'log_every', 'tensorboard', 'compile',
           'lambda_prior', 't_low', 't_high', 'prior_rows', 'min_snr', 'unet_learning_rate', 'unet_batch', 'buffer_size',
           'refresh', 'sample_steps', 'eta', 'drawn')


def load_control(folder, previous):
    """The metrics of the control: a run of the same settings without the prior, from the same checkpoint of P5, that
    has ended. SystemExit(2), after one line, if it is none."""
    checkpoint = runtime.load_checkpoint(f'{folder}/ckpt.pt', 'p6',
                                         f'python p6_diffusion.py --lambda_prior=0 --out_dir={folder}')
    theirs = checkpoint['config']
    differs = [key for key in config if key not in ITS_OWN and config[key] != theirs.get(key)]
    if repr(checkpoint['history'][-1]['metrics']) != repr(previous['metrics']):       # nan is not nan
        differs.append('what it began with')
    if theirs['lambda_prior'] or differs or checkpoint['step'] != theirs['max_steps']:
        runtime.fail(f'--control={folder} is no control of this run: it must have ended, with --lambda_prior=0 and '
                     f'otherwise the same settings; {", ".join(differs) or "lambda_prior or the last step"} differs')
    return checkpoint['metrics']


def check(world):
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
    run = runtime.start('p6', config)
    check(run.world)
    previous = runtime.inherit(run, init_from, 'p5', 'python p5_roundtrip.py')
    before, control_metrics = previous['metrics'], load_control(control, previous) if control else None
    if 'mine_pairs' not in previous['config'] or previous['step'] != previous['config']['max_steps']:
        runtime.fail(f'{init_from} is of a run that has not ended, or older than this script: python p5_roundtrip.py')
    knobs = previous['config'] | {'batch_size': batch_size}            # all losses go on as in P5
    arch = previous['arch'] | {'unet_dim': unet_dim}
    splits, tokenizer = data.load(arch['data'], run, previous)
    train, checked = splits['train'], not arch['data']['corpus']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = nn.ModuleDict(build(arch)).to(run.device)
    encoder, readout, decoder, unet = nets.values()
    predict = partial(noise_in, unet)
    p5_nets = nn.ModuleDict({name: nets[name] for name in ('encoder', 'readout', 'decoder')})      # the nets of P5
    runtime.load_weights(p5_nets.eval(), previous, p5_nets)
    pairs = (confused_pairs(lambda x: embed(encoder, readout, x, run), train, run)
             if knobs['mine_pairs'] and train.canonical else None)      # as in P2
    run.say(f'U-Net {runtime.count_parameters(unet) / 1e6:.1f}M parameters')
    cell = arch['size'] // arch['query_grid']
    optimizer = runtime.adamw(nets, learning_rate, weight_decay,
                              scale={'encoder': encoder_scale, 'readout': encoder_scale})
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics = (state['step'], state['metrics']) if state else (0, {})
    evaluations = state['extra']['evaluations'] if state else []
    if state:
        buffer, mean, std = (state['extra'][name].to(run.device) for name in ('buffer', 'mean', 'std'))
        oldest = state['extra']['oldest']
    else:      # canvases of random sentences, each channel at mean 0 and variance 1 as first measured
        first = train.sentences(buffer_size if lambda_prior else 1, seed, 0)[:, 0]         # nobody reads the control's
        buffer = encode(encoder.eval(), first, run)
        mean, std = buffer.mean((0, 2, 3), keepdim=True), buffer.std((0, 2, 3), keepdim=True)
        buffer, oldest = (buffer - mean) / std, 0
    if not lambda_prior:         # the control starts where the encoder moves
        start = max(start, unet_steps)
    runtime.compile_nets(nets, run)
    length = min(arch['max_length'], train.width)

    for step in run.steps(start, max_steps):
        # The U-Net alone up to unet_steps, then all nets; the control begins there and has no U-Net to train.
        last, encoder_moves = step == max_steps, step >= unet_steps
        due = step % eval_every == 0 or step == unet_steps or last
        if due:
            nets.eval()
            held_out, metrics = splits['test' if last else 'val'], {}  # as in P1
            with ema.weights():
                if encoder_moves:
                    metrics, ways, rows, V = p5_roundtrip.evaluate(p5_nets, held_out, types, concepts, tokenizer, run,
                                                                   cell, knobs)
                else:
                    V = encode(encoder, held_out.fixed(512), run)
                if lambda_prior:
                    found, texts, sampled = evaluate(nets, V, mean, std, tokenizer, run, cell, length, checked, config)
                    metrics |= found
                arrays = canvas_arrays(encoder, V, tokenizer, run)
                if last:
                    arrays |= p4_decoder.attention_arrays(nets, V[:4], held_out.fixed(4), types, tokenizer, run)
            if encoder_moves:
                evaluations = last_three(evaluations, step, metrics)
            run.log(step, metrics, prefix='val')
            if run.master:
                if lambda_prior:
                    arrays |= {'drawn': torch.cat((sampled[:10], V[:6])), 'drawn_titles': [
                        *(f'drawn: {text}' for text in texts['drawn'][:10]),
                        *(f'painted: {text}' for text in texts['painted'][:6])]}
                if encoder_moves:
                    runtime.write_text(run.dir / 'samples.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
                    plot.samples_table(run.dir)
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        if due or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, metrics, arch, {
                'evaluations': evaluations, 'buffer': buffer, 'oldest': oldest, 'mean': mean, 'std': std,
                'tokenizer': tokenizer.state()})
        if last:
            break

        lr = (runtime.cosine_lr(step - unet_steps, learning_rate, warmup_steps, lr_steps - unet_steps)
              if encoder_moves else 0.0)
        unet_lr = runtime.cosine_lr(step, unet_learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = unet_lr if group['net'] == 'unet' else lr * group['scale']
        nets.train()
        generator = torch.Generator(run.device).manual_seed(1_000_003 * seed + step + 2 * data.SALT)
        terms = {}

        if lambda_prior:                                               # the U-Net on the buffer
            picked = torch.randint(len(buffer), (unet_batch,), generator=generator, device=run.device)
            t = torch.rand(unet_batch, generator=generator, device=run.device)
            noise = torch.randn(unet_batch, *buffer.shape[1:], generator=generator, device=run.device)
            mine = runtime.local_slice(run, unet_batch)
            with run.autocast():
                terms['diffusion'] = diffusion_loss(predict, buffer[picked[mine]], t[mine], noise[mine], min_snr)
            terms['diffusion'].backward()

        if encoder_moves:                                              # the nets of P5, under the U-Net
            whole, meanings, valid, mine = p5_roundtrip.batch(train, seed, step, length, knobs, run, pairs)
            prior_t = t_low + (t_high - t_low) * torch.rand(batch_size, generator=generator, device=run.device)[mine]
            prior_noise = torch.randn(batch_size, *buffer.shape[1:], generator=generator, device=run.device)[mine]

            def forward(part):
                *sentences, t, noise = part
                z, local, found, V = p5_roundtrip.local_losses(p5_nets, sentences, run, cell, run.world * grad_accum,
                                                               knobs)
                V = (V.unflatten(0, (len(t), -1))[:, 0] - mean) / std          # (n, C, H, W): the first of each scene
                some = slice(None, None, max(1, batch_size // prior_rows))     # the same ones however it is split
                with run.autocast():
                    found['prior'] = (prior_loss(predict, V[some], t[some], noise[some]) if lambda_prior
                                      else V.new_zeros(()))
                return z, local + lambda_prior * found['prior'], found

            def loss_of_all(z):
                terms['nce'] = contrast(runtime.gather(z, run), meanings, valid, 3, knobs['temperature'],
                                        knobs['anchors'], knobs['mask_false_negatives'], mine)
                return knobs['lambda_nce'] * terms['nce']

            loss, local_terms = runtime.contrastive_backward(
                forward, lambda part: embed_batch(encoder, readout, part, run), (*whole, prior_t, prior_noise),
                grad_accum, loss_of_all)
            terms |= local_terms
            if lambda_prior:
                # Random sentences: those of the batch are mostly the ones that z confuses.
                with runtime.eagerly():
                    new = encode(encoder.eval(), train.sentences(refresh, seed, step + 3 * data.SALT)[:, 0], run)
                new = (new - mean) / std
                buffer[torch.arange(oldest, oldest + len(new), device=run.device) % len(buffer)] = new
                oldest = (oldest + len(new)) % len(buffer)
        runtime.average_gradients(nets, run)
        norms = [torch.nn.utils.clip_grad_norm_(parameters, grad_clip) for parameters in (
            unet.parameters(), p5_nets.parameters())]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values = {'loss': loss if encoder_moves else terms['diffusion'], 'unet_grad_norm': norms[0], 'lr': lr,
                  'grad_norm': norms[1], 'unet_lr': unet_lr} | terms
        run.watch(step, values)
        if step % log_every == 0:
            run.log(step, values, prefix='train')

    with ema.weights():
        say_held_out(encoder, readout, splits, run)
    if not lambda_prior:
        run.say('this was the control: it has no prior and no gate of its own')
        return
    for name in QUARTERS:
        run.say(f"{name:10s} diffusion loss {metrics[f'diffusion_{name}']:.4f}   "
                f"Wiener filter {metrics[f'wiener_{name}']:.4f}")
    for kind in texts:
        m = {name.removeprefix(f'{kind}_'): value for name, value in metrics.items() if name.startswith(f'{kind}_')}
        run.say(f"{kind:8s} parsed {m.get('parsed', float('nan')):.3f}  distinct {m['distinct']:.3f}  slope "
                f"{sum(m['alpha']) / len(m['alpha']):.2f}  TV {m['tv']:.3f}  kurtosis {min(m['kurtosis']):.1f}  "
                f"lattice {m['lattice']:.2f}")
    for text in texts['drawn'][:8]:
        run.say(f'  drawn: {text}')
    run.say('\ntest scenes             before  with the prior' + '  without' * bool(control_metrics))
    for name in ('prior_spectrum', 'prior_tv', 'prior', 'paraphrase_distance', 'r1', 'r5', 'r1_hard',
                 *(name for name in metrics if name.startswith('gap_'))):
        without = f'{control_metrics[name]:9.3f}' if control_metrics else ''
        run.say(f'{name:20s}{before[name]:10.3f}{metrics[name]:16.3f}{without}')
    runtime.write_gate(run, gate(metrics, before, control_metrics, ways, evaluations, checked))


if __name__ == '__main__':
    main()
