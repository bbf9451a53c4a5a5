"""The priors before and after, in turn in one run, forward and backward, 32 canvases of a 1/f field: wall-clock medians.
git show d201ae6:priors.py > old.py; git show 5b0a40f:priors.py > new.py; python old_and_new.py [threads]"""
import importlib.util
import statistics
import sys
import time

import torch

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
WEIGHTS = {'spectrum': 0.5, 'tv': 0.05, 'wavelet': 0.05, 'gradkurt': 0.05, 'cov': 0.5, 'var': 0.5, 'common': 1.0,
           'lattice': 0.05}                                                                            # runs/cpu.sh


def load(name):
    spec = importlib.util.spec_from_file_location(name, f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient(priors):
    canvases = V.detach().requires_grad_()
    priors.image_prior_loss(priors.image_prior_terms(canvases, 2.0, 4), WEIGHTS).backward()
    return canvases.grad


noise = torch.fft.rfft2(torch.randn(32, 6, 32, 32, generator=torch.Generator().manual_seed(0)))
radius = torch.hypot(torch.fft.fftfreq(32, 1 / 32)[:, None], torch.fft.rfftfreq(32, 1 / 32)).clamp(min=1)
V = torch.fft.irfft2(noise / radius)
V = V / V.std()
old, new = load('old'), load('new')
a, b = gradient(old), gradient(new)
print(f'{torch.get_num_threads()} threads; gradients differ by {(a - b).norm() / a.norm():.1e} (relative)')
for turn in range(3):
    seconds = {old: [], new: []}
    for _ in range(60):
        for priors, took in seconds.items():
            began = time.perf_counter()
            gradient(priors)
            took.append(time.perf_counter() - began)
    before, after = (1e3 * statistics.median(took) for took in seconds.values())
    print(f'turn {turn}: {before:.2f} ms before, {after:.2f} after, ratio {after / before:.2f}')
