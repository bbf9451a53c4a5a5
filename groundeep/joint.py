"""The joint model: an image DBN and a text RBM, and an RBM over their latents z_img and z_txt.

The document's five devices, and one more, are switches here (`Devices`), each with its own function or branch, and each
is a row of the ablation table (ablate.py). What each does, and what is off without it:

balance      Gradient and variance balancing. z_img is several times as wide as z_txt, so at equal weights it decides
             the joint code, and its gradient dwarfs the other's. Initial weights are scaled so that either sub-space
             gives a hidden unit the same variance; in training each sub-space's gradient (the rows of W, and its
             biases) is scaled to the geometric mean of the two running norms. A positive factor moves no fixed point.
             Off: equal initial scale, raw gradients.
warmup       Auxiliary clamping. For the first epochs the negative chain keeps one modality at the data and the other
             starts from noise: contrastive divergence of p(z_txt|z_img) and, every `draw_every`-th batch, of
             p(z_img|z_txt), the two conditionals generation uses: half of the batches drown naming in drawing, whose
             gradient is over all of z_img. Afterwards `clamp_share` of the batches stay so, the rest is free.
             Off: free-phase contrastive divergence from the first batch to the last.
enumeration  In p(z_txt|z_img) half of the negative phase is the expectation over the texts of the batch, each with its
             probability under the model: the exact gradient of a classification RBM (Larochelle & Bengio 2008), which
             ranks the words. The other half is the chain, which unlearns codes that are no word: without it the words
             are ranked, and a chain no longer comes to any of them. It acts through warmup and is no device of the
             document. Off: the chain alone.
hot_gibbs    The chain of TXT->IMG and of IMG->TXT starts at inverse temperature `hot` and is annealed to 1.
             Off: the same number of steps, all at 1.
gain         Dynamic gain control. The mean and the variance over stimuli of z_img and of z_txt are tracked; a gain and
             a shift for each modality, on the input of its top units, move both towards their average.
             Off: gain 1, shift 0.
mitigation   Against mode collapse: the free negative phase runs persistent chains, of which a small share starts again
             from noise at every update, so that modes far from the data are found and unlearned.
             Off: CD-k from the data.
"""
from dataclasses import dataclass

import torch
from torch import nn

from groundeep.rbm import RBM, annealed, centred, draw

IMAGE, TEXT = 0, 1


@dataclass
class Devices:
    """Switches and knobs of the devices above."""
    balance: bool = True
    warmup: bool = True
    enumeration: bool = True
    hot_gibbs: bool = True
    gain: bool = False
    mitigation: bool = True
    warmup_epochs: int = 10      # epochs in which every batch is clamped
    clamp_share: float = 1.0     # of the batches after them; 1: there is no free phase
    draw_every: int = 8          # of so many clamped batches one learns to draw, p(z_img|z_txt), the others to name
    clamp_steps: int = 5         # Gibbs steps of a clamped chain
    hot: float = 0.5             # inverse temperature a hot chain starts at
    refresh: float = 0.01        # share of the persistent chains that start again at an update
    gain_rate: float = 0.01      # how far the gains move at an update


class Joint(nn.Module):
    """image, text: DBNs; hidden: units of the joint RBM; chains: its persistent chains; devices: Devices."""

    def __init__(self, image, text, hidden, chains, devices):
        super().__init__()
        self.image, self.text, self.devices = image, text, devices
        sizes = [len(dbn.layers[-1].c) for dbn in (image, text)]
        self.split = sizes[0]
        self.rbm = RBM(sum(sizes), hidden, chains=chains, scale=0.02)
        if devices.balance:
            for part, size in zip(self.blocks(), sizes):
                self.rbm.W[part] *= (sum(sizes) / (2 * size)) ** 0.5
        self.register_buffer('gain', torch.ones(2))
        self.register_buffer('shift', torch.zeros(2))
        self.register_buffer('norm', torch.zeros(2))          # running gradient norm of each sub-space

    def blocks(self):
        """The slices of the joint RBM's visible units that are z_img and z_txt."""
        return slice(0, self.split), slice(self.split, None)

    def clamp(self, modality):
        """(V,) bool: the joint RBM's visible units of one modality."""
        mask = torch.zeros(len(self.rbm.b), dtype=torch.bool, device=self.rbm.b.device)
        mask[self.blocks()[modality]] = True
        return mask

    def latent(self, v, modality):
        """z (N, Z) in (0, 1) of images or texts v (N, V): top-layer probabilities under the modality's gain."""
        a = (self.image, self.text)[modality].top_input(v)
        return torch.sigmoid(self.gain[modality] * (a - self.shift[modality]))

    def latents(self, image, text):
        """[z_img, z_txt] (N, V of the joint RBM) of images (N, pixels) and texts (N, characters)."""
        return torch.cat((self.latent(image, IMAGE), self.latent(text, TEXT)), dim=1)

    # ---- learning ---------------------------------------------------------------------------------------------------

    def learn(self, image, text, batch, epoch, k=1, **how):
        """One update of the joint RBM on paired images and texts; batch, epoch: where training is; how: RBM.ascend's
        knobs."""
        devices = self.devices
        z = self.latents(image, text)
        if devices.gain:
            self.control_gain(z)
        if devices.warmup and (epoch < devices.warmup_epochs or float(torch.rand(())) < devices.clamp_share):
            clamped = TEXT if (batch + 1) % devices.draw_every == 0 else IMAGE
            mask = self.clamp(clamped)
            start = torch.where(mask, z, self.rbm.random_visible(len(z)))
            negative = self.rbm.correlations(self.rbm.gibbs(start, [1.0] * devices.clamp_steps, mask)[0])
            if devices.enumeration and clamped == IMAGE:
                words = self.expected(*(z[:, part] for part in self.blocks()))
                negative = {name: (value + words[name]) / 2 for name, value in negative.items()}
        else:
            negative = self.rbm.correlations(
                self.rbm.negative(self.rbm.sample_visible(z), k, devices.mitigation, devices.refresh))
        # The data are probabilities: half of the units of z_img are grey, and a sample of them has lost the number.
        positive = self.rbm.correlations(z)
        gradient = centred(positive, negative)
        if devices.balance:
            self.balance(gradient)
        self.rbm.note_activity(positive['c'])
        self.rbm.ascend(gradient, **how)

    def expected(self, z, y):
        """Statistics {W, b, c} of z_img z (N, Z) joined to each of the different z_txt of y (N, Y), weighed by the
        model's probability of that text given the image."""
        y = y.unique(dim=0)                                                                         # (T, Y)
        image, text = self.blocks()
        a = (self.rbm.c + z @ self.rbm.W[image])[:, None] + y @ self.rbm.W[text]                    # (N, T, H)
        p = torch.softmax(torch.nn.functional.softplus(a).sum(-1) + y @ self.rbm.b[text], 1)        # (N, T)
        h = torch.sigmoid(a) * p[..., None]
        return {'W': torch.cat((z.T @ h.sum(1), y.T @ h.sum(0))) / len(z),
                'b': torch.cat((z.mean(0), p.mean(0) @ y)), 'c': h.sum(1).mean(0)}

    def balance(self, gradient, decay=0.95, most=4.0):
        """Scale the two sub-spaces' parts of a gradient {W, b, c}, in place, to one root-mean-square size."""
        parts = self.blocks()
        now = torch.stack([gradient['W'][part].square().mean().sqrt() for part in parts])
        self.norm.copy_(now if not self.norm.any() else decay * self.norm + (1 - decay) * now)
        factor = (self.norm.prod().sqrt() / self.norm.clamp(min=1e-8)).clamp(1 / most, most)
        for part, scale in zip(parts, factor):
            gradient['W'][part] *= scale
            gradient['b'][part] *= scale

    def control_gain(self, z):
        """Move gains and shifts so that z_img and z_txt (N, V) come to one mean and one variance over stimuli."""
        mean = torch.stack([z[:, part].mean() for part in self.blocks()])
        sd = torch.stack([z[:, part].var(0).mean().sqrt() for part in self.blocks()])
        self.shift += self.devices.gain_rate * (mean - mean.mean())
        self.gain *= torch.exp(self.devices.gain_rate * (sd.mean() - sd))
        self.gain.clamp_(0.25, 4.0)

    # ---- generation -------------------------------------------------------------------------------------------------

    def betas(self, steps):
        """Inverse temperatures of a generating chain of so many steps."""
        return annealed(steps, self.devices.hot if self.devices.hot_gibbs else 1.0)

    def complete(self, z, modality, steps, keep=1):
        """Clamp one modality at z (N, Z) and let the other run from noise: its probabilities in the last `keep` states
        of a chain of so many steps, (keep, N, Z of the other)."""
        v = torch.zeros(len(z), len(self.rbm.b), device=z.device)
        v[:, self.blocks()[modality]] = z
        other = self.rbm.given(v, self.clamp(modality))
        betas = self.betas(steps)
        v, p = other.gibbs(other.random_visible(len(z)), betas[:len(betas) - keep + 1])
        found = [p]
        for beta in betas[len(betas) - keep + 1:]:
            v, p = other.gibbs(v, [beta])
            found.append(p)
        return torch.stack(found)

    def image_to_text(self, image, steps, keep=10, chains=10):
        """Images (N, pixels) -> log of the probability (N, characters) of each character, averaged over the last `keep`
        states of so many chains: one chain comes to one word, as probable as the model finds it; several show which
        word is the most probable."""
        z = self.latent(image, IMAGE).repeat_interleave(chains, 0)
        p = torch.stack([self.text.down(y) for y in self.complete(z, IMAGE, steps, keep)]).mean(0)
        return p.unflatten(0, (len(image), chains)).mean(1).clamp(min=1e-6).log()

    def text_to_image(self, text, steps):
        """Texts (N, characters) -> pixel probabilities (N, pixels) of one sample each."""
        z = self.complete(self.latent(text, TEXT), TEXT, steps)[0]
        return self.image.down(draw(z))

    def word_energies(self, image, words):
        """Free energy (N, W) of each image (N, pixels) joined to each of W texts (W, characters): exp(-F) is the
        model's own weight of the pair, so the lowest is the word the model finds most probable, without a chain."""
        z, y = self.latent(image, IMAGE), self.latent(words, TEXT)
        a = self.rbm.c + z @ self.rbm.W[self.blocks()[IMAGE]]                                       # (N, H)
        columns = [torch.nn.functional.softplus(a + one @ self.rbm.W[self.blocks()[TEXT]]).sum(1) for one in y]
        return -(torch.stack(columns, dim=1) + y @ self.rbm.b[self.blocks()[TEXT]])

    def joint_code(self, image, steps=20, keep=10):
        """E p(h | z_img, z_txt), (N, H), of images (N, pixels) alone: the text is what the clamped chain fills in, and
        the code is averaged over the last `keep` of its steps."""
        z = self.latent(image, IMAGE)
        states = self.complete(z, IMAGE, steps, keep)
        return torch.stack([self.rbm.hidden(torch.cat((z, y), dim=1)) for y in states]).mean(0)
