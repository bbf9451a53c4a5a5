"""P5 · Say it in other words.

The encoder thaws at a small learning rate. The decoder goes on saying the sentence again (BOS) and saying other
sentences of the same scene (PARA). Of k free-run candidates the one whose canvas means most nearly the same is chosen;
it is encoded again and pulled to the meaning of the input (L_cycle, through the straight-through gradient of its
tokens), and tokens that complete a long n-gram of the input are made less likely (L_copy).

Reads:  out/p4/ckpt.pt      Writes: out/p5/ckpt.pt, run.json, metrics.jsonl, gate.json, samples.jsonl, plots/
    python p5_roundtrip.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p5_roundtrip.py
"""
import json
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

import data
import p4_decoder
import plot
import priors
import runtime
from model import BOS, PARA, trim
from p1_canvas import (canvas_arrays, canvas_gate, canvas_metrics, encode, last_three, reconstruction, token_metrics,
                       weights)
from p2_contrast import confused_pairs, contrast, embed, embed_batch, say_held_out, semantic_gate, semantic_metrics
from p3_jitter import jitter, robustness, shift_gate
from p4_decoder import graph_metrics, reading_gate

out_dir = 'out/p5'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p4/ckpt.pt'   # the phase before
resume = False            # go on from out_dir/ckpt.pt
seed = 0
# round trip
best_of_k = 4             # free-run candidates of a sentence
top_p = 0.9               # nucleus they are drawn from
generated = 64            # sentences a step (all ranks) that go round
lambda_dec = 0.7          # the plan's gamma: says the sentence again, and says a paraphrase
lambda_cycle = 0.2        # the plan's delta: 1 - cos(g(V(x)), g(V(candidate)))
lambda_copy = 0.1         # the plan's rho: unlikelihood of tokens that complete a copied n-gram
copy_ngram = 4            # shortest run of tokens that counts as copied
paraphrase_share = 0.5    # of lambda_dec that goes to paraphrases; 0 is the plan to the letter (only x1 itself)
# what goes on from P3
lambda_inv = 0.2
jitter_prob = 0.5
max_shift = 2
blur_sigma = 0.8
cutout = 6
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
alpha = 2.0
prior_samples = 64
dec_samples = 128         # sentences a step (all ranks) for lambda_dec, at least one a scene
# optimisation
batch_size = 256          # scenes a step, all ranks together
grad_accum = 1            # micro-steps, by gradient caching
learning_rate = 1e-4      # of the decoder
encoder_scale = 0.2       # encoder and readout learn at this fraction of it
warmup_steps = 100
max_steps = 3_000
lr_steps = 3_000
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 500
log_every = 25
device = 'auto'
dtype = 'auto'
compile = True
tensorboard = False
config = runtime.configure(globals())

# Text is normalised already; its own tokenizer knows ASCII alone.
ROUGE = RougeScorer(['rougeL'], tokenizer=SimpleNamespace(tokenize=str.split))


def copied(y, x, n):
    """Which tokens of y (B, L) complete an n-gram that also stands in x (B, T) -> (B, L) bool."""
    if min(y.shape[1], x.shape[1]) < n:                                               # a corpus of very short sentences
        return torch.zeros_like(y, dtype=torch.bool)
    spans, source = y.unfold(1, n, 1), x.unfold(1, n, 1)                              # (B, L-n+1, n), (B, T-n+1, n)
    same = (spans[:, :, None] == source[:, None]).all(-1).any(-1)                     # (B, L-n+1)
    return F.pad(same, (n - 1, 0)) & (y >= data.SPECIALS)


def copy_suppression(log_p, y, x, n, length):
    """Unlikelihood (Welleck et al. 2020) of copied n-grams: -log(1 - p) at the tokens that complete one, a mean
    over the `length` tokens that may be said and over sentences. log_p (B, L, vocab) of the decoder on its own sample
    y (B, L)."""
    p = log_p.gather(2, y[:, :, None])[:, :, 0].exp()
    return (-torch.log1p(-p.clamp(max=1 - 1e-4)) * copied(y, x, n)).sum(1).mean() / length


def straight_through(logits, y):
    """One-hot rows of y (B, L) forward, the softmax of logits (B, L, vocab) backward; padding stays zero."""
    soft = logits.softmax(-1)
    hard = F.one_hot(y, logits.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach()) * (y != data.PAD)[:, :, None]


@torch.no_grad()
def candidates(nets, V, z, k, length, top_p, u, start=PARA):
    """k free-run sentences of each canvas, all in one batch -> ids (B, k, length), their cosine with z (B, k).
    u (B, k, length) uniform numbers."""
    B = len(V)
    y = nets['decoder'].generate(V, z, length, start, top_p, u.flatten(0, 1))
    z_y = nets['readout'](nets['encoder'](trim(y)))
    return y.unflatten(0, (B, k)), (z_y.unflatten(0, (B, k)) * z[:, None]).sum(-1)


def round_trip(nets, x, V, z, k, top_p, u, n, start=PARA):
    """-> (L_cycle, L_copy) of the best of k candidates of each x (B, T); u (B, k, L)."""
    nets.eval()
    y, cosine = candidates(nets, V.detach(), z.detach(), k, u.shape[2], top_p, u, start)
    nets.train()
    y = trim(y[torch.arange(len(y), device=y.device), cosine.argmax(1)])              # (B, L)
    logits = nets['decoder'](y, V, z, start)
    again = nets['readout'](nets['encoder'](y, soft=straight_through(logits, y)))
    cycle = 1 - (again * z.detach()).sum(-1).mean()
    return cycle, copy_suppression(logits.log_softmax(-1), y, x, n, u.shape[2])


def paraphrase_metrics(texts, originals, cosines):
    """What P5's gate asks of one way of decoding."""
    rouge = [ROUGE.score(a, b)['rougeL'].fmeasure for a, b in zip(originals, texts)]
    spans = [[set(pairwise(text.split())) for text in pair] for pair in zip(originals, texts)]
    bigrams = [len(theirs & ours) / len(ours) for theirs, ours in spans if ours]          # share of ours that is copied
    return graph_metrics(texts, originals) | {
        'rouge_l': sum(rouge) / len(rouge), 'cosine': sum(cosines) / len(cosines),
        'bigrams': sum(bigrams) / max(1, len(bigrams)),
        'distinct': sum(a != b for a, b in zip(originals, texts)) / len(texts)}


@torch.no_grad()
def evaluate_paraphrases(nets, x, tokenizer, run, k, top_p, length, start=PARA):
    """Held-out x (N, T) -> ({way of decoding: metrics}, rows for samples.jsonl). Ways: greedy, one sample, best of k by
    cosine (the model's own choice), best of k by Graph F1 (an oracle), and copying the input."""
    originals = [tokenizer.decode(row) for row in x.tolist()]
    ys, cosines = [], []                                                              # k samples, then the greedy one
    generator = torch.Generator().manual_seed(0)
    for part in x.split(128):
        u = torch.rand(len(part), k, length, generator=generator).to(x.device)
        with run.autocast():
            V = nets['encoder'](part)
            z = nets['readout'](V)
            y, cosine = candidates(nets, V, z, k, length, top_p, u, start)
            greedy = nets['decoder'].generate(V, z, length, start)
            greedy_cosine = (nets['readout'](nets['encoder'](trim(greedy))) * z).sum(-1)
        ys.append(torch.cat((y, greedy[:, None]), 1)), cosines.append(torch.cat((cosine, greedy_cosine[:, None]), 1))
    texts, cosine = [[tokenizer.decode(c) for c in row] for row in torch.cat(ys).tolist()], torch.cat(cosines).tolist()
    best = [max(range(k), key=row.__getitem__) for row in cosine]
    truth = [data.parse(text) for text in originals]
    oracle = [max(range(k), key=lambda c: data.graph_f1(t, data.parse(row[c]))) for t, row in zip(truth, texts)]

    def chosen(index):
        return paraphrase_metrics([row[i] for row, i in zip(texts, index)], originals,
                                  [row[i] for row, i in zip(cosine, index)])

    ways = {'best of k': chosen(best), 'greedy': chosen([k] * len(texts)),
            'one sample': chosen([0] * len(texts)), 'oracle of k': chosen(oracle),
            'copy the input': paraphrase_metrics(originals, originals, [1.0] * len(originals))}
    ways['best of k']['distinct_candidates'] = sum(len(set(row[:k])) for row in texts) / (k * len(texts))
    rows = [{'input': o, 'paraphrase': row[i], 'f1': t and data.graph_f1(t, data.parse(row[i])),
             'rouge_l': ROUGE.score(o, row[i])['rougeL'].fmeasure, 'cosine': c[i]}
            for o, t, row, i, c in zip(originals, truth, texts, best, cosine)]
    return ways, rows


def evaluate(nets, held_out, types, concepts, tokenizer, run, cell, knobs):
    """Everything that the gates of P1 to P5 ask of one checkpoint, on a held-out split -> (metrics, ways, rows, V)."""
    encoder, readout, decoder, x = nets['encoder'], nets['readout'], nets['decoder'], held_out.fixed(512)
    metrics = semantic_metrics(lambda x: embed(encoder, readout, x, run), held_out)
    V, z = encode(encoder, x, run), embed(encoder, readout, x, run)
    metrics |= canvas_metrics(V, cell) | robustness(encoder, readout, x, run, knobs['max_shift'],
                                                    knobs['blur_sigma'], knobs['cutout'])
    metrics |= token_metrics(decoder, V, z, x, types, concepts, run)
    shuffled = token_metrics(decoder, p4_decoder.shuffle_canvas(V), z, x, types, concepts, run)
    metrics['shuffle_ce_rise'] = shuffled['ce'] / metrics['ce'] - 1
    terms = priors.image_prior_terms(V, knobs['alpha'], cell)
    metrics |= {f'prior_{name}': value.item() for name, value in terms.items()}
    metrics['prior'] = priors.image_prior_loss(terms, weights(knobs)).item()
    ways, rows = evaluate_paraphrases(nets, x, tokenizer, run, knobs['best_of_k'], knobs['top_p'],
                                      min(held_out.width, decoder.position.num_embeddings), start_token(knobs))
    return metrics | ways['best of k'] | {'graph_f1_one': ways['one sample']['graph_f1']}, ways, rows, V


def start_token(knobs):
    """What the free run starts with: a decoder that was taught no paraphrases says the sentence again."""
    return PARA if knobs['paraphrase_share'] else BOS


def batch(corpus, seed, step, length, knobs, run, pairs=None):
    """A step's batch on this rank's device -> (of its own n scenes: sentences x (n, K, views, T), uniform numbers of
    the jitter (n, K, views, 7) and of the free run (n, trips, k, length), which scenes of the batch they are (n,)); and
    what the contrast wants to know of all N: meanings and valid (N, K), and the slice of its own."""
    n = knobs['batch_size']
    scenes, variants, views, valid = corpus.contrast_batch(n, seed, step, 3, knobs['negatives'], knobs['leave_out'],
                                                           pairs)
    generator = torch.Generator().manual_seed(1_000_003 * seed + step + data.SALT)
    u = torch.rand(*views.shape, 7, generator=generator)
    trips = min(max(1, knobs['generated'] // n), views.shape[1])                      # sentences a scene that go round
    u_trip, mine = torch.rand(n, trips, knobs['best_of_k'], length, generator=generator), runtime.local_slice(run, n)
    x = corpus.take(scenes[mine, :, None], variants[mine, :, None], views[mine])
    u, u_trip, valid, scenes, variants = (t.to(run.device, non_blocking=True)
                                          for t in (u[mine], u_trip[mine], valid, scenes, variants))
    index = torch.arange(n, device=run.device)[mine]
    return (x, u, u_trip, index), corpus.meanings[scenes, variants], valid, mine


def local_losses(nets, part, run, cell, parts, knobs):
    """All losses of P1 to P5 that need no other sentence. part: as from batch(); parts: how many such parts all ranks
    and micro-steps make. -> z (n, K, views, E), loss, {term: scalar}, V (n*K*views, C, H, W)."""
    x, u, u_trip, index = part
    encoder, readout, decoder, share, flat = (nets['encoder'], nets['readout'], nets['decoder'],
                                              knobs['paraphrase_share'], x.flatten(0, 2))
    with run.autocast():
        V = encoder(flat)
        z = readout(V)
        jittered = readout(jitter(V, u.flatten(0, 2), knobs['jitter_prob'], knobs['max_shift'], knobs['blur_sigma'],
                                  knobs['cutout']))
        rows = torch.arange(len(flat), device=flat.device)
        other = rows ^ 1                                                              # its paraphrase: views are paired
        each = x.shape[1] * x.shape[2]                                                # sentences of a scene
        some = data.spread(index, each, min(each, max(1, knobs['dec_samples'] // knobs['batch_size'])))
        if share:
            again, para = reconstruction(decoder, V[some], z[some], torch.stack((flat[some], flat[other[some]]), 1),
                                         (BOS, PARA))
        else:
            again, para = reconstruction(decoder, V[some], z[some], flat[some]), z.new_zeros(())
        every = max(1, knobs['batch_size'] // knobs['generated'])                     # one scene of so many goes round
        tripping = rows.view(x.shape[:3])[::every, :u_trip.shape[1], 0].flatten()
        cycle, copy = round_trip(nets, flat[tripping], V[tripping], z[tripping], knobs['best_of_k'], knobs['top_p'],
                                 u_trip[::every].flatten(0, 1), knobs['copy_ngram'], start_token(knobs))
    z, jittered = z.unflatten(0, x.shape[:3]), jittered.unflatten(0, x.shape[:3])
    inv = (jittered[:, :, 0] - z[:, :, 1]).square().sum(-1).mean()                    # |g(T(V(x1))) - g(V(x2))|^2
    stride = max(1, knobs['batch_size'] // knobs['prior_samples'])      # the same canvases however the batch is split
    seen = priors.seen(V[some], stride, knobs['prior_samples'] // parts)
    terms = (priors.image_prior_terms(seen, knobs['alpha'], cell)
             | {'again': again, 'para': para, 'inv': inv, 'cycle': cycle, 'copy': copy})
    loss = (priors.image_prior_loss(terms, weights(knobs)) + knobs['lambda_inv'] * inv
            + knobs['lambda_dec'] * ((1 - share) * again + share * para)
            + knobs['lambda_cycle'] * cycle + knobs['lambda_copy'] * copy)
    return z, loss, terms, V


def gate(ways, metrics, evaluations, checked):
    """P5's criteria (DESIGN 8) for the best of k, the other ways of decoding beside it; then those of P1 to P4 once
    more, so that the table says whether one checkpoint passes them all."""
    m = ways['best of k']
    earlier = (canvas_gate(evaluations) + semantic_gate(metrics, {}) + shift_gate(metrics)
               + reading_gate(metrics, checked))

    def beside(key):
        return ', '.join(f'{way} {values[key]:.2f}' for way, values in ways.items() if way != 'best of k')

    graph = [('Graph F1', '>= 0.85', m['graph_f1'], m['graph_f1'] >= 0.85, beside('graph_f1'))] if checked else []
    return graph + [('ROUGE-L', '<= 0.55', m['rouge_l'], m['rouge_l'] <= 0.55, beside('rouge_l')),
                    ('round-trip cosine', '>= 0.90', m['cosine'], m['cosine'] >= 0.90, beside('cosine'))] + [
                        (f'still: {name}', *rest) for name, *rest in earlier]


def main():
    data.check_families(leave_out, negatives)
    run = runtime.start('p5', config)
    previous = runtime.inherit(run, init_from, 'p4', 'python p4_decoder.py')
    arch = previous['arch']
    splits, tokenizer = data.load(arch['data'], run, previous)
    train, checked = splits['train'], not arch['data']['corpus']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = nn.ModuleDict(p4_decoder.build(arch, controls=False)).to(run.device)
    encoder, readout, decoder = nets.values()
    runtime.load_weights(nets.eval(), previous, nets)
    pairs = (confused_pairs(lambda x: embed(encoder, readout, x, run), train, run)
             if mine_pairs and train.canonical else None)      # as in P2
    cell = arch['size'] // arch['query_grid']
    optimizer = runtime.adamw(nets, learning_rate, weight_decay,
                              scale={'encoder': encoder_scale, 'readout': encoder_scale})
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics = (state['step'], state['metrics']) if state else (0, {})
    evaluations = state['extra']['evaluations'] if state else []
    runtime.compile_nets(nets, run)
    length = min(arch['max_length'], train.width)

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = splits['test' if last else 'val']      # as in P1
            with ema.weights():
                metrics, ways, rows, V = evaluate(nets, held_out, types, concepts, tokenizer, run, cell, config)
                arrays = canvas_arrays(encoder, V, tokenizer, run)
                if last:      # drawing it takes two seconds
                    arrays |= p4_decoder.attention_arrays(nets, V[:4], held_out.fixed(4), types, tokenizer, run)
            evaluations = last_three(evaluations, step, metrics)
            run.log(step, metrics, prefix='val')
            if run.master:
                runtime.write_text(run.dir / 'samples.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
                plot.evaluation(run.dir, step, arrays)
                plot.samples_table(run.dir)
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
        whole, meanings, valid, mine = batch(train, seed, step, length, config, run, pairs)
        terms = {}

        def forward(part):
            return local_losses(nets, part, run, cell, run.world * grad_accum, config)[:3]

        def loss_of_all(z):
            Z = runtime.gather(z, run)
            terms['nce'] = contrast(Z, meanings, valid, 3, temperature, anchors, mask_false_negatives, mine)
            return lambda_nce * terms['nce']

        loss, local_terms = runtime.contrastive_backward(
            forward, lambda part: embed_batch(encoder, readout, part, run), whole, grad_accum, loss_of_all)
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
    for way, m in ways.items():
        run.say(f"{way:16s} Graph F1 {m['graph_f1']:.3f}  exact {m['graph_exact']:.3f}  ROUGE-L {m['rouge_l']:.3f}  "
                f"cosine {m['cosine']:.3f}  not the input {m['distinct']:.3f}  unreadable {m['unreadable']:.3f}")
    for row in rows[:8]:
        run.say(f"  {row['input']}\n    -> {row['paraphrase']}   F1 {plot.number(row['f1'], '.2f')}  "
                f"ROUGE-L {row['rouge_l']:.2f}  cosine {row['cosine']:.2f}")
    runtime.write_gate(run, gate(ways, metrics, evaluations, checked))


if __name__ == '__main__':
    main()
