"""P2 · Give the canvas a meaning by contrast.

Paraphrases of a scene are pulled together in z = g(V), other scenes and constructed counterfactuals are pushed apart
(InfoNCE), while the image priors and the reading of V go on. The plan's free paraphrases alone teach a bag of words,
because "A on B" / "B under A" against "B on A" is an XOR; so the paraphrases come in three stages (staged=false is the
plan): canonical direction only, then free paraphrases pulled to canonical ones, then everything free. From then on most
of a batch are pairs of scenes that z itself confuses (mine_every=0 is the plan). Scenes of more than two things go
through the same stages once those of two things are mastered.

Reads:  out/p1/ckpt.pt      Writes: out/p2/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p2_contrast.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p2_contrast.py
"""
import torch
import torch.nn.functional as F
from torch import nn

import data
import plot
import priors
import runtime
import p1_canvas
from model import build_readout
from p1_canvas import canvas_arrays, canvas_gate, last_three, reading_noise, reconstruction, weights

out_dir = 'out/p2'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p1/ckpt.pt'   # the phase before
resume = False            # go on from out_dir/ckpt.pt
seed = 0
z_dim = 256               # E, size of the sentence embedding
readout_hidden = 512
pyramid = True            # pool V over 1x1, 2x2 and 4x4 cells; false is the plan's global mean and variance
# contrast
lambda_nce = 1.0          # the plan's alpha
temperature = 0.07
negatives = 2             # counterfactuals of each scene in the batch; 0: other batch items only
anchors = True            # counterfactuals have paraphrases of their own; false: they are negatives only (the plan)
mask_false_negatives = True   # rows that mean the same are never negatives of each other
mine_every = 500          # steps between searches for the scenes that z confuses, which then fill most of the batch
                          # (from stage 3 on); 0 is the plan
leave_out = 'count'       # a counterfactual family that is never constructed, to ask what teaches it then: the others,
                          # or the mined pairs, which may differ in it; '' for none
staged = True             # canonical first (see above); false is the plan
stage1_ends = 0.95        # share of swaps beaten in the batch at which stage 1 ends
stage2_ends = 0.90        # the same for stage 2: at 0.70 one seed of three never got past a swap gap of 0.18
more_come_in = 0.95       # the same at which scenes of the fewest things are mastered; the others begin with stage 1
look_every = 20           # steps between looks at whether a stage ends: each waits for the device
lambda_vicreg = 0.0       # variance + covariance of z (VICReg), against collapse
lambda_barlow = 0.0       # cross-correlation of the two views towards the identity (Barlow Twins)
# what goes on from P1
lambda_spectrum = 0.5
lambda_tv = 0.1
lambda_wavelet = 0.1
lambda_gradkurt = 0.05
lambda_cov = 0.05
lambda_var = 0.05
lambda_common = 1.0
lambda_lattice = 0.05
lambda_rec = 1.0          # the throwaway decoder goes on reading V; 0 is the plan to the letter
canvas_noise = 0.3        # sd of the noise on V that it reads through
alpha = 2.0
prior_samples = 64        # canvases a step (all ranks) that the priors see
rec_samples = 128         # sentences a step (all ranks) that the throwaway decoder reads, at least one a scene
# optimisation
batch_size = 256          # scenes a step, all ranks together; each brings (1 + negatives) x 2 or 3 sentences
grad_accum = 1            # micro-steps, by gradient caching: the contrast always sees the whole batch
learning_rate = 2e-4
warmup_steps = 200
max_steps = 10_000
lr_steps = 10_000
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


def info_nce(z1, z2, hidden, rows, temperature, own=slice(None)):
    """InfoNCE (van den Oord et al. 2018): row i of z1 finds row i of z2 among all rows of z2, both (N, E); nats.

    rows (N,) bool: the rows that the mean is taken over. own: the slice of them that this rank answers for, such that
    the mean over the ranks is that over all rows. hidden (len of own, N) bool: pairs that are no negatives."""
    target = torch.arange(len(z1), device=z1.device)[own]
    logits = (z1[own] @ z2.T / temperature).masked_fill(hidden, -1e4)
    share = len(target) / len(z1)
    return (F.cross_entropy(logits, target, reduction='none') * rows[own]).sum() / (rows.sum() * share)


def contrast(Z, meanings, valid, stage, temperature, anchors=True, mask_false_negatives=True, own_scenes=None):
    """The contrastive loss of a whole batch. Z (n, K, views, E): scenes x variants x renderings; meanings and valid
    (n, K); own_scenes: the slice of them that this rank answers for, as in info_nce. Stage 2 has a third view, a free
    paraphrase, pulled to the canonical ones without moving them."""
    n, K = meanings.shape
    own = slice(own_scenes.start * K, own_scenes.stop * K) if own_scenes else slice(0, n * K)     # of rows
    z = Z.flatten(0, 1)                                                               # (n*K, views, E)
    ids, ok, row = meanings.flatten(), valid.flatten(), torch.arange(n * K, device=Z.device)
    hidden = ~ok[None, :].expand(own.stop - own.start, -1)                            # (own, n*K)
    if mask_false_negatives:
        hidden = hidden | (ids[own, None] == ids) & (row[own, None] != row)
    rows = ok if anchors else ok & (row % K == 0)
    loss = info_nce(z[:, 0], z[:, 1], hidden, rows, temperature, own)
    if anchors:
        loss = (loss + info_nce(z[:, 1], z[:, 0], hidden, rows, temperature, own)) / 2
    if stage == 2:
        loss = loss + info_nce(z[:, 2], z[:, 0].detach(), hidden, rows, temperature, own)
    return loss


def swaps_beaten(Z, variants, valid, stage):
    """Share of (scene, swap of it) pairs in the batch whose paraphrase is nearer than the swap; a 0-d tensor, NaN where
    there is no swap."""
    query = Z[:, :, 2 if stage == 2 else 0]
    similarity = torch.einsum('nke,nme->nkm', query, Z[:, :, 1])                      # (n, K, K)
    beaten = similarity.diagonal(dim1=1, dim2=2)[:, :, None] > similarity
    swap = valid & (variants >= data.VARIANTS.index('argument swap'))            # (n, K): VARIANTS ends in both swaps
    hits = beaten[:, 0] & swap, beaten[:, :, 0] & swap
    return (hits[0].sum() + hits[1].sum()) / (2 * swap.sum())


def vicreg(z):
    """Variance and covariance terms of VICReg (Bardes et al. 2022) on z (N, E), rescaled to unit expected variance."""
    z = (z - z.mean(0)) * z.shape[1] ** 0.5
    covariance = z.T @ z / (len(z) - 1)
    off_diagonal = covariance - covariance.diag().diag()
    return F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean() + off_diagonal.square().sum() / z.shape[1]


def barlow(z1, z2):
    """Barlow Twins (Zbontar et al. 2021): cross-correlation of two views (N, E) towards the identity."""
    z1, z2 = ((z - z.mean(0)) / (z.std(0) + 1e-4) for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)
    diagonal = correlation.diagonal()
    return ((1 - diagonal).square().sum()
            + 5e-3 * (correlation.square().sum() - diagonal.square().sum())) / len(diagonal)


@torch.no_grad()
def confused_pairs(encode_z, corpus, run, among=None, share=0.05, pool=50_000, rows=1024):
    """The scenes that the embedding itself takes for each other (Xiong et al. 2021, ANCE): each of the first `pool`
    scenes (of all, or of the indices `among`) with the scene of another meaning that is nearest in z, for the `share`
    of scenes whose nearest is nearest of all. encode_z: (N, T) -> (N, E) unit vectors. -> (P, 2) int64 on the host.
    Every rank searches, and all go by what rank 0 found, should rounding differ."""
    scenes = (torch.arange(corpus.size) if among is None else among)[:pool]           # (S,)
    with runtime.eagerly():
        z = encode_z(corpus.fixed(among=scenes))                                      # (S, E)
    meanings = corpus.meanings[scenes.to(z.device), 0]
    found = [(z[part] @ z.T).masked_fill(meanings[part, None] == meanings, -2.0).max(1)
             for part in torch.arange(len(z), device=z.device).split(rows)]
    similarity, nearest = (torch.cat(column) for column in zip(*found))               # (S,), (S,)
    hardest = similarity.topk(max(1, int(share * len(z))))[1]
    return scenes[runtime.from_master(torch.stack((hardest, nearest[hardest]), dim=1), run).cpu()]


def build(arch):
    """The nets of P2 from the sizes in a checkpoint: P1's and the readout."""
    return p1_canvas.build(arch) | {'readout': build_readout(arch)}


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(encoder, readout, x, run, batch=256):
    """Sentences (N, T) -> z (N, E), in batches."""
    with run.autocast():
        return torch.cat([readout(encoder(part)) for part in x.split(batch)])


def embed_batch(encoder, readout, x, run):
    """Sentences of a batch (n, K, views, T) -> z (n, K, views, E), as the losses see it: for gradient caching."""
    with run.autocast():
        return readout(encoder(x.flatten(0, 2))).unflatten(0, x.shape[:3])


def retrieval_metrics(query, positive, negatives, valid):
    """What the gate asks of embeddings: two paraphrases of S scenes, query and positive (S, E), and one sentence of
    each counterfactual family, negatives (S, families, E), valid (S, families). All rows are unit vectors.

    r1, r5: rank of the positive among all positives; r1_hard: the query's own counterfactuals are in the pool too;
    gap_<family>: mean of cos(query, positive) - cos(query, counterfactual); wins_<family>: share above 0; gap: over all
    pairs, or against all other scenes where there is no counterfactual."""
    similarity = query @ positive.T                                                   # (S, S)
    own = similarity.diagonal()
    rank = (similarity >= own[:, None]).sum(1) - 1               # a tie counts against: a collapsed z must not pass
    rivals = torch.einsum('se,sfe->sf', query, negatives)                             # (S, families)
    beaten = ((rivals < own[:, None]) | ~valid).all(1)
    metrics = {'r1': (rank < 1).float().mean(), 'r5': (rank < 5).float().mean(),
               'r1_hard': ((rank < 1) & beaten).float().mean(), 'paraphrase_cosine': own.mean(),
               'paraphrase_distance': (2 - 2 * own).clamp(min=0).sqrt().mean()}             # |z - z'| of unit vectors
    gaps = own[:, None] - rivals
    for f, family in enumerate(data.FAMILIES):
        here = valid[:, f]
        if here.any():                                           # a corpus of your own may lack a family, or all
            metrics[f'gap_{family}'], metrics[f'wins_{family}'] = (gaps[here, f].mean(),
                                                                   (gaps[here, f] > 0).float().mean())
    metrics['gap'] = gaps[valid].mean() if valid.any() else own.mean() - similarity.mean()
    return {name: value.item() for name, value in metrics.items()}


def semantic_metrics(encode_z, corpus, n=1024):
    """retrieval_metrics of a split under any embedding encode_z: (N, T) -> (N, E) unit vectors."""
    query, positive, negatives, valid = corpus.retrieval_pool(min(n, corpus.size))
    return retrieval_metrics(encode_z(query), encode_z(positive),
                             encode_z(negatives.flatten(0, 1)).unflatten(0, valid.shape), valid)


def baselines(train, corpus, vocab_size, n):
    """R@1 and gaps of two embeddings without learning: bag of tokens and TF-IDF (fitted on training sentences)."""
    from sklearn.feature_extraction.text import TfidfTransformer     # here, or sample.py would wait for it

    def counts(x):
        return torch.zeros(len(x), vocab_size, device=x.device).scatter_add_(1, x, (x >= data.SPECIALS).float())

    tfidf = TfidfTransformer().fit(counts(train.fixed(n=5000)).cpu().numpy())
    return {'bag of tokens': semantic_metrics(lambda x: F.normalize(counts(x), dim=-1), corpus, n),
            'TF-IDF': semantic_metrics(lambda x: torch.from_numpy(
                tfidf.transform(counts(x).cpu().numpy()).toarray()).float().to(x.device), corpus, n)}


def evaluate(encoder, readout, decoder, held_out, types, concepts, run, cell, n=1024):
    """Metrics on a held-out split: retrieval and gaps on new scenes, and those of P1."""
    metrics, V = p1_canvas.evaluate(encoder, decoder, held_out, types, concepts, run, cell, n)
    return semantic_metrics(lambda x: embed(encoder, readout, x, run), held_out, n) | metrics, V


def say_held_out(encoder, readout, splits, run, n=1024):
    """Print the semantic metrics of every held-out split, side by side."""
    sets = {name: semantic_metrics(lambda x: embed(encoder, readout, x, run), splits[name], n)
            for name in splits if name != 'train'}
    run.say(f"{'held-out':24s}" + ''.join(f'{split:>14s}' for split in sets))
    for name in ['r1', 'r5', 'r1_hard', 'gap',
                 *(f'{kind}_{family}' for family in data.FAMILIES for kind in ('gap', 'wins'))]:
        run.say(f'{name:24s}' + ''.join(f"{metrics.get(name, float('nan')):14.3f}" for metrics in sets.values()))


def semantic_gate(m, base):
    """P2's criteria (DESIGN 8) on metrics m, baselines (a dict of metrics) beside them."""
    def beside(key):
        return ', '.join(f'{name} {values[key]:.2f}' for name, values in base.items())

    rows = [('R@1', '>= 0.60', m['r1'], m['r1'] >= 0.60, beside('r1')),
            ('R@5', '>= 0.85', m['r5'], m['r5'] >= 0.85, beside('r5')),
            ('R@1 with own counterfactuals in the pool +', '>= 0.85', m['r1_hard'], m['r1_hard'] >= 0.85,
             beside('r1_hard')),
            ('mean cosine gap', '>= 0.25', m['gap'], m['gap'] >= 0.25, beside('gap'))]
    for family in (family for family in data.FAMILIES if f'gap_{family}' in m):
        gap, wins = m[f'gap_{family}'], m[f'wins_{family}']
        rows += [(f'gap, {family} +', '>= 0.25', gap, gap >= 0.25, beside(f'gap_{family}')),
                 (f'wins, {family} +', '>= 0.95', wins, wins >= 0.95, beside(f'wins_{family}'))]
    return rows


def main():
    if staged and (negatives == 0 or leave_out == 'argument swap'):
        runtime.fail('the stages end when argument swaps are told apart: use --negatives=2 and train on them, '
                     'or --staged=false')
    data.check_families(leave_out, negatives)
    run = runtime.start('p2', config)
    previous = runtime.inherit(run, init_from, 'p1', 'python p1_canvas.py')
    arch = previous['arch'] | {'z_dim': z_dim, 'readout_hidden': readout_hidden, 'pyramid': pyramid}
    splits, tokenizer = data.load(arch['data'], run, previous)
    train = splits['train']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = nn.ModuleDict(build(arch)).to(run.device)
    encoder, decoder, readout = nets.values()
    untrained = semantic_metrics(lambda x: embed(encoder.eval(), readout, x, run), splits['test'])      # random weights
    runtime.load_weights(nets, previous, ('encoder', 'decoder'))
    cell, V_shape = arch['size'] // arch['query_grid'], (arch['channels'], arch['size'], arch['size'])
    optimizer = runtime.adamw(nets, learning_rate, weight_decay)
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics, extra = (state['step'], state['metrics'], state['extra']) if state else (0, {}, {})
    evaluations, stage = extra.get('evaluations', []), extra.get('stage', 1 if staged and train.canonical else 3)
    few = extra.get('few', stage == 1 and train.others is not None)      # only scenes of the fewest things so far
    pairs = extra.get('pairs') if mine_every else None
    beaten_mean = torch.tensor(extra.get('beaten', 0.5), device=run.device)
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
                arrays = canvas_arrays(encoder, V, tokenizer, run)
                if last:      # drawing it takes five seconds
                    x, scene, kind = splits['val'].clusters(20)
                    arrays |= {'tsne_z': embed(encoder, readout, x, run), 'tsne_scene': scene, 'tsne_kind': kind}
            evaluations = last_three(evaluations, step, metrics)
            run.log(step, metrics | {'stage': stage}, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        due = mine_every and step and step % mine_every == 0 and stage == 3
        # Not in a corpus of one's own, where what z confuses may mean the same.
        if due and train.canonical and not (last or run.interrupted):
            nets.eval()
            pairs = confused_pairs(lambda x: embed(encoder, readout, x, run), train, run,
                                   train.fewest if few else None)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, metrics, arch,
                         {'evaluations': evaluations, 'stage': stage, 'few': few, 'pairs': pairs,
                          'beaten': beaten_mean.item(), 'tokenizer': tokenizer.state()})
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        among = train.fewest if few else train.others if stage < 3 else None      # None: all
        scenes, variants, views, valid = train.contrast_batch(batch_size, seed, step, stage, negatives, leave_out,
                                                               pairs, among)
        mine = runtime.local_slice(run, batch_size)
        x = train.take(scenes[mine, :, None], variants[mine, :, None], views[mine])       # (n, K, views, T)
        scenes, variants, valid = (t.to(run.device, non_blocking=True) for t in (scenes, variants, valid))
        meanings = train.meanings[scenes, variants]
        index, parts = torch.arange(batch_size, device=run.device)[mine], run.world * grad_accum
        each = views[0].numel()                                                           # sentences of a scene
        read = min(each, max(1, rec_samples // batch_size))                               # of which some are read
        noise = reading_noise((batch_size, read), V_shape, seed, step, run)[mine]
        terms = {}

        def forward(part):
            """(sentences (n, K, views, T), which scenes, noise (n, read, C, H, W)) -> z (n, K, views, E), the losses
            that need no other sentence, and their terms."""
            x, index, noise = part
            flat = x.flatten(0, 2)
            some = data.spread(index, each, read)
            with run.autocast():
                V = encoder(flat)
                z, V = readout(V), V[some]
                rec = (reconstruction(decoder, V + canvas_noise * noise.transpose(0, 1).flatten(0, 1), None, flat[some])
                       if lambda_rec else V.new_zeros(()))
            found = priors.image_prior_terms(priors.seen(V, stride, prior_samples // parts), alpha, cell)
            local = priors.image_prior_loss(found, weights(config)) + lambda_rec * rec
            return z.unflatten(0, x.shape[:3]), local, found | {'rec': rec}

        def loss_of_all(z):
            Z = runtime.gather(z, run)
            terms['nce'] = contrast(Z, meanings, valid, stage, temperature, anchors, mask_false_negatives, mine)
            terms['swaps_beaten'] = swaps_beaten(Z.detach(), variants, valid, stage)
            loss, (z1, z2) = lambda_nce * terms['nce'], Z[:, :, :2].flatten(0, 1).unbind(1)
            if lambda_vicreg:
                terms['vicreg'] = (vicreg(z1) + vicreg(z2)) / 2
                loss = loss + lambda_vicreg * terms['vicreg']
            if lambda_barlow:
                terms['barlow'] = barlow(z1, z2)
                loss = loss + lambda_barlow * terms['barlow']
            return loss

        loss, local_terms = runtime.contrastive_backward(
            forward, lambda part: embed_batch(encoder, readout, part, run), (x, index, noise), grad_accum, loss_of_all)
        terms |= local_terms
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        beaten = terms['swaps_beaten']
        beaten_mean = torch.where(beaten.isnan(), beaten_mean, beaten_mean.lerp(beaten, 0.1))
        values = terms | {'loss': loss, 'swaps_beaten': beaten_mean, 'grad_norm': grad_norm, 'lr': lr}
        run.watch(step, values)
        if step % log_every == 0:
            run.log(step, values, prefix='train')
        # The stages end by what the batch shows, never by a step count: every ramp without this gate failed.
        if step % look_every == 0 and (stage < 3 or few):
            beaten_mean = runtime.from_master(beaten_mean, run)      # should rounding differ, all end it or none
            if beaten_mean.item() > (stage1_ends, stage2_ends, more_come_in)[stage - 1]:
                few = few and stage < 3                              # scenes of more things come in, at stage 1
                stage, pairs = stage % 3 + 1, None
                run.say(f'step {step}: stage {stage} begins' + (' for scenes of more things' if stage == 1 else ''))
                beaten_mean = torch.full_like(beaten_mean, 0.5)

    with ema.weights():
        say_held_out(encoder, readout, splits, run)
    base = baselines(train, splits['test'], tokenizer.size, 1024) | {'untrained': untrained}
    runtime.write_gate(run, semantic_gate(metrics, base) + canvas_gate(evaluations))


if __name__ == '__main__':
    main()
