"""P2 · Give the canvas a meaning by contrast.

Paraphrases of a scene are pulled together in z = g(V), other scenes and constructed counterfactuals are pushed apart
(InfoNCE), while the image priors and the reading of V go on. The plan's free paraphrases alone teach a bag of words,
because "A on B" / "B under A" against "B on A" is an XOR; so the paraphrases come in the stages of `curriculum`, and
once they are free most of a batch are pairs of scenes that z itself confuses (--staged=false --mine_every=0 is the
plan).

Reads:  out/p1/ckpt.pt      Writes: out/p2/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p2_contrast.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p2_contrast.py
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import plot
import priors
import runtime
from metrics import (canvas_arrays, canvas_gate, embed, evaluate_meaning, held_out_table, last_evaluations,
                     semantic_gate, semantic_metrics)
from model import build, embed_views, sizes
from p1_canvas import image_loss, reconstruction

out_dir = 'out/p2'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p1/ckpt.pt'   # the phase before; every setting that is not here comes from it
resume = False            # go on from out_dir/ckpt.pt
z_dim = 256               # >= 1: E, size of the sentence embedding
readout_hidden = 512      # >= 1
pyramid = True            # pool V over 1x1, 2x2 and 4x4 cells; false is the plan's global mean and variance
# contrast
lambda_nce = 1.0          # the plan's alpha
temperature = 0.07
negatives = 2             # 0 to 6: counterfactuals of each scene in the batch; 0: other batch items only
anchors = True            # counterfactuals have paraphrases of their own; false: they are negatives only (the plan)
mask_false_negatives = True   # rows that mean the same are never negatives of each other
leave_out = 'count'       # a counterfactual family that is never constructed, to ask what teaches it then: the others,
                          # or the mined pairs, which may differ in it; '' for none
lambda_vicreg = 0.0       # variance + covariance of z (VICReg), against collapse
lambda_barlow = 0.0       # cross-correlation of the two views towards the identity (Barlow Twins)
# a sentence of a corpus of one's own that is said in one way only finds itself again, altered
drop_words = 0.1          # 0 to 1: share of its words that are deleted
mask_words = 0.0          # 0 to 1: share of its words that are hidden
turn_words = 0.0          # 0 to 1: chance that it is cut in two and the second part comes first
# curriculum
staged = True             # the stages of `curriculum`; false is the plan: the last one from the start
stage1_ends = 0.95        # share of swaps beaten in the batch at which stage 1 ends
stage2_ends = 0.90        # the same for stage 2: at 0.70 one seed of three never got past a swap gap of 0.18
more_come_in = 0.95       # the same at which scenes of the fewest things are mastered; the others begin with stage 1
mine_every = 500          # steps between searches for the scenes that z confuses, which then fill most of the batch (in
                          # stages of free paraphrases); 0 is the plan
# what goes on from P1
rec_samples = 256         # >= 1: sentences a step (all ranks) that the auxiliary decoder reads (in P3 one a scene at
                          # least): as many of each scene, or one of every so many scenes
# optimisation; here, in P3, P5 and P6 grad_accum works by gradient caching: the contrast always sees the whole batch
learning_rate = 2e-4
warmup_steps = 200
max_steps = 10_000
lr_steps = 10_000
eval_every = 500
config = runtime.configure(globals(), after='p1')


class Stage(NamedTuple):
    """What a batch is made of until the batch itself shows that it is learnt."""
    name: str
    form: str                # of the two paraphrases that attract each other: 'canonical' or 'any'
    free: str                # a third, free paraphrase: 'read' by the auxiliary decoder, 'pulled' to the others as well
    all_swaps: bool          # every scene brings its argument swap: without it in the batch nothing learns direction
    scenes: torch.Tensor     # indices of the scenes, None for all
    ends: float              # when this share of the swaps in the batch is beaten


def curriculum(config, corpus):
    """The stages of P2 in order. Scenes of more than the fewest things go through all of them once those of the fewest
    are mastered. Every ramp by step count instead of by what the batch shows failed (docs/LOG.md)."""
    def stages(scenes, last):
        #             what attracts each other         form         free      swaps scenes  ends
        return [Stage('canonical paraphrases',         'canonical', 'read',   True, scenes, config.stage1_ends),
                Stage('free paraphrases to canonical', 'canonical', 'pulled', True, scenes, config.stage2_ends), last]

    everything = Stage('free paraphrases of all scenes', 'any', '', False, None, math.inf)
    if not config.staged or not corpus.canonical:
        return [everything]
    if corpus.others is None:
        return stages(None, everything)
    fewest = Stage('free paraphrases of the fewest things', 'any', '', False, corpus.fewest, config.more_come_in)
    return stages(corpus.fewest, fewest) + stages(corpus.others, everything)


def info_nce(z1, z2, hidden, counted, temperature, rows=slice(None)):
    """InfoNCE (van den Oord et al. 2018): row i of z1 finds row i of z2 among all rows of z2, both (N, E); nats.

    counted (N,) bool: the rows that the mean is taken over. rows: the slice of them that this rank answers for, such
    that the mean over the ranks is that over all rows. hidden (len of rows, N) bool: pairs that are no negatives."""
    target = torch.arange(len(z1), device=z1.device)[rows]
    logits = (z1[rows] @ z2.T / temperature).masked_fill(hidden, -1e4)
    share = len(target) / len(z1)
    return (F.cross_entropy(logits, target, reduction='none') * counted[rows]).sum() / (counted.sum() * share)


def contrast(Z, batch, config, pull_free=False):
    """The contrastive loss of a whole batch: Z (N, K, views, E) of its N scenes, of which batch.rows are this rank's.
    pull_free: the third view, a free paraphrase, is pulled to the canonical ones without moving them."""
    N, K = batch.meanings.shape
    rows = slice(batch.rows.start * K, batch.rows.stop * K)
    z = Z.flatten(0, 1)                                                               # (N*K, views, E)
    meanings, valid, row = batch.meanings.flatten(), batch.valid.flatten(), torch.arange(N * K, device=Z.device)
    hidden = ~valid[None, :].expand(rows.stop - rows.start, -1)                       # (rows, N*K)
    if config.mask_false_negatives:
        hidden = hidden | (meanings[rows, None] == meanings) & (row[rows, None] != row)
    counted = valid if config.anchors else valid & (row % K == 0)
    loss = info_nce(z[:, 0], z[:, 1], hidden, counted, config.temperature, rows)
    if config.anchors:
        loss = (loss + info_nce(z[:, 1], z[:, 0], hidden, counted, config.temperature, rows)) / 2
    if pull_free:
        loss = loss + info_nce(z[:, 2], z[:, 0].detach(), hidden, counted, config.temperature, rows)
    return loss


def swaps_beaten(Z, batch, view=0):
    """Share of (scene, swap of it) pairs in the batch whose paraphrase is nearer than the swap, asked of one view; a
    0-d tensor, NaN where there is no swap."""
    similarity = torch.einsum('nke,nme->nkm', Z[:, :, view], Z[:, :, 1])              # (N, K, K)
    beaten = similarity.diagonal(dim1=1, dim2=2)[:, :, None] > similarity
    hits = beaten[:, 0] & batch.swaps, beaten[:, :, 0] & batch.swaps
    return (hits[0].sum() + hits[1].sum()) / (2 * batch.swaps.sum())


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
def mine_pairs(nets, corpus, run, scenes=None, share=0.05, pool=50_000, rows=1024):
    """The scenes that the embedding itself takes for each other (Xiong et al. 2021, ANCE): each of the first `pool`
    scenes (of all, or of these indices) with the scene of another meaning that is nearest in z, for the `share` of
    scenes whose nearest is nearest of all -> (P, 2) int64 on the host, or None in a corpus of your own, where what z
    confuses may mean the same. Every rank searches, and all go by what rank 0 found, should rounding differ."""
    if not corpus.canonical:
        return None
    nets.eval()
    scenes = (torch.arange(corpus.size) if scenes is None else scenes)[:pool]         # (S,)
    with runtime.eagerly():
        z = embed(nets, corpus.fixed(among=scenes), run.autocast)                     # (S, E)
    meanings = corpus.meanings[scenes.to(z.device), 0]
    nearest = [(z[part] @ z.T).masked_fill(meanings[part, None] == meanings, -2.0).max(1)
               for part in torch.arange(len(z), device=z.device).split(rows)]
    similarity, nearest = (torch.cat(column) for column in zip(*nearest))             # (S,), (S,)
    hardest = similarity.topk(max(1, int(share * len(z))))[1]
    return scenes[runtime.from_master(torch.stack((hardest, nearest[hardest]), dim=1), run).cpu()]


def baselines(text, held_out):
    """R@1 and gaps of two embeddings without learning: bag of tokens and TF-IDF (fitted on training sentences)."""
    from sklearn.feature_extraction.text import TfidfVectorizer      # here, or sample.py would wait for it

    def sentences(x):
        return [text.tokenizer.decode(row) for row in x.tolist()]

    def counts(x):
        return torch.zeros(len(x), text.tokenizer.size, device=x.device).scatter_add_(
            1, x, (x >= data.SPECIALS).float())

    known = [sentence for rendering in (0, 1) for sentence in
             sentences(text.splits['train'].fixed(10_000, rendering=rendering))]
    tfidf = TfidfVectorizer(token_pattern=r'\S+', max_features=16_384, dtype=np.float32).fit(known)      # of words
    return {'bag of tokens': semantic_metrics(lambda x: F.normalize(counts(x), dim=-1), held_out),
            'TF-IDF': semantic_metrics(lambda x: torch.from_numpy(
                tfidf.transform(sentences(x)).toarray()).to(x.device), held_out)}


def main():
    if staged and not config.corpus and (negatives == 0 or leave_out == 'argument swap'):
        runtime.fail('the stages end when argument swaps are told apart: use --negatives=2 and train on them, '
                     'or --staged=false')
    run = runtime.start('p2', config, sizes(config))
    previous = runtime.inherit(run)
    text = data.load(config, run, previous)
    train = text.splits['train']
    if not text.checked:
        applies = (train.count[:, 1:] > 0).float().mean(0).tolist()
        run.say('no stages and no mined pairs in a corpus of one\'s own, where what z confuses may mean the same; '
                f'{(train.count[:, 0] > 1).float().mean():.2f} of the sentences have another that means the same; '
                'counterfactuals: ' + ', '.join(f'{name} {share:.2f}' for name, share in zip(train.families, applies)))
    nets = build(config, 'encoder', 'auxiliary', 'readout').to(run.device)
    untrained = semantic_metrics(lambda x: embed(nets.eval(), x, run.autocast), text.splits['test'])  # random weights
    runtime.load_weights(nets, previous, ('encoder', 'auxiliary'))
    optimizer = runtime.adamw(nets, learning_rate, config.weight_decay)
    ema = runtime.EMA(nets, config.ema_decay)
    # stage: an index into the curriculum; beaten: a running mean of swaps_beaten; pairs: the scenes that z confuses
    stages = curriculum(config, train)
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state(), 'stage': 0, 'beaten': torch.tensor(0.5), 'pairs': None}
    start = runtime.resume(run, nets, optimizer, ema, state)
    state |= {'stage': min(state['stage'], len(stages) - 1), 'beaten': state['beaten'].to(run.device),
              'pairs': state['pairs'] if mine_every else None}          # should a resumed run have other settings
    runtime.compile_nets(nets, run)
    batch_size, parts = config.batch_size, run.world * config.grad_accum
    every = max(1, batch_size // rec_samples)      # of so many scenes one is read, the same ones however it is split
    if batch_size // parts % every:
        runtime.fail(f'--rec_samples={rec_samples}: one of {every} scenes would be read, which does not divide the '
                     f'{batch_size // parts} of a part (batch_size {batch_size}, ranks and grad_accum {parts})')
    stride = max(1, batch_size // every // config.prior_samples)                      # of those, what the priors see

    def embed_part(part):
        """z of a part of a batch: the first thing that forward() does, for gradient caching."""
        with run.autocast():
            return embed_views(nets, part.x)

    def forward(part):
        """A part of a batch -> z (n, K, views, E), the losses that need no other sentence, and their terms."""
        x, noise = part.x.flatten(0, 2), part.draws['noise']                          # (n*K*views, T), (n, read, ...)
        read = data.spread(part.index, len(x) // len(part.x), noise.shape[1], every)
        noise = noise[::every].transpose(0, 1).flatten(0, 1)                          # (n*read/every, C, H, W)
        with run.autocast():
            V = nets.encoder(x)
            z, V = nets.readout(V), V[read]
            rec = (reconstruction(nets.auxiliary, V + config.canvas_noise * noise, None, x[read])
                   if config.lambda_rec else V.new_zeros(()))
        image, terms = image_loss(priors.seen(V, stride, config.prior_samples // parts), config)
        return z.unflatten(0, part.x.shape[:3]), image + config.lambda_rec * rec, terms | {'rec': rec}

    def loss_of_all(z, batch):
        """z of this rank's scenes -> the losses that compare all sentences of the batch, and their terms."""
        Z, pull_free = runtime.gather(z, run), stages[state['stage']].free == 'pulled'
        terms = {'nce': contrast(Z, batch, config, pull_free)}
        terms['swaps_beaten'] = swaps_beaten(Z.detach(), batch, view=2 if pull_free else 0)
        loss, (z1, z2) = lambda_nce * terms['nce'], Z[:, :, :2].flatten(0, 1).unbind(1)
        if lambda_vicreg:
            terms['vicreg'] = (vicreg(z1) + vicreg(z2)) / 2
            loss = loss + lambda_vicreg * terms['vicreg']
        if lambda_barlow:
            terms['barlow'] = barlow(z1, z2)
            loss = loss + lambda_barlow * terms['barlow']
        return loss, terms

    for step in run.steps(start, max_steps):
        last, stage = step == max_steps, stages[state['stage']]
        if step % eval_every == 0 or last:
            nets.eval()
            held_out = text.splits['test' if last else 'val']      # as in P1
            with ema.weights():
                state['metrics'], V = evaluate_meaning(nets, held_out, text, config, run.autocast)
                arrays = canvas_arrays(nets.encoder, V, text, run.autocast)
                if last:      # drawing it takes five seconds
                    x, scene, kind = text.splits['val'].clusters(20)
                    arrays |= {'tsne_z': embed(nets, x, run.autocast), 'tsne_scene': scene, 'tsne_kind': kind}
            run.log(step, state['metrics'] | {'stage': state['stage'] + 1}, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays)
                plot.trends(run.dir)
        if mine_every and step and step % mine_every == 0 and stage.form == 'any' and not (last or run.interrupted):
            state['pairs'] = mine_pairs(nets, train, run, stage.scenes)
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        nets.train()
        batch = train.contrast_batch(config, run, step, form=stage.form, free_view=bool(stage.free),
                                     all_swaps=stage.all_swaps, pairs=state['pairs'], among=stage.scenes)
        sentences = batch.x.shape[1] * batch.x.shape[2]                               # of a scene
        read = min(sentences, max(1, rec_samples // batch_size))                      # of which some are read
        batch = batch.with_draws(noise=torch.randn(
            batch_size, read, config.channels, config.size, config.size, device=run.device,
            generator=run.generator(step, 'noise', run.device)))
        loss, terms = runtime.contrastive_backward(forward, embed_part, loss_of_all, batch, config.grad_accum)
        runtime.average_gradients(nets, run)
        grad_norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        beaten = terms['swaps_beaten']
        state['beaten'] = torch.where(beaten.isnan(), state['beaten'], state['beaten'].lerp(beaten, 0.1))
        values = terms | {'loss': loss, 'swaps_beaten': state['beaten'], 'grad_norm': grad_norm, 'lr': lr}
        run.watch(step, values)
        if step % config.log_every == 0:
            run.log(step, values, prefix='train')
        if step % config.look_every == 0 and stage.ends < math.inf:
            beaten = runtime.from_master(state['beaten'], run)       # should rounding differ, all end it or none
            if beaten.item() > stage.ends:
                state |= {'stage': state['stage'] + 1, 'pairs': None, 'beaten': torch.full_like(beaten, 0.5)}
                run.say(f"step {step}: stage {state['stage'] + 1} begins, {stages[state['stage']].name}")

    with ema.weights():
        run.say(held_out_table(nets, text.splits, run.autocast))
    beside = baselines(text, text.splits['test']) | {'untrained': untrained}
    runtime.write_gate(run, semantic_gate(state['metrics'], beside, text.checked)
                       + canvas_gate(last_evaluations(run.dir)))


if __name__ == '__main__':
    main()
