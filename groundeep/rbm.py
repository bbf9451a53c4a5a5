"""The restricted Boltzmann machine: energy, Gibbs chain, contrastive divergence, likelihood by sampling and exactly.

    E(v, h) = -b.v - c.h - v W h         p(v, h) = exp(-beta E(v, h)) / Z(beta)         beta = 1 unless said otherwise

Hidden units are Bernoulli. The visible vector is `binary` Bernoulli units followed by `groups` softmax groups of
`classes` units each, of which exactly one is on (characters of a text; Hinton 2012, section 13). Everything is a plain
tensor operation without autograd: the gradient of the log-likelihood is a difference of two correlations.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


def difference(positive, negative):
    """{W, b, c}: what the statistics of two phases (`RBM.correlations`) differ by; the gradient of the log-likelihood
    when they are of the data and of the model."""
    return {name: positive[name] - negative[name] for name in positive}


def centred(positive, negative):
    """The gradient {W, b, c} of two phases' statistics in the coordinates where each unit is measured from its mean
    over both (the enhanced gradient: Cho, Raiko & Ilin 2011; Melchior, Fischer & Wiskott 2016).

    It is zero where `difference` is. Units that are mostly off, or mostly on, no longer tie the weights to the biases.
    """
    v, h = (positive['b'] + negative['b']) / 2, (positive['c'] + negative['c']) / 2
    plain = difference(positive, negative)
    W = plain['W'] - torch.outer(v, plain['c']) - torch.outer(plain['b'], h)
    return {'W': W, 'b': plain['b'] - W @ h, 'c': plain['c'] - v @ W}


def draw(p):
    """Bernoulli samples of probabilities p, of any shape; three times as fast on a CPU as torch.bernoulli."""
    return (torch.rand_like(p) < p).to(p.dtype)


class RBM(nn.Module):
    """One machine. All state, that of the optimizer and of the persistent chains included, is in buffers, so that
    `state_dict` holds what it takes to go on."""

    def __init__(self, binary, hidden, groups=0, classes=0, chains=0, scale=0.01):
        """binary, hidden, groups, classes: sizes (see above); chains: persistent chains kept; scale: sd of weights."""
        super().__init__()
        self.binary, self.groups, self.classes = binary, groups, classes
        visible = binary + groups * classes
        for name, value in (('W', scale * torch.randn(visible, hidden)), ('b', torch.zeros(visible)),
                            ('c', torch.zeros(hidden))):
            self.register_buffer(name, value)
            self.register_buffer(f'speed_{name}', torch.zeros_like(value))      # momentum
        self.register_buffer('activity', torch.full((hidden,), -1.0))           # running mean of p(h|v); -1: none yet
        self.register_buffer('fantasy', torch.zeros(chains, visible))           # persistent chains
        self.register_buffer('fantasy_alive', torch.zeros((), dtype=torch.bool))

    # ---- conditionals, energies -------------------------------------------------------------------------------------

    def hidden(self, v, beta=1.0):
        """p(h = 1 | v), (N, H), of visible v (N, V) in [0, 1]."""
        return torch.sigmoid(beta * (self.c + v @ self.W))

    def visible(self, h, beta=1.0):
        """p(v = 1 | h), (N, V), of hidden h (N, H)."""
        return self.squash(beta * (self.b + h @ self.W.T))

    def squash(self, a):
        """Probabilities (N, V) of visible units with inputs a (N, V): sigmoids, then a softmax for each group."""
        if not self.groups:
            return torch.sigmoid(a)
        letters = a[:, self.binary:].reshape(-1, self.groups, self.classes).softmax(-1)
        return torch.cat((torch.sigmoid(a[:, :self.binary]), letters.flatten(1)), dim=1)

    def sample_visible(self, p):
        """One draw (N, V) in {0, 1} from probabilities p (N, V) as `visible` returns them."""
        v = draw(p[:, :self.binary])
        if not self.groups:
            return v
        letters = p[:, self.binary:].reshape(-1, self.classes)
        on = F.one_hot(torch.multinomial(letters, 1)[:, 0], self.classes).to(p.dtype)
        return torch.cat((v, on.reshape(len(p), -1)), dim=1)

    def random_visible(self, n):
        """n visible vectors drawn as if no unit had an input, (n, V): where a chain starts that knows nothing."""
        p = torch.full((n, len(self.b)), 0.5, device=self.b.device, dtype=self.b.dtype)
        p[:, self.binary:] = 1 / max(1, self.classes)
        return self.sample_visible(p)

    def energy(self, v, h):
        """E(v, h), (N,), of v (N, V) and h (N, H)."""
        return -(v @ self.b) - h @ self.c - ((v @ self.W) * h).sum(1)

    def free_energy(self, v, beta=1.0):
        """-log sum_h exp(-beta E(v, h)), (N,), of v (N, V)."""
        return -beta * (v @ self.b) - F.softplus(beta * (self.c + v @ self.W)).sum(1)

    # ---- chains -----------------------------------------------------------------------------------------------------

    def gibbs(self, v, betas, clamp=None):
        """Block Gibbs sampling of h given v, then v given h, once for each inverse temperature of `betas`.

        v (N, V) in {0, 1} (a clamped unit may hold a probability); clamp: (V,) bool, units that keep the value they
        have in v. Returns (v, p): the last sample and the conditional probabilities it was drawn from,
        both (N, V). With clamp the chain leaves p(free units | clamped units) unchanged; with a beta below 1 it is
        that of the model at temperature 1 / beta.
        """
        if clamp is not None:
            end, p = v.clone(), v.clone()
            end[:, ~clamp], p[:, ~clamp] = self.given(v, clamp).gibbs(v[:, ~clamp], betas)
            return end, p
        p = v
        for beta in betas:
            h = draw(self.hidden(v, beta))
            p = self.visible(h, beta)
            v = self.sample_visible(p)
        return v, p

    def given(self, v, clamp):
        """The machine of the free units, whose distribution is p(free units | clamped units): an RBM too, with hidden
        biases c (N, H) of its own for each row of v (N, V). clamp: (V,) bool; a softmax group is clamped or free whole.
        """
        part = RBM(0, 0)
        part.binary = int((~clamp[:self.binary]).sum())
        part.classes, part.groups = self.classes, int((~clamp[self.binary:]).sum()) // max(1, self.classes)
        part.W, part.b, part.c = self.W[~clamp], self.b[~clamp], self.c + v[:, clamp] @ self.W[clamp]
        return part

    def negative(self, v, k, persistent, refresh=0.0):
        """Samples (N, V) for the negative phase: k Gibbs steps from the data v (CD-k, Hinton 2002), or from where the
        last call left the chains (PCD, Tieleman 2008), of which a share `refresh` starts again from noise."""
        if not persistent:
            return self.gibbs(v, [1.0] * k)[0]
        if not self.fantasy_alive:
            self.fantasy.copy_(self.random_visible(len(self.fantasy)))
            self.fantasy_alive.fill_(True)
        if refresh:
            again = torch.rand(len(self.fantasy), 1, device=v.device) < refresh
            self.fantasy.copy_(torch.where(again, self.random_visible(len(self.fantasy)), self.fantasy))
        self.fantasy.copy_(self.gibbs(self.fantasy, [1.0] * k)[0])
        return self.fantasy

    # ---- learning ---------------------------------------------------------------------------------------------------

    def correlations(self, v):
        """Means over rows of v (N, V) of v p(h|v)', v and p(h|v): the statistics {W, b, c} a phase contributes."""
        h = self.hidden(v)
        return {'W': v.T @ h / len(v), 'b': v.mean(0), 'c': h.mean(0)}

    def ascend(self, gradient, lr, momentum=0.0, weight_decay=0.0, sparsity=0.0, sparsity_cost=0.0):
        """One step of momentum ascent along a gradient {W, b, c}.

        weight_decay: L2 on W only. sparsity: target for the running mean of each hidden unit, towards which its bias is
        pulled with sparsity_cost (Lee, Ekanadham & Ng 2008 move the bias only). `note_activity` keeps that mean.
        """
        pull = {'W': -weight_decay * self.W, 'b': 0.0, 'c': 0.0}
        if sparsity_cost:
            pull['c'] = sparsity_cost * (sparsity - self.activity)
        for name, value in gradient.items():
            speed, weight = getattr(self, f'speed_{name}'), getattr(self, name)
            speed.mul_(momentum).add_(value + pull[name], alpha=lr)
            weight.add_(speed)

    def note_activity(self, mean, decay=0.9):
        """Move the running mean of hidden activity towards that of a batch, (H,)."""
        self.activity.copy_(mean if self.activity[0] < 0 else decay * self.activity + (1 - decay) * mean)

    def learn(self, v, lr, k=1, persistent=False, momentum=0.0, weight_decay=0.0, sparsity=0.0, sparsity_cost=0.0):
        """One update on a batch v (N, V) in [0, 1]."""
        data = self.sample_visible(v)        # grey input is a probability; binary input is drawn as itself
        positive = self.correlations(data)
        negative = self.correlations(self.negative(data, k, persistent))
        self.note_activity(positive['c'])
        self.ascend(difference(positive, negative), lr, momentum, weight_decay, sparsity, sparsity_cost)

    def reconstruction_error(self, v):
        """Mean square, a unit, of v (N, V) less what comes back of it from the hidden units, in probabilities."""
        return (self.visible(self.hidden(v)) - v).square().mean()

    def start_biases(self, mean):
        """Set b so that a machine without hidden units had the data's means, (V,) (Hinton 2012, section 8)."""
        p = mean.clamp(1e-3, 1 - 1e-3)
        self.b.copy_(torch.cat((torch.logit(p[:self.binary]), p[self.binary:].log())))

    # ---- likelihood -------------------------------------------------------------------------------------------------

    def all_visible(self):
        """Every visible state, (2**binary * classes**groups, V); for small models only."""
        choices = [((0.0,), (1.0,))] * self.binary + [torch.eye(self.classes).tolist()] * self.groups
        return torch.tensor([[x for part in state for x in part] for state in itertools.product(*choices)],
                            dtype=self.W.dtype, device=self.W.device)

    def exact_log_z(self, beta=1.0):
        """log Z by enumeration of the hidden states or, with softmax groups, of the visible ones.

        Raises ValueError above 2**20 states.
        """
        hidden = len(self.c)
        states = self.binary * math.log(2) + self.groups * math.log(max(1, self.classes))
        if min(hidden * math.log(2), states) > 20 * math.log(2):
            raise ValueError('too many states to enumerate')
        if states <= hidden * math.log(2):
            return torch.logsumexp(-self.free_energy(self.all_visible(), beta), 0)
        h = torch.cartesian_prod(*[torch.tensor((0.0, 1.0), dtype=self.W.dtype, device=self.W.device)] * hidden)
        a = beta * (self.b + h.reshape(-1, hidden) @ self.W.T)
        letters = a[:, self.binary:].reshape(len(a), self.groups, self.classes)
        terms = F.softplus(a[:, :self.binary]).sum(1) + (torch.logsumexp(letters, -1).sum(1) if self.groups else 0)
        return torch.logsumexp(beta * h.reshape(-1, hidden) @ self.c + terms, 0)

    def exact_gradient(self, v):
        """Gradient {W, b, c} of the mean log-likelihood of v (N, V), with the model's expectation by enumeration."""
        states = self.all_visible()
        p = torch.softmax(-self.free_energy(states), 0)                                             # (S,)
        h = self.hidden(states)
        model = {'W': (states * p[:, None]).T @ h, 'b': p @ states, 'c': p @ h}
        return difference(self.correlations(v), model)

    def ais_log_z(self, base, chains=200, steps=1000):
        """log Z by annealed importance sampling (Neal 2001; Salakhutdinov & Murray 2008): (estimate, standard error).

        base: (V,) visible biases of the base model, which has no weights; intermediate models have free energy
        -(1 - t) base.v - t b.v - softplus(t (c + v W)), t = 0 ... 1 in `steps` equal steps. The standard error is that
        of the mean weight, by the delta method; it is blind to modes that no chain visits.
        """
        hidden = len(self.c)
        log_z = F.softplus(base[:self.binary]).sum() + hidden * math.log(2)
        if self.groups:
            log_z = log_z + torch.logsumexp(base[self.binary:].reshape(self.groups, self.classes), -1).sum()
        v = self.sample_visible(self.squash(base.expand(chains, -1)))
        log_w = torch.zeros(chains, dtype=self.W.dtype, device=self.W.device)
        for i in range(steps):
            now, then = i / steps, (i + 1) / steps
            a = self.c + v @ self.W
            log_w += (then - now) * (v @ (self.b - base)) + (F.softplus(then * a) - F.softplus(now * a)).sum(1)
            h = draw(torch.sigmoid(then * a))
            v = self.sample_visible(self.squash((1 - then) * base + then * (self.b + h @ self.W.T)))
        ratio = torch.exp(log_w - log_w.max())
        return log_z + log_w.max() + ratio.mean().log(), ratio.std() / ratio.mean() / chains ** 0.5

    def pseudo_log_likelihood(self, v):
        """sum_i log p(v_i | the others), (N,), of binary v (N, V); all units, where scikit-learn draws one at random.

        Raises ValueError for a machine with softmax groups.
        """
        if self.groups:
            raise ValueError('the pseudo-likelihood is for Bernoulli visible units')
        a = self.c + v @ self.W                                                                     # (N, H)
        before, total = F.softplus(a).sum(1), torch.zeros(len(v), dtype=v.dtype, device=v.device)
        for i in range(self.binary):
            change = 1 - 2 * v[:, i]                               # what flipping unit i adds to it
            gain = change * self.b[i] + F.softplus(a + change[:, None] * self.W[i]).sum(1) - before
            total -= F.softplus(gain)                              # log sigmoid(F(flipped) - F(v))
        return total


def annealed(steps, hot, hold=0.25):
    """Inverse temperatures of a chain of so many steps: from `hot` up to 1, linearly, then 1 for the last share `hold`.

    hot = 1 is a plain chain. A hot chain crosses the energy barriers that a cold one would sit behind.
    """
    cold = max(1, round(hold * steps))
    rise = steps - cold
    return [hot + (1 - hot) * i / rise for i in range(rise)] + [1.0] * cold
