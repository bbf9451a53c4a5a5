"""Experiment 1 at two latent sizes, batches of 32: kNN accuracy on 2,000 validation digits, 8,000 to train, seed 0.

    OMP_NUM_THREADS=1 python records/2026-11-22_grounding/validation.py data/mnist
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'grounding'))

import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

import autoencoders
import digits
import settings
from latents import knn_predictions


def config(latent):
    return settings.load_config(settings.parser('').parse_args([
        '--config', str(ROOT / 'grounding/configs/1_naive_covnet_autoencoder.yaml'), '--data_root', sys.argv[1],
        '--set', 'data.val_samples=2000', '--set', f'model.latent_dim={latent}']))


def accuracies(train, val):
    """'euc3:0.9400 ...': k = 3 and 5, both metrics."""
    return ' '.join(f'{metric[:3]}{k}:'
                    f'{(knn_predictions(train, labels, val, k, metric) == splits["val"].labels.numpy()).mean():.4f}'
                    for metric in ('euclidean', 'cosine') for k in (3, 5))


splits, source = digits.load(config(16))
print(source, flush=True)
x, y, labels = splits['train'], splits['val'], splits['train'].labels.numpy()
print('pixels', accuracies(x.flat(), y.flat()))
for latent in (16, 24, 32):
    pca = PCA(latent, random_state=0).fit(x.flat())
    print('PCA', latent, accuracies(pca.transform(x.flat()), pca.transform(y.flat())), flush=True)
runs = []
for latent in (16, 32):
    torch.manual_seed(0)
    model = autoencoders.build(config(latent)).to(memory_format=torch.channels_last)
    runs.append((latent, model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)))
for epoch in range(1, 31):
    for latent, model, optimizer in runs:
        model.train()
        for batch, in digits.batches(x.images, 32, 1, 0, seed=epoch):
            loss = F.binary_cross_entropy_with_logits(model.logits(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == 2 or epoch % 5 == 0:
            print('latent', latent, 'epoch', epoch, f'val {autoencoders.cross_entropy(model, y.images, "cpu"):.4f}',
                  accuracies(*(autoencoders.encode(model, s.images, 'cpu') for s in (x, y))), flush=True)
