"""P1 · Make the canvas look like a picture.

A text encoder paints each sentence on a canvas V (6, 32, 32), and six image priors hold the canvas to the statistics of
natural images. Priors alone are satisfied by one canvas for all sentences, so a small throwaway decoder also has to
read the sentence back from V (lambda_rec; --lambda_rec=0.0 is the plan to the letter).

Reads:  out/data/ (made on first use)      Writes: out/p1/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p1_canvas.py --batch_size=64
    torchrun --standalone --nproc_per_node=2 p1_canvas.py
"""
import torch
from torch import nn

import data
import plot
import priors
import runtime
from model import BOS, TextDecoder, build_encoder, check_sizes, cross_entropy

out_dir = 'out/p1'        # run folder: checkpoint, metrics, gate, plots
resume = False            # go on from out_dir/ckpt.pt
seed = 0                  # weights, batches, dropout
# data
corpus = ''               # your own sentences (.txt or .jsonl); '' is the built-in grammar
num_scenes = 50_000       # training scenes of the built-in grammar
complexity = 1            # things and relations in a scene, see data.py
simple_share = 0.5        # of the training scenes of complexity 2 and 3: fewer things, learnt first; 0 is the plan
data_seed = 0             # which scenes: the same for every seed, so that seeds differ in training only
max_length = 64           # tokens; longer sentences are an error
# sizes: the plan's. Later phases inherit them from the checkpoint.
vocab_size = 16384        # rows of the embedding and target of the BPE
channels = 6              # C
size = 32                 # H = W
query_grid = 32           # queries a side; fewer than `size` paint a patch each (model.Strokes)
dim = 384                 # D, width of the token states
layers = 6                # transformer blocks over the tokens
heads = 8
hidden = 1536             # FFN width
cross_layers = 2          # blocks in which the queries read the tokens
cross_hidden = 768        # their FFN width
dropout = 0.1
smoothing = False         # depthwise 3x3 + 1x1 head against checkerboards
slots = 0                 # > 0: slot attention and Gaussian splats instead of the query grid (the plan's K = 6)
rec_dim = 256             # width of the throwaway decoder
rec_layers = 2
patch = 1                 # canvas pixels a side in one key of a decoder; 1 is the plan's flattened V
# losses
lambda_spectrum = 0.5     # the six weights are the plan's
lambda_tv = 0.1
lambda_wavelet = 0.1
lambda_gradkurt = 0.05
lambda_cov = 0.05
lambda_var = 0.05
lambda_common = 1.0       # ours: no picture common to all sentences; 0 is the plan
lambda_lattice = 0.05     # ours: the grid of queries does not show through; 0 is the plan
lambda_rec = 1.0          # cross-entropy of reading the sentence from V; 0 is the plan to the letter
prior_gate = 0.5          # nats a token: priors come in once V is read this well (reading first, LOG.md); 0: at once
look_every = 20           # steps between looks at whether they come in: each waits for the device
prior_ramp = 100          # steps over which they come in; 0, at once, is the plan
canvas_noise = 0.3        # sd of the noise on V, whose channels have unit variance, that the throwaway decoder reads
                          # through: without it the priors press what depends on the sentence down to 5% of the canvas
alpha = 2.0               # target slope of the spectrum
prior_samples = 64        # canvases a step (all ranks) that the priors see: a per-sample mean needs no more
blur_steps = 0            # blur V before the priors for their first steps (the plan's warm-up, sigma 0.8 px)
coordinate_steps = 0      # append (x, y) channels to V before the priors for so many steps
# optimisation
batch_size = 256          # sentences a step, all ranks together
grad_accum = 1            # micro-steps that each rank cuts its share into
learning_rate = 2e-4
warmup_steps = 1000
max_steps = 10_000        # stop here
lr_steps = 10_000         # the cosine ends here, at a tenth of the peak
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 500
log_every = 50
device = 'auto'           # cuda, mps or cpu
dtype = 'auto'            # autocast: bfloat16 or float32
compile = True            # torch.compile on CUDA; not on a CPU, which gains 9% at most for minutes of compiling
tensorboard = False       # also write scalars for TensorBoard
config = runtime.configure(globals())


def prior_input(V, step, blur_steps, coordinate_steps):
    """The canvas as the priors see it: blurred, or with (x, y) channels in [-1, 1], for the first steps in which they
    count."""
    if step < blur_steps:
        V = priors.gaussian_blur(V, 0.8)
    if step < coordinate_steps:
        axis = torch.linspace(-1, 1, V.shape[-1], device=V.device)
        xy = torch.stack(torch.meshgrid(axis, axis, indexing='xy'))                   # (2, H, W)
        V = torch.cat((V, xy.expand(len(V), -1, -1, -1)), dim=1)
    return V


def weights(config):
    """The weights of the priors out of a phase's config."""
    return {name: config[f'lambda_{name}'] for name in priors.PRIORS}


def reading_noise(rows, V_shape, seed, step, run):
    """Standard normal noise for the canvases that the throwaway decoder reads, rows (a tuple) of the global batch ->
    (*rows, C, H, W) on the device. A function of seed and step: all ranks and micro-steps cut theirs from the same."""
    generator = torch.Generator(run.device).manual_seed(1_000_003 * seed + step + 4 * data.SALT)
    return torch.randn(*rows, *V_shape, generator=generator, device=run.device)


def reconstruction(decoder, V, z, x, start=BOS):
    """Cross-entropy a token, nats, of the decoder reading x (B, T) from V (and z): a mean over sentences of means over
    tokens, so that splitting a batch does not change it. Of x (B, K, T) and K start tokens: K such means."""
    return (cross_entropy(decoder(x, V, z, start), x).sum(-1) / (x != data.PAD).sum(-1).clamp(min=1)).mean(0)


@torch.no_grad()
def encode(encoder, x, run, batch=256):
    """Sentences (N, T) -> canvases (N, C, H, W), in batches."""
    with run.autocast():
        return torch.cat([encoder(part) for part in x.split(batch)])


def canvas_metrics(V, cell):
    """The statistics of P1's gate from held-out canvases, as plain numbers and lists."""
    return {name: value.tolist() for name, value in priors.statistics(V, cell).items() if name != 'alpha_image'}


@torch.no_grad()
def token_metrics(decoder, V, z, x, types, concepts, run, batch=256):
    """Teacher-forced reading of x (N, T) from V -> cross-entropy and accuracy, exact and by concept (crimson = red),
    over content tokens (colours, shapes, counts, relations) and by type."""
    loss, hit, concept_hit = [], [], []
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        with run.autocast():
            logits = decoder(x[part], V[part], None if z is None else z[part])
        said = logits.argmax(-1)
        loss.append(cross_entropy(logits, x[part]))
        hit.append(said == x[part])
        concept_hit.append(concepts[said] == concepts[x[part]])
    loss, hit, concept_hit = torch.cat(loss), torch.cat(hit).float(), torch.cat(concept_hit).float()
    kind, real = types[x], x != data.PAD
    content = kind > 0
    metrics = {'ce': loss[real].mean(), 'accuracy': hit[real].mean(), 'ce_content': loss[content].mean(),
               'ce_function': loss[real & ~content].mean(), 'content_accuracy': hit[content].mean(),
               'content_concept': concept_hit[content].mean(),
               'sentence_exact': (hit.bool() | ~real).all(1).float().mean()}
    for k, name in enumerate(data.TYPES[1:], start=1):
        metrics[f'accuracy_{name}'], metrics[f'concept_{name}'] = hit[kind == k].mean(), concept_hit[kind == k].mean()
        metrics[f'ce_{name}'] = loss[kind == k].mean()
    return {name: value.item() for name, value in metrics.items()}


def evaluate(encoder, decoder, held_out, types, concepts, run, cell, n=1024):
    """Statistics of the canvases of a held-out split, and how much of the sentence the throwaway decoder
    reads from them."""
    x = held_out.fixed(n)
    V = encode(encoder, x, run)
    metrics = canvas_metrics(V, cell)
    if decoder is not None:
        metrics |= {f'rec_{name}': value
                    for name, value in token_metrics(decoder, V, None, x, types, concepts, run).items()}
    return metrics, V


def canvas_arrays(encoder, V, tokenizer, run):
    """What the figures of P1 are drawn from: the statistics of canvases V, and the fixed sentences as pictures."""
    montage = tokenizer.pad(data.EVAL_SENTENCES, min(24, encoder.max_length)).to(run.device)
    return plot.spectra_arrays(V) | {'montage': encode(encoder, montage, run), 'titles': list(data.EVAL_SENTENCES)}


def last_three(evaluations, step, metrics):
    """What canvas_gate() asks for, with this evaluation at the end. A resumed run repeats its first one."""
    names = 'alpha', 'alpha_hann', 'tv', 'kurtosis', 'max_correlation', 'share_total', 'lattice'
    earlier = [e for e in evaluations if e['step'] < step]
    return [*earlier[-2:], {'step': step} | {name: metrics[name] for name in names}]


def in_band(alphas):
    return sum(1.5 <= a <= 2.5 for a in alphas)


def canvas_gate(history):
    """P1's criteria (DESIGN 8) on the last evaluations; later phases repeat them. history: list of metrics dicts."""
    last, recent = history[-1], history[-3:]
    need = -(-4 * len(last['alpha']) // 6)                                    # 4 of 6 channels
    plain, hann = (min(in_band(m[name]) for m in recent) if len(recent) == 3 else 0 for name in ('alpha', 'alpha_hann'))
    tvs = [m['tv'] for m in recent]
    spread = (max(tvs) - min(tvs)) / max(sum(tvs) / len(tvs), 1e-9)
    return [
        ('channels with slope in [1.5, 2.5], 3 evaluations', f'>= {need}', plain, plain >= need, 'white noise 0'),
        ('the same under a Hann window +', f'>= {need}', hann, hann >= need, 'white noise 0'),
        ('TV per pixel, non-zero', '> 0.01', last['tv'], last['tv'] > 0.01, 'white noise 2.26'),
        ('TV is flat: range over 3 evaluations / mean', '<= 0.10', spread, len(recent) == 3 and spread <= 0.10),
        ('gradient kurtosis, lowest channel', '> 3', min(last['kurtosis']), min(last['kurtosis']) > 3,
         'Gaussian field 3.0'),
        ('largest channel correlation', '<= 0.3', last['max_correlation'], last['max_correlation'] <= 0.3),
        ('share of variance that depends on the sentence +', '>= 0.20', last['share_total'],
         last['share_total'] >= 0.20, 'priors alone 0.00'),
        ('lattice energy +', '<= 2', last['lattice'], last['lattice'] <= 2, '1/f^2 field 1.0')]


def build(arch):
    """The encoder and the throwaway decoder from the sizes in a checkpoint."""
    decoder = TextDecoder(arch['vocab_size'], arch['channels'], arch['size'], arch['patch'], dim=arch['rec_dim'],
                          layers=arch['rec_layers'], hidden=2 * arch['rec_dim'], dropout=arch['dropout'],
                          memory='canvas', max_length=arch['max_length'])
    return {'encoder': build_encoder(arch), 'decoder': decoder}


SIZES = ('vocab_size', 'channels', 'size', 'query_grid', 'dim', 'layers', 'heads', 'hidden', 'cross_layers',
         'cross_hidden', 'dropout', 'smoothing', 'slots', 'max_length', 'rec_dim', 'rec_layers', 'patch')
DATA = ('corpus', 'num_scenes', 'complexity', 'simple_share', 'data_seed', 'vocab_size', 'max_length')


def main():
    check_sizes(config)
    run = runtime.start('p1', config)
    splits, tokenizer = data.load(config, run)
    train = splits['train']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, vocab_size))
    arch = {name: config[name] for name in SIZES} | {'data': {name: config[name] for name in DATA}}
    nets = nn.ModuleDict(build(arch)).to(run.device)
    encoder, decoder = nets.values()
    run.say(f'encoder {runtime.count_parameters(encoder) / 1e6:.1f}M parameters '
            f'({encoder.embedding.weight.numel() / 1e6:.1f}M of them token embeddings), '
            f'throwaway decoder {runtime.count_parameters(decoder) / 1e6:.1f}M; '
            f'{train.size} scenes, {tokenizer.size} tokens')
    optimizer = runtime.adamw(nets, learning_rate, weight_decay)
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics, extra = (state['step'], state['metrics'], state['extra']) if state else (0, {}, {})
    evaluations = extra.get('evaluations', [])
    came_in = extra.get('came_in', None if lambda_rec and prior_gate else 0)      # step at which the priors came in
    rec_mean = torch.tensor(extra.get('rec_mean', 10.0), device=run.device)
    runtime.compile_nets(nets, run)
    cell = size // query_grid

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = splits['test' if last else 'val']      # choices are made on val, never on what the gate sees
            with ema.weights():
                metrics, V = evaluate(encoder, decoder if lambda_rec else None, held_out, types, concepts, run, cell)
                arrays = canvas_arrays(encoder, V, tokenizer, run)
            evaluations = last_three(evaluations, step, metrics)
            run.log(step, metrics, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.mean_over_ranks(rec_mean, run)
            runtime.save(run, step, nets, optimizer, ema, metrics, arch,
                         {'evaluations': evaluations, 'came_in': came_in, 'rec_mean': rec_mean.item(),
                          'tokenizer': tokenizer.state()})
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        mine = runtime.local_slice(run, batch_size)
        x = train.sentences(batch_size, seed, step)[mine, 0]
        noise = reading_noise((batch_size,), (channels, size, size), seed, step, run)[mine]
        stride = max(1, batch_size // prior_samples)      # the priors see the same canvases however the batch is split
        age = 0 if came_in is None else step - came_in        # of the priors, in steps
        ramp = 0.0 if came_in is None else min(1.0, (age + 1) / max(1, prior_ramp))
        values = {}
        for part, eps in zip(x.chunk(grad_accum), noise.chunk(grad_accum)):
            with run.autocast():
                V = encoder(part)
                rec = (reconstruction(decoder, V + canvas_noise * ramp * eps, None, part)
                       if lambda_rec else V.new_zeros(()))
            shown = prior_input(priors.seen(V, stride, len(V)), age, blur_steps, coordinate_steps)
            terms = priors.image_prior_terms(shown, alpha, cell)
            image = priors.image_prior_loss(terms, weights(config))
            loss = ramp * image + lambda_rec * rec
            (loss / grad_accum).backward()
            for name, value in ({'loss': loss, 'image': image, 'rec': rec} | terms).items():
                values[name] = values.get(name, 0.0) + value.detach() / grad_accum
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        rec_mean.lerp_(values['rec'], 0.1)
        values |= {'grad_norm': grad_norm, 'lr': lr}
        run.watch(step, values)
        if step % log_every == 0:
            run.log(step, values, prefix='train')
        if came_in is None and (step % look_every == 0 or step >= lr_steps // 2):
            runtime.mean_over_ranks(rec_mean, run)
            if rec_mean.item() < prior_gate or step >= lr_steps // 2:
                came_in = step + 1
                run.say(f'step {step}: the sentence is read from the canvas at {rec_mean.item():.2f} nats a token; '
                        'the priors come in')

    runtime.write_gate(run, canvas_gate(evaluations))


if __name__ == '__main__':
    main()
