"""Tests of metrics.py and of the gates of all phases: metrics and criteria against what one works out by hand."""
import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import metrics
import p1_canvas
import p2_contrast
import p3_jitter
import p4_decoder
import p5_roundtrip
import p6_diffusion
import priors
import runtime
from grammar import EVAL_SENTENCES, FAMILIES, TYPES
from model import build, shift

FULL = runtime.Config(p1_canvas.config | p2_contrast.config | p3_jitter.config | p4_decoder.config)
TINY = runtime.Config(FULL | {
    'vocab_size': 1024, 'dim': 16, 'layers': 1, 'heads': 2, 'hidden': 16, 'cross_hidden': 16, 'cross_layers': 1,
    'query_grid': 4, 'size': 16, 'patch': 4, 'rec_dim': 16, 'rec_layers': 1, 'z_dim': 8, 'readout_hidden': 8,
    'dec_dim': 16, 'dec_layers': 2, 'dec_heads': 2, 'dec_hidden': 16})


@pytest.fixture
def text(small, monkeypatch):
    """The small corpus as the phases know it."""
    monkeypatch.chdir(small.folder)
    return data.load(small.config)


@pytest.fixture
def nets():
    return build(TINY, 'encoder', 'auxiliary', 'readout', 'decoder').eval()


# ---- the nets on many sentences -------------------------------------------------------------------------------------

def test_many_sentences_go_through_the_nets_in_batches(nets):
    x, entered = torch.randint(4, 1024, (7, 6)), []

    @contextmanager
    def autocast():
        entered.append(1)
        yield

    V, z = metrics.encode(nets['encoder'], x, autocast, batch=3), metrics.embed(nets, x, autocast, batch=3)
    said = metrics.free_run(nets['decoder'], V, z, autocast, 9, batch=3)
    assert len(entered) == 3 and not (V.requires_grad or z.requires_grad)
    torch.testing.assert_close(V, nets['encoder'](x).detach())
    torch.testing.assert_close(z, nets['readout'](V).detach())
    assert said.shape == (7, 9) and torch.equal(said, nets['decoder'].generate(V, z, 9))


# ---- meaning --------------------------------------------------------------------------------------------------------

def test_retrieval_metrics():
    """With unit queries e_i the similarities are what one writes down."""
    similarity = torch.full((6, 6), 0.1).fill_diagonal_(0.5)
    similarity[1, 3] = 0.6                                    # second
    similarity[2] = torch.tensor([0.6, 0.6, 0.5, 0.6, 0.6, 0.6])   # sixth
    rivals = torch.full((6, len(FAMILIES)), 0.2)
    valid = torch.ones_like(rivals, dtype=torch.bool)
    rivals[3, 0] = 0.7                                        # beaten by a change of colour
    rivals[4, 4], valid[4, 4] = 0.7, False                    # would be by a swap, but has none
    negatives = torch.zeros(6, len(FAMILIES), 6)
    negatives[torch.arange(6), :, torch.arange(6)] = rivals
    m = metrics.retrieval_metrics(torch.eye(6), similarity.T, negatives, valid, FAMILIES)
    assert m['r1'] == pytest.approx(4 / 6) and m['r5'] == pytest.approx(5 / 6) and m['r1_hard'] == pytest.approx(3 / 6)
    assert m['paraphrase_cosine'] == pytest.approx(0.5)
    assert m['gap_colour'] == pytest.approx((5 * 0.3 - 0.2) / 6) and m['wins_colour'] == pytest.approx(5 / 6)
    assert m['gap_argument swap'] == pytest.approx(0.3) and m['wins_argument swap'] == 1
    assert m['gap'] == pytest.approx((34 * 0.3 - 0.2) / 35)
    assert {f'{kind}_{family}' for kind in ('gap', 'wins') for family in FAMILIES} <= m.keys()
    tied = metrics.retrieval_metrics(torch.ones(6, 1), torch.ones(6, 1), torch.ones(6, 6, 1), valid & False, FAMILIES)
    assert tied['r1'] == tied['r5'] == tied['gap'] == 0, 'a collapsed z finds nothing'
    assert not any(name.startswith(('gap_', 'wins_')) for name in tied)
    own = metrics.retrieval_metrics(torch.eye(6), similarity.T, negatives[:, [4, 0]], valid[:, [4, 0]], ('mood', 'ton'))
    assert {name for name in own if '_' in name} - {'r1_hard', 'paraphrase_cosine', 'paraphrase_distance'} == {
        'gap_mood', 'wins_mood', 'gap_ton', 'wins_ton'}, 'families have the names that they are given'
    assert own['gap_mood'] == m['gap_argument swap'] and own['wins_ton'] == m['wins_colour']


def test_semantic_metrics_of_a_split_and_the_table_of_all(nets, text):
    val = text.splits['val']
    seen = []

    def embedding(x):
        seen.append(tuple(x.shape[:-1]))
        return metrics.embed(nets, x, nullcontext)

    m = metrics.semantic_metrics(embedding, val, n=50)
    assert seen == [(50,), (50,), (50 * len(FAMILIES),)], 'sentences, their paraphrases, their counterfactuals'
    query, positive, negatives, valid = val.retrieval_pool(50)
    z = [nets['readout'](nets['encoder'](part)).detach() for part in (query, positive, negatives.flatten(0, 1))]
    expected = metrics.retrieval_metrics(z[0], z[1], z[2].view(50, len(FAMILIES), -1), valid, FAMILIES)
    assert m.keys() == expected.keys() and m == pytest.approx(expected, abs=1e-5)
    everything = metrics.semantic_metrics(lambda x: metrics.embed(nets, x, nullcontext), val)        # 64 scenes
    head, *rows = metrics.held_out_table(nets, text.splits, nullcontext).splitlines()
    assert head.split() == ['held-out', 'val', 'test', 'composition', 'template']
    assert len(rows) == 4 + 2 * len(FAMILIES)
    by_name = {row[:24].strip(): [float(number) for number in row[24:].split()] for row in rows}
    assert all(len(numbers) == 4 for numbers in by_name.values())
    assert all(by_name[name][0] == pytest.approx(everything[name], abs=6e-4) for name in by_name)
    val.count[:, 1:] = 0                                    # a split may lack families; nobody looks at 'train'
    rows = metrics.held_out_table(nets, {'train': None, 'val': val}, nullcontext).splitlines()[1:]
    assert {row[:24].strip() for row in rows if 'nan' not in row[24:]} == {'gap', 'r1', 'r5', 'r1_hard'}


# ---- canvas and reading ---------------------------------------------------------------------------------------------

def test_canvas_metrics_are_plain_numbers():
    V = torch.randn(6, 3, 16, 16)
    m, expected = metrics.canvas_metrics(V, 4), priors.statistics(V, 4)
    assert m.keys() == expected.keys() - {'alpha_image'} and json.loads(json.dumps(m)) == m
    assert all(m[name] == expected[name].tolist() for name in m) and len(m['alpha']) == 3


def moved(v, dy, dx):
    """A canvas (C, H, W) as numpy, moved by whole pixels, its border repeated."""
    H, W = v.shape[1:]
    wide = np.pad(v, ((0, 0), (9, 9), (9, 9)), mode='edge')
    return wide[:, 9 - dy:9 - dy + H, 9 - dx:9 - dx + W]


@pytest.mark.parametrize('max_shift, longest', [(2, 4), (5, 5)])
def test_robustness_by_hand(max_shift, longest):
    """z is the canvas itself, normalised: each cosine is one between pictures."""
    V = torch.randn(4, 2, 16, 16).cumsum(-1)
    nets = {'encoder': lambda x: V[x[:, 0]], 'readout': lambda V: F.normalize(V.flatten(1), dim=-1)}
    config = runtime.Config(max_shift=max_shift, cutout=6, blur_sigma=0.8)
    m = metrics.robustness(nets, torch.arange(4)[:, None], config, nullcontext)

    def cosine(changed):
        return F.cosine_similarity(torch.as_tensor(changed).flatten(1), V.flatten(1)).mean().item()

    by_shift = [[cosine(np.stack([moved(v, dy * px, dx * px) for v in V.numpy()]))
                 for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx] for px in range(longest + 1)]
    curve = [sum(directions) / 8 for directions in by_shift]
    assert m['shift_cosine'] == pytest.approx(curve, abs=1e-5) and curve[0] == pytest.approx(1) and curve[4] < 0.9
    assert m['jitter_cosine'] == m['shift_cosine'][2]
    assert m['jitter_cosine_worst'] == pytest.approx(min(by_shift[2]), abs=1e-5)
    assert m['jitter_cosine_worst'] < m['jitter_cosine'] - 1e-3
    assert m['blur_cosine'] == pytest.approx(cosine(priors.gaussian_blur(V, 0.8)), abs=1e-5)
    cuts = []
    for top in (0, 3, 6, 10):
        for left in (0, 3, 6, 10):
            changed = V.clone()
            changed[:, :, top:top + 6, left:left + 6] = V.mean((2, 3))[:, :, None, None]
            cuts.append(cosine(changed))
    assert m['cutout_cosine'] == pytest.approx(sum(cuts) / 16, abs=1e-5)
    assert m['cutout_cosine_worst'] == pytest.approx(min(cuts), abs=1e-5)
    assert m['cutout_cosine_worst'] < m['cutout_cosine'] - 1e-3


def test_robustness_is_1_where_place_means_nothing():
    V = torch.randn(4, 2, 1, 1).expand(-1, -1, 16, 16)
    nets = {'encoder': lambda x: V[x[:, 0]], 'readout': lambda V: F.normalize(V.mean((2, 3)), dim=-1)}
    m = metrics.robustness(nets, torch.arange(4)[:, None], FULL, nullcontext)
    assert len(m) == 6 and torch.tensor([m[name] for name in p3_jitter.ROBUST]).allclose(torch.ones(5))


class Says:
    """A decoder that says these logits (N, T, vocab) of the sentences that V (N,) numbers."""

    def __init__(self, logits):
        self.logits, self.asked = logits, []

    def __call__(self, x, V, z):
        self.asked.append((len(x), z is None))
        return self.logits[V, :x.shape[1]]


def test_token_metrics_by_hand():
    """Of the ids 4 to 9 two are of type colour and mean the same (4, 5), one is a shape (6), the others function."""
    types = torch.tensor([0, 0, 0, 0, 1, 1, 2, 0, 0, 0])
    concepts = torch.tensor([0, 1, 2, 3, 4, 4, 6, 7, 8, 9])
    text = SimpleNamespace(types=types, concepts=concepts)
    x = torch.tensor([[4, 7, 6, data.EOS], [5, 8, data.EOS, data.PAD], [6, 4, data.EOS, data.PAD]])
    said = torch.tensor([[5, 7, 6, data.EOS], [4, 8, data.EOS, 9], [6, 4, data.EOS, 4]])
    logits = torch.zeros(3, 4, 10).scatter(2, said[..., None], math.log(31.0))      # 31 of 40, the others 1 of 40
    decoder = Says(logits)
    m = metrics.token_metrics(decoder, torch.arange(3), None, x, text, nullcontext, batch=2)
    assert decoder.asked == [(2, True), (1, True)]
    right, wrong = -math.log(31 / 40), -math.log(1 / 40)
    assert m['accuracy'] == pytest.approx(8 / 10) and m['ce'] == pytest.approx((8 * right + 2 * wrong) / 10, rel=1e-5)
    assert m['content_accuracy'] == pytest.approx(3 / 5) and m['content_concept'] == 1
    assert m['ce_content'] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)
    assert m['ce_function'] == pytest.approx(right, rel=1e-5), 'padding is no token'
    assert m['sentence_exact'] == pytest.approx(1 / 3)
    assert m['accuracy_colour'] == pytest.approx(1 / 3) and m['concept_colour'] == 1
    assert m['ce_colour'] == pytest.approx((right + 2 * wrong) / 3, rel=1e-5)
    assert m['accuracy_shape'] == m['concept_shape'] == 1 and m['ce_shape'] == pytest.approx(right, rel=1e-5)
    assert all(math.isnan(m[f'{name}_count']) for name in ('accuracy', 'concept', 'ce')), 'none there'
    assert {f'{name}_{kind}' for kind in TYPES[1:] for name in ('accuracy', 'concept', 'ce')} <= m.keys()


def test_what_a_held_out_split_is_measured_by(nets, text):
    val = text.splits['val']
    m, V = metrics.evaluate_canvas(nets, val, text, TINY, nullcontext)
    x = val.fixed()
    torch.testing.assert_close(V, metrics.encode(nets['encoder'], x, nullcontext))
    expected = metrics.canvas_metrics(V, 4) | {
        f'rec_{name}': value for name, value in metrics.token_metrics(nets['auxiliary'], V, None, x, text,
                                                                      nullcontext).items()}
    assert repr(m) == repr(expected), 'the canvas alone is read'
    plain, _ = metrics.evaluate_canvas(nets, val, text, runtime.Config(TINY | {'lambda_rec': 0.0}), nullcontext)
    assert plain == metrics.canvas_metrics(V, 4), 'nothing has learnt to read it'
    both, _ = metrics.evaluate_meaning(nets, val, text, TINY, nullcontext)
    assert repr(both) == repr(metrics.semantic_metrics(lambda x: metrics.embed(nets, x, nullcontext), val) | m)


def test_attention_maps_are_what_the_decoder_looks_at(nets, text):
    x, V = text.splits['val'].fixed(3), torch.randn(3, 6, 16, 16)
    z = nets['readout'](V).detach()
    maps = metrics.attention_maps(nets['decoder'], V, z, x, nullcontext)
    assert maps.shape == (3, x.shape[1], 4, 4)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(x.shape))
    _, layers = nets['decoder'].decode(shift(x), nets['decoder'].memory(V, z), maps=True)
    weights = sum(layer[n, h, t, :16] for layer in layers for h in range(2) for n, t in ((1, 2),))
    torch.testing.assert_close(maps[1, 2].flatten(), (weights / weights.sum()).detach())
    arrays = metrics.attention_arrays(nets, V, x, text, nullcontext)
    assert torch.equal(arrays['attention'], maps)
    words, kinds = arrays['attention_tokens'][0], arrays['attention_types'][0]
    assert len(words) == len(kinds) == x.shape[1]
    ends = x[0].tolist().index(data.EOS)
    assert ' '.join(words[:ends]) == text.tokenizer.decode(x[0].tolist()) and words[ends] == '.'
    assert set(words[ends + 1:]) <= {''} and set(kinds) <= set(TYPES) and {'colour', 'shape'} < set(kinds)


def test_canvas_arrays_show_the_sixteen_sentences(nets, text):
    V = torch.randn(8, 6, 16, 16)
    arrays = metrics.canvas_arrays(nets['encoder'], V, text, nullcontext)
    assert arrays['montage'].shape == (16, 6, 16, 16) and arrays['titles'] == list(EVAL_SENTENCES)
    for n in (0, 15):
        alone = nets['encoder'](torch.tensor([text.tokenizer.encode(EVAL_SENTENCES[n])])).detach()
        torch.testing.assert_close(arrays['montage'][n:n + 1], alone, atol=1e-4, rtol=1e-4)
    val = text.splits['val']
    arrays = metrics.canvas_arrays(nets['encoder'], V, text._replace(checked=False), nullcontext)
    titles = [text.tokenizer.decode(row) for row in val.fixed(16).tolist()]
    assert arrays['titles'] == titles != list(EVAL_SENTENCES), 'in a corpus of your own its first held-out ones'
    torch.testing.assert_close(arrays['montage'], nets['encoder'](val.fixed(16)).detach(), atol=1e-4, rtol=1e-4)


def test_shuffle_canvas_keeps_the_pixels_and_loses_their_places():
    V = torch.randn(3, 2, 4, 4)
    shuffled = metrics.shuffle_canvas(V)
    sums, sums_shuffled = (v.flatten(2).sum(1).sort(-1)[0] for v in (V, shuffled))
    assert torch.equal(sums, sums_shuffled), 'the channels of a pixel stay together'
    assert not torch.equal(shuffled, V) and torch.equal(shuffled[1:2], metrics.shuffle_canvas(V[1:2]))


def test_graph_metrics():
    original = 'a red cube is on a blue ball'
    texts = ['a blue ball is under a red cube', 'a blue ball is on a red cube', 'red red red']
    m = metrics.graph_metrics(texts, [original] * 3)
    assert m['graph_f1'] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert m['graph_exact'] == pytest.approx(1 / 3) == m['unreadable']


# ---- gates ----------------------------------------------------------------------------------------------------------

def test_last_evaluations_are_those_that_measured_canvases(tmp_path):
    assert metrics.last_evaluations(tmp_path) == []
    rows = [{'step': 0, 'val/alpha': [1.0, 2.0], 'val/tv': 0.5}, {'step': 0, 'train/alpha': 3.0, 'train/loss': 1.0},
            {'step': 5, 'val/diffusion': 0.1}, {'step': 9, 'val/alpha': [2.0, 2.5], 'val/tv': None}]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    first, last = metrics.last_evaluations(tmp_path)
    assert first == {'step': 0, 'alpha': [1.0, 2.0], 'tv': 0.5} and last['alpha'] == [2.0, 2.5]
    assert math.isnan(last['tv']), 'what was not finite passes no gate'


GOOD_CANVAS = {'alpha': [2.0] * 6, 'alpha_hann': [2.0] * 6, 'tv': 0.5, 'kurtosis': [5.0] * 6, 'max_correlation': 0.1,
               'share_total': 0.5, 'lattice': 1.0}


def failing(criteria):
    return [i for i, row in enumerate(criteria) if not row[3]]


def test_canvas_gate():
    assert not failing(metrics.canvas_gate([GOOD_CANVAS] * 5))
    assert not failing(metrics.canvas_gate([GOOD_CANVAS | {'alpha': [2.0] * 4 + [0.0, 9.0]}] * 3)), 'four of six'
    assert failing(metrics.canvas_gate([GOOD_CANVAS] * 2)) == [0, 1, 3], 'two evaluations are not three'
    for change, at in (({'alpha': [2.0] * 3 + [2.6] * 3}, 0), ({'alpha_hann': [1.4] * 3 + [2.0] * 3}, 1),
                       ({'tv': 0.6}, 3), ({'kurtosis': [5.0] * 5 + [3.0]}, 4), ({'max_correlation': 0.31}, 5),
                       ({'share_total': 0.19}, 6), ({'lattice': 2.1}, 7), ({'lattice': math.nan}, 7)):
        assert failing(metrics.canvas_gate([GOOD_CANVAS] * 2 + [GOOD_CANVAS | change])) == [at]
        earlier = [GOOD_CANVAS | change] + [GOOD_CANVAS] * 2
        assert failing(metrics.canvas_gate(earlier)) == ([at] if at in (0, 1, 3) else []), 'slopes and TV must last'
        assert not failing(metrics.canvas_gate([GOOD_CANVAS | change] + [GOOD_CANVAS] * 3))
    assert failing(metrics.canvas_gate([GOOD_CANVAS | {'tv': 0.01}] * 3)) == [2]


GOOD_MEANING = {'r1': 0.6, 'r5': 0.85, 'r1_hard': 0.85, 'gap': 0.25}
GOOD_MEANING |= {f'{kind}_{f}': value for kind, value in (('gap', 0.25), ('wins', 0.95)) for f in FAMILIES}


def test_semantic_gate():
    good = GOOD_MEANING
    base = {'TF-IDF': dict.fromkeys(good, 0.125)}
    criteria = metrics.semantic_gate(good, base, True)
    assert len(criteria) == 4 + 2 * len(FAMILIES) and not failing(criteria)
    assert all(row[4] == 'TF-IDF 0.12' for row in criteria)
    names = ['r1', 'r5', 'r1_hard', 'gap', *(f'{kind}_{f}' for f in FAMILIES for kind in ('gap', 'wins'))]
    for i, name in enumerate(names):
        for value in (good[name] - 0.01, math.nan):
            assert failing(metrics.semantic_gate(good | {name: value}, base, True)) == [i]
    few = {name: value for name, value in good.items() if not name.endswith('swap')}
    assert len(metrics.semantic_gate(few, base, True)) == len(criteria) - 4, 'a corpus may lack families'


def test_semantic_gate_of_a_corpus_of_ones_own():
    """All that is asked of the grammar, of the families that it has, by whatever name, and more than TF-IDF finds."""
    m = {'r1': 0.61, 'r5': 0.85, 'r1_hard': 0.85, 'gap': 0.25, 'gap_mood': 0.25, 'wins_mood': 0.95}
    base = {'TF-IDF': m | {'r1': 0.60}}
    criteria = metrics.semantic_gate(m, base, False)
    assert [row[:2] for row in criteria[:-1]] == [row[:2] for row in metrics.semantic_gate(m, base, True)]
    assert criteria[-2][:2] == ('wins, mood +', '>= 0.95') and criteria[-1][:2] == ('R@1, above TF-IDF +', '> 0.600')
    assert not failing(criteria) and failing(metrics.semantic_gate(m | {'r1': 0.60}, base, False)) == [6]
    for i, name in enumerate(m):
        assert i in failing(metrics.semantic_gate(m | {name: math.nan}, base, False))


def test_shift_gate_and_reading_gate():
    row, = metrics.shift_gate({'jitter_cosine': 0.9}, 'before 0.60')
    assert row == ('cosine after shifts of 2 px', '>= 0.90', 0.9, True, 'before 0.60')
    for value in (0.899, math.nan):
        assert failing(metrics.shift_gate({'jitter_cosine': value})) == [0]
    m = {'content_accuracy': 0.9, 'accuracy': 0.9, 'shuffle_ce_rise': 0.3}
    for checked, read, kind in ((True, 'content_accuracy', 'content-token'), (False, 'accuracy', 'token')):
        rows = metrics.reading_gate(m, checked, 'controls', 'canvas only')
        assert not failing(rows) and rows[0][0] == f'{kind} accuracy, exact'
        assert [row[4] for row in rows] == ['controls', 'canvas only']
        for value in (0.89, math.nan):
            assert failing(metrics.reading_gate(m | {read: value}, checked)) == [0]
        assert failing(metrics.reading_gate(m | {'shuffle_ce_rise': 0.29}, checked)) == [1]
    assert failing(metrics.reading_gate(m | {'accuracy': 0.1}, True)) == [], 'which tokens are content is known'


def test_later_gates():
    before, now = {'r1': 0.90, 'jitter_cosine': 0.6}, {'r1': 0.89, 'jitter_cosine': 0.9}
    assert not failing(p3_jitter.gate(now, before, [GOOD_CANVAS] * 3))
    assert failing(p3_jitter.gate(now | {'r1': 0.87}, before, [GOOD_CANVAS] * 3)) == [1]
    lattice = [GOOD_CANVAS | {'lattice': 3.0}] * 3
    assert failing(p3_jitter.gate(now | {'jitter_cosine': 0.89}, before, lattice)) == [0, 9]

    m = {'content_accuracy': 0.9, 'content_concept': 0.9, 'shuffle_ce_rise': 0.3, 'cells_content': 3.0,
         'cells_function': 4.0, 'graph_exact': 0.85, 'graph_f1': 0.9, 'unreadable': 0.0}
    tables = {'decoder': m, 'no canvas': m}
    assert not failing(p4_decoder.gate(m, tables, True))
    asked = {f'{key}_{row}': least for row, leasts in p4_decoder.LENGTHS.items()
             for key, least in zip(('exact', 'bleu4'), leasts) if least}
    own = m | asked | {'accuracy': 0.9, 'sentence_exact': 0.5}        # your sentences: any token counts, and how long
    beside = {'decoder': own, 'no canvas': own}
    criteria = p4_decoder.gate(own, beside, False)
    assert len(criteria) == 2 + len(asked) and not failing(criteria)
    assert failing(p4_decoder.gate(own | {'accuracy': 0.89, 'shuffle_ce_rise': 0.2}, beside, False)) == [0, 1]
    for i, (name, least) in enumerate(asked.items(), start=2):
        assert failing(p4_decoder.gate(own | {name: least - 0.01}, beside, False)) == [i]
        alone = {key: value for key, value in own.items() if key != name}
        assert len(p4_decoder.gate(alone, beside, False)) == len(criteria) - 1, 'none of that length is held out'
    assert failing(p4_decoder.gate(m | {'cells_content': 4.0, 'graph_exact': 0.84}, tables, True)) == [3, 4]

    m |= GOOD_MEANING | {'jitter_cosine': 0.9}
    ways = {'best of k': {'graph_f1': 0.85, 'rouge_l': 0.55, 'cosine': 0.9}}
    criteria = p5_roundtrip.gate(ways, m, [GOOD_CANVAS] * 3, True)
    assert not failing(criteria)
    same = {f'same_{name}': 0.9 for name in ('numbers', 'colours', 'negation')}
    own = m | {'accuracy': 0.9, 'r1_tfidf': 0.59}
    ways_own = {'best of k': ways['best of k'] | same}
    names = [row[0] for row in p5_roundtrip.gate(ways_own, own, [GOOD_CANVAS] * 3, False)]
    assert [name.split(',')[0] for name in names[:3]] == ['same numbers', 'same colours', 'same negation']
    assert len(names) == 3 + 2 + 8 + (4 + 2 * len(FAMILIES) + 1) + 1 + 2 and not any('Graph F1' in name for name in names)
    for way, worse, at in ((same, {'r1_tfidf': 0.6}, 5 + 8 + 4 + 2 * len(FAMILIES)), (same, {'accuracy': 0.8}, len(names) - 2),
                           (same | {'same_colours': 0.89}, {}, 1), (same, {'wins_count': 0.94}, 5 + 8 + 4 + 2 * 3 + 1)):
        ways_own = {'best of k': ways['best of k'] | way}
        assert failing(p5_roundtrip.gate(ways_own, own | worse, [GOOD_CANVAS] * 3, False)) == [at], (way, worse)
    ways = {'best of k': {'graph_f1': 0.84, 'rouge_l': 0.56, 'cosine': 0.89}}
    assert failing(p5_roundtrip.gate(ways, m | {'r1': 0.5}, [GOOD_CANVAS] * 3, True)) == [0, 1, 2, 3 + 8]


def test_prior_gate_asks_the_control():
    quarters = {f'{kind}_{q}': value for q in p6_diffusion.QUARTERS
                for kind, value in (('diffusion', 0.2), ('wiener', 0.3))}
    before = {'prior_spectrum': 1.0, 'prior_tv': 1.0, 'prior': 1.0, 'paraphrase_distance': 0.5, 'r1': 0.95, 'r5': 1.0,
              'r1_hard': 0.9, 'gap_colour': 0.3, 'gap_count': 0.3}
    m = GOOD_MEANING | quarters | before | {'prior_spectrum': 0.8, 'prior_tv': 0.9, 'prior': 0.9,
                                            'paraphrase_distance': 0.4, 'jitter_cosine': 0.9,
                                            'content_accuracy': 0.9, 'shuffle_ce_rise': 0.3}
    ways = {'best of k': {'graph_f1': 0.85, 'rouge_l': 0.55, 'cosine': 0.9}}

    def fails(other, **changed):
        criteria = p6_diffusion.gate(m | changed, before, other, ways, [GOOD_CANVAS] * 3, True)
        return [name for name, _, _, passed, *_ in criteria if not passed]

    control = before | {'prior_spectrum': 0.9, 'prior_tv': 0.95, 'prior': 0.95}
    assert not fails(control)
    assert fails(None) == ['compared with a control (--control) +']
    assert fails(control | {'prior_spectrum': 0.7, 'paraphrase_distance': 0.43}) == [
        'spectrum prior, change, against the control +', 'paraphrase distance falls by, against the control +']
    assert fails(control | {'r5': 1.0}, r5=0.98) == [
        'retrieval, largest drop of the three R, points', 'retrieval, largest drop of the three R, points, against the '
        'control +']
    assert fails(control, prior=1.2) == [
        'weighted sum of all priors, change', 'weighted sum of all priors, change, against the control +']
    assert fails(control | {'prior': -0.5}, prior=-0.4) == ['weighted sum of all priors, change, against the control +']
    assert fails(control, gap_count=0.27) == [
        'family gaps, largest drop +', 'family gaps, largest drop, against the control +']
    assert fails(control, **{'diffusion_t 0-25%': 0.31}, prior_tv=1.1, paraphrase_distance=0.46) == [
        'diffusion loss over that of a Wiener filter, worst quarter of t +', 'TV, change',
        'paraphrase distance falls by', 'TV, change, against the control +',
        'paraphrase distance falls by, against the control +']
