"""Tests of the losses that the phases define, against what one works out by hand; of what a batch of P2 is made of; and
that a step at full size reaches every parameter."""
import json
import math
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import p1_canvas
import p2_contrast
import p3_jitter
import p4_decoder
import p5_roundtrip
import p6_diffusion
import priors
import runtime
from model import BOS, CONTROLS, PARA, TextDecoder, build


@pytest.fixture
def corpus(small, monkeypatch):
    """The small corpus, training split."""
    monkeypatch.chdir(small.folder)
    return data.load(small.config).splits['train']


# ---- one step at full size ------------------------------------------------------------------------------------------

# All settings, as P6 would take them over.
FULL = runtime.Config(p1_canvas.config | p2_contrast.config | p3_jitter.config | p4_decoder.config
                      | p5_roundtrip.config | p6_diffusion.config)


def batch_of(meanings, valid=None, rows=None, **columns):
    """A batch (data.Batch) of scenes with these meanings (N, K), which a test of losses asks nothing else of."""
    valid = torch.ones_like(meanings, dtype=torch.bool) if valid is None else valid
    batch = {'x': None, 'index': torch.arange(len(meanings)), 'swaps': torch.zeros_like(valid)} | columns
    return data.Batch(meanings=meanings, valid=valid, rows=slice(0, len(meanings)) if rows is None else rows, **batch)


def step_p1(nets, x, meanings):
    V = nets['encoder'](x)
    loss = p1_canvas.reconstruction(nets['auxiliary'], V + 0.3 * torch.randn_like(V), None, x)
    return loss + p1_canvas.image_loss(V, FULL)[0]


def meant(z, meanings):
    """The contrast of z (4, E): two scenes, each in two renderings."""
    return p2_contrast.contrast(z.view(2, 1, 2, -1), batch_of(meanings), FULL)


def step_p2(nets, x, meanings):
    V = nets['encoder'](x)
    return meant(nets['readout'](V), meanings) + p1_canvas.reconstruction(nets['auxiliary'], V, None, x)


def step_p3(nets, x, meanings):
    V = nets['encoder'](x)
    T_V = p3_jitter.jitter(V, torch.rand(len(V), 7), FULL)
    z, z_jittered = nets['readout'](V), nets['readout'](T_V)
    inv = p3_jitter.invariance(*(e.view(2, 1, 2, -1) for e in (z_jittered, z)))
    return meant(z, meanings) + inv + p1_canvas.reconstruction(nets['auxiliary'], T_V, None, x)


def step_p4(nets, x, meanings):
    with torch.no_grad():
        V = nets['encoder'](x)
        z = nets['readout'](V)
    return sum(p1_canvas.reconstruction(nets[name], V, z, x) for name in ('decoder', *CONTROLS))


def step_p5(nets, x, meanings):
    V = nets['encoder'](x)
    z = nets['readout'](V)
    cycle, copy = p5_roundtrip.round_trip(nets, x[:2], V[:2], z[:2], torch.rand(2, 2, 8), FULL)
    para = p1_canvas.reconstruction(nets['decoder'], V, z, x[torch.arange(4) ^ 1], PARA)
    return meant(z, meanings) + para + cycle + copy


def step_p6(nets, x, meanings):
    for p in nets['unet'].parameters():                  # some of its layers start at zero and let nothing through
        nn.init.normal_(p, std=0.05)
    V, t = nets['encoder'](x), torch.rand(4)
    noise = torch.randn_like(V)
    predict = partial(p6_diffusion.predict_eps, nets['unet'])
    loss = p6_diffusion.diffusion_loss(predict, V.detach(), t, noise, 5.0)
    return loss + p6_diffusion.prior_loss(predict, V, t, noise) + step_p5(nets, x, meanings)


NETS = {'p1': ('encoder', 'auxiliary'), 'p4': ('encoder', 'readout', 'decoder', *CONTROLS),
        'p5': ('encoder', 'readout', 'decoder'), 'p6': ('encoder', 'readout', 'decoder', 'unet')}
NETS |= dict.fromkeys(('p2', 'p3'), ('encoder', 'auxiliary', 'readout'))
STEPS = {'p1': step_p1, 'p2': step_p2, 'p3': step_p3, 'p4': step_p4, 'p5': step_p5, 'p6': step_p6}


@pytest.mark.parametrize('phase', STEPS)
def test_a_step_at_full_size_reaches_every_parameter(corpus, phase):
    x = corpus.take(torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long), torch.tensor([2, 3, 2, 3]))
    nets = build(FULL, *NETS[phase])
    print(f"encoder {runtime.count_parameters(nets['encoder']) / 1e6:.2f}M parameters")
    assert 19e6 < runtime.count_parameters(nets['encoder']) < 26e6
    learning = {name: net for name, net in nets.items() if phase != 'p4' or name in ('decoder', *CONTROLS)}
    optimizer = runtime.adamw(learning, 1e-4, 0.01)
    loss = STEPS[phase](nets, x, corpus.meanings[:2, :1])
    loss.backward()
    assert loss.isfinite()
    # A bias of the keys moves all scores alike; one that reads z alone has a single key and nothing to choose.
    idle = r'.*key\.bias|z only\.cross\.\d+\.(norm|attention\.(query|key))\..*'
    for name, net in learning.items():
        for key, p in net.named_parameters():
            if not re.fullmatch(idle, f'{name}.{key}'):
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, f'{name}.{key}'
    optimizer.step()
    assert all(p.isfinite().all() for net in learning.values() for p in net.parameters())


# ---- P1 -------------------------------------------------------------------------------------------------------------

def test_prior_input():
    V = torch.randn(2, 6, 8, 8)
    assert torch.equal(p1_canvas.prior_input(V, 5, 5, 5), V)
    assert torch.equal(p1_canvas.prior_input(V, 4, 5, 0), priors.gaussian_blur(V, 0.8))
    both = p1_canvas.prior_input(V, 4, 0, 5)
    assert both.shape == (2, 8, 8, 8) and torch.equal(both[:, :6], V)
    assert both[0, 6, 3].tolist() == both[1, 7, :, 3].tolist() == pytest.approx(np.linspace(-1, 1, 8).tolist())


def test_image_loss_is_the_weighted_sum_of_the_priors():
    V = torch.randn(4, 6, 16, 16)
    config = runtime.Config(FULL | {'size': 16, 'query_grid': 4, 'alpha': 1.5, 'lambda_tv': 0.7, 'lambda_common': 0.0})
    loss, terms = p1_canvas.image_loss(V, config)
    expected = priors.image_prior_terms(V, alpha=1.5, cell=4)
    assert terms.keys() == expected.keys() == set(priors.PRIORS)
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    by_hand = sum(config[f'lambda_{name}'] * value.item() for name, value in expected.items())
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_reconstruction_does_not_depend_on_padding_or_on_how_the_batch_is_cut():
    V, x = torch.randn(4, 2, 8, 8), torch.randint(4, 20, (4, 8))
    x[0, 3:], x[1, 5:] = 0, 0
    decoder = TextDecoder(20, 2, 8, 2, dim=16, layers=1, heads=2, hidden=16, memory='canvas').eval()
    whole = p1_canvas.reconstruction(decoder, V, None, x)
    halves = [p1_canvas.reconstruction(decoder, v, None, F.pad(t, (0, 4))) for v, t in zip(V.chunk(2), x.chunk(2))]
    assert torch.allclose(whole, sum(halves) / 2)
    two = p1_canvas.reconstruction(decoder, V, None, torch.stack((x, x.flip(0)), dim=1), (BOS, PARA))
    assert torch.allclose(two, torch.stack((whole, p1_canvas.reconstruction(decoder, V, None, x.flip(0), PARA))))


def some_sentences(B=12, T=9, vocabulary=50):
    """Sentences (B, T) of 1 to T tokens, the last of them EOS."""
    x = torch.randint(data.SPECIALS, vocabulary, (B, T))
    for n, row in enumerate(x):
        end = n % T
        row[end], row[end + 1:] = data.EOS, data.PAD
    return x


def test_join_is_what_a_loop_does():
    x = some_sentences()
    sentences = [[i for i in row if i != data.PAD] for row in x.tolist()]
    for share, longest in ((1.0, 64), (0.5, 64), (0.5, 9), (0.3, 11), (1.0, 13), (0.01, 18)):
        expected = []
        for n, sentence in enumerate(sentences):
            whole = sentence[:-1] + sentences[(n + 1) % 12] if n < share * 12 else sentence
            expected.append(whole if len(whole) <= longest else whole[:longest - 1] + [data.EOS])
        y = p1_canvas.join(x, share, longest)
        assert y.dtype == x.dtype and len(y) == 12 and y.shape[1] <= longest
        for row, sentence in zip(y.tolist(), expected):
            assert row == sentence + [data.PAD] * (y.shape[1] - len(sentence)), (share, longest)
    alone = p1_canvas.join(x, 0.0, 64)
    assert torch.equal(alone[:, :9], x) and not alone[:, 9:].any()
    both = torch.stack((x, x.flip(0)), dim=1)             # sentences and their paraphrases are joined alike
    for k in range(2):
        assert torch.equal(p1_canvas.join(both, 0.5, 11)[:, k], p1_canvas.join(both[:, k], 0.5, 11))


def test_replace_tokens_leaves_ends_and_padding():
    x, seen = some_sentences(B=400), set()
    words = x >= data.SPECIALS
    for share in (0.0, 0.2, 1.0):
        y = p1_canvas.replace_tokens(x, share, 200, torch.Generator().manual_seed(3))
        assert y.dtype == x.dtype and torch.equal(y[~words], x[~words])
        changed = y[words] != x[words]
        assert changed.float().mean().item() == pytest.approx(share, abs=0.02)
        assert data.SPECIALS <= y[words].min() and y[words].max() < 200
        seen |= set(y[words].tolist())
        again = p1_canvas.replace_tokens(x, share, 200, torch.Generator().manual_seed(3))
        assert torch.equal(y, again), 'the same on every rank'
    assert seen == set(range(data.SPECIALS, 200)), 'by any token'
    assert torch.equal(x, x.clone()) and x.max() < 50, 'in a copy'


# ---- P2 -------------------------------------------------------------------------------------------------------------

MEANINGS = torch.tensor([[7, 8, 9], [8, 5, 7], [4, 4, 6]])    # scene 1 is scene 0's first counterfactual, and so on
VALID = torch.tensor([[True, True, True], [True, True, True], [True, False, True]])


CONTRAST = runtime.Config(temperature=0.3, anchors=True, mask_false_negatives=True)


def by_hand(queries, keys, meanings, valid, temperature, scenes_only=False, mask=True):
    """InfoNCE written as it reads: a row against itself and all valid rows that mean something else."""
    losses = []
    for i in range(len(queries)):
        if valid[i] and not (scenes_only and i % 3):
            rivals = [j for j in range(len(keys)) if valid[j] and (j == i or not mask or meanings[j] != meanings[i])]
            scores = torch.stack([queries[i] @ keys[j] / temperature for j in rivals])
            losses.append(-scores.log_softmax(0)[rivals.index(i)])
    return torch.stack(losses).mean()


def test_contrast_hides_exactly_the_false_negatives():
    Z = F.normalize(torch.randn(3, 3, 3, 5), dim=-1).requires_grad_()
    a, b, c = Z.flatten(0, 1).unbind(1)
    ids, ok = MEANINGS.flatten(), VALID.flatten()

    def close(options, expected, pull_free=False):
        loss = p2_contrast.contrast(Z, batch_of(MEANINGS, VALID), runtime.Config(CONTRAST | options), pull_free)
        assert torch.allclose(loss, expected, rtol=1e-5)
    symmetric = (by_hand(a, b, ids, ok, 0.3) + by_hand(b, a, ids, ok, 0.3)) / 2
    close({}, symmetric)
    close({'anchors': False}, by_hand(a, b, ids, ok, 0.3, scenes_only=True))
    close({'mask_false_negatives': False},
          (by_hand(a, b, ids, ok, 0.3, mask=False) + by_hand(b, a, ids, ok, 0.3, mask=False)) / 2)
    close({}, symmetric + by_hand(c, a, ids, ok, 0.3), pull_free=True)
    assert not torch.allclose(symmetric, by_hand(a, b, ids, ok, 0.3, mask=False), rtol=1e-3)

    # A false negative and a row that is not valid leave no trace in a loss that they are not rows of.
    first = torch.arange(9) == 0
    hidden = (ids == ids[0]) & ~first | ~ok
    grad, = torch.autograd.grad(p2_contrast.info_nce(a[:1].expand(9, -1), b, hidden[None], first, 0.3), Z)
    touched = grad[:, :, 1].abs().sum(-1).flatten() > 0
    assert touched.tolist() == [True, True, True, True, True, False, True, False, True]


def test_contrast_of_each_rank_s_own_rows_is_in_the_mean_that_of_all():
    """Ranks with rows that are not valid, in every stage: the losses, and the gradients that a gather sums."""
    Z = F.normalize(torch.randn(4, 3, 3, 5), dim=-1).requires_grad_()
    meanings, valid = torch.cat((MEANINGS, MEANINGS[:1])), torch.cat((VALID, ~VALID[2:]))
    for options in ({}, {'anchors': False}, {'mask_false_negatives': False}):
        config = runtime.Config(CONTRAST | options)
        for pull_free in (False, True):
            whole = p2_contrast.contrast(Z, batch_of(meanings, valid), config, pull_free)
            ranks = [p2_contrast.contrast(Z, batch_of(meanings, valid, slice(r, r + 2)), config, pull_free)
                     for r in (0, 2)]
            assert torch.allclose(sum(ranks) / 2, whole, rtol=1e-6) and not torch.allclose(*ranks)
            gradients = (torch.autograd.grad(loss, Z)[0] for loss in (sum(ranks) / 2, whole))
            assert torch.allclose(*gradients, atol=1e-7)


def test_pulling_the_free_paraphrase_does_not_move_the_canonical_rows():
    Z = F.normalize(torch.randn(3, 3, 3, 5), dim=-1).requires_grad_()
    one, two = (torch.autograd.grad(p2_contrast.contrast(Z, batch_of(MEANINGS, VALID), CONTRAST, pull_free), Z)[0]
                for pull_free in (False, True))
    assert torch.allclose(one[:, :, :2], two[:, :, :2]) and one[:, :, 2].abs().sum() == 0 < two[:, :, 2].abs().sum()


def test_swaps_beaten():
    east, north, west = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    Z = torch.stack([torch.stack(views).view(2, 2, 2) for views in (                # (scene, paraphrase, swap, its own)
        (east, east, west, west),                                                   # both find their own
        (east, north, north, east),                                                 # neither does
        (east, east, north, west),                                                  # the scene does, the swap does not
        (west, east, east, west))])                                                 # not a swap: does not count
    swaps = torch.tensor([[False, True], [False, True], [False, True], [False, False]])

    def share(Z, swaps, **view):
        return p2_contrast.swaps_beaten(Z, batch_of(swaps.long(), swaps=swaps), **view)

    assert share(Z, swaps).item() == pytest.approx(3 / 6)
    swaps[1, 1] = False
    assert share(Z, swaps).item() == pytest.approx(3 / 4)
    assert share(Z, torch.zeros_like(swaps)).isnan(), 'no swap, no verdict'
    free = torch.cat((Z, Z[:, :, 1:].roll(1, 1)), dim=2)      # the third view, here each other's sentence
    assert share(free, swaps, view=2) == 0


def test_contrastive_backward_in_parts_has_the_gradient_of_the_whole_batch():
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)).double()
    batch = batch_of(torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])[:, None], x=torch.randn(8, 2, 6, dtype=torch.float64))
    sizes, forwards = [], []

    def embed(part):
        return F.normalize(net(part.x), dim=-1)

    def forward(part):
        forwards.append(part.index.tolist())
        z = embed(part)
        local = z[:, 0].square().sum(-1).mean() + part.x.mean() * z.mean()
        return z, local, {'local': local}

    def loss_of_all(z, batch):
        sizes.append(len(z))
        nce = p2_contrast.contrast(z[:, None], batch, runtime.Config(CONTRAST | {'temperature': 0.2}))
        return nce, {'nce': nce}
    torch.manual_seed(1)
    outputs = [forward(part) for part in batch.parts(4)]
    nce, _ = loss_of_all(torch.cat([z for z, *_ in outputs]), batch)
    direct = nce + sum(local for _, local, _ in outputs) / 4
    direct.backward()
    state, expected = torch.get_rng_state(), [p.grad.clone() for p in net.parameters()]
    net.zero_grad(), forwards.clear()
    torch.manual_seed(1)
    loss, terms = runtime.contrastive_backward(forward, embed, loss_of_all, batch, 4)
    assert forwards == [[0, 1], [2, 3], [4, 5], [6, 7]], 'all other losses once'
    assert terms['local'].item() == pytest.approx(sum(local.item() for _, local, _ in outputs) / 4), 'of all parts'
    assert terms['nce'].item() == pytest.approx(nce.item(), abs=1e-12)
    assert not terms['local'].requires_grad and not terms['nce'].requires_grad
    assert loss.item() == pytest.approx(direct.item(), abs=1e-12) and not loss.requires_grad and sizes == [8, 8]
    assert all(torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12) for p, g in zip(net.parameters(), expected))
    assert torch.equal(torch.get_rng_state(), state), 'the same dropout, and no more of it'

    net.eval().zero_grad(), forwards.clear(), sizes.clear()
    loss, terms = runtime.contrastive_backward(forward, embed, loss_of_all, batch, 1)
    whole, expected = [p.grad.clone() for p in net.parameters()], (loss, terms)
    net.zero_grad()
    z, local, _ = forward(batch)
    (loss_of_all(z, batch)[0] + local).backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12) for p, g in zip(net.parameters(), whole))
    assert forwards == [[*range(8)]] * 2 and sizes == [8, 8] and terms.keys() == {'nce', 'local'}
    assert not loss.requires_grad and loss.item() == pytest.approx(terms['nce'].item() + local.item(), abs=1e-12)


STAGE_ENDS = runtime.Config(staged=True, stage1_ends=0.95, stage2_ends=0.9, more_come_in=0.8)
FEWEST, OTHERS = torch.tensor([0, 2]), torch.tensor([1, 3, 4])


def test_curriculum_of_scenes_that_are_alike():
    stages = p2_contrast.curriculum(STAGE_ENDS, SimpleNamespace(canonical=2, fewest=None, others=None))
    assert [stage.form for stage in stages] == ['canonical', 'canonical', 'any']
    assert [stage.free for stage in stages] == ['read', 'pulled', '']
    assert [stage.all_swaps for stage in stages] == [True, True, False]
    assert [stage.ends for stage in stages] == [0.95, 0.9, math.inf] and len({stage.name for stage in stages}) == 3
    assert all(stage.scenes is None for stage in stages)


def test_curriculum_begins_with_the_scenes_of_the_fewest_things():
    stages = p2_contrast.curriculum(STAGE_ENDS, SimpleNamespace(canonical=2, fewest=FEWEST, others=OTHERS))
    assert [stage.form for stage in stages] == ['canonical', 'canonical', 'any'] * 2
    assert [stage.free for stage in stages] == ['read', 'pulled', ''] * 2
    assert [stage.all_swaps for stage in stages] == [True, True, False] * 2
    assert [stage.ends for stage in stages] == [0.95, 0.9, 0.8, 0.95, 0.9, math.inf]
    assert all(stage.scenes is FEWEST for stage in stages[:3]) and all(stage.scenes is OTHERS for stage in stages[3:5])
    assert stages[5].scenes is None, 'all of them in the end'


@pytest.mark.parametrize('settings, canonical', [({'staged': False}, 2), ({}, 0), ({'staged': False}, 0)],
                         ids=['the plan', 'a corpus of your own', 'both'])
@pytest.mark.parametrize('others', [None, OTHERS])
def test_curriculum_of_one_stage(settings, canonical, others):
    corpus = SimpleNamespace(canonical=canonical, fewest=None if others is None else FEWEST, others=others)
    stage, = p2_contrast.curriculum(runtime.Config(STAGE_ENDS | settings), corpus)
    assert stage[1:] == ('any', '', False, None, math.inf)


def test_curriculum_of_the_small_corpus_makes_batches(corpus):
    run = SimpleNamespace(rank=0, world=1, device=torch.device('cpu'))
    config = runtime.Config(FULL | {'batch_size': 8})
    for stage in p2_contrast.curriculum(config, corpus):
        batch = corpus.contrast_batch(config, run, 0, form=stage.form, free_view=bool(stage.free),
                                      all_swaps=stage.all_swaps, among=stage.scenes)
        assert batch.x.shape[:3] == (8, 3, 3 if stage.free else 2)


class Meanings(dict):
    """Nets whose embedding of a sentence is looked up: a stand-in for {'encoder', 'readout'}."""

    def __init__(self, corpus, z):
        place = {self.key(row): n for n, row in enumerate(corpus.fixed().tolist())}
        assert len(place) == len(z)
        super().__init__(encoder=lambda x: torch.tensor([place[self.key(row)] for row in x.tolist()]),
                         readout=lambda index: z[index])
        self.training = True

    @staticmethod
    def key(row):
        return tuple(i for i in row if i != data.PAD)

    def eval(self):
        self.training = False


def test_mined_pairs_are_the_scenes_that_z_confuses(corpus):
    run, size = SimpleNamespace(world=1, autocast=nullcontext), corpus.size
    angle = torch.arange(size) * (torch.pi / size)            # neighbours on a circle; 3 and 4 are nearest of all
    angle[4] = angle[3] + 1e-3
    nets = Meanings(corpus, torch.stack((angle.cos(), angle.sin()), dim=1))
    pairs = p2_contrast.mine_pairs(nets, corpus, run, share=4 / size, rows=7)
    assert not nets.training and pairs.dtype == torch.int64
    assert pairs.shape == (4, 2) and {(3, 4), (4, 3)} <= set(map(tuple, pairs.tolist()))
    assert all(0 < abs(a - b) <= 2 for a, b in pairs.tolist())
    assert len(p2_contrast.mine_pairs(nets, corpus, run)) == int(0.05 * size)
    scenes = torch.tensor([100, 3, 150, 4, 200, 7])
    some = p2_contrast.mine_pairs(nets, corpus, run, scenes, share=0.5)
    assert len(some) == 3 and set(some.flatten().tolist()) <= set(scenes.tolist())
    assert {tuple(pair) for pair in some[:2].tolist()} == {(3, 4), (4, 3)}, 'indices of the corpus'
    first = p2_contrast.mine_pairs(nets, corpus, run, share=1.0, pool=10)
    assert len(first) == 10 and first.max() < 10
    same = corpus.meanings[:, 0].clone()
    try:
        corpus.meanings[4, 0] = corpus.meanings[3, 0]         # now they mean the same: not confused at all
        pairs = p2_contrast.mine_pairs(nets, corpus, run, share=1.0)
        assert len(pairs) == size and not {(3, 4), (4, 3)} & set(map(tuple, pairs.tolist()))
        assert (corpus.meanings[pairs[:, 0], 0] != corpus.meanings[pairs[:, 1], 0]).all()
    finally:
        corpus.meanings[:, 0] = same
    settings = runtime.Config(batch_size=16, negatives=2, leave_out='', seed=0)
    scenes = corpus.contrast_rows(settings, 5, pairs=pairs)[0][:, 0]
    partner = dict(pairs.tolist())
    assert [partner[s] for s in scenes[:6].tolist()] == scenes[6:12].tolist()
    assert torch.equal(scenes[12:], corpus.contrast_rows(settings, 5)[0][12:, 0])


def test_tf_idf_is_of_words_however_they_are_cut_into_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{'original': f'the {a} chased a {b}', 'paraphrases': [f'a {b} was chased by the {a}'],
             'counterfactuals': {'who': [f'the {b} chased a {a}']}}
            for a in ('cat', 'dog', 'hen', 'owl', 'ox', 'pig') for b in ('mouse', 'worm', 'fly', 'bee', 'ant')]
    (tmp_path / 'c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = {}
    for vocab_size in (260, 1024):
        text = data.load(p1_canvas.config | {'corpus': 'c.jsonl', 'vocab_size': vocab_size})
        found[vocab_size] = p2_contrast.baselines(text, text.splits['train'])
        assert found[vocab_size].keys() == {'bag of tokens', 'TF-IDF'}
    small, large = found[260], found[1024]
    assert small['TF-IDF'] == pytest.approx(large['TF-IDF']) and small['TF-IDF']['r1'] > 0.9, 'two rare words of it'
    assert small['bag of tokens'] != pytest.approx(large['bag of tokens'])
    assert small['TF-IDF']['gap_who'] < 1e-6, 'it does not know who chases whom'


def test_nothing_is_mined_in_a_corpus_of_ones_own():
    assert p2_contrast.mine_pairs(None, SimpleNamespace(canonical=0), None) is None


# ---- P3 -------------------------------------------------------------------------------------------------------------

JITTER = runtime.Config(jitter_prob=0.5, max_shift=2, blur_sigma=0.8, cutout=4)


def test_jitter_is_decided_by_u_alone():
    V, u = torch.randn(64, 2, 12, 12), torch.rand(64, 7)
    whole = p3_jitter.jitter(V, u, JITTER)
    torch.manual_seed(9)
    parts = [p3_jitter.jitter(v, t, JITTER) for v, t in zip(V.split(16), u.split(16))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    none = (u[:, :3] >= 0.5).all(1)
    assert none.any() and torch.equal(whole[none], V[none]) and not torch.equal(whole[~none], V[~none])
    assert torch.equal(p3_jitter.jitter(V, u, runtime.Config(JITTER | {'jitter_prob': 0.0})), V)
    least, most = torch.zeros(1, 7), torch.full((1, 7), 1 - 2 ** -24)
    for k, change in ((0, lambda V, d: priors.shift(V, d, d)), (1, lambda V, d: priors.gaussian_blur(V, 0.8)),
                      (2, lambda V, d: priors.cut_out(V, 4 + 2 * d, 4 + 2 * d, 4))):
        for u, d in ((least, -2), (most, 2)):
            u = u.clone()
            u[:, :3] = 1.0
            u[:, k] = 0.0
            expected = change(V[:1], torch.tensor([d]))
            assert torch.allclose(p3_jitter.jitter(V[:1], u, JITTER), expected, atol=1e-6)


def test_invariance_pulls_a_jittered_paraphrase_to_the_other():
    z, z_jittered = (F.normalize(torch.randn(3, 2, 2, 5), dim=-1) for _ in range(2))
    by_hand = [(z_jittered[n, k, 0] - z[n, k, 1]).norm().item() ** 2 for n in range(3) for k in range(2)]
    assert p3_jitter.invariance(z_jittered, z).item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)


# ---- P4 and P5 ------------------------------------------------------------------------------------------------------

def test_reading_losses_share_the_decoder_between_again_and_in_other_words():
    def reader(memory):
        return TextDecoder(20, 2, 8, 2, z_dim=6, dim=16, layers=1, heads=2, hidden=16, memory=memory).eval()

    decoders = {'decoder': reader('both'), 'z only': reader('z')}
    V, z, x = torch.randn(4, 2, 8, 8), torch.randn(4, 6), torch.randint(4, 20, (4, 3, 8))
    x[0, 1, 3:], x[1, 2, 5:] = data.PAD, data.PAD
    again, only = (p1_canvas.reconstruction(net, V, z, x[:, 0]) for net in decoders.values())
    others = [p1_canvas.reconstruction(decoders['decoder'], V, z, x[:, k], PARA) for k in (1, 2)]
    loss, losses = p4_decoder.reading_losses(decoders, V, z, x, 0.25)
    assert losses.keys() == {'decoder', 'paraphrase', 'z only'}
    for name, expected in (('decoder', again), ('paraphrase', sum(others) / 2), ('z only', only)):
        assert torch.allclose(losses[name], expected, rtol=1e-5), name
    assert torch.allclose(loss, 0.75 * again + 0.25 * sum(others) / 2 + only, rtol=1e-5)
    loss, losses = p4_decoder.reading_losses(decoders, V, z, x, 0.0)
    assert losses.keys() == {'decoder', 'z only'} and torch.allclose(loss, again + only, rtol=1e-5)


def test_paraphrase_metrics():
    original = 'a red cube is on a blue ball'
    m = p5_roundtrip.paraphrase_metrics([original, 'nothing of that'], [original] * 2, [1.0, 0.5], True)
    assert (m['rouge_l'], m['cosine'], m['distinct'], m['graph_exact']) == (0.5, 0.75, 0.5, 0.5)
    originals = ['two red cubes', 'two red cubes', 'no dog', 'a dog', 'a cat']
    said = ['crimson cubes two', 'three red cubes', 'no cat', 'not a dog', 'a cow']
    m = p5_roundtrip.paraphrase_metrics(said, originals, [0.5] * 5, False)
    assert (m['same_numbers'], m['same_colours'], m['same_negation']) == (0.5, 1.0, 0.5)
    assert not any(name.startswith(('graph', 'unreadable')) for name in m), 'there is no checker for it'


def test_copied_marks_the_tokens_that_complete_an_n_gram():
    x = torch.tensor([[10, 11, 12, 13, data.EOS, 0], [20, 21, 22, 20, 21, data.EOS]])
    y = torch.tensor([[9, 10, 11, 12, 13, data.EOS, 0, 0], [21, 20, 21, 22, 22, 20, 21, data.EOS]])
    for n, first, second in ((2, [2, 3, 4], [2, 3, 5, 6]), (3, [3, 4], [3, 6]), (4, [4], [])):
        marked = [row.nonzero()[:, 0].tolist() for row in p5_roundtrip.copied(y, x, n)]
        assert marked == [first, second], n
    assert not p5_roundtrip.copied(y[:, :2], x, 3).any() and not p5_roundtrip.copied(y, x[:, :2], 3).any()


def test_copy_suppression():
    x, y = torch.tensor([[10, 11, 12, 13, data.EOS]]), torch.tensor([[9, 10, 11, 12, data.EOS]])
    logits = torch.randn(1, 5, 16, requires_grad=True)
    assert p5_roundtrip.copy_suppression(logits.log_softmax(-1), y, x + 20, 3, 5) == 0
    loss = p5_roundtrip.copy_suppression(logits.log_softmax(-1), y, x, 3, 5)
    p = logits.softmax(-1)[0, 3, 12]
    assert loss.item() == pytest.approx(-math.log(1 - p.item()) / 5, rel=1e-5)
    loss.backward()
    assert logits.grad[0, 3, 12] > 0 and logits.grad[0, [0, 1, 2, 4]].abs().sum() == 0
    certain = torch.full((1, 5, 16), -50.0).scatter(2, y[:, :, None], 0.0)
    assert p5_roundtrip.copy_suppression(certain, y, x, 3, 5).isfinite()


def test_straight_through_is_one_hot_forward_and_soft_backward():
    y, w = torch.tensor([[5, 7, data.EOS, data.PAD]]), torch.randn(1, 4, 9)
    logits = torch.randn(1, 4, 9, requires_grad=True)
    hard = p5_roundtrip.straight_through(logits, y)
    assert torch.allclose(hard[:, :3], F.one_hot(y[:, :3], 9).float(), atol=1e-6) and (hard[:, 3] == 0).all()
    grad, = torch.autograd.grad((hard * w).sum(), logits)
    soft, = torch.autograd.grad((logits.softmax(-1) * w).sum(), logits)
    assert torch.allclose(grad[:, :3], soft[:, :3]) and (grad[:, 3] == 0).all() and grad[:, :3].abs().sum() > 0


TINY = runtime.Config(FULL | {
    'vocab_size': 40, 'dim': 16, 'layers': 1, 'heads': 2, 'hidden': 16, 'cross_hidden': 16, 'cross_layers': 1,
    'query_grid': 4, 'size': 16, 'patch': 4, 'z_dim': 8, 'readout_hidden': 8, 'dec_dim': 16, 'dec_layers': 1,
    'dec_heads': 2, 'dec_hidden': 16})


def test_candidates_of_a_batch_are_those_of_its_rows():
    """Drawn by u alone: cutting the batch for ranks changes no sentence."""
    nets = build(TINY, 'encoder', 'readout', 'decoder').eval()
    V, u = torch.randn(4, 6, 16, 16), torch.rand(4, 3, 10)
    z = nets['readout'](V).detach()
    y, cosine = p5_roundtrip.candidates(nets, V, z, u, TINY)
    assert y.shape == (4, 3, 10) and cosine.shape == (4, 3) and len(y.flatten(0, 1).unique(dim=0)) > 6
    parts = [p5_roundtrip.candidates(nets, V[i:i + 2], z[i:i + 2], u[i:i + 2], TINY) for i in (0, 2)]
    assert torch.equal(torch.cat([part for part, _ in parts]), y)
    assert torch.allclose(torch.cat([c for _, c in parts]), cosine, atol=1e-5)
    again = nets['readout'](nets['encoder'](y[:, 1]))
    assert torch.allclose((again * z).sum(-1), cosine[:, 1], atol=1e-5)
    plain = runtime.Config(TINY | {'paraphrase_share': 0.0})
    assert (p5_roundtrip.start_token(TINY), p5_roundtrip.start_token(plain)) == (PARA, BOS)
    assert not torch.equal(p5_roundtrip.candidates(nets, V, z, u, plain)[0], y), 'taught no paraphrases: says it again'


def test_local_losses_of_the_parts_are_in_the_mean_those_of_the_batch(corpus):
    """Of ranks and of micro-batches alike: the random numbers of jitter and free run go with their scenes."""
    config = runtime.Config(TINY | {'vocab_size': 1024, 'batch_size': 8, 'dropout': 0.0, 'dec_dropout': 0.0,
                                    'generated': 16, 'best_of_k': 2, 'dec_samples': 16})
    nets = build(config, 'encoder', 'readout', 'decoder')

    def losses(rank, world, grad_accum, config=config):
        run = SimpleNamespace(rank=rank, world=world, device=torch.device('cpu'),
                              generator=partial(runtime.generator, config.seed))
        batch = p5_roundtrip.draw_batch(corpus, config, run, 5, 12, None)
        return [p5_roundtrip.local_losses(nets, part, config, world * grad_accum, nullcontext)
                for part in batch.parts(grad_accum)]

    (z, loss, terms, V), = losses(0, 1, 1)
    assert z.shape[:3] == (8, 3, 2) and len(V) == 48 and V.shape[1:] == (6, 16, 16)
    assert terms.keys() == {*priors.PRIORS, 'again', 'para', 'inv', 'cycle', 'copy'}
    assert all(value.shape == () and value.isfinite() for value in terms.values())
    weighted = sum(config[f'lambda_{name}'] * terms[name] for name in (*priors.PRIORS, 'inv', 'cycle', 'copy'))
    again, para = ((1 - config.paraphrase_share) * terms['again'], config.paraphrase_share * terms['para'])
    assert torch.allclose(loss, weighted + config.lambda_dec * (again + para), rtol=1e-5)
    two_ranks = losses(0, 2, 1) + losses(1, 2, 1)
    for parts in (losses(0, 1, 2), two_ranks, losses(0, 2, 2) + losses(1, 2, 2)):
        assert torch.allclose(torch.cat([part[0] for part in parts]), z, atol=1e-5)
        for name in ('again', 'para', 'inv', 'cycle', 'copy'):
            mean = sum(part[2][name] for part in parts) / len(parts)
            assert torch.allclose(mean, terms[name], rtol=1e-4, atol=1e-6), name
    mean = sum(part[1] for part in two_ranks) / 2
    assert torch.allclose(mean, loss, rtol=1e-4), 'the priors see the same canvases'
    (_, _, terms, _), = losses(0, 1, 1, runtime.Config(config | {'paraphrase_share': 0.0}))
    assert terms['para'] == 0 < terms['again'], 'the plan has none'


def test_the_numbers_of_a_batch_of_p5_are_drawn_for_all_ranks(corpus):
    def draws(rank, world, step, **changes):
        config = runtime.Config(TINY | {'batch_size': 4, 'generated': 8, 'best_of_k': 3} | changes)
        run = SimpleNamespace(rank=rank, world=world, device=torch.device('cpu'),
                              generator=partial(runtime.generator, 0))
        return p5_roundtrip.draw_batch(corpus, config, run, step, 10, None).draws

    whole = draws(0, 1, 7)
    assert whole['jitter'].shape == (4, 3, 2, 7) and whole['free_run'].shape == (4, 2, 3, 10)
    assert draws(0, 1, 7, generated=1)['free_run'].shape[1] == 1, 'one sentence of a scene at least'
    assert draws(0, 1, 7, generated=100)['free_run'].shape[1] == 3, 'and no more than there are'
    for name in whole:
        assert torch.equal(torch.cat([draws(rank, 2, 7)[name] for rank in (0, 1)]), whole[name])
        assert not torch.equal(draws(0, 1, 8)[name], whole[name])


# ---- P6 -------------------------------------------------------------------------------------------------------------

def test_alpha_bar_is_the_cosine_schedule():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = p6_diffusion.alpha_bar(t)
    assert (a.diff() < 0).all() and a[0] == pytest.approx(1 - 1e-5) and a[-1] == pytest.approx(1e-5)
    by_hand = [(math.cos((x + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
               for x in (0.25, 0.5, 0.75)]
    assert a[[25, 50, 75]].tolist() == pytest.approx(by_hand, rel=1e-9)


def test_q_sample_keeps_the_variance_and_predict_x0_undoes_it():
    V, noise, t = torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.linspace(0, 0.98, 64)
    V_t = p6_diffusion.q_sample(V, t, noise)
    assert V_t.var((1, 2, 3)).tolist() == pytest.approx([1.0] * 64, abs=0.2)
    torch.testing.assert_close(p6_diffusion.predict_x0(V_t, noise, t), V, atol=1e-3, rtol=1e-3)


def test_a_net_that_says_nothing_leaves_the_linear_guess():
    """On white canvases of unit variance sqrt(1 - a) V_t is off by a of the noise's variance, whatever t."""
    V, noise, t = torch.randn(64, 2, 16, 16), torch.randn(64, 2, 16, 16), torch.linspace(0.1, 0.99, 64)
    guess = partial(p6_diffusion.predict_eps, lambda V_t, t: torch.zeros_like(V_t))
    error = (guess(p6_diffusion.q_sample(V, t, noise), t) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(error, p6_diffusion.alpha_bar(t), atol=0.12, rtol=0)


def test_diffusion_loss_weighs_by_min_snr():
    """A net that predicts nothing has error |noise|^2; what is left is the weight."""
    t, noise = torch.tensor([0.02, 0.5, 0.9]), torch.ones(3, 1, 4, 4)
    nothing = lambda V_t, t: torch.zeros_like(V_t)
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise).item() == pytest.approx(1.0)
    a = p6_diffusion.alpha_bar(t)
    weights = [min(snr, 5.0) / snr for snr in (a / (1 - a)).tolist()]
    assert weights[0] < 0.02 and weights[1:] == [1.0, 1.0]
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise, 5.0).item() == pytest.approx(sum(weights) / 3)


def test_prior_loss_pulls_towards_the_denoised_canvas_and_nothing_flows_through_the_net():
    net = nn.Conv2d(2, 2, 1)
    V, t, noise = torch.randn(3, 2, 8, 8, requires_grad=True), torch.tensor([0.1, 0.2, 0.3]), torch.randn(3, 2, 8, 8)
    p6_diffusion.prior_loss(lambda V_t, t: net(V_t), V, t, noise).backward()
    with torch.no_grad():
        V_t = p6_diffusion.q_sample(V, t, noise)
        target = p6_diffusion.predict_x0(V_t, net(V_t), t)
    torch.testing.assert_close(V.grad, 2 * (V.detach() - target) / V.numel())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_ddim_with_a_perfect_net(eta):
    """The best prediction is known for one canvas (it comes back) and for Gaussian pixels (their variance does)."""
    generator = torch.Generator().manual_seed(0)
    noise, only = torch.randn(32, 2, 8, 8, generator=generator), torch.randn(1, 2, 8, 8, generator=generator)

    def knows_it(V_t, t):
        a = p6_diffusion.alpha_bar(t)[:, None, None, None]
        return (V_t - a.sqrt() * only) / (1 - a).sqrt()

    def gaussian(V_t, t):
        a = p6_diffusion.alpha_bar(t)[:, None, None, None]
        return (1 - a).sqrt() * V_t / (a * 0.25 + 1 - a)                              # pixels of variance 0.25

    torch.testing.assert_close(p6_diffusion.ddim(knows_it, noise, 20, eta, generator, nullcontext),
                               only.expand(32, -1, -1, -1), atol=0.02, rtol=0)
    drawn = p6_diffusion.ddim(gaussian, noise, 200, eta, generator, nullcontext)
    assert drawn.var().item() == pytest.approx(0.25, rel=0.1)


def test_ddim_is_as_noisy_as_eta_says():
    """Where nothing is predicted and the start is 0 all that is left is the noise of two steps, by hand."""
    now, middle, end = (p6_diffusion.alpha_bar(t) for t in torch.linspace(0.999, 0, 3))
    sigma = [((1 - then) / (1 - before) * (1 - before / then)).sqrt()                             # eq. 16 at eta = 1
             for before, then in ((now, middle), (middle, end))]
    expected = (end / middle * sigma[0].square() + sigma[1].square()).sqrt().item()
    for eta in (0.0, 0.5, 1.0):
        drawn = p6_diffusion.ddim(lambda V_t, t: torch.zeros_like(V_t), torch.zeros(64, 2, 16, 16), 2, eta,
                                  torch.Generator().manual_seed(0), nullcontext)
        assert drawn.std().item() == pytest.approx(eta * expected, rel=0.02)


def test_wiener_filter_is_the_best_on_gaussian_fields():
    """On fields of known power the closed form is what that filter measures, and no skill is 1 at t = 1."""
    generator = torch.Generator().manual_seed(0)
    fy, fx = torch.fft.fftfreq(16)[:, None], torch.fft.rfftfreq(16)
    amplitude = 1 / (0.1 + torch.hypot(fy, fx))
    V = torch.fft.irfft2(torch.fft.rfft2(torch.randn(4000, 2, 16, 16, generator=generator)) * amplitude, s=(16, 16))
    V = V / V.std()
    power = torch.fft.fft2(V, norm='ortho').abs().square().mean(0)

    def wiener(V_t, t):
        a = p6_diffusion.alpha_bar(t)[:, None, None, None]
        return torch.fft.ifft2((1 - a).sqrt() / (a * power + 1 - a) * torch.fft.fft2(V_t)).real

    metrics = p6_diffusion.diffusion_metrics(wiener, V, nullcontext, per=2000)
    for quarter in p6_diffusion.QUARTERS:
        assert metrics[f'diffusion_{quarter}'] == pytest.approx(metrics[f'wiener_{quarter}'], rel=0.03)
    assert metrics['wiener_t 0-25%'] > 0.5 > 0.2 > metrics['wiener_t 75-100%'] > 0
