"""What the joint model can do: name an image, draw a word, compare two images; and the judges and baselines beside it.

Nothing here trains the model or is seen by it. The two judges of a drawing are a counter of connected components, which
knows nothing of any training, and a small convolutional net trained on real images only.
"""
import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from groundeep import stimuli


# ---- judges ---------------------------------------------------------------------------------------------------------

def count_components(images, side, smallest=2):
    """Connected components (4 neighbours) of at least `smallest` pixels in images (N, side**2) bool: (N,) counts."""
    counts = []
    for image in np.asarray(images, dtype=bool).reshape(-1, side, side):
        labels, _ = scipy.ndimage.label(image)
        counts.append((np.bincount(labels.ravel())[1:] >= smallest).sum())
    return np.array(counts)


class Judge(nn.Module):
    """Classifier of numbers, trained on real images only: convolutions, the sum over the image, a linear layer."""

    def __init__(self, side, max_number, channels=16):
        super().__init__()
        self.side = side
        self.features = nn.Sequential(nn.Conv2d(1, channels, 5, padding=2), nn.ReLU(),
                                      nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU(),
                                      nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(2 * channels, 64), nn.ReLU(), nn.Linear(64, max_number))

    def forward(self, images):
        """Images (N, side**2) in [0, 1] -> logits (N, max_number) of the numbers 1, 2, ..."""
        x = self.features(images.reshape(-1, 1, self.side, self.side))
        return self.head(x.sum((2, 3)) / 16)        # a sum, because a mean would have to be told the image's size

    @torch.no_grad()
    def count(self, images, batch=500):
        """Images (N, side**2) -> (N,) numbers, as a NumPy array."""
        return torch.cat([self(part).argmax(1) + 1 for part in images.split(batch)]).cpu().numpy()


def train_judge(images, numbers, side, max_number, epochs, device, batch=100, learning_rate=3e-3):
    """A Judge after so many epochs of Adam on images (N, side**2) float and numbers (N,) tensors."""
    judge = Judge(side, max_number).to(device)
    optimizer = torch.optim.Adam(judge.parameters(), learning_rate)
    steps = epochs * max(1, len(images) // batch)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).to(device).split(batch)[:max(1, len(images) // batch)]:
            loss = nn.functional.cross_entropy(judge(images[rows]), numbers[rows] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return judge.eval()


# ---- naming and drawing ---------------------------------------------------------------------------------------------

def scores(said, true, upto=None):
    """{exact, near}: shares of answers that are right, and right within 1, over the true numbers up to `upto`."""
    said, true = np.asarray(said), np.asarray(true)
    chosen = true <= (upto or true.max())
    off = np.abs(said - true)[chosen]
    return {'exact': float((off == 0).mean()), 'near': float((off <= 1).mean())}


@torch.no_grad()
def name_images(joint, images, words, steps, batch=400):
    """IMG->TXT of images (N, pixels): three readings, (N,) arrays each, of the same model.

    words: {string: number}. chain: the word of the lexicon that is likeliest under the clamped chain's averaged
    characters; spelled: the number whose word the likeliest characters spell exactly, 0 where they spell none; energy:
    the word of least free energy with the image.
    """
    strings, numbers = list(words), np.array(list(words.values()))
    codes = torch.as_tensor(stimuli.one_hot(stimuli.encode_text(strings)), device=images.device)
    found = {'chain': [], 'spelled': [], 'energy': []}
    for part in images.split(batch):
        log_p = joint.image_to_text(part, steps)
        found['chain'].append(numbers[(log_p @ codes.T).argmax(1).cpu().numpy()])
        letters = log_p.reshape(len(part), stimuli.LENGTH, -1).argmax(-1).cpu().numpy()
        found['spelled'].append(np.array([words.get(s, 0) for s in stimuli.decode_text(letters)]))
        found['energy'].append(numbers[joint.word_energies(part, codes).argmin(1).cpu().numpy()])
    return {name: np.concatenate(parts) for name, parts in found.items()}


@torch.no_grad()
def draw_words(joint, strings, samples, steps, device):
    """TXT->IMG: `samples` drawings of each string -> (len(strings), samples, pixels) probabilities."""
    codes = torch.as_tensor(stimuli.one_hot(stimuli.encode_text(strings)), device=device)
    return joint.text_to_image(codes.repeat_interleave(samples, 0), steps).unflatten(0, (len(strings), samples))


def diversity(drawn):
    """Of thresholded drawings (W, S, pixels) bool of W words: {distinct: share of a word's drawings that are different
    from all others of it, 1/S when the model has collapsed to one; distance: mean of 1 - Jaccard overlap over pairs}.
    """
    distinct, distance = [], []
    for images in np.asarray(drawn, dtype=bool):
        distinct.append(len(np.unique(np.packbits(images, axis=1), axis=0)) / len(images))
        above = np.triu_indices(len(images), 1)
        distance.append(1 - overlap(images)[above].mean())
    return {'distinct': float(np.mean(distinct)), 'distance': float(np.mean(distance))}


def overlap(images):
    """Jaccard overlap (N, N) of the pixels that are on in images (N, pixels) bool; 1 for two empty images."""
    x = np.asarray(images, dtype=np.float32)
    both, on = x @ x.T, x.sum(1)
    either = on[:, None] + on - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def drawing_scores(drawn, numbers, side, judge, upto):
    """Scores by both judges of drawings (W, S, pixels) probabilities of the numbers (W,), thresholded at 1/2.

    Also the counter's scores with the drawings dealt out to the wrong words at random (`chance`), and the diversity of
    the drawings of numbers up to `upto`. Returns a flat {name: value}.
    """
    W, S, _ = drawn.shape
    black = drawn > 0.5
    flat, true = black.flatten(0, 1), np.repeat(numbers, S)
    counted, classified = count_components(flat.cpu().numpy(), side), judge.count(flat.float())
    dealt = np.random.default_rng(0).permutation(counted[true <= upto])
    found = {}
    for name, said in (('counter', counted), ('classifier', classified)):
        found |= {f'{name}_{key}': value for key, value in scores(said, true, upto).items()}
        found[f'{name}_exact_all'] = scores(said, true)['exact']
    found['chance_exact'] = scores(dealt, true[true <= upto])['exact']
    found |= diversity(black.cpu().numpy()[np.asarray(numbers) <= upto])
    return found, counted.reshape(W, S)


def drawing_baselines(train, numbers, samples, side, upto, seed):
    """TXT->IMG by other means, `samples` drawings of each of `numbers`, by the counter, over numbers up to `upto`:
    {method: {exact, near, distinct, distance}}.

    retrieved: training images of the word (the nearest neighbour of a word; it draws nothing new). logistic: each pixel
    by itself, with the probability that a logistic regression on the word gives it: the mean of the word's images.
    """
    rng = np.random.default_rng(seed)
    numbers = np.array([n for n in numbers if n <= upto and (train['number'] == n).any()])
    of_word = [train['image'][train['number'] == n] for n in numbers]
    drawn = {'retrieved': np.stack([images[rng.integers(len(images), size=samples)] for images in of_word]),
             'logistic': np.stack([rng.random((samples, side ** 2)) < images.mean(0) for images in of_word])}
    return {name: scores(count_components(images, side), np.repeat(numbers, samples)) | diversity(images)
            for name, images in drawn.items()}


def logistic(x, numbers, images):
    """Numbers (M,) that a multinomial logistic regression, fitted to x (N, features) and numbers (N,), gives to images
    (M, features). Of three penalties that is taken which does best on a fifth of the first 4000 rows, held out for it.
    """
    few = np.arange(min(len(x), 4000))
    learn, held = few[few % 5 > 0], few[few % 5 == 0]
    fit = [LogisticRegression(C=C, max_iter=1000, tol=1e-3).fit(x[learn], numbers[learn]) for C in (0.01, 0.1, 1.0)]
    best = max(fit, key=lambda model: model.score(x[held], numbers[held]))
    return best.fit(x, numbers).predict(images)


def baselines(train, test, upto, seed, rows=20_000):
    """IMG->TXT by other means, exact and within 1 over numbers up to `upto`: {method: {exact, near}}.

    train, test: {'image', 'number'} arrays. chance names numbers in the training set's frequencies; nearest is the
    nearest of the training images (pixels that differ); logistic on pixels sees the labels too.
    """
    x, y = train['image'][:rows].astype(np.float32), train['number'][:rows]
    images, numbers = test['image'].astype(np.float32), test['number']
    said = {'chance': np.random.default_rng(seed).choice(y, len(numbers)),
            'nearest': KNeighborsClassifier(1, algorithm='brute').fit(x, y).predict(images),
            'logistic on pixels': logistic(x, y, images)}
    return {name: scores(answer, numbers, upto) for name, answer in said.items()}


# ---- psychophysics --------------------------------------------------------------------------------------------------

def readout(train_z, train_numbers, z):
    """Log2 number (N,) that a ridge regression on codes reads from z (N, Z)."""
    return Ridge(alpha=1.0).fit(train_z, np.log2(train_numbers)).predict(z)


def correlation(x, y):
    """Pearson correlation of x (N,) and y (N,); 0 where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def comparisons(estimate, design, seed, pairs=20_000):
    """Two-alternative choices 'which has more' from estimates (N,): (choice, log2 ratios).

    design: {name: (N,) log2 value}, 'number' among them. Returns choice (P,) bool, True where the first has the larger
    estimate, and {name: (P,) log2 ratio of first to second}; pairs of equal number are left out.
    """
    rng = np.random.default_rng(seed)
    first, second = rng.integers(len(estimate), size=(2, pairs))
    keep = design['number'][first] != design['number'][second]
    first, second = first[keep], second[keep]
    return estimate[first] > estimate[second], {name: x[first] - x[second] for name, x in design.items()}


def weber_fraction(choice, log2_ratio):
    """Weber fraction w of choices by maximum likelihood under P(first) = Phi(ln ratio / (sqrt(2) w)): noise of constant
    width on a logarithmic scale (Piazza et al. 2004). choice (P,) bool, log2_ratio (P,)."""
    x = np.log(2) * np.where(choice, 1, -1) * log2_ratio
    loss = [-scipy.stats.norm.logcdf(x / (2 ** 0.5 * np.exp(log_w))).sum() for log_w in LOG_W]
    best = LOG_W[int(np.argmin(loss))]
    fit = scipy.optimize.minimize_scalar(
        lambda log_w: -scipy.stats.norm.logcdf(x / (2 ** 0.5 * np.exp(log_w))).sum(),
        bounds=(best - 0.2, best + 0.2), method='bounded')
    return float(np.exp(fit.x))


LOG_W = np.log(10) * np.linspace(-2.5, 1.5, 41)      # where the search begins: w from 0.003 to 30


def choice_weights(choice, log2_ratios):
    """{name: weight} of a probit model of choices on the log2 ratios of number, Size and Spacing (DeWind et al. 2015,
    equation 5 without its guessing rate). A pure sense of number weighs the other two 0.
    """
    names = list(log2_ratios)
    x = np.stack([log2_ratios[name] for name in names], axis=1) * np.where(choice, 1, -1)[:, None]

    def loss(weights):
        # A small penalty: where the choices are perfect, the likelihood alone has no maximum.
        a = x @ weights
        slope = -np.exp(scipy.stats.norm.logpdf(a) - scipy.stats.norm.logcdf(a))
        return -scipy.stats.norm.logcdf(a).mean() + 1e-4 * weights @ weights, x.T @ slope / len(x) + 2e-4 * weights

    return dict(zip(names, scipy.optimize.minimize(loss, np.zeros(len(names)), jac=True).x.tolist()))


def naming_curve(said, true):
    """For each true number: (number, mean, sd) of what was said, (M, 3); scalar variability is sd growing with mean."""
    return np.array([(n, said[true == n].mean(), said[true == n].std()) for n in np.unique(true)])
