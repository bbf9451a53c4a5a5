"""Our RBM beside scikit-learn's BernoulliRBM: the same digits, sizes, epochs, batches and learning rate.

Both are trained by persistent contrastive divergence with one Gibbs step an update, without momentum or decay, on the
digits that come with scikit-learn (1797 images of 8 x 8, scaled to [0, 1]). Both are scored by one function: the exact
pseudo-log-likelihood of held-out digits, made binary at one half, of the weights that each has learned.

Writes: out_file
    python -m groundeep.compare
"""
import os
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import BernoulliRBM

import runtime
from groundeep.dbn import batches
from groundeep.rbm import RBM

out_file = 'out/groundeep/compare.json'
hidden = 100
epochs = 20
batch_size = 10
learning_rate = 0.05
seeds = 3
config = runtime.configure(globals())


def ours(data, hidden, epochs, batch_size, learning_rate, seed):
    """An RBM trained on data (N, V) float32 by PCD-1."""
    torch.manual_seed(seed)
    rbm = RBM(data.shape[1], hidden, chains=batch_size)
    data = torch.as_tensor(data)
    for _ in range(epochs):
        for rows in batches(len(data), batch_size, 'cpu'):
            rbm.learn(data[rows], learning_rate, persistent=True)
    return rbm


def theirs(data, hidden, epochs, batch_size, learning_rate, seed):
    """scikit-learn's machine trained on the same, its weights in an RBM of ours."""
    found = BernoulliRBM(hidden, learning_rate=learning_rate, batch_size=batch_size, n_iter=epochs,
                         random_state=seed).fit(data)
    rbm = RBM(data.shape[1], hidden)
    for name, value in (('W', found.components_.T), ('b', found.intercept_visible_), ('c', found.intercept_hidden_)):
        getattr(rbm, name).copy_(torch.as_tensor(np.ascontiguousarray(value), dtype=torch.float32))
    return rbm


def compare(hidden, epochs, batch_size, learning_rate, seeds):
    """{ours, theirs: {'pseudo_log_likelihood': [a value a seed], 'seconds': [...]}} on every fifth digit held out."""
    digits = (load_digits().data / 16).astype(np.float32)
    held_out = np.arange(len(digits)) % 5 == 0
    test = torch.as_tensor((digits[held_out] > 0.5).astype(np.float32))
    found = {}
    for name, train in (('ours', ours), ('theirs', theirs)):
        found[name] = {'pseudo_log_likelihood': [], 'seconds': []}
        for seed in range(seeds):
            began = time.perf_counter()
            rbm = train(digits[~held_out], hidden, epochs, batch_size, learning_rate, seed)
            found[name]['seconds'].append(time.perf_counter() - began)
            found[name]['pseudo_log_likelihood'].append(rbm.pseudo_log_likelihood(test).mean().item())
    return found


def main():
    for key in ('hidden', 'epochs', 'seeds'):
        if config[key] < 1:
            runtime.fail(f'--{key}={config[key]}: expects at least 1')
    if learning_rate <= 0:
        runtime.fail(f'--learning_rate={learning_rate}: expects a positive number')
    found = compare(hidden, epochs, batch_size, learning_rate, seeds)
    for name, row in found.items():
        score, seconds = np.array(row['pseudo_log_likelihood']), np.array(row['seconds'])
        print(f'{name:6}  pseudo-log-likelihood {score.mean():.3f} ± {score.std():.3f} nats a digit, '
              f'{seconds.mean():.2f} s')
    ratio = np.mean(found['ours']['seconds']) / np.mean(found['theirs']['seconds'])
    print(f'time, ours / theirs: {ratio:.2f}')
    path = Path(out_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix('.tmp')
        runtime.write_json(temporary, {'config': config, 'time_ratio': ratio} | found)
        os.replace(temporary, path)
    except OSError as error:
        runtime.fail(f'cannot write {path}: {error.strerror}')


if __name__ == '__main__':
    main()
