"""Deep belief network: a stack of RBMs in which each learns the hidden probabilities of the one below.

Trained greedily (Hinton, Osindero & Teh 2006: a layer at a time, those below frozen) or iteratively (all layers on
every batch, each on what the layer below says at that moment; Zambra, Testolin & Zorzi 2022, "A developmental approach
for training deep belief networks"). Nothing is fine-tuned with labels.
"""
import torch
from torch import nn

from groundeep.rbm import RBM


class DBN(nn.Module):
    """RBMs of sizes[0] visible, then sizes[1], sizes[2], ... hidden units.

    groups, classes: softmax groups behind the sizes[0] binary units of the bottom layer; chains: persistent chains of
    each layer.
    """

    def __init__(self, sizes, groups=0, classes=0, chains=0):
        super().__init__()
        self.layers = nn.ModuleList(
            RBM(below, above, groups if i == 0 else 0, classes if i == 0 else 0, chains)
            for i, (below, above) in enumerate(zip(sizes, sizes[1:])))

    def up(self, v):
        """Mean-field upward pass of v (N, V): [p(h1|v), p(h2|h1), ...], one (N, H) a layer."""
        found = []
        for rbm in self.layers:
            v = rbm.hidden(v)
            found.append(v)
        return found

    def top_input(self, v):
        """Input (N, H), before the sigmoid, of the top layer's units to v (N, V)."""
        for rbm in self.layers[:-1]:
            v = rbm.hidden(v)
        return self.layers[-1].c + v @ self.layers[-1].W

    def down(self, z, sample=False):
        """Top layer z (N, H) -> probabilities of the visible units (N, V). With sample, the layers in between are drawn
        (the directed part of the model, as it is defined); without, they are passed on as probabilities."""
        for rbm in reversed(self.layers[1:]):
            p = rbm.visible(z)
            z = rbm.sample_visible(p) if sample else p
        return self.layers[0].visible(z)

    def reconstruct(self, v):
        """v (N, V) up to the top and down again, all in probabilities."""
        return self.down(self.up(v)[-1])

    def sample(self, n, betas):
        """n visible probabilities (n, V) from the model: a chain in the top RBM from noise, then down."""
        top = self.layers[-1]
        v, p = top.gibbs(top.random_visible(n), betas)
        if len(self.layers) == 1:
            return p
        for rbm in reversed(self.layers[1:-1]):
            v = rbm.sample_visible(rbm.visible(v))
        return self.layers[0].visible(v)

    def learn(self, v, layers, **how):
        """One update on a batch v (N, V) of each layer numbered in `layers`, bottom up; how: RBM.learn's knobs.

        Greedy training passes one number at a time, iterative training all.
        """
        for i, rbm in enumerate(self.layers):
            if i in layers:
                rbm.learn(v, **how)
            if i < max(layers):
                v = rbm.hidden(v)


def schedule(name, layers, epochs, greedy):
    """Stages of the training of a DBN, one entry an epoch: (name, epoch, layers that learn in it)."""
    if greedy:
        return [(name, epoch, (layer,)) for layer in range(layers) for epoch in range(epochs)]
    return [(name, epoch, tuple(range(layers))) for epoch in range(epochs)]


def batches(count, size, device):
    """Index tensors of one epoch over `count` rows, in an order drawn from torch's generator of the CPU; rows beyond
    the last whole batch wait for another epoch, so that every batch has as many rows as there are chains."""
    order = torch.randperm(count).to(device)
    return order.split(size)[:max(1, count // size)]
