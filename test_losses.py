"""Tests of the functions that the phases define: a step at full size reaches every parameter; losses, metrics and gates
against what one works out by hand."""
import math
import re
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
from model import BOS, PARA, TextDecoder


@pytest.fixture
def corpus(small, monkeypatch):
    """The small corpus, training split."""
    monkeypatch.chdir(small.folder)
    return data.load(small.config)[0]['train']


# ---- one step at full size ------------------------------------------------------------------------------------------

FULL = {name: getattr(p1_canvas, name) for name in p1_canvas.SIZES}
FULL |= {name: getattr(p2_contrast, name) for name in ('z_dim', 'readout_hidden', 'pyramid')}
FULL |= {name: getattr(p4_decoder, name) for name in ('dec_dim', 'dec_layers', 'dec_heads', 'dec_hidden')}
FULL |= {'dec_dropout': p4_decoder.dropout, 'unet_dim': p6_diffusion.unet_dim}


def step_p1(nets, x, meanings):
    V = nets['encoder'](x)
    loss = p1_canvas.reconstruction(nets['decoder'], V + 0.3 * torch.randn_like(V), None, x)
    return loss + priors.image_prior_loss(priors.image_prior_terms(V), p1_canvas.weights(p1_canvas.config))


def meant(z, meanings):
    """The contrast of z (4, E): two scenes, each in two renderings."""
    return p2_contrast.contrast(z.view(2, 1, 2, -1), meanings, torch.ones(2, 1, dtype=torch.bool), 3, 0.07)


def step_p2(nets, x, meanings):
    V = nets['encoder'](x)
    return meant(nets['readout'](V), meanings) + p1_canvas.reconstruction(nets['decoder'], V, None, x)


def step_p3(nets, x, meanings):
    V = nets['encoder'](x)
    T_V = p3_jitter.jitter(V, torch.rand(len(V), 7), 0.5, 2, 0.8, 6)
    inv = (nets['readout'](T_V)[::2] - nets['readout'](V)[1::2]).square().sum(-1).mean()
    return meant(nets['readout'](V), meanings) + inv + p1_canvas.reconstruction(nets['decoder'], T_V, None, x)


def step_p4(nets, x, meanings):
    with torch.no_grad():
        V = nets['encoder'](x)
        z = nets['readout'](V)
    return sum(p1_canvas.reconstruction(nets[name], V, z, x) for name in p4_decoder.CONTROLS)


def step_p5(nets, x, meanings):
    V = nets['encoder'](x)
    z = nets['readout'](V)
    cycle, copy = p5_roundtrip.round_trip(nets, x[:2], V[:2], z[:2], 2, 0.9, torch.rand(2, 2, 8), 4)
    para = p1_canvas.reconstruction(nets['decoder'], V, z, x[torch.arange(4) ^ 1], PARA)
    return meant(z, meanings) + para + cycle + copy


def step_p6(nets, x, meanings):
    for p in nets['unet'].parameters():                  # some of its layers start at zero and let nothing through
        nn.init.normal_(p, std=0.05)
    V, t = nets['encoder'](x), torch.rand(4)
    noise = torch.randn_like(V)
    predict = partial(p6_diffusion.noise_in, nets['unet'])
    loss = p6_diffusion.diffusion_loss(predict, V.detach(), t, noise, 5.0)
    return loss + p6_diffusion.prior_loss(predict, V, t, noise) + step_p5(nets, x, meanings)


def full_nets(phase):
    if phase == 'p1':
        return p1_canvas.build(FULL)
    if phase == 'p6':
        return p6_diffusion.build(FULL)
    return p4_decoder.build(FULL, controls=phase == 'p4') if phase in ('p4', 'p5') else p2_contrast.build(FULL)


STEPS = {'p1': step_p1, 'p2': step_p2, 'p3': step_p3, 'p4': step_p4, 'p5': step_p5, 'p6': step_p6}


@pytest.mark.parametrize('phase', STEPS)
def test_a_step_at_full_size_reaches_every_parameter(corpus, phase):
    x = corpus.take(torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long), torch.tensor([2, 3, 2, 3]))
    nets = nn.ModuleDict(full_nets(phase))
    print(f"encoder {runtime.count_parameters(nets['encoder']) / 1e6:.2f}M parameters")
    assert 19e6 < runtime.count_parameters(nets['encoder']) < 26e6
    learning = {name: net for name, net in nets.items() if phase != 'p4' or name in p4_decoder.CONTROLS}
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

GOOD_CANVAS = {'alpha': [2.0] * 6, 'alpha_hann': [2.0] * 6, 'tv': 0.5, 'kurtosis': [5.0] * 6, 'max_correlation': 0.1,
               'share_total': 0.5, 'lattice': 1.0}


def failing(criteria):
    return [i for i, row in enumerate(criteria) if not row[3]]


def test_canvas_gate():
    assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 5))
    assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS | {'alpha': [2.0] * 4 + [0.0, 9.0]}] * 3)), 'four of six'
    assert failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 2)) == [0, 1, 3], 'two evaluations are not three'
    for change, at in (({'alpha': [2.0] * 3 + [2.6] * 3}, 0), ({'alpha_hann': [1.4] * 3 + [2.0] * 3}, 1),
                       ({'tv': 0.6}, 3), ({'kurtosis': [5.0] * 5 + [3.0]}, 4), ({'max_correlation': 0.31}, 5),
                       ({'share_total': 0.19}, 6), ({'lattice': 2.1}, 7), ({'lattice': math.nan}, 7)):
        assert failing(p1_canvas.canvas_gate([GOOD_CANVAS] * 2 + [GOOD_CANVAS | change])) == [at]
        earlier = [GOOD_CANVAS | change] + [GOOD_CANVAS] * 2
        assert failing(p1_canvas.canvas_gate(earlier)) == ([at] if at in (0, 1, 3) else []), 'slopes and TV must last'
        assert not failing(p1_canvas.canvas_gate([GOOD_CANVAS | change] + [GOOD_CANVAS] * 3))
    assert failing(p1_canvas.canvas_gate([GOOD_CANVAS | {'tv': 0.01}] * 3)) == [2]


def test_prior_input():
    V = torch.randn(2, 6, 8, 8)
    assert torch.equal(p1_canvas.prior_input(V, 5, 5, 5), V)
    assert torch.equal(p1_canvas.prior_input(V, 4, 5, 0), priors.gaussian_blur(V, 0.8))
    both = p1_canvas.prior_input(V, 4, 0, 5)
    assert both.shape == (2, 8, 8, 8) and torch.equal(both[:, :6], V)
    assert both[0, 6, 3].tolist() == both[1, 7, :, 3].tolist() == pytest.approx(np.linspace(-1, 1, 8).tolist())


def test_noise_of_reading_is_a_function_of_seed_and_step():
    run = SimpleNamespace(device=torch.device('cpu'))
    noise, again, later, other = (p1_canvas.reading_noise((64, 2), (6, 8, 8), seed, step, run)
                                  for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5)))
    assert noise.shape == (64, 2, 6, 8, 8) and torch.equal(noise, again)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise * later).mean()) < 0.02 and abs((noise * other).mean()) < 0.02


def test_reconstruction_does_not_depend_on_padding_or_on_how_the_batch_is_cut():
    V, x = torch.randn(4, 2, 8, 8), torch.randint(4, 20, (4, 8))
    x[0, 3:], x[1, 5:] = 0, 0
    decoder = TextDecoder(20, 2, 8, 2, dim=16, layers=1, heads=2, hidden=16, memory='canvas').eval()
    whole = p1_canvas.reconstruction(decoder, V, None, x)
    halves = [p1_canvas.reconstruction(decoder, v, None, F.pad(t, (0, 4))) for v, t in zip(V.chunk(2), x.chunk(2))]
    assert torch.allclose(whole, sum(halves) / 2)
    two = p1_canvas.reconstruction(decoder, V, None, torch.stack((x, x.flip(0)), dim=1), (BOS, PARA))
    assert torch.allclose(two, torch.stack((whole, p1_canvas.reconstruction(decoder, V, None, x.flip(0), PARA))))


# ---- P2 -------------------------------------------------------------------------------------------------------------

MEANINGS = torch.tensor([[7, 8, 9], [8, 5, 7], [4, 4, 6]])    # scene 1 is scene 0's first counterfactual, and so on
VALID = torch.tensor([[True, True, True], [True, True, True], [True, False, True]])


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

    def close(options, expected, stage=3):
        assert torch.allclose(p2_contrast.contrast(Z, MEANINGS, VALID, stage, 0.3, **options), expected, rtol=1e-5)
    symmetric = (by_hand(a, b, ids, ok, 0.3) + by_hand(b, a, ids, ok, 0.3)) / 2
    close({}, symmetric)
    close({}, symmetric, stage=1)
    close({'anchors': False}, by_hand(a, b, ids, ok, 0.3, scenes_only=True))
    close({'mask_false_negatives': False},
          (by_hand(a, b, ids, ok, 0.3, mask=False) + by_hand(b, a, ids, ok, 0.3, mask=False)) / 2)
    close({}, symmetric + by_hand(c, a, ids, ok, 0.3), stage=2)
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
        for stage in (1, 2, 3):
            whole = p2_contrast.contrast(Z, meanings, valid, stage, 0.3, **options)
            ranks = [p2_contrast.contrast(Z, meanings, valid, stage, 0.3, own_scenes=slice(r, r + 2), **options)
                     for r in (0, 2)]
            assert torch.allclose(sum(ranks) / 2, whole, rtol=1e-6) and not torch.allclose(*ranks)
            gradients = (torch.autograd.grad(loss, Z)[0] for loss in (sum(ranks) / 2, whole))
            assert torch.allclose(*gradients, atol=1e-7)


def test_stage_2_does_not_move_the_canonical_rows():
    Z = F.normalize(torch.randn(3, 3, 3, 5), dim=-1).requires_grad_()
    one, two = (torch.autograd.grad(p2_contrast.contrast(Z, MEANINGS, VALID, stage, 0.3), Z)[0] for stage in (1, 2))
    assert torch.allclose(one[:, :, :2], two[:, :, :2]) and one[:, :, 2].abs().sum() == 0 < two[:, :, 2].abs().sum()


def test_swaps_beaten():
    east, north, west = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    colour, swap, attribute = (data.VARIANTS.index(name) for name in ('colour', 'argument swap', 'attribute swap'))
    Z = torch.stack([torch.stack(views).view(2, 2, 2) for views in (                # (scene, paraphrase, swap, its own)
        (east, east, west, west),                                                   # both find their own
        (east, north, north, east),                                                 # neither does
        (east, east, north, west),                                                  # the scene does, the swap does not
        (west, east, east, west))])                                                 # not a swap: does not count
    variants = torch.tensor([[0, swap], [0, attribute], [0, swap], [0, colour]])
    valid = torch.ones(4, 2, dtype=torch.bool)
    assert p2_contrast.swaps_beaten(Z, variants, valid, 3).item() == pytest.approx(3 / 6)
    valid[1, 1] = False
    assert p2_contrast.swaps_beaten(Z, variants, valid, 1).item() == pytest.approx(3 / 4)
    assert p2_contrast.swaps_beaten(Z, variants, torch.zeros_like(valid), 3).isnan(), 'no swap, no verdict'
    free = torch.cat((Z, Z[:, :, 1:].roll(1, 1)), dim=2)      # stage 2 asks the third view, here each other's sentence
    assert p2_contrast.swaps_beaten(free, variants, valid, 2) == 0


def test_retrieval_metrics():
    """With unit queries e_i the similarities are what one writes down."""
    similarity = torch.full((6, 6), 0.1).fill_diagonal_(0.5)
    similarity[1, 3] = 0.6                                    # second
    similarity[2] = torch.tensor([0.6, 0.6, 0.5, 0.6, 0.6, 0.6])   # sixth
    rivals = torch.full((6, len(data.FAMILIES)), 0.2)
    valid = torch.ones_like(rivals, dtype=torch.bool)
    rivals[3, 0] = 0.7                                        # beaten by a change of colour
    rivals[4, 4], valid[4, 4] = 0.7, False                    # would be by a swap, but has none
    negatives = torch.zeros(6, len(data.FAMILIES), 6)
    negatives[torch.arange(6), :, torch.arange(6)] = rivals
    m = p2_contrast.retrieval_metrics(torch.eye(6), similarity.T, negatives, valid)
    assert m['r1'] == pytest.approx(4 / 6) and m['r5'] == pytest.approx(5 / 6) and m['r1_hard'] == pytest.approx(3 / 6)
    assert m['paraphrase_cosine'] == pytest.approx(0.5)
    assert m['gap_colour'] == pytest.approx((5 * 0.3 - 0.2) / 6) and m['wins_colour'] == pytest.approx(5 / 6)
    assert m['gap_argument swap'] == pytest.approx(0.3) and m['wins_argument swap'] == 1
    assert m['gap'] == pytest.approx((34 * 0.3 - 0.2) / 35)
    assert {f'{kind}_{family}' for kind in ('gap', 'wins') for family in data.FAMILIES} <= m.keys()
    tied = p2_contrast.retrieval_metrics(torch.ones(6, 1), torch.ones(6, 1), torch.ones(6, 6, 1), valid & False)
    assert tied['r1'] == tied['r5'] == tied['gap'] == 0, 'a collapsed z finds nothing'
    assert not any(name.startswith(('gap_', 'wins_')) for name in tied)


def test_contrastive_backward_in_parts_has_the_gradient_of_the_whole_batch():
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)).double()
    x, meanings = torch.randn(8, 2, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])[:, None]
    sizes, forwards = [], []

    def embed(x):
        return F.normalize(net(x), dim=-1)

    def forward(part):
        forwards.append(len(part[0]))
        z = embed(part[0])
        local = z[:, 0].square().sum(-1).mean() + part[0].mean() * z.mean()
        return z, local, {'local': local}

    def loss_of_all(z):
        sizes.append(len(z))
        return p2_contrast.contrast(z[:, None], meanings, torch.ones(8, 1, dtype=torch.bool), 3, 0.2)
    torch.manual_seed(1)
    outputs = [forward((part,)) for part in x.chunk(4)]
    direct = loss_of_all(torch.cat([z for z, *_ in outputs]))
    direct = direct + sum(local for _, local, _ in outputs) / 4
    direct.backward()
    state, expected = torch.get_rng_state(), [p.grad.clone() for p in net.parameters()]
    net.zero_grad(), forwards.clear()
    torch.manual_seed(1)
    loss, terms = runtime.contrastive_backward(forward, embed, (x,), 4, loss_of_all)
    assert forwards == [2, 2, 2, 2], 'all other losses once'
    assert terms['local'].item() == pytest.approx(sum(local.item() for _, local, _ in outputs) / 4), 'of all parts'
    assert not terms['local'].requires_grad
    assert loss.item() == pytest.approx(direct.item(), abs=1e-12) and not loss.requires_grad and sizes == [8, 8]
    assert all(torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12) for p, g in zip(net.parameters(), expected))
    assert torch.equal(torch.get_rng_state(), state), 'the same dropout, and no more of it'


def test_contrast_batch(corpus):
    for stage, views in ((1, 3), (2, 3), (3, 2)):
        scenes, variants, renderings, valid = corpus.contrast_batch(16, 0, 5, stage, 2, 'count')
        assert scenes.shape == variants.shape == valid.shape == (16, 3) and renderings.shape == (16, 3, views)
        assert valid[:, 0].all() and (variants[:, 0] == 0).all() and (variants[~valid] == 0).all()
        assert not (variants == data.VARIANTS.index('count')).any(), 'left out'
        assert (corpus.count[scenes, variants] > 0).all()
        canonical = renderings < corpus.canonical
        assert canonical[:, :, :2].all() and not canonical[:, :, 2].any() if stage < 3 else not canonical.all()
        assert (renderings[:, :, 0] != renderings[:, :, 1]).all()
    again = corpus.contrast_batch(16, 0, 5, 3, 2, 'count')
    assert torch.equal(again[2], renderings) and not torch.equal(
        corpus.contrast_batch(16, 0, 6, 3, 2, 'count')[0], scenes)


def test_confused_pairs_fill_three_quarters_of_the_batch(corpus):
    run, size = SimpleNamespace(world=1), corpus.size
    angle = torch.arange(size) * (torch.pi / size)            # neighbours on a circle; 3 and 4 are nearest of all
    angle[4] = angle[3] + 1e-3
    z = torch.stack((angle.cos(), angle.sin()), dim=1)
    pairs = p2_contrast.confused_pairs(lambda x: z[:len(x)], corpus, run, share=4 / size, rows=7)
    assert pairs.shape == (4, 2) and {(3, 4), (4, 3)} <= set(map(tuple, pairs.tolist()))
    assert all(0 < abs(a - b) <= 2 for a, b in pairs.tolist())
    same = corpus.meanings[:, 0].clone()
    try:
        corpus.meanings[4, 0] = corpus.meanings[3, 0]         # now they mean the same: not confused at all
        pairs = p2_contrast.confused_pairs(lambda x: z[:len(x)], corpus, run, share=1.0)
        assert len(pairs) == size and not {(3, 4), (4, 3)} & set(map(tuple, pairs.tolist()))
        assert (corpus.meanings[pairs[:, 0], 0] != corpus.meanings[pairs[:, 1], 0]).all()
    finally:
        corpus.meanings[:, 0] = same
    scenes = corpus.contrast_batch(16, 0, 5, 3, 2, '', pairs)[0][:, 0]
    partner = dict(pairs.tolist())
    assert [partner[s] for s in scenes[:6].tolist()] == scenes[6:12].tolist()
    assert torch.equal(scenes[12:], corpus.contrast_batch(16, 0, 5, 3, 2, '')[0][12:, 0])


GOOD_MEANING = {'r1': 0.6, 'r5': 0.85, 'r1_hard': 0.85, 'gap': 0.25}
GOOD_MEANING |= {f'{kind}_{f}': value for kind, value in (('gap', 0.25), ('wins', 0.95)) for f in data.FAMILIES}


def test_semantic_gate():
    good = GOOD_MEANING
    base = {'TF-IDF': dict.fromkeys(good, 0.125)}
    criteria = p2_contrast.semantic_gate(good, base)
    assert len(criteria) == 4 + 2 * len(data.FAMILIES) and not failing(criteria)
    assert all(row[4] == 'TF-IDF 0.12' for row in criteria)
    names = ['r1', 'r5', 'r1_hard', 'gap', *(f'{kind}_{f}' for f in data.FAMILIES for kind in ('gap', 'wins'))]
    for i, name in enumerate(names):
        for value in (good[name] - 0.01, math.nan):
            assert failing(p2_contrast.semantic_gate(good | {name: value}, base)) == [i]
    few = {name: value for name, value in good.items() if not name.endswith('swap')}
    assert len(p2_contrast.semantic_gate(few, base)) == len(criteria) - 4, 'a corpus may lack families'


# ---- P3 -------------------------------------------------------------------------------------------------------------

def test_shift_is_a_slice_of_the_canvas_with_its_border_repeated():
    V, pad = torch.randn(25, 3, 7, 9), 3
    dy, dx = (d.flatten() for d in torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing='ij'))
    moved = p3_jitter.shift(V, dy, dx)
    for v, y, x, result in zip(V.numpy(), dy, dx, moved.numpy()):
        wide = np.pad(v, ((0, 0), (pad, pad), (pad, pad)), mode='edge')
        assert (result == wide[:, pad - y:pad - y + 7, pad - x:pad - x + 9]).all()


def test_cut_out():
    V = torch.randn(3, 2, 8, 8)
    top, left = torch.tensor([0, 2, 6]), torch.tensor([5, 0, 6])
    for v, y, x, result in zip(V, top, left, p3_jitter.cut_out(V, top, left, 3)):
        expected = v.clone()
        expected[:, y:y + 3, x:x + 3] = v.mean((1, 2))[:, None, None]
        assert torch.equal(result, expected)


def test_jitter_is_decided_by_u_alone():
    V, u = torch.randn(64, 2, 12, 12), torch.rand(64, 7)
    whole = p3_jitter.jitter(V, u, 0.5, 2, 0.8, 4)
    torch.manual_seed(9)
    parts = [p3_jitter.jitter(v, t, 0.5, 2, 0.8, 4) for v, t in zip(V.split(16), u.split(16))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    none = (u[:, :3] >= 0.5).all(1)
    assert none.any() and torch.equal(whole[none], V[none]) and not torch.equal(whole[~none], V[~none])
    assert torch.equal(p3_jitter.jitter(V, u, 0.0, 2, 0.8, 4), V)
    least, most = torch.zeros(1, 7), torch.full((1, 7), 1 - 2 ** -24)
    for k, change in ((0, lambda V, d: p3_jitter.shift(V, d, d)), (1, lambda V, d: priors.gaussian_blur(V, 0.8)),
                      (2, lambda V, d: p3_jitter.cut_out(V, 4 + 2 * d, 4 + 2 * d, 4))):
        for u, d in ((least, -2), (most, 2)):
            u = u.clone()
            u[:, :3] = 1.0
            u[:, k] = 0.0
            expected = change(V[:1], torch.tensor([d]))
            assert torch.allclose(p3_jitter.jitter(V[:1], u, 0.5, 2, 0.8, 4), expected, atol=1e-6)


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
    own = m | {'accuracy': 0.9}                # your sentences: any token counts
    assert len(p4_decoder.gate(own, tables, False)) == 2 and not failing(p4_decoder.gate(own, tables, False))
    assert failing(p4_decoder.gate(own | {'accuracy': 0.89, 'shuffle_ce_rise': 0.2}, tables, False)) == [0, 1]
    assert failing(p4_decoder.gate(m | {'cells_content': 4.0, 'graph_exact': 0.84}, tables, True)) == [3, 4]

    m |= GOOD_MEANING | {'jitter_cosine': 0.9}
    ways = {'best of k': {'graph_f1': 0.85, 'rouge_l': 0.55, 'cosine': 0.9}}
    criteria = p5_roundtrip.gate(ways, m, [GOOD_CANVAS] * 3, True)
    own = p5_roundtrip.gate(ways, m | {'accuracy': 0.8}, [GOOD_CANVAS] * 3, False)
    assert not failing(criteria) and len(own) == len(criteria) - 1 and failing(own) == [len(own) - 2]
    ways = {'best of k': {'graph_f1': 0.84, 'rouge_l': 0.56, 'cosine': 0.89}}
    assert failing(p5_roundtrip.gate(ways, m | {'r1': 0.5}, [GOOD_CANVAS] * 3, True)) == [0, 1, 2, 3 + 8]


# ---- P4 and P5 ------------------------------------------------------------------------------------------------------

def test_shuffle_canvas_keeps_the_pixels_and_loses_their_places():
    V = torch.randn(3, 2, 4, 4)
    shuffled = p4_decoder.shuffle_canvas(V)
    sums, sums_shuffled = (v.flatten(2).sum(1).sort(-1)[0] for v in (V, shuffled))
    assert torch.equal(sums, sums_shuffled), 'the channels of a pixel stay together'
    assert not torch.equal(shuffled, V) and torch.equal(shuffled[1:2], p4_decoder.shuffle_canvas(V[1:2]))


def test_graph_metrics():
    original = 'a red cube is on a blue ball'
    texts = ['a blue ball is under a red cube', 'a blue ball is on a red cube', 'red red red']
    m = p4_decoder.graph_metrics(texts, [original] * 3)
    assert m['graph_f1'] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert m['graph_exact'] == pytest.approx(1 / 3) == m['unreadable']


def test_paraphrase_metrics():
    original = 'a red cube is on a blue ball'
    m = p5_roundtrip.paraphrase_metrics([original, 'nothing of that'], [original] * 2, [1.0, 0.5])
    assert (m['rouge_l'], m['cosine'], m['distinct'], m['graph_exact']) == (0.5, 0.75, 0.5, 0.5)


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


def test_candidates_of_a_batch_are_those_of_its_rows():
    """Drawn by u alone: cutting the batch for ranks changes no sentence."""
    arch = FULL | {'vocab_size': 40, 'dim': 16, 'layers': 1, 'heads': 2, 'hidden': 16, 'cross_hidden': 16,
                   'cross_layers': 1, 'query_grid': 4, 'size': 16, 'patch': 4, 'z_dim': 8, 'readout_hidden': 8,
                   'dec_dim': 16, 'dec_layers': 1, 'dec_heads': 2, 'dec_hidden': 16}
    nets = p4_decoder.build(arch, controls=False)
    for net in nets.values():
        net.eval()
    V, u = torch.randn(4, 6, 16, 16), torch.rand(4, 3, 10)
    z = nets['readout'](V).detach()
    y, cosine = p5_roundtrip.candidates(nets, V, z, 3, 10, 0.9, u)
    assert y.shape == (4, 3, 10) and cosine.shape == (4, 3) and len(y.flatten(0, 1).unique(dim=0)) > 6
    parts = [p5_roundtrip.candidates(nets, V[i:i + 2], z[i:i + 2], 3, 10, 0.9, u[i:i + 2]) for i in (0, 2)]
    assert torch.equal(torch.cat([part for part, _ in parts]), y)
    assert torch.allclose(torch.cat([c for _, c in parts]), cosine, atol=1e-5)
    again = nets['readout'](nets['encoder'](y[:, 1]))
    assert torch.allclose((again * z).sum(-1), cosine[:, 1], atol=1e-5)


# ---- P6 -------------------------------------------------------------------------------------------------------------

def test_signal_share_is_the_cosine_schedule():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = p6_diffusion.signal_share(t)
    assert (a.diff() < 0).all() and a[0] == pytest.approx(1 - 1e-5) and a[-1] == pytest.approx(1e-5)
    by_hand = [(math.cos((x + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
               for x in (0.25, 0.5, 0.75)]
    assert a[[25, 50, 75]].tolist() == pytest.approx(by_hand, rel=1e-9)


def test_add_noise_keeps_the_variance_and_denoise_undoes_it():
    V, noise, t = torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.linspace(0, 0.98, 64)
    V_t = p6_diffusion.add_noise(V, t, noise)
    assert V_t.var((1, 2, 3)).tolist() == pytest.approx([1.0] * 64, abs=0.2)
    torch.testing.assert_close(p6_diffusion.denoise(V_t, noise, t), V, atol=1e-3, rtol=1e-3)


def test_a_net_that_says_nothing_leaves_the_linear_guess():
    """On white canvases of unit variance sqrt(1 - a) V_t is off by a of the noise's variance, whatever t."""
    V, noise, t = torch.randn(64, 2, 16, 16), torch.randn(64, 2, 16, 16), torch.linspace(0.1, 0.99, 64)
    guess = partial(p6_diffusion.noise_in, lambda V_t, t: torch.zeros_like(V_t))
    error = (guess(p6_diffusion.add_noise(V, t, noise), t) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(error, p6_diffusion.signal_share(t), atol=0.12, rtol=0)


def test_diffusion_loss_weighs_by_min_snr():
    """A net that predicts nothing has error |noise|^2; what is left is the weight."""
    t, noise = torch.tensor([0.02, 0.5, 0.9]), torch.ones(3, 1, 4, 4)
    nothing = lambda V_t, t: torch.zeros_like(V_t)
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise).item() == pytest.approx(1.0)
    a = p6_diffusion.signal_share(t)
    weights = [min(snr, 5.0) / snr for snr in (a / (1 - a)).tolist()]
    assert weights[0] < 0.02 and weights[1:] == [1.0, 1.0]
    assert p6_diffusion.diffusion_loss(nothing, noise, t, noise, 5.0).item() == pytest.approx(sum(weights) / 3)


def test_prior_loss_pulls_towards_the_denoised_canvas_and_nothing_flows_through_the_net():
    net = nn.Conv2d(2, 2, 1)
    V, t, noise = torch.randn(3, 2, 8, 8, requires_grad=True), torch.tensor([0.1, 0.2, 0.3]), torch.randn(3, 2, 8, 8)
    p6_diffusion.prior_loss(lambda V_t, t: net(V_t), V, t, noise).backward()
    with torch.no_grad():
        V_t = p6_diffusion.add_noise(V, t, noise)
        target = p6_diffusion.denoise(V_t, net(V_t), t)
    torch.testing.assert_close(V.grad, 2 * (V.detach() - target) / V.numel())
    assert all(p.grad is None for p in net.parameters())


CPU = SimpleNamespace(device=torch.device('cpu'), autocast=lambda: torch.autocast('cpu', enabled=False))


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_ddim_with_a_perfect_net(eta):
    """The best prediction is known for one canvas (it comes back) and for Gaussian pixels (their variance does)."""
    generator = torch.Generator().manual_seed(0)
    noise, only = torch.randn(32, 2, 8, 8, generator=generator), torch.randn(1, 2, 8, 8, generator=generator)

    def knows_it(V_t, t):
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return (V_t - a.sqrt() * only) / (1 - a).sqrt()

    def gaussian(V_t, t):
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return (1 - a).sqrt() * V_t / (a * 0.25 + 1 - a)                              # pixels of variance 0.25

    torch.testing.assert_close(p6_diffusion.ddim(knows_it, noise, 20, eta, generator, CPU),
                               only.expand(32, -1, -1, -1), atol=0.02, rtol=0)
    assert p6_diffusion.ddim(gaussian, noise, 200, eta, generator, CPU).var().item() == pytest.approx(0.25, rel=0.1)


def test_ddim_is_as_noisy_as_eta_says():
    """Where nothing is predicted and the start is 0 all that is left is the noise of two steps, by hand."""
    now, middle, end = (p6_diffusion.signal_share(t) for t in torch.linspace(0.999, 0, 3))
    sigma = [((1 - then) / (1 - before) * (1 - before / then)).sqrt()                             # eq. 16 at eta = 1
             for before, then in ((now, middle), (middle, end))]
    expected = (end / middle * sigma[0].square() + sigma[1].square()).sqrt().item()
    for eta in (0.0, 0.5, 1.0):
        drawn = p6_diffusion.ddim(lambda V_t, t: torch.zeros_like(V_t), torch.zeros(64, 2, 16, 16), 2, eta,
                                  torch.Generator().manual_seed(0), CPU)
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
        a = p6_diffusion.signal_share(t)[:, None, None, None]
        return torch.fft.ifft2((1 - a).sqrt() / (a * power + 1 - a) * torch.fft.fft2(V_t)).real

    metrics = p6_diffusion.diffusion_metrics(wiener, V, CPU, per=2000)
    for quarter in p6_diffusion.QUARTERS:
        assert metrics[f'diffusion_{quarter}'] == pytest.approx(metrics[f'wiener_{quarter}'], rel=0.03)
    assert metrics['wiener_t 0-25%'] > 0.5 > 0.2 > metrics['wiener_t 75-100%'] > 0


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
