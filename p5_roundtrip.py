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

import data
import plot
import priors
import runtime
from english import details_kept
from grammar import graph_f1, parse
from metrics import (READ, attention_arrays, canvas_arrays, canvas_gate, canvas_metrics, embed, encode, graph_metrics,
                     held_out_table, last_evaluations, reading_gate, robustness, semantic_gate, semantic_metrics,
                     shift_gate, shuffle_canvas, token_metrics)
from model import BOS, PARA, build, embed_views, sizes, trim
from p1_canvas import image_loss, reconstruction
from p2_contrast import baselines, contrast, mine_pairs
from p3_jitter import invariance, jitter

out_dir = 'out/p5'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p4/ckpt.pt'   # the phase before; every setting that is not here comes from it
resume = False            # go on from out_dir/ckpt.pt
# round trip
best_of_k = 4             # >= 1: free-run candidates of a sentence
top_p = 0.9               # 0 to 1: nucleus they are drawn from
generated = 64            # >= 1: sentences a step (all ranks) that go round
lambda_dec = 0.7          # the plan's gamma: says the sentence again, and, for paraphrase_share of it, a paraphrase
lambda_cycle = 0.2        # the plan's delta: 1 - cos(g(V(x)), g(V(candidate)))
lambda_copy = 0.1         # the plan's rho: unlikelihood of tokens that complete a copied n-gram
copy_ngram = 4            # shortest run of tokens that counts as copied
dec_samples = 128         # >= 1: sentences a step (all ranks) for lambda_dec, at least one a scene
# optimisation
learning_rate = 1e-4      # >= 0: of the decoder
encoder_scale = 0.2       # encoder and readout learn at this fraction of it
warmup_steps = 100
max_steps = 3_000
lr_steps = 3_000
eval_every = 500
config = runtime.configure(globals(), after='p4')

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


def start_token(config):
    """What a free run starts with: a decoder that was taught no paraphrases says the sentence again."""
    return PARA if config.paraphrase_share else BOS


@torch.no_grad()
def candidates(nets, V, z, u, config):
    """k free-run sentences of each canvas, all in one batch -> ids (B, k, length), their cosine with z (B, k).
    u (B, k, length) uniform numbers."""
    B, k, length = u.shape
    y = nets['decoder'].generate(V, z, length, start_token(config), config.top_p, u.flatten(0, 1))
    z_y = nets['readout'](nets['encoder'](trim(y)))
    return y.unflatten(0, (B, k)), (z_y.unflatten(0, (B, k)) * z[:, None]).sum(-1)


def round_trip(nets, x, V, z, u, config):
    """-> (L_cycle, L_copy) of the best of k candidates of each x (B, T); u (B, k, L)."""
    nets.eval()
    y, cosine = candidates(nets, V.detach(), z.detach(), u, config)
    nets.train()
    y = trim(y[torch.arange(len(y), device=y.device), cosine.argmax(1)])              # (B, L)
    logits = nets['decoder'](y, V, z, start_token(config))
    z_again = nets['readout'](nets['encoder'](y, soft=straight_through(logits, y)))
    cycle = 1 - (z_again * z.detach()).sum(-1).mean()
    return cycle, copy_suppression(logits.log_softmax(-1), y, x, config.copy_ngram, u.shape[2])


def draw_batch(corpus, config, run, step, length, pairs):
    """A step's batch with the random numbers of the jitter (N, K, views, 7) and of the free run (N, trips, k, length):
    trips sentences of a scene go round."""
    batch = corpus.contrast_batch(config, run, step, pairs=pairs)
    n, (K, views), generator = config.batch_size, batch.x.shape[1:3], run.generator(step, 'jitter')
    trips = min(max(1, config.generated // n), K)
    return batch.with_draws(jitter=torch.rand(n, K, views, 7, generator=generator),
                            free_run=torch.rand(n, trips, config.best_of_k, length, generator=generator))


def local_losses(nets, part, config, parts, autocast):
    """All losses of P1 to P5 that need no other sentence, on one of `parts` parts of a batch -> z (n, K, views, E),
    loss, {term: scalar}, V (n*K*views, C, H, W)."""
    x, u_free, share, n = part.x.flatten(0, 2), part.draws['free_run'], config.paraphrase_share, config.batch_size
    encoder, readout, decoder = nets['encoder'], nets['readout'], nets['decoder']
    with autocast():
        V = encoder(x)
        z = readout(V)
        z_jittered = readout(jitter(V, part.draws['jitter'].flatten(0, 2), config))
        row = torch.arange(len(x), device=x.device)
        paraphrase = row ^ 1                                                          # views are paired
        sentences = len(x) // len(part.x)                                             # of a scene
        read = data.spread(part.index, sentences, min(sentences, max(1, config.dec_samples // n)))
        if share:
            again, para = reconstruction(decoder, V[read], z[read], torch.stack((x[read], x[paraphrase[read]]), 1),
                                         (BOS, PARA))
        else:
            again, para = reconstruction(decoder, V[read], z[read], x[read]), z.new_zeros(())
        every = max(1, n // config.generated)                                         # one scene of so many goes round
        tripping = row.view(part.x.shape[:3])[::every, :u_free.shape[1], 0].flatten()
        cycle, copy = round_trip(nets, x[tripping], V[tripping], z[tripping], u_free[::every].flatten(0, 1), config)
    z, z_jittered = (e.unflatten(0, part.x.shape[:3]) for e in (z, z_jittered))
    inv = invariance(z_jittered, z)
    stride = max(1, n // config.prior_samples)      # the priors see the same canvases however the batch is split
    shown = priors.seen(V[read], stride, config.prior_samples // parts)
    image, terms = image_loss(shown, config)
    loss = (image + config.lambda_inv * inv + config.lambda_dec * ((1 - share) * again + share * para)
            + config.lambda_cycle * cycle + config.lambda_copy * copy)
    return z, loss, terms | {'again': again, 'para': para, 'inv': inv, 'cycle': cycle, 'copy': copy}, V


def paraphrase_metrics(texts, originals, cosines, checked):
    """What P5's gate asks of one way of decoding. Without a checker: whether numbers, colours and negation are those of
    the original."""
    rouge = [ROUGE.score(a, b)['rougeL'].fmeasure for a, b in zip(originals, texts)]
    spans = [[set(pairwise(text.split())) for text in pair] for pair in zip(originals, texts)]
    bigrams = [len(source & said) / len(said) for source, said in spans if said]          # share of them that is copied
    meaning = graph_metrics(texts, originals) if checked else {
        f'same_{name}': share for name, share in details_kept(originals, texts).items()}
    return meaning | {
        'rouge_l': sum(rouge) / len(rouge), 'cosine': sum(cosines) / len(cosines),
        'bigrams': sum(bigrams) / max(1, len(bigrams)),
        'distinct': sum(a != b for a, b in zip(originals, texts)) / len(texts)}


@torch.no_grad()
def evaluate_paraphrases(nets, x, text, config, length, autocast):
    """Held-out x (N, T) -> ({way of decoding: metrics}, rows for samples.jsonl). Ways: greedy, one sample, best of k by
    cosine (the model's own choice), best of k by Graph F1 (an oracle), and copying the input."""
    originals, k = [text.tokenizer.decode(row) for row in x.tolist()], config.best_of_k
    ys, cosines = [], []                                                              # k samples, then the greedy one
    generator = torch.Generator().manual_seed(0)
    for part in x.split(128):
        u = torch.rand(len(part), k, length, generator=generator).to(x.device)
        with autocast():
            V = nets['encoder'](part)
            z = nets['readout'](V)
            y, cosine = candidates(nets, V, z, u, config)
            greedy = nets['decoder'].generate(V, z, length, start_token(config))
            greedy_cosine = (nets['readout'](nets['encoder'](trim(greedy))) * z).sum(-1)
        ys.append(torch.cat((y, greedy[:, None]), 1)), cosines.append(torch.cat((cosine, greedy_cosine[:, None]), 1))
    said = [[text.tokenizer.decode(ids) for ids in row] for row in torch.cat(ys).tolist()]
    cosine = torch.cat(cosines).tolist()
    best = [max(range(k), key=row.__getitem__) for row in cosine]
    truth = [parse(sentence) if text.checked else None for sentence in originals]

    def chosen(index):
        return paraphrase_metrics([row[i] for row, i in zip(said, index)], originals,
                                  [row[i] for row, i in zip(cosine, index)], text.checked)

    ways = {'best of k': chosen(best), 'greedy': chosen([k] * len(said)), 'one sample': chosen([0] * len(said))}
    if text.checked:
        ways['oracle of k'] = chosen([max(range(k), key=lambda c: graph_f1(t, parse(row[c])))
                                      for t, row in zip(truth, said)])
    ways['copy the input'] = paraphrase_metrics(originals, originals, [1.0] * len(originals), text.checked)
    ways['best of k']['distinct_candidates'] = sum(len(set(row[:k])) for row in said) / (k * len(said))
    rows = [{'input': o, 'paraphrase': row[i], 'f1': t and graph_f1(t, parse(row[i])),
             'rouge_l': ROUGE.score(o, row[i])['rougeL'].fmeasure, 'cosine': c[i]}
            for o, t, row, i, c in zip(originals, truth, said, best, cosine)]
    return ways, rows


def evaluate(nets, held_out, text, config, autocast):
    """Everything that the gates of P1 to P5 ask of one checkpoint, on a held-out split -> (metrics, ways, rows, V)."""
    x, decoder, cell = held_out.fixed(READ), nets['decoder'], config.size // config.query_grid
    metrics = semantic_metrics(lambda x: embed(nets, x, autocast), held_out)
    if not text.checked:
        metrics['r1_tfidf'] = baselines(text, held_out)['TF-IDF']['r1']
    V, z = encode(nets['encoder'], x, autocast), embed(nets, x, autocast)
    metrics |= canvas_metrics(V, cell) | robustness(nets, x, config, autocast)
    metrics |= token_metrics(decoder, V, z, x, text, autocast)
    shuffled = token_metrics(decoder, shuffle_canvas(V), z, x, text, autocast)
    metrics['shuffle_ce_rise'] = shuffled['ce'] / metrics['ce'] - 1
    image, terms = image_loss(V, config)
    metrics |= {f'prior_{name}': value.item() for name, value in terms.items()} | {'prior': image.item()}
    length = min(held_out.width, decoder.position.num_embeddings)
    ways, rows = evaluate_paraphrases(nets, x, text, config, length, autocast)
    one = {'graph_f1_one': ways['one sample']['graph_f1']} if text.checked else {}
    return metrics | ways['best of k'] | one, ways, rows, V


def gate(ways, metrics, evaluations, checked):
    """P5's criteria (docs/PLAN.md) for the best of k, the other ways of decoding beside it; then those of P1 to P4 once
    more, so that the table says whether one checkpoint passes them all."""
    m = ways['best of k']
    words = {} if checked else {'TF-IDF': {'r1': metrics['r1_tfidf']}}
    earlier = (canvas_gate(evaluations) + semantic_gate(metrics, words, checked) + shift_gate(metrics)
               + reading_gate(metrics, checked))

    def beside(key):
        return ', '.join(f'{way} {values[key]:.2f}' for way, values in ways.items()
                         if way != 'best of k' and key in values)

    meaning = ([('Graph F1', '>= 0.85', m['graph_f1'], m['graph_f1'] >= 0.85, beside('graph_f1'))] if checked else
               [(f'same {name[5:]}, of sentences with any +', '>= 0.90', m[name], m[name] >= 0.90, beside(name))
                for name in m if name.startswith('same_')])
    return meaning + [('ROUGE-L', '<= 0.55', m['rouge_l'], m['rouge_l'] <= 0.55, beside('rouge_l')),
                    ('round-trip cosine', '>= 0.90', m['cosine'], m['cosine'] >= 0.90, beside('cosine'))] + [
                        (f'still: {name}', *rest) for name, *rest in earlier]


def main():
    run = runtime.start('p5', config, sizes(config))
    previous = runtime.inherit(run)
    text = data.load(config, run, previous)
    train = text.splits['train']
    nets = build(config, 'encoder', 'readout', 'decoder').to(run.device)
    runtime.load_weights(nets.eval(), previous, nets)
    pairs = mine_pairs(nets, train, run) if config.mine_at_start else None
    optimizer = runtime.adamw(nets, learning_rate, config.weight_decay,
                              scale={'encoder': encoder_scale, 'readout': encoder_scale})
    ema = runtime.EMA(nets, config.ema_decay)
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state()}
    start = runtime.resume(run, nets, optimizer, ema, state)
    runtime.compile_nets(nets, run)
    length = min(config.max_length, train.width)

    def embed_part(part):
        """z of a part of a batch: the first thing that forward() does, for gradient caching."""
        with run.autocast():
            return embed_views(nets, part.x)

    def forward(part):
        """A part of a batch -> z (n, K, views, E), the losses that need no other sentence, and their terms."""
        return local_losses(nets, part, config, run.world * config.grad_accum, run.autocast)[:3]

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
                state['metrics'], ways, rows, V = evaluate(nets, held_out, text, config, run.autocast)
                arrays = canvas_arrays(nets.encoder, V, text, run.autocast)
                if last:      # drawing it takes two seconds
                    arrays |= attention_arrays(nets, V[:4], held_out.fixed(4), text, run.autocast)
            run.log(step, state['metrics'], prefix='val')
            if run.master:
                runtime.write_text(run.dir / 'samples.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
                plot.evaluation(run.dir, step, arrays)
                plot.samples_table(run.dir)
                plot.trends(run.dir)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        batch = draw_batch(train, config, run, step, length, pairs)
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
    for way, m in ways.items():
        meaning = (f"Graph F1 {m['graph_f1']:.3f}  exact {m['graph_exact']:.3f}  unreadable {m['unreadable']:.3f}"
                   if text.checked else '  '.join(f'{name} {m[name]:.3f}' for name in m if name.startswith('same_')))
        run.say(f"{way:16s} {meaning}  ROUGE-L {m['rouge_l']:.3f}  cosine {m['cosine']:.3f}  "
                f"not the input {m['distinct']:.3f}")
    for row in rows[:8]:
        run.say(f"  {row['input']}\n    -> {row['paraphrase']}   F1 {plot.number(row['f1'], '.2f')}  "
                f"ROUGE-L {row['rouge_l']:.2f}  cosine {row['cosine']:.2f}")
    runtime.write_gate(run, gate(ways, state['metrics'], last_evaluations(run.dir), text.checked))


if __name__ == '__main__':
    main()
