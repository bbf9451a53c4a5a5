"""P1 · Make the canvas look like a picture.

A text encoder paints each sentence on a canvas V (6, 32, 32), and image priors hold the canvas to the statistics of
natural images. Priors alone are satisfied by one canvas for all sentences, so a small auxiliary decoder also has to
read the sentence back from V (lambda_rec; --lambda_rec=0 is the plan to the letter).

Reads:  out/data/ (made on first use)      Writes: out/p1/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p1_canvas.py --batch_size=64
    torchrun --standalone --nproc_per_node=2 p1_canvas.py
"""
import torch
import torch.nn.functional as F

import data
import plot
import priors
import runtime
from metrics import canvas_arrays, canvas_gate, evaluate_canvas, last_evaluations
from model import BOS, build, cross_entropy, similar_lengths, size_error, sizes, trim

# All settings here hold for later phases too, unless one sets them differently.
out_dir = 'out/p1'        # run folder: checkpoint, metrics, gate, plots
resume = False            # go on from out_dir/ckpt.pt
seed = 0                  # weights, batches, dropout
# data
corpus = ''               # your own sentences (.txt or .jsonl); '' is the built-in grammar
num_scenes = 50_000       # >= 1: training scenes of the built-in grammar
complexity = 1            # things and relations in a scene, see data.py
simple_share = 0.5        # of the training scenes of complexity 2 and 3: fewer things, learnt first; 0 is the plan
data_seed = 0             # which scenes: the same for every seed, so that seeds differ in training only
max_length = 64           # tokens; longer sentences are cut
# sizes: the plan's
vocab_size = 16384        # rows of the embedding and target of the BPE
channels = 6              # >= 2: C
size = 32                 # H = W
query_grid = 32           # >= 1: queries a side; fewer than `size` paint a patch each (model.Strokes)
dim = 384                 # D, width of the token states
layers = 6                # >= 1: transformer blocks over the tokens
heads = 8                 # >= 1
hidden = 1536             # >= 1: FFN width
cross_layers = 2          # >= 1: blocks in which the queries read the tokens
cross_hidden = 768        # >= 1: their FFN width
dropout = 0.1             # 0 to 1: of the encoder and the auxiliary decoder
smoothing = False         # depthwise 3x3 + 1x1 head against checkerboards
gist = 0                  # >= 0: the lowest gist x gist frequencies of V also get a picture of the words (English: 4)
aligned = False           # half of the heads between tokens and canvas begin in the order of reading: for English
slots = 0                 # >= 0: slot attention and Gaussian splats instead of the query grid (the plan's K = 6)
rec_dim = 256             # width of the auxiliary decoder
rec_layers = 2            # >= 1
patch = 1                 # >= 1: canvas pixels a side in one key of a decoder; 1 is the plan's flattened V
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
prior_gate = 0.5          # nats a token: priors come in once V is read this well (docs/LOG.md); 0: at once
look_every = 20           # >= 1: steps between looks at whether something begins or ends: each waits for the device
prior_ramp = 100          # steps over which the priors come in; 0, at once, is the plan
canvas_noise = 0.3        # sd of the noise on V, whose channels have unit variance, that the auxiliary decoder reads
                          # through: without it the priors press what depends on the sentence down to 5% of the canvas
# here and in P4, for English
random_tokens = 0.0       # 0 to 1: share of tokens replaced by any other, so that rare words are read too
joined = 0.0              # 0 to 1: share of sentences that another one follows, so that long ones are read too
alpha = 2.0               # target slope of the spectrum
prior_samples = 64        # >= 1: canvases a step (all ranks) that the priors see: a per-sample mean needs no more
blur_steps = 0            # blur V before the priors for their first steps (the plan's warm-up, sigma 0.8 px)
coordinate_steps = 0      # append (x, y) channels to V before the priors for so many steps
# optimisation
batch_size = 256          # >= 1: sentences (P2, P3, P5, P6: scenes) a step, all ranks together
grad_accum = 1            # >= 1: micro-steps that each rank cuts its share into
learning_rate = 2e-4      # >= 0: the peak
warmup_steps = 1000       # >= 0
max_steps = 10_000        # >= 0: stop here
lr_steps = 10_000         # the cosine ends here, at a tenth of the peak
weight_decay = 0.01       # >= 0
grad_clip = 1.0
ema_decay = 0.999         # 0 to 1: of the averaged weights, which every evaluation and later phase uses
eval_every = 500          # >= 1: steps between evaluations, each with figures and a checkpoint
log_every = 50            # >= 1: steps between lines in metrics.jsonl
device = 'auto'           # cuda, mps or cpu
dtype = 'auto'            # autocast: bfloat16 or float32
compile = True            # torch.compile on CUDA; not on a CPU, which gains 9% at most for minutes of compiling
tensorboard = False       # also write scalars for TensorBoard
config = runtime.configure(globals())


def replace_tokens(x, share, vocabulary, generator):
    """Sentences x (B, T) with a `share` of their tokens replaced by random ones of the vocabulary: what a token is
    read by should not be how often it occurs."""
    any_token = torch.randint(data.SPECIALS, vocabulary, x.shape, generator=generator, device=x.device)
    chosen = torch.rand(x.shape, generator=generator, device=x.device) < share
    return any_token.where(chosen & (x >= data.SPECIALS), x)


def join(x, share, longest):
    """Sentences x (B, ..., T), the first `share` of the rows each with the next row's behind it, cut to `longest`
    tokens -> (B, ..., up to 2 T)."""
    B, T = len(x), x.shape[-1]
    place = torch.arange(min(2 * T, longest), device=x.device)                        # (T2,)
    behind = place - (x >= data.SPECIALS).sum(-1, keepdim=True)                       # (B, ..., T2): after the words
    later = x.roll(-1, 0).gather(-1, behind.clamp(0, T - 1)) * (behind < T)
    first = (torch.arange(B, device=x.device) < share * B).view(-1, *[1] * (x.dim() - 1))
    x = later.where(first & (behind >= 0), F.pad(x, (0, len(place) - T)))
    return torch.cat((x[..., :-1], x[..., -1:].where(x[..., -1:] == data.PAD, data.EOS)), dim=-1)


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


def image_loss(V, config):
    """The weighted priors on canvases V -> scalar, {prior: value}."""
    terms = priors.image_prior_terms(V, config.alpha, config.size // config.query_grid)
    return priors.image_prior_loss(terms, {name: config[f'lambda_{name}'] for name in terms}), terms


def reconstruction(decoder, V, z, x, start=BOS):
    """Cross-entropy a token, nats, of the decoder reading x (B, T) from V (and z): a mean over sentences of means over
    tokens, so that splitting a batch does not change it. Of x (B, K, T) and K start tokens: K such means."""
    def read(x, V, z):
        return cross_entropy(decoder(x, V, z, start), x).sum(-1) / (x != data.PAD).sum(-1).clamp(min=1)       # (B, ...)

    parts = similar_lengths(x)
    return torch.cat([read(trim(x[rows]), V[rows], None if z is None else z[rows]) for rows in parts]).mean(0)


def main():
    if error := size_error(config):
        runtime.fail(error)
    run = runtime.start('p1', config, sizes(config))
    text = data.load(config, run)
    train = text.splits['train']
    nets = build(config, 'encoder', 'auxiliary').to(run.device)
    encoder, decoder = nets.encoder, nets.auxiliary
    run.say(f'encoder {runtime.count_parameters(encoder) / 1e6:.1f}M parameters '
            f'({encoder.embedding.weight.numel() / 1e6:.1f}M of them token embeddings), '
            f'auxiliary decoder {runtime.count_parameters(decoder) / 1e6:.1f}M; '
            f'{train.size} scenes, {text.tokenizer.size} tokens')
    optimizer = runtime.adamw(nets, learning_rate, weight_decay)
    ema = runtime.EMA(nets, ema_decay)
    # priors_from: the step at which the priors come in; rec_mean: a running mean of the reconstruction loss
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state(), 'rec_mean': torch.tensor(10.0),
             'priors_from': None if lambda_rec and prior_gate else 0}
    start = runtime.resume(run, nets, optimizer, ema, state)
    rec_mean = state['rec_mean'] = state['rec_mean'].to(run.device)
    runtime.compile_nets(nets, run)
    stride = max(1, batch_size // prior_samples)      # the priors see the same canvases however the batch is split

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = text.splits['test' if last else 'val']      # choices are made on val, not on what the gate sees
            with ema.weights():
                state['metrics'], V = evaluate_canvas(nets, held_out, text, config, run.autocast)
                arrays = canvas_arrays(encoder, V, text, run.autocast)
            run.log(step, state['metrics'], prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.mean_over_ranks(rec_mean, run)
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        rows = runtime.local_slice(run, batch_size)
        x = train.sentences(batch_size, seed, step)[:, 0]
        if joined:
            x = trim(join(x, joined, max_length))
        if random_tokens:
            x = replace_tokens(x, random_tokens, text.tokenizer.size, run.generator(step, 'words', run.device))
        x = x[rows]
        noise = torch.randn(batch_size, channels, size, size, device=run.device,
                            generator=run.generator(step, 'noise', run.device))[rows]
        age = -1 if state['priors_from'] is None else step - state['priors_from']     # of the priors, in steps
        ramp = min(1.0, (age + 1) / max(1, prior_ramp))
        values = {}
        for part, part_noise in zip(x.chunk(grad_accum), noise.chunk(grad_accum)):
            with run.autocast():
                V = encoder(part)
                rec = (reconstruction(decoder, V + canvas_noise * ramp * part_noise, None, part)
                       if lambda_rec else V.new_zeros(()))
            shown = prior_input(priors.seen(V, stride, len(V)), max(0, age), blur_steps, coordinate_steps)
            image, terms = image_loss(shown, config)
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
        if state['priors_from'] is None and (step % look_every == 0 or step >= lr_steps // 2):
            runtime.mean_over_ranks(rec_mean, run)
            if rec_mean.item() < prior_gate or step >= lr_steps // 2:
                state['priors_from'] = step + 1
                late = ' (no better by half of the steps)' * (rec_mean.item() >= prior_gate)
                run.say(f'step {step}: the sentence is read from the canvas at {rec_mean.item():.2f} nats a token{late}; '
                        'the priors come in')

    runtime.write_gate(run, canvas_gate(last_evaluations(run.dir)))


if __name__ == '__main__':
    main()
