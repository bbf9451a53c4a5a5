"""The RBM against enumeration: energies, gradients, chains and likelihood of models small enough to write out."""
import itertools

import pytest
import torch

from groundeep.rbm import RBM, annealed, centred, difference

MODELS = [{'binary': 4, 'hidden': 3}, {'binary': 2, 'hidden': 3, 'groups': 2, 'classes': 3},
          {'binary': 0, 'hidden': 4, 'groups': 2, 'classes': 3}]


def tiny(seed=0, scale=1.0, **sizes):
    """A random machine in double precision."""
    torch.manual_seed(seed)
    rbm = RBM(**sizes, scale=scale).double()
    rbm.b.normal_(std=0.5), rbm.c.normal_(std=0.5)
    return rbm


def all_hidden(rbm):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(rbm.c))), dtype=torch.float64)


def joint_table(rbm, beta=1.0):
    """exp(-beta E) of every (v, h), from the definition of the energy: (visible states, hidden states)."""
    h = all_hidden(rbm)
    return torch.stack([torch.exp(-beta * rbm.energy(v.expand(len(h), -1), h)) for v in rbm.all_visible()])


def kernel(rbm, beta=1.0, clamp=None):
    """Exact transition matrix (S, S) of one Gibbs step between visible states, by enumeration of h and v."""
    states, h = rbm.all_visible(), all_hidden(rbm)
    on = rbm.hidden(states, beta)
    to_h = torch.stack([(p * h + (1 - p) * (1 - h)).prod(1) for p in on])                 # (S, 2**H)
    p = rbm.visible(h, beta)                                                              # (2**H, V)
    log = states @ p.log().T
    log = log + (1 - states[:, :rbm.binary]) @ (1 - p[:, :rbm.binary]).log().T            # softmax: only what is on
    to_v = log.exp().T                                                                    # (2**H, S)
    step = to_h @ to_v
    if clamp is not None:    # p(new free part | h) keeps the clamped part: sum over what would have been drawn there
        full = torch.zeros_like(step)
        keep = states[:, clamp]
        for i, j in itertools.product(range(len(states)), repeat=2):
            if torch.equal(keep[i], keep[j]):
                same_free = (states[:, ~clamp] == states[j, ~clamp]).all(1)
                full[i, j] = step[i, same_free].sum()
        step = full
    return step


@pytest.mark.parametrize('sizes', MODELS)
@pytest.mark.parametrize('beta', (1.0, 0.4))
def test_free_energy_and_partition_function_are_the_sums_they_stand_for(sizes, beta):
    rbm = tiny(**sizes)
    table = joint_table(rbm, beta)
    torch.testing.assert_close(-rbm.free_energy(rbm.all_visible(), beta), table.sum(1).log())
    torch.testing.assert_close(rbm.exact_log_z(beta), table.sum().log())


def test_log_z_is_the_same_from_either_side():
    rbm = tiny(binary=7, hidden=3)                       # enumerates h; the transposed machine enumerates its v
    other = RBM(3, 7).double()
    other.W.copy_(rbm.W.T), other.b.copy_(rbm.c), other.c.copy_(rbm.b)
    torch.testing.assert_close(rbm.exact_log_z(), other.exact_log_z())
    mixed = tiny(binary=3, hidden=3, groups=2, classes=4)
    torch.testing.assert_close(mixed.exact_log_z(), joint_table(mixed).sum().log())
    with pytest.raises(ValueError, match='too many'):
        RBM(30, 30).exact_log_z()


@pytest.mark.parametrize('sizes', MODELS)
def test_conditionals_are_those_of_the_joint(sizes):
    rbm = tiny(**sizes)
    table, states, h = joint_table(rbm), rbm.all_visible(), all_hidden(rbm)
    torch.testing.assert_close(rbm.hidden(states), table @ h / table.sum(1, keepdim=True))
    torch.testing.assert_close(rbm.visible(h), table.T @ states / table.sum(0)[:, None])


@pytest.mark.parametrize('sizes', MODELS)
def test_exact_gradient_is_that_of_the_exact_likelihood(sizes):
    rbm = tiny(**sizes)
    v = rbm.all_visible()[[0, 3, 3, 5]]
    exact = rbm.exact_gradient(v)
    for name in ('W', 'b', 'c'):
        leaf = getattr(rbm, name).clone().requires_grad_()
        setattr(rbm, name, leaf)
        (-rbm.free_energy(v).mean() - rbm.exact_log_z()).backward()
        torch.testing.assert_close(exact[name], leaf.grad)
        setattr(rbm, name, leaf.detach())


def distance(a, b):
    """Length of the difference of two gradients, relative to the second."""
    a, b = (torch.cat([g[name].flatten() for name in ('W', 'b', 'c')]) for g in (a, b))
    return ((a - b).norm() / b.norm()).item()


def contrast(rbm, data, model):
    """The gradient that learning takes from data and samples of the model."""
    return difference(rbm.correlations(data), rbm.correlations(model))


@pytest.mark.parametrize('sizes', MODELS)
def test_contrastive_divergence_comes_to_the_exact_gradient_as_chains_grow(sizes):
    rbm = tiny(**sizes)
    few = rbm.all_visible()[[0, 1]]
    data = few.repeat(20_000, 1)
    exact = rbm.exact_gradient(few)
    torch.manual_seed(1)
    errors = {k: distance(contrast(rbm, data, rbm.negative(data, k, persistent=False)), exact) for k in (1, 30)}
    assert errors[30] < 0.03 < errors[1]


def test_persistent_chains_come_to_the_exact_gradient_and_survive_refreshing():
    rbm = tiny(binary=4, hidden=3, chains=20_000)
    data = rbm.all_visible()[[0, 1]]
    exact = rbm.exact_gradient(data)
    for _ in range(30):
        model = rbm.negative(data, 1, persistent=True)
    assert distance(contrast(rbm, data, model), exact) < 0.04
    before = rbm.fantasy.clone()
    assert rbm.negative(data, 1, persistent=True, refresh=1.0) is rbm.fantasy       # all chains began again
    assert not torch.equal(before, rbm.fantasy)


@pytest.mark.parametrize('sizes', MODELS)
@pytest.mark.parametrize('beta', (1.0, 0.4))
def test_gibbs_leaves_the_models_distribution_as_it_is(sizes, beta):
    rbm = tiny(**sizes)
    p = torch.softmax(-rbm.free_energy(rbm.all_visible(), beta), 0)
    step = kernel(rbm, beta)
    torch.testing.assert_close(step.sum(1), torch.ones(len(p), dtype=torch.float64))
    torch.testing.assert_close(p @ step, p)


@pytest.mark.parametrize('sizes, units', [(MODELS[0], [0, 2]), (MODELS[1], [0, 2, 3, 4])])
def test_a_clamped_chain_has_the_exact_conditional(sizes, units):
    rbm = tiny(**sizes)
    states, p = rbm.all_visible(), torch.softmax(-rbm.free_energy(rbm.all_visible()), 0)
    clamp = torch.zeros(states.shape[1], dtype=torch.bool)
    clamp[units] = True
    conditional = p * (states[:, clamp] == states[-1, clamp]).all(1)
    conditional /= conditional.sum()
    torch.testing.assert_close(conditional @ kernel(rbm, clamp=clamp), conditional)        # by enumeration
    torch.manual_seed(0)                                                                   # and what `gibbs` draws
    start = rbm.random_visible(40_000)
    start[:, clamp] = states[-1, clamp]
    end, _ = rbm.gibbs(start, [1.0] * 25, clamp)
    assert torch.equal(end[:, clamp], start[:, clamp])
    found = torch.stack([(end == state).all(1).double().mean() for state in states])
    assert (found - conditional).abs().sum() < 0.03


@pytest.mark.parametrize('sizes', MODELS[:2])
def test_what_gibbs_draws_at_a_temperature_is_the_tempered_model(sizes):
    rbm, beta = tiny(scale=1.5, **sizes), 0.5
    states = rbm.all_visible()
    exact = torch.softmax(-rbm.free_energy(states, beta), 0)
    end, _ = rbm.gibbs(rbm.random_visible(40_000), [beta] * 25)
    found = torch.stack([(end == state).all(1).double().mean() for state in states])
    assert (found - exact).abs().sum() < 0.03
    assert (exact - torch.softmax(-rbm.free_energy(states), 0)).abs().sum() > 0.1          # or the test shows nothing


def test_softmax_groups_always_have_one_unit_on():
    rbm = tiny(binary=2, hidden=3, groups=3, classes=4)
    v, p = rbm.gibbs(rbm.random_visible(500), [1.0] * 3)
    groups = v[:, 2:].reshape(-1, 3, 4)
    assert set(groups.unique().tolist()) == {0.0, 1.0} and (groups.sum(-1) == 1).all()
    torch.testing.assert_close(p[:, 2:].reshape(-1, 3, 4).sum(-1), torch.ones(500, 3, dtype=torch.float64))


@pytest.mark.parametrize('sizes', [{'binary': 10, 'hidden': 6}, {'binary': 3, 'hidden': 6, 'groups': 2, 'classes': 4}])
def test_annealed_importance_sampling_finds_the_exact_log_z_within_a_twentieth_of_a_nat(sizes):
    rbm = tiny(**sizes)
    torch.manual_seed(2)
    estimate, error = rbm.ais_log_z(torch.zeros_like(rbm.b), chains=500, steps=300)
    assert abs(estimate - rbm.exact_log_z()) < 0.05 and 0 < error < 0.05
    crude, _ = rbm.ais_log_z(torch.zeros_like(rbm.b), chains=4, steps=1)
    assert abs(crude - rbm.exact_log_z()) > abs(estimate - rbm.exact_log_z())


def test_pseudo_likelihood_is_the_product_of_conditionals():
    rbm = tiny(binary=4, hidden=3)
    states, p = rbm.all_visible(), torch.softmax(-rbm.free_energy(rbm.all_visible()), 0)
    total = torch.zeros(len(states), dtype=torch.float64)
    for n, state in enumerate(states):
        for i in range(4):
            others = torch.arange(4) != i
            total[n] += (p[n] / p[(states[:, others] == state[others]).all(1)].sum()).log()
    torch.testing.assert_close(rbm.pseudo_log_likelihood(states), total)


def test_learning_raises_the_exact_likelihood_and_starts_from_the_datas_means():
    torch.manual_seed(0)
    data = torch.tensor([[1., 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1]]).repeat(50, 1)
    for persistent in (False, True):
        rbm = RBM(6, 4, chains=100)
        rbm.start_biases(data.mean(0))
        torch.testing.assert_close(rbm.visible(torch.zeros(1, 4))[0], data.mean(0))
        before = -rbm.free_energy(data).mean() - rbm.exact_log_z()
        for _ in range(300):
            rbm.learn(data, lr=0.1, k=1, persistent=persistent, momentum=0.5)
        after = -rbm.free_energy(data).mean() - rbm.exact_log_z()
        assert before < -4 and after > -1.5                        # the best is -log 2 = -0.69


def test_sparsity_and_weight_decay_do_what_they_say():
    torch.manual_seed(0)
    data = torch.bernoulli(torch.full((200, 8), 0.5))
    free, held = RBM(8, 6), RBM(8, 6)
    for _ in range(300):
        free.learn(data, lr=0.1)
        held.learn(data, lr=0.1, weight_decay=0.1, sparsity=0.1, sparsity_cost=1.0)
    assert (held.hidden(data).mean(0) - 0.1).abs().max() < 0.05 < (free.hidden(data).mean(0) - 0.1).abs().max()
    assert held.W.norm() < free.W.norm()


def test_momentum_gathers_speed():
    rbm = tiny(binary=2, hidden=2)
    before, one = rbm.b.clone(), {'W': torch.zeros(2, 2), 'b': torch.ones(2), 'c': torch.zeros(2)}
    rbm.ascend(one, lr=0.1, momentum=0.5), rbm.ascend(one, lr=0.1, momentum=0.5)
    torch.testing.assert_close(rbm.b - before, torch.full((2,), 0.25, dtype=torch.float64))


def test_the_schedule_of_a_hot_chain_rises_to_one():
    betas = annealed(20, 0.4)
    assert len(betas) == 20 and betas[0] == 0.4 and betas[-5:] == [1.0] * 5 and betas == sorted(betas)
    assert annealed(3, 1.0) == [1.0] * 3


def test_the_centred_gradient_is_zero_where_the_plain_one_is_and_points_uphill():
    rbm = tiny(binary=4, hidden=3)
    states = rbm.all_visible()
    model = rbm.correlations(states)      # any statistics of both phases will do
    assert all((value == 0).all() for value in centred(model, model).values())
    data = states[[0, 1]]
    p = torch.softmax(-rbm.free_energy(states), 0)
    h = rbm.hidden(states)
    step = centred(rbm.correlations(data), {'W': (states * p[:, None]).T @ h, 'b': p @ states, 'c': p @ h})
    exact = rbm.exact_gradient(data)
    assert sum((step[name] * exact[name]).sum() for name in step) > 0
