"""Tests of model.py: shapes, masks, causality, the cache, sampling, that encoder and decoder can learn, and the nets of
a run's settings."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import runtime
from model import (
    BOS, CONTROLS, EOS, PAD, PARA, Attention, Gist, Readout, Strokes, TextDecoder, TextEncoder, UNet,
    alignment, attend, build, cross_entropy, embed_views, nucleus, rope, rotation, shift, size_error, sizes, trim)

VOCAB, C, SIZE, Z = 40, 3, 8, 12
HEADS = {'a query a pixel': {}, 'strokes': {'query_grid': 4}, 'slots': {'slots': 3},
         'smoothing': {'query_grid': 2, 'smoothing': True}, 'smooth slots': {'slots': 2, 'smoothing': True},
         'aligned': {'query_grid': 4, 'aligned': True}, 'gist': {'query_grid': 4, 'gist': 3}}
MEMORIES = ('both', 'canvas', 'z', 'none')


def encoder(**changes):
    sizes = dict(channels=C, size=SIZE, query_grid=SIZE, dim=32, layers=2, heads=4, hidden=48, cross_hidden=48,
                 dropout=0.0, max_length=16)
    return TextEncoder(VOCAB, **sizes | changes).eval()


def decoder(**changes):
    sizes = dict(channels=C, size=SIZE, patch=2, z_dim=Z, dim=32, layers=2, heads=4, hidden=48, dropout=0.0,
                 max_length=16)
    return TextDecoder(VOCAB, **sizes | changes).eval()


def sentences(lengths, width=None):
    """Random ids closed by EOS, padded to `width`."""
    x = torch.full((len(lengths), width or max(lengths)), PAD)
    for row, n in zip(x, lengths):
        row[:n - 1], row[n - 1] = torch.randint(PARA + 1, VOCAB, (n - 1,)), EOS
    return x


def sources(B):
    return torch.randn(B, C, SIZE, SIZE), F.normalize(torch.randn(B, Z), dim=-1)


def without_gradient(net):
    """Names of the parameters that learn nothing. A bias of the keys moves all scores alike, if not rotated."""
    return [name for name, p in net.named_parameters() if (p.grad is None or not p.grad.abs().sum() > 0)
            and not name.endswith('key.bias')]


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize('net', [encoder(), encoder(query_grid=4), encoder(slots=3), encoder(gist=4, aligned=True),
                                 Readout(C, Z, 16), UNet(C, 8), decoder(aligned=True),
                                 *(decoder(memory=m) for m in MEMORIES)], ids=lambda net: type(net).__name__)
def test_a_net_is_one_graph(net):
    """What torch.compile cannot trace would break it in two."""
    x, (V, z) = sentences([6, 9]), sources(2)
    given = {TextEncoder: (x,), Readout: (V,), UNet: (V, torch.rand(2)), TextDecoder: (x, V, z)}[type(net)]
    expected = net(*given)
    assert close(torch.compile(net, fullgraph=True, backend='eager', dynamic=False)(*given), expected)
    torch._dynamo.reset()


# ---- attention ------------------------------------------------------------------------------------------------------

def test_rope_scores_depend_on_relative_position_only():
    q, k = torch.randn(2, 2, 4, 5, 8).double().unbind(0)
    at = torch.arange(5)

    def scores(shift_q, shift_k):
        return rope(q, rotation(at + shift_q, 8)) @ rope(k, rotation(at + shift_k, 8)).transpose(-1, -2)
    assert close(scores(0, 0), scores(7, 7), 1e-4)
    assert not close(scores(0, 0), scores(0, 1), 1e-2)
    assert close(rope(q, rotation(at, 8)).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(rope(q, rotation(at * 0, 8)), q)


def test_rope_turns_the_pairs_i_and_i_plus_half():
    q = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    slow = 10_000.0 ** -0.5 * torch.arange(3.0)
    expected = torch.stack((torch.arange(3.0).cos(), slow.cos(), torch.arange(3.0).sin(), slow.sin()), dim=-1)
    assert close(rope(q, rotation(torch.arange(3), 4))[0, 0], expected)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('maps', [False, True])
def test_attend_is_scaled_dot_product_attention(masked, maps):
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8)
    q.requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(3, 1, 5, 7) < 0.6
        mask[..., 0] = True
    y, weights = attend(q, k, v, mask, maps=maps)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert close(y, expected) and close(weights.sum(-1), torch.ones(3, 4, 5))
    assert close(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (y, expected)))
    if masked:
        assert (weights[~mask.expand_as(weights)] == 0).all() and (weights[mask.expand_as(weights)] > 0).all()


def test_attend_with_one_query_for_all_samples():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8)
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    shared, expanded = (attend(query, k, v, mask) for query in (q, q.expand(3, -1, -1, -1)))
    assert shared[0].shape == (3, 4, 5, 8) and close(shared[0], expanded[0]) and close(shared[1], expanded[1])
    assert not close(shared[0][1], attend(q, k, v)[0][1]), 'the mask of each sample'


def test_attend_where_everything_is_masked_stays_finite():
    mask = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    assert attend(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8), mask)[0].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='the fused path is taken on CUDA')
def test_attend_on_cuda_is_attend_on_cpu():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8)
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    for mask in (mask, alignment(4, torch.arange(5), 7, 7).masked_fill(~mask, -1e4)):
        for maps in (False, True):
            y, weights = attend(*(tensor.cuda() for tensor in (q, k, v, mask)), maps=maps)
            assert close(y.cpu(), attend(q, k, v, mask)[0], 1e-3) and (weights is not None) == maps


def test_attention_starts_far_from_uniform():
    """Scores of normalised inputs have a standard deviation near 3."""
    attention, h = Attention(64, 4), torch.randn(8, 16, 64)
    q, k = attention.split(attention.query(h)), attention.split(attention.key(h))
    assert 2 < (q @ k.transpose(-1, -2) / math.sqrt(16)).std() < 4


def test_attention_drops_out_in_training_only():
    attention = Attention(32, 4, dropout=0.5)
    parts = [attention.split(torch.randn(2, 6, 32)) for _ in range(3)]
    y = [attention.train(training)(*parts)[0] for training in (True, True, False, False)]
    assert not close(y[0], y[1]) and torch.equal(y[2], y[3])


# ---- encoder --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('head', HEADS)
def test_encoder_shapes_and_gradients(head):
    net, x = encoder(**HEADS[head]), sentences([5, 9, 3])
    V, weights = net(x, maps=True)
    assert V.shape == (3, C, SIZE, SIZE) and V.dtype == torch.float32 and torch.equal(V, net(x))
    if 'slots' in head:
        assert weights is None
    else:
        assert weights.shape == (3, 4, net.query_grid ** 2, 9)
        assert close(weights.sum(-1), torch.ones(()).expand(weights.shape[:-1]))
        assert (weights.permute(0, 3, 1, 2)[x == PAD] == 0).all(), 'nothing is read from padding'
    (V * torch.randn_like(V)).sum().backward()
    assert not without_gradient(net)
    assert (net.embedding.weight.grad[PAD] == 0).all() and (net.embedding.weight[PAD] == 0).all()
    with torch.autocast('cpu', torch.bfloat16):
        low = net(x)
    assert low.dtype == torch.float32 and F.cosine_similarity(low.flatten(), V.flatten(), dim=0) > 0.98


@pytest.mark.parametrize('head', HEADS)
def test_padding_and_company_never_change_the_canvas(head):
    net, x = encoder(**HEADS[head]), sentences([5, 9, 3], width=16)
    V = net(x)
    assert close(V, net(x[:, :9])), 'wider padding'
    for row, n in enumerate((5, 9, 3)):
        assert close(V[row], net(x[row:row + 1, :n])[0]), 'alone and without padding'
    with torch.no_grad():
        net.embedding.weight[PAD] = 5.0
        net.position.weight[9:] = 5.0
    assert close(V, net(x)), 'whatever stands there'
    assert net(torch.full((2, 8), PAD)).isfinite().all()


@pytest.mark.parametrize('head', HEADS)
def test_canvas_depends_on_words_and_their_order(head):
    net = encoder(**HEADS[head])
    x = sentences([8])
    word, order = x.clone(), x.clone()
    word[0, 3] = (x[0, 3] - PARA) % (VOCAB - PARA - 1) + PARA + 1
    x[0, 2], x[0, 4] = 10, 20
    order[0, 2], order[0, 4] = 20, 10
    assert not close(net(x), net(word), 1e-3) and not close(net(x), net(order), 1e-3)


def test_encoder_dropout():
    net, x = encoder(dropout=0.3), sentences([6, 6])
    assert torch.equal(net(x), net(x))
    net.train()
    assert not close(net(x), net(x), 1e-3)


@pytest.mark.parametrize('head', HEADS)
def test_soft_one_hot_rows_are_the_tokens(head):
    net, x = encoder(**HEADS[head]), sentences([5, 9, 3])
    soft = F.one_hot(x, VOCAB).float().requires_grad_()
    V = net(x, soft=soft)
    assert close(V, net(x))
    V.square().sum().backward()
    assert (soft.grad[x != PAD].abs().sum(-1) > 0).all() and (soft.grad[x == PAD] == 0).all()
    other = soft.detach().roll(1, dims=1)
    assert not close(net(x, soft=other), V, 1e-3), 'soft says the words, x only where they are'


def test_strokes_are_three_cells_wide_and_leave_no_gap():
    net = Strokes(dim=16, grid=4, size=16, channels=C)
    y = torch.zeros(1, 16, 4, 4)
    blank = net(y)
    assert blank.shape == (1, C, 16, 16)
    y[0, :, 1, 2] = torch.randn(16)
    painted = (net(y) - blank).abs().sum((0, 1)) > 1e-6
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[0:12, 4:16] = True                                          # cells 0 to 2 down, 1 to 3 across
    assert torch.equal(painted, expected)
    power = (net(torch.randn(500, 16, 4, 4)) - blank).square().mean((0, 1))
    middle = power[4:12, 4:12]
    assert middle.min() > 0.5 * middle.max(), 'neighbours overlap without a seam'


def test_strokes_are_the_transposed_convolution_that_they_hold():
    net = Strokes(dim=16, grid=4, size=16, channels=C)
    torch.nn.init.normal_(net.paint.bias)
    y = torch.randn(3, 16, 4, 4, requires_grad=True)
    seen = net(y), net.paint(y)
    assert torch.allclose(*seen, atol=1e-5)
    w = torch.randn(3, C, 16, 16)
    ours, theirs = (torch.autograd.grad((V * w).sum(), (y, net.paint.weight, net.paint.bias)) for V in seen)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))


def test_full_size():
    assert 19e6 < runtime.count_parameters(TextEncoder(vocab_size=16384)) < 26e6


# ---- readout --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pyramid', [True, False])
def test_readout(pyramid):
    readout, V = Readout(C, dim=Z, hidden=24, pyramid=pyramid), 3 * torch.randn(5, C, SIZE, SIZE) + 1
    z = readout(V)
    assert z.shape == (5, Z) and z.dtype == torch.float32 and close(z.norm(dim=-1), torch.ones(5))
    assert not close(z[0], z[1], 1e-2) and close(z[2:3], readout(V[2:3]))
    with torch.autocast('cpu', torch.bfloat16):
        low = readout(V)
    assert low.dtype == torch.float32 and close(low.norm(dim=-1), torch.ones(5))
    shuffled = V.flatten(2)[..., torch.randperm(SIZE * SIZE)].view_as(V)
    if pyramid:
        assert (1 - F.cosine_similarity(z, readout(shuffled))).min() > 1e-3, 'the pyramid knows place'
        assert (1 - F.cosine_similarity(z, readout(V.flip(-1)))).min() > 1e-3
    else:
        assert close(z, readout(shuffled)), 'the whole canvas does not'


def test_readout_pools_means_and_variances_of_cells():
    readout, V, seen = Readout(C, dim=Z, hidden=24), torch.randn(2, C, SIZE, SIZE) + 2, []
    readout.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    readout(V)
    expected = []
    for n in (1, 2, 4):
        cells = V.unfold(2, SIZE // n, SIZE // n).unfold(3, SIZE // n, SIZE // n).flatten(4)      # (B, C, n, n, pixels)
        expected += [cells.mean(-1).flatten(1), cells.var(-1, correction=0).flatten(1)]
    assert close(seen[0], torch.cat(expected, dim=1)) and seen[0].shape == (2, 2 * C * 21)


# ---- gist and alignment ---------------------------------------------------------------------------------------------

def test_the_gist_knows_the_words_and_not_their_order():
    gist, (h, e) = Gist(32, 4, 16, C), torch.randn(2, 3, 6, 32)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])[:, None, None]
    V, order = gist(e, h, mask), torch.tensor([3, 0, 5, 1, 4, 2])
    assert V.shape == (3, C, 16, 16) and close(gist(e[:, order], h[:, order], mask[..., order]), V)
    changed = e.clone()
    changed[:, 4:] += torch.randn(3, 2, 32)
    moved = (gist(changed, h, mask) - V).abs().amax((1, 2, 3))
    assert moved[1] < 1e-6 < 0.01 < moved[[0, 2]].min(), 'what is masked does not count'


def test_the_gist_is_the_lowest_frequencies():
    """scipy's cosine transform finds 4 x 4 of them, which fall as 1/f and are about half of a canvas's variance."""
    from scipy.fft import dctn
    torch.manual_seed(0)
    V = Gist(64, 4, 32, C)(torch.randn(300, 5, 64), torch.randn(300, 5, 64), torch.ones(300, 1, 1, 5, dtype=torch.bool))
    power = np.square(dctn(V.detach().double().numpy(), axes=(2, 3), norm='ortho')).mean((0, 1))
    assert power[:4, :4].sum() / power.sum() > 1 - 1e-9
    assert power[0, 1] / power[0, 2] == pytest.approx(4, rel=0.3)
    assert power[1, 1] / power[3, 3] == pytest.approx(9, rel=0.4)
    assert 0.4 < V.square().mean() < 0.9


def test_the_gist_of_soft_tokens_is_that_of_the_tokens():
    net, x = encoder(query_grid=4, gist=3), sentences([5, 9, 3])
    assert close(net(x, soft=F.one_hot(x, VOCAB).float()), net(x))
    other = encoder(query_grid=4)
    other.load_state_dict({key: value for key, value in net.state_dict().items() if 'gist' not in key})
    assert (net(x) - other(x)).std() > 0.1


def test_attention_that_is_aligned_begins_at_the_same_place():
    bias = alignment(4, torch.arange(8), 16, 8).transpose(1, 2)             # 16 cells of half a token each
    assert bias.shape == (4, 16, 8) and (bias <= 0).all()
    assert torch.equal(bias[:2, 6].argmax(-1), torch.tensor([3, 3])) and (bias[0] <= bias[1]).all()
    assert not bias[2:].any(), 'the other half looks anywhere'
    q, k, v = torch.zeros(1, 4, 16, 8), torch.randn(2, 4, 8, 8), torch.eye(8).expand(2, 4, 8, 8)
    y, weights = attend(q, k, v, bias)
    assert close(weights[0], bias.softmax(-1)) and close(y, weights)
    mask = torch.tensor([True] * 3 + [False] * 5)
    assert not attend(q, k, v, bias.masked_fill(~mask, -1e4))[1][..., 3:].any()


@pytest.mark.parametrize('memory', MEMORIES)
def test_an_aligned_decoder_speaks_as_it_reads(memory):
    """A step at a time with a cache, several sentences of a canvas, and all at once: the same logits."""
    net, (V, z), x = decoder(memory=memory, aligned=True), sources(2), sentences([5, 9])
    logits = net(x, V, z)
    assert close(net(torch.stack((x, x), 1), V, z, (BOS, BOS))[:, 1], logits)
    said = net.generate(V, z, 9)
    assert torch.equal(net(said, V, z).argmax(-1)[said != PAD][:2], said[said != PAD][:2])
    other = decoder(memory=memory, aligned=False)
    other.load_state_dict(net.state_dict())
    assert close(other(x, V, z), logits) == (memory in ('z', 'none')), 'z has no place'


# ---- decoder --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('memory', MEMORIES)
@pytest.mark.parametrize('patch', [1, 4])
def test_decoder_sees_what_its_memory_names(memory, patch):
    net, x = decoder(memory=memory, patch=patch), sentences([5, 9, 3])
    (V, z), (other_V, other_z) = sources(3), sources(3)
    logits = net(x, V, z)
    assert logits.shape == (3, 9, VOCAB) and logits.dtype == torch.float32
    assert close(logits, net(x, other_V, z)) == (memory in ('z', 'none'))
    assert close(logits, net(x, V, other_z)) == (memory in ('canvas', 'none'))
    assert close(logits, net(x, V.flip(-1), z)) == (memory in ('z', 'none')), 'it knows place'
    if memory == 'canvas':
        assert torch.equal(logits, net(x, V))
    (logits * torch.randn_like(logits)).sum().backward()
    idle = ('norm.weight', 'norm.bias', 'query.weight', 'query.bias', 'key.weight') if memory == 'z' else ()
    assert not [name for name in without_gradient(net) if not (name.startswith('cross') and name.endswith(idle))], \
        'a single key leaves nothing to choose'


@pytest.mark.parametrize('memory', MEMORIES)
def test_decoder_is_causal(memory):
    net, x, (V, z) = decoder(memory=memory), sentences([10, 10]), sources(2)
    logits = net(x, V, z)
    for t in range(9):
        changed = x.clone()
        changed[:, t] = (x[:, t] - PARA) % (VOCAB - PARA - 1) + PARA + 1
        other = net(changed, V, z)
        assert close(logits[:, :t + 1], other[:, :t + 1]), 'x[t] is not known when it is predicted'
        assert ((logits - other)[:, t + 1:].abs().amax(-1) > 1e-4).all(), 'and known to all that follow'
    assert not close(logits[:, 0], net(x, V, z, start=PARA)[:, 0], 1e-3), 'the first token says what is asked'


def test_decoder_padding_changes_no_earlier_logits():
    net, x, (V, z) = decoder(), sentences([5, 9, 3], width=16), sources(3)
    assert close(net(x, V, z)[:, :9], net(x[:, :9], V, z))


def test_decoder_attention_maps():
    net, x, (V, z) = decoder(patch=2, layers=3), sentences([6, 6]), sources(2)
    _, maps = net.decode(shift(x), net.memory(V, z), maps=True)
    assert len(maps) == 3
    for weights in maps:
        assert weights.shape == (2, 4, 6, (SIZE // 2) ** 2 + 1)              # the last key is z
        assert close(weights.sum(-1), torch.ones(2, 4, 6)) and (weights >= 0).all()


def test_shift():
    x = torch.tensor([[5, 6, EOS, PAD], [7, EOS, PAD, PAD]])
    assert shift(x).tolist() == [[BOS, 5, 6, EOS], [BOS, 7, EOS, PAD]]
    assert shift(x, PARA)[:, 0].tolist() == [PARA, PARA]


def test_trim_cuts_what_is_padding_in_every_row():
    x = torch.tensor([[5, 6, EOS, PAD, PAD], [5, EOS, PAD, PAD, PAD]])
    assert torch.equal(trim(x), x[:, :3]) and trim(torch.zeros_like(x)).shape == (2, 1)


def test_cross_entropy_leaves_padding_out():
    logits, x = torch.randn(3, 9, VOCAB), sentences([5, 9, 3])
    loss = cross_entropy(logits, x)
    expected = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    assert loss.shape == (3, 9) and (loss[x == PAD] == 0).all() and close(loss[x != PAD], expected[x != PAD])


# ---- free run -------------------------------------------------------------------------------------------------------

def restless(net):
    """A decoder whose next word depends a lot on what was said and seen, and that ends some sentences early."""
    with torch.no_grad():
        net.embedding.weight.mul_(0.5)
        net.position.weight.mul_(0.5)
        net.head.weight.mul_(4.0)
        net.head.bias[EOS] += 2.0
    return net


def greedy_without_cache(net, V, z, length, start=BOS):
    x, ended = torch.zeros(len(V), 0, dtype=torch.long), torch.zeros(len(V), dtype=torch.bool)
    for t in range(length):
        logits = net(F.pad(x, (0, 1)), V, z, start)[:, t]
        logits[:, [PAD, BOS, PARA]] = -math.inf
        token = logits.argmax(-1).masked_fill(ended, PAD)
        ended |= token == EOS
        x = torch.cat((x, token[:, None]), dim=1)
    return x


def well_formed(x):
    """Words, then one EOS, then padding; or words up to the last column."""
    ended = (x == EOS).cumsum(1)
    return bool((ended <= 1).all() and ((x == PAD) == (ended.bool() & (x != EOS))).all() and (x != BOS).all()
                and (x != PARA).all())


@pytest.mark.parametrize('memory', MEMORIES)
@pytest.mark.parametrize('start', [BOS, PARA])
def test_generate_with_cache_is_generate_without(memory, start):
    net, (V, z) = restless(decoder(memory=memory)), sources(12)
    x = net.generate(V, z, 14, start=start)
    assert x.shape == (12, 14) and x.dtype == torch.int64
    assert torch.equal(x, greedy_without_cache(net, V, z, 14, start)) and well_formed(x)
    if memory != 'none':
        assert len(set(map(tuple, x.tolist()))) > 6 and len(x.unique()) > 8, 'sentences worth comparing'
        assert 0 < (x == EOS).any(1).sum(), 'some of them end'


@pytest.mark.parametrize('memory', MEMORIES)
def test_several_sentences_of_a_canvas_at_once_are_each_alone(memory):
    net, (V, z), u = restless(decoder(memory=memory)), sources(4), torch.rand(4, 3, 14)
    rows = torch.arange(4).repeat_interleave(3)
    x = net.generate(V, z, 14, PARA, 0.9, u.flatten(0, 1))
    assert torch.equal(x, net.generate(V[rows], z[rows], 14, PARA, 0.9, u.flatten(0, 1))) and len(x.unique(dim=0)) > 6
    x, starts = x.unflatten(0, (4, 3)), (BOS, PARA, BOS)
    together = net(x, V, z, starts)
    alone = torch.stack([net(x[:, i], V, z, start) for i, start in enumerate(starts)], dim=1)
    assert together.shape == (4, 3, 14, VOCAB) and close(together, alone, 1e-5)
    assert not close(alone[:, 0], net(x[:, 0], V, z, PARA), 1e-2), 'the start token tells'


def test_generate_never_says_what_no_sentence_holds():
    net, (V, z) = restless(decoder()), sources(12)
    with torch.no_grad():
        net.head.bias[[PAD, BOS, PARA]] += 100.0
    u = torch.rand(12, 14)
    for x in (net.generate(V, z, 14), net.generate(V, z, 14, top_p=1.0, u=u)):
        assert well_formed(x) and (x == EOS).any() and (x == PAD).any()
    with torch.no_grad():
        net.head.bias[EOS] += 100.0
    assert net.generate(V, z, 3).tolist() == [[EOS, PAD, PAD]] * 12


def test_vocabulary_mask():
    net, (V, z) = restless(decoder()), sources(12)
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[EOS, 7, 11, 13, 30]] = True
    before = net.generate(V, z, 14)
    net.allowed.copy_(allowed)
    assert not allowed[before].all() and 'allowed' in net.state_dict()
    for x in (net.generate(V, z, 14), net.generate(V, z, 14, top_p=1.0, u=torch.rand(12, 14))):
        assert allowed[x[x != PAD]].all() and len(x.unique()) > 3 and well_formed(x)
    probability = net(before, V, z).softmax(-1)
    assert (probability[..., ~allowed] == 0).all() and close(probability.sum(-1), torch.ones(12, 14))


def test_sampling_is_a_function_of_its_numbers_row_by_row():
    net, (V, z), u = restless(decoder()), sources(12), torch.rand(12, 14)
    x = net.generate(V, z, 14, top_p=0.9, u=u)
    assert torch.equal(x, net.generate(V, z, 14, top_p=0.9, u=u)) and well_formed(x)
    assert torch.equal(x[4:8], net.generate(V[4:8], z[4:8], 14, top_p=0.9, u=u[4:8])), 'on any number of ranks'
    later = torch.cat((u[:, :3], torch.rand(12, 11)), dim=1)                        # one number for each word
    other = net.generate(V, z, 14, top_p=0.9, u=later)
    assert torch.equal(x[:, :3], other[:, :3]) and not torch.equal(x, other)
    assert torch.equal(net.generate(V, z, 14, top_p=1e-6, u=u), net.generate(V, z, 14))


def test_generate_in_bfloat16():
    net, (V, z) = restless(decoder()), sources(12)
    with torch.autocast('cpu', torch.bfloat16):
        x = net.generate(V, z, 14)
    assert well_formed(x) and (x == net.generate(V, z, 14))[:, 0].float().mean() > 0.7


MIDPOINTS = (torch.arange(10_000) + 0.5) / 10_000


@pytest.mark.parametrize('top_p, expected', [
    (1e-9, {2: 1.0}), (0.45, {2: 1.0}), (0.55, {2: 0.5 / 0.8, 0: 0.3 / 0.8}), (0.75, {2: 0.5 / 0.8, 0: 0.3 / 0.8}),
    (0.85, {2: 0.5 / 0.95, 0: 0.3 / 0.95, 3: 0.15 / 0.95}), (1.0, {2: 0.5, 0: 0.3, 3: 0.15, 1: 0.05})])
def test_nucleus_by_hand(top_p, expected):
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log() + 3.0
    ids = nucleus(logits.expand(10_000, 4), top_p, MIDPOINTS)
    share = ids.bincount(minlength=4) / 10_000
    assert close(share, torch.tensor([expected.get(token, 0.0) for token in range(4)]), 2e-4)
    assert (nucleus(logits.expand(2, 4), top_p, torch.tensor([0.0, 1 - 2 ** -24])).tolist()
            == [2, min(expected, key=expected.get)]), 'the ends of the unit interval'
    edge = expected[2]                                                    # the most probable token owns [0, edge)
    if edge < 1:
        assert nucleus(logits.expand(2, 4), top_p, torch.tensor([edge - 1e-4, edge + 1e-4])).tolist() == [2, 0]


def test_nucleus_is_the_truncated_distribution():
    logits = 2 * torch.randn(5, 30)
    for top_p in (0.3, 0.7, 0.95, 1.0):
        for row in logits:
            order = row.softmax(-1).argsort(descending=True)
            n = int((row.softmax(-1)[order].cumsum(-1) < top_p).sum()) + 1         # smallest set that reaches top_p
            kept = torch.zeros(30)
            kept[order[:n]] = row.softmax(-1)[order[:n]]
            share = nucleus(row.expand(10_000, 30), top_p, MIDPOINTS).bincount(minlength=30) / 10_000
            assert close(share, kept / kept.sum(), 2e-4) and (share > 0).sum() <= n


def test_nucleus_rows_are_independent_and_masks_are_kept():
    logits = torch.randn(50, 30)
    logits[:, ::2] = -1e4
    u = torch.rand(50)
    ids = nucleus(logits, 0.9, u)
    assert ids.tolist() == [int(nucleus(logits[k:k + 1], 0.9, u[k:k + 1])) for k in range(50)]
    assert (nucleus(logits, 1.0, torch.full((50,), 1 - 2 ** -24)) % 2 == 1).all()
    assert torch.equal(nucleus(logits, 1e-9, u), logits.argmax(-1))


# ---- both together --------------------------------------------------------------------------------------------------

def test_compiling_leaves_the_keys_of_a_state_dict_clean(monkeypatch):
    nets, compiled = {'encoder': encoder(), 'decoder': decoder(), 'readout': Readout(C, Z, 24)}, []
    monkeypatch.setattr(nn.Module, 'compile', lambda net, **_: compiled.append(net))  # the real one imports for seconds
    monkeypatch.setattr(torch, '_dynamo', SimpleNamespace(config=SimpleNamespace()), raising=False)

    class Run:
        config, device = {'compile': True}, torch.device('cpu')
    before = list(nets.values())
    runtime.compile_nets(nets, Run)
    assert not compiled, 'a CPU does not compile'
    Run.device = torch.device('cuda')
    runtime.compile_nets(nets, Run)
    assert compiled == before == list(nets.values())
    assert not [key for net in nets.values() for key in net.state_dict() if '_orig_mod' in key]
    encoder().load_state_dict(nets['encoder'].state_dict())


@pytest.mark.parametrize('head', ['strokes', 'slots'])
def test_encoder_and_decoder_learn_eight_sentences_by_heart(head):
    net, readout, reader = encoder(**HEADS[head]), Readout(C, Z, 24), decoder()
    x = sentences([6, 7, 8, 6, 7, 8, 6, 7])
    parameters = [*net.parameters(), *readout.parameters(), *reader.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(80):
        V = net(x)
        losses.append(cross_entropy(reader(x, V, readout(V)), x).sum() / (x != PAD).sum())
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert losses[0] > math.log(VOCAB) - 1 and losses[-1] < losses[0] / 3
    V = net(x)
    again = reader.generate(V, readout(V), x.shape[1])
    assert (again == x).float().mean() > 0.9, 'and says them from the canvas'


# ---- U-Net ----------------------------------------------------------------------------------------------------------

def test_unet_shapes_and_size():
    net = UNet()
    assert 1e6 < sum(p.numel() for p in net.parameters()) < 4e6
    V_t, t = torch.randn(3, 6, 32, 32), torch.rand(3)
    assert not net(V_t, t).any(), 'starts without an opinion'
    for C, size in ((8, 48), (1, 16)):
        net = UNet(C, dim=8)
        assert net(torch.randn(2, C, size, size), torch.rand(2)).shape == (2, C, size, size)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert net(torch.randn(2, 1, 16, 16), torch.rand(2)).dtype == torch.float32


def test_unet_sees_time_and_the_whole_canvas_and_every_parameter_learns():
    net = UNet(2, dim=8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    V_t = torch.randn(2, 2, 16, 16, requires_grad=True)
    y = net(V_t, torch.tensor([0.2, 0.2]))
    assert not torch.allclose(y, net(V_t, torch.tensor([0.2, 0.7]))[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(net(V_t, torch.tensor([0.2, 0.7]))[0], y[0])
    y[0, :, 0, 0].sum().backward()
    assert V_t.grad[0].abs().min() > 0 and not V_t.grad[1].any(), 'attention carries a corner to the other'
    (net(V_t, torch.rand(2)).square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if not name.endswith('key.bias'))


def test_unet_learns_the_noise_of_one_canvas():
    torch.manual_seed(0)
    net, V = UNet(1, dim=8), torch.randn(1, 1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        noise = torch.randn(16, 1, 8, 8)
        loss = (net(0.6 * V + 0.8 * noise, torch.full((16,), 0.5)) - noise).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < 0.25, '1 at the start'


# ---- from the settings of a run -------------------------------------------------------------------------------------

SETTINGS = runtime.Config(
    vocab_size=VOCAB, channels=C, size=16, query_grid=4, dim=16, layers=1, heads=2, hidden=24, cross_layers=1,
    cross_hidden=20, smoothing=False, slots=0, max_length=12, rec_dim=32, rec_layers=1, patch=4, z_dim=Z,
    readout_hidden=10, pyramid=True, gist=4, aligned=True, dec_dim=24, dec_layers=2, dec_heads=3, dec_hidden=28,
    unet_dim=8, dropout=0.2, dec_dropout=0.3, learning_rate=1.0)
ALL = ('auxiliary', 'encoder', 'readout', 'decoder', *CONTROLS, 'unet')


def test_build_makes_the_nets_that_settings_describe():
    nets = build(SETTINGS, *ALL)
    assert isinstance(nets, nn.ModuleDict) and set(nets) == set(ALL)
    x, V, z = sentences([5, 9, 3]), torch.randn(3, C, 16, 16), F.normalize(torch.randn(3, Z), dim=-1)
    assert nets.encoder(x).shape == V.shape and nets.readout(V).shape == z.shape
    assert nets.encoder.query_grid == 4 and nets.encoder.position.weight.shape == (12, 16)
    assert nets.unet(V, torch.rand(3)).shape == V.shape
    for name, memory in (('auxiliary', 'canvas'), ('decoder', 'both'), *CONTROLS.items()):
        assert nets[name].memory_kind == memory and nets[name](x, V, z).shape == (3, 9, VOCAB)
    assert nets.auxiliary.embedding.weight.shape == (VOCAB, 32) and len(nets.auxiliary.blocks) == 1
    assert nets.decoder.embedding.weight.shape == (VOCAB, 24) and len(nets.decoder.blocks) == 2
    assert nets.decoder.position.num_embeddings == nets.auxiliary.position.num_embeddings == 12
    drops = {name: {part.p for part in nets[name].modules() if isinstance(part, nn.Dropout)} for name in ALL}
    assert drops['encoder'] == drops['auxiliary'] == {0.2}
    assert drops['decoder'] == {0.3} and all(drops[name] == {0.3} for name in CONTROLS)


def test_build_makes_only_what_is_asked_for_and_always_in_one_order():
    torch.manual_seed(3)
    first = build(SETTINGS, 'encoder', 'auxiliary')
    torch.manual_seed(3)
    second = build(SETTINGS, 'auxiliary', 'encoder')
    assert list(first) == ['encoder', 'auxiliary'] and list(second) == ['auxiliary', 'encoder']
    for name in first:
        for a, b in zip(first[name].parameters(), second[name].parameters(), strict=True):
            assert torch.equal(a, b), 'the random weights do not hang on the order of the names'
    torch.manual_seed(3)
    third = build(SETTINGS, 'encoder', 'auxiliary', 'readout')
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters())), 'nor on what comes later'


def test_embed_views_keeps_scenes_variants_and_views_apart():
    nets = build(SETTINGS, 'encoder', 'readout').eval()
    x = sentences([5, 9, 3, 4] * 3).view(2, 3, 2, 9)
    z = embed_views(nets, x)
    assert z.shape == (2, 3, 2, Z)
    for index in ((0, 0, 0), (0, 2, 1), (1, 1, 0)):
        assert close(z[index], nets.readout(nets.encoder(x[index][None]))[0])


def test_sizes_are_what_fixes_the_shapes_of_weights():
    found = sizes(SETTINGS)
    assert SETTINGS.items() - found.items() == {('dropout', 0.2), ('dec_dropout', 0.3), ('learning_rate', 1.0)}
    assert 'unet_dim' not in sizes({'dim': 3, 'patch': 1}) and sizes({'dim': 3, 'seed': 1}) == {'dim': 3}
    shapes = [tuple(p.shape) for p in build(SETTINGS, *ALL).parameters()]
    again = build(runtime.Config(SETTINGS | {'dropout': 0.0, 'dec_dropout': 0.0, 'learning_rate': 2.0}), *ALL)
    assert [tuple(p.shape) for p in again.parameters()] == shapes


@pytest.mark.parametrize('change, words', [
    ({'dim': 17}, '--dim=17: expects a multiple of 4'), ({'dim': 0}, '--dim=0'), ({'dim': 18}, 'multiple of 4'),
    ({'rec_dim': 24}, '--rec_dim=24: expects a multiple of 16'), ({'dec_dim': 27}, '--dec_dim=27'),
    ({'dec_dim': 20}, 'multiple of 6'), ({'size': 8}, '--size=8: expects a multiple of 8, at least 16'),
    ({'size': 20}, '--size=20'), ({'query_grid': 3}, "--query_grid=3: expects a divisor of the canvas's side, 16"),
    ({'patch': 5}, '--patch=5'), ({'gist': 17}, '--gist=17: expects at most --size=16'),
    ({'query_grid': 2}, '--aligned=true: expects'), ({'slots': 2}, '--aligned=true'), ({'heads': 1}, '--aligned=true')])
def test_sizes_that_do_not_fit_are_named(change, words):
    assert size_error(SETTINGS) == ''
    error = size_error(runtime.Config(SETTINGS | change))
    assert words in error and '\n' not in error
    before = {key: value for key, value in SETTINGS.items() if not key.startswith(('dec_', 'unet_'))}
    if 'dec_dim' not in change:
        assert size_error(before) == '' and words in size_error(before | change), 'P1 has no decoder yet'
