"""What two or more phases measure, and the plan's criteria as rows of a gate; what one phase measures stands in it.

Shapes: x (N, T) token ids; V (N, C, H, W) canvases; z (N, E) unit vectors. `autocast` is a function that returns a
context, such as Run.autocast; `text` is what data.load() returned; metrics are {name: number or list}, rows of a gate
(name, target, measured, passed[, what stands beside it]). Everything is measured on held-out sentences.
"""
import torch

import data
import plot
import priors
import runtime
from grammar import EVAL_SENTENCES, TYPES, graph_f1, parse
from model import cross_entropy, shift

POOL = 1024               # scenes among which a paraphrase is looked for
READ = 512                # sentences that the decoder reads at an evaluation, canvases under jitter


# ---- the nets on many sentences -------------------------------------------------------------------------------------

@torch.no_grad()
def encode(encoder, x, autocast, batch=256):
    """Sentences x -> canvases V, in batches."""
    with autocast():
        return torch.cat([encoder(part) for part in x.split(batch)])


@torch.no_grad()
def embed(nets, x, autocast, batch=256):
    """Sentences x -> embeddings z, in batches."""
    with autocast():
        return torch.cat([nets['readout'](nets['encoder'](part)) for part in x.split(batch)])


@torch.no_grad()
def free_run(decoder, V, z, autocast, length, batch=256):
    """The likeliest sentence that the decoder says of each canvas: ids (N, length)."""
    with autocast():
        return torch.cat([decoder.generate(v, e, length) for v, e in zip(V.split(batch), z.split(batch))])


def shuffle_canvas(V):
    """The same pixels in one random order for all canvases: what is left when place is gone."""
    order = torch.randperm(V.shape[2] * V.shape[3], generator=torch.Generator().manual_seed(0)).to(V.device)
    return V.flatten(2)[:, :, order].view_as(V)


# ---- canvas ---------------------------------------------------------------------------------------------------------

def canvas_metrics(V, cell):
    """The statistics of P1's gate, as plain numbers and lists; cell as in priors.statistics()."""
    return {name: value.tolist() for name, value in priors.statistics(V, cell).items() if name != 'alpha_image'}


def robustness(nets, x, config, autocast):
    """Cosine of g(V) with g(T(V)): by shift from 0 px on (mean over eight directions), at 2 px (also the worst of the
    eight), under blur, and under cutouts in sixteen places."""
    with torch.no_grad():
        V = encode(nets['encoder'], x, autocast)
        with autocast():
            z = nets['readout'](V)

        def cosine(jittered):
            with autocast():
                return (nets['readout'](jittered) * z).sum(-1).mean().item()

        directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        ones = torch.ones(len(V), dtype=torch.long, device=V.device)
        by_shift = [[cosine(priors.shift(V, ones * dy * px, ones * dx * px)) for dy, dx in directions]
                    for px in range(max(4, config.max_shift) + 1)]
        places = torch.linspace(0, V.shape[-1] - config.cutout, 4).long().tolist()
        cuts = [cosine(priors.cut_out(V, ones * top, ones * left, config.cutout)) for top in places for left in places]
        blur = cosine(priors.gaussian_blur(V, config.blur_sigma))
    curve = [sum(cosines) / len(cosines) for cosines in by_shift]
    return {'shift_cosine': curve, 'jitter_cosine': curve[2], 'jitter_cosine_worst': min(by_shift[2]),
            'blur_cosine': blur, 'cutout_cosine': sum(cuts) / len(cuts), 'cutout_cosine_worst': min(cuts)}


# ---- meaning --------------------------------------------------------------------------------------------------------

def retrieval_metrics(query, positive, negatives, valid, families):
    """What P2's gate asks of embeddings: two paraphrases of S scenes, query and positive (S, E), and one sentence of
    each counterfactual family, negatives (S, F, E), valid (S, F), families their names. All rows are unit vectors.

    r1, r5: rank of the positive among all positives; r1_hard: the scene's own counterfactuals are in the pool too;
    gap_<family>: mean of cos(query, positive) - cos(query, counterfactual); wins_<family>: share above 0; gap: over all
    pairs, or against all other scenes where there is no counterfactual."""
    similarity = query @ positive.T                                                   # (S, S)
    paraphrase = similarity.diagonal()
    rank = (similarity >= paraphrase[:, None]).sum(1) - 1        # a tie counts against: a collapsed z must not pass
    rivals = torch.einsum('se,sfe->sf', query, negatives)                             # (S, families)
    beaten = ((rivals < paraphrase[:, None]) | ~valid).all(1)
    metrics = {'r1': (rank < 1).float().mean(), 'r5': (rank < 5).float().mean(),
               'r1_hard': ((rank < 1) & beaten).float().mean(), 'paraphrase_cosine': paraphrase.mean(),
               'paraphrase_distance': (2 - 2 * paraphrase).clamp(min=0).sqrt().mean()}      # |z - z'| of unit vectors
    gaps = paraphrase[:, None] - rivals
    for f, family in enumerate(families):
        applies = valid[:, f]
        if applies.any():                                        # a corpus of your own may lack a family, or all
            metrics[f'gap_{family}'], metrics[f'wins_{family}'] = (gaps[applies, f].mean(),
                                                                   (gaps[applies, f] > 0).float().mean())
    metrics['gap'] = gaps[valid].mean() if valid.any() else paraphrase.mean() - similarity.mean()
    return {name: value.item() for name, value in metrics.items()}


def semantic_metrics(embedding, corpus, n=POOL):
    """retrieval_metrics of a split under any function embedding: x (N, T) -> (N, E) unit vectors."""
    query, positive, negatives, valid = corpus.retrieval_pool(min(n, corpus.size))
    return retrieval_metrics(embedding(query), embedding(positive),
                             embedding(negatives.flatten(0, 1)).unflatten(0, valid.shape), valid, corpus.families)


def held_out_table(nets, splits, autocast):
    """The semantic metrics of every held-out split, side by side, as text."""
    by_split = {name: semantic_metrics(lambda x: embed(nets, x, autocast), splits[name])
                for name in splits if name != 'train'}
    names = ['r1', 'r5', 'r1_hard', 'gap', *(f'{kind}_{family}' for family in splits['val'].families
                                             for kind in ('gap', 'wins'))]
    lines = [f"{'held-out':24s}" + ''.join(f'{split:>14s}' for split in by_split)]
    lines += [f'{name:24s}' + ''.join(f"{metrics.get(name, float('nan')):14.3f}" for metrics in by_split.values())
              for name in names]
    return '\n'.join(lines)


# ---- reading --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def token_metrics(decoder, V, z, x, text, autocast, batch=256):
    """Teacher-forced reading of x from V (and z) -> cross-entropy and accuracy, exact and by concept (crimson = red),
    over content tokens (colours, shapes, counts, relations) and by type."""
    loss, hit, concept_hit = [], [], []
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        with autocast():
            logits = decoder(x[part], V[part], None if z is None else z[part])
        said = logits.argmax(-1)
        loss.append(cross_entropy(logits, x[part]))
        hit.append(said == x[part])
        concept_hit.append(text.concepts[said] == text.concepts[x[part]])
    loss, hit, concept_hit = torch.cat(loss), torch.cat(hit).float(), torch.cat(concept_hit).float()
    kind, real = text.types[x], x != data.PAD
    content = kind > 0
    metrics = {'ce': loss[real].mean(), 'accuracy': hit[real].mean(), 'ce_content': loss[content].mean(),
               'ce_function': loss[real & ~content].mean(), 'content_accuracy': hit[content].mean(),
               'content_concept': concept_hit[content].mean(),
               'sentence_exact': (hit.bool() | ~real).all(1).float().mean()}
    for k, name in enumerate(TYPES[1:], start=1):
        metrics[f'accuracy_{name}'], metrics[f'concept_{name}'] = hit[kind == k].mean(), concept_hit[kind == k].mean()
        metrics[f'ce_{name}'] = loss[kind == k].mean()
    return {name: value.item() for name, value in metrics.items()}


def graph_metrics(texts, originals):
    """Graph F1 by the checker, the share of exact graphs, and of sentences that it cannot read."""
    scores = [(graph_f1(parse(a), parse(b)), parse(b)) for a, b in zip(originals, texts)]
    n = max(1, len(scores))
    return {'graph_f1': sum(f1 for f1, _ in scores) / n, 'graph_exact': sum(f1 == 1.0 for f1, _ in scores) / n,
            'unreadable': sum(scene is None for _, scene in scores) / n}


# ---- several of them at once ----------------------------------------------------------------------------------------

def evaluate_canvas(nets, held_out, text, config, autocast):
    """P1 to P3: statistics of the canvases of a held-out split, and how much of the sentence the auxiliary decoder
    reads from them -> metrics, V."""
    x = held_out.fixed(POOL)
    V = encode(nets['encoder'], x, autocast)
    metrics = canvas_metrics(V, config.size // config.query_grid)
    if config.lambda_rec:
        metrics |= {f'rec_{name}': value
                    for name, value in token_metrics(nets['auxiliary'], V, None, x, text, autocast).items()}
    return metrics, V


def evaluate_meaning(nets, held_out, text, config, autocast):
    """P2 and P3: retrieval and gaps on new scenes, and what evaluate_canvas() measures -> metrics, V."""
    metrics, V = evaluate_canvas(nets, held_out, text, config, autocast)
    return semantic_metrics(lambda x: embed(nets, x, autocast), held_out) | metrics, V


# ---- what figures are drawn from ------------------------------------------------------------------------------------

def canvas_arrays(encoder, V, text, autocast):
    """The statistics of canvases V, and sixteen fixed sentences as pictures: those of the evaluation pack, or the first
    held-out ones of a corpus of one's own."""
    if text.checked:
        titles = list(EVAL_SENTENCES)
        montage = text.tokenizer.pad(titles, min(24, encoder.max_length)).to(V.device)
    else:
        montage = text.splits['val'].fixed(len(EVAL_SENTENCES))
        titles = [text.tokenizer.decode(row) for row in montage.tolist()]
    return plot.spectra_arrays(V) | {'montage': encode(encoder, montage, autocast), 'titles': titles}


@torch.no_grad()
def attention_maps(decoder, V, z, x, autocast):
    """Cross-attention over the canvas at the position that says each token, averaged over layers and heads:
    (N, T, h, w), each map sums to 1 (the weight on z is left out)."""
    with autocast():
        _, layers = decoder.decode(shift(x), decoder.memory(V, z), maps=True)
    side = V.shape[-1] // decoder.patch
    weights = torch.stack([w.float() for w in layers]).mean((0, 2))[:, :, :side * side]      # (N, T, cells)
    return (weights / weights.sum(-1, keepdim=True)).unflatten(2, (side, side))


def attention_arrays(nets, V, x, text, autocast):
    """Where the decoder looks on canvases V as it says each token of x."""
    with torch.no_grad(), autocast():
        z = nets['readout'](V)
    words = [[text.tokenizer.decode([i]) if i >= data.SPECIALS else '.' if i == data.EOS else '' for i in row]
             for row in x.tolist()]
    return {'attention': attention_maps(nets['decoder'], V, z, x, autocast), 'attention_tokens': words,
            'attention_types': [[TYPES[text.types[i]] for i in row] for row in x.tolist()]}


# ---- rows of gates --------------------------------------------------------------------------------------------------

def last_evaluations(folder):
    """The evaluations in a run folder that measured canvases, oldest first: what canvas_gate() asks for."""
    return [evaluation for evaluation in runtime.evaluations(folder) if 'alpha' in evaluation]


def in_band(alphas):
    return sum(1.5 <= a <= 2.5 for a in alphas)


def canvas_gate(evaluations):
    """P1's criteria (docs/PLAN.md) on the last evaluations, a list of metrics; later phases repeat them."""
    last, recent = evaluations[-1], evaluations[-3:]
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


def semantic_gate(m, baselines, checked):
    """P2's criteria on metrics m, {name: metrics} of baselines beside them. In a corpus of one's own (not checked) one more
    row: two sentences of a row are no paraphrases to the letter there, so the least is to find more than TF-IDF does."""
    def beside(key):
        return ', '.join(f'{name} {values[key]:.2f}' for name, values in baselines.items() if key in values)

    rows = [('R@1', '>= 0.60', m['r1'], m['r1'] >= 0.60, beside('r1')),
            ('R@5', '>= 0.85', m['r5'], m['r5'] >= 0.85, beside('r5')),
            ('R@1 with own counterfactuals in the pool +', '>= 0.85', m['r1_hard'], m['r1_hard'] >= 0.85,
             beside('r1_hard')),
            ('mean cosine gap', '>= 0.25', m['gap'], m['gap'] >= 0.25, beside('gap'))]
    for family in (name[len('gap_'):] for name in m if name.startswith('gap_')):
        gap, wins = m[f'gap_{family}'], m[f'wins_{family}']
        rows += [(f'gap, {family} +', '>= 0.25', gap, gap >= 0.25, beside(f'gap_{family}')),
                 (f'wins, {family} +', '>= 0.95', wins, wins >= 0.95, beside(f'wins_{family}'))]
    if not checked:
        words = baselines['TF-IDF']['r1']
        rows.append(('R@1, above TF-IDF +', f'> {words:.3f}', m['r1'], m['r1'] > words))
    return rows


def shift_gate(m, beside=''):
    """P3's criterion: what shifts of two pixels leave of z."""
    return [('cosine after shifts of 2 px', '>= 0.90', m['jitter_cosine'], m['jitter_cosine'] >= 0.9, beside)]


def reading_gate(m, checked, controls='', canvas_only=''):
    """P4's criteria: how well the sentence is read, and that place matters. controls, canvas_only: what stands beside
    them. Which tokens are content is known of the built-in grammar only (checked)."""
    read, kind = (m['content_accuracy'], 'content-token') if checked else (m['accuracy'], 'token')
    return [(f'{kind} accuracy, exact', '>= 0.90', read, read >= 0.90, controls),
            ('CE rise when the canvas is shuffled', '>= 0.30', m['shuffle_ce_rise'], m['shuffle_ce_rise'] >= 0.30,
             canvas_only)]
