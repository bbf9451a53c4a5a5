"""The priors against fields whose statistics are known: 1/f^α, Gaussian, Laplace, photographs, flat, lattices."""
import math

import numpy as np
import pytest
import pywt
import scipy.stats
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

import priors
from priors import (
    PRIORS, channel_correlation, cov_loss, gaussian_blur, gradient_kurtosis, gradkurt_loss, image_prior_loss,
    image_prior_terms, lattice_energy, power, radial_power, spectrum_loss, spectrum_slope, standardise, statistics,
    tv_loss, var_loss, wavelet_bands, wavelet_loss)

WEIGHTS = dict(zip(PRIORS[:6], (0.5, 0.1, 0.1, 0.05, 0.05, 0.05)))      # the plan's


def radius(size):
    """Radial frequency of each bin of rfft2, (size, size//2+1), in cycles per canvas."""
    return torch.hypot(torch.fft.fftfreq(size, 1 / size)[:, None], torch.fft.rfftfreq(size, 1 / size))


def power_law(alpha, B=64, C=6, size=32, random_amplitude=True, r=None):
    """Unit-variance periodic fields with power r^-alpha; Gaussian, or with random phases only."""
    spectrum = torch.fft.rfft2(torch.randn(B, C, size, size))
    if not random_amplitude:
        spectrum = spectrum / spectrum.abs()
    r = radius(size) if r is None else r
    amplitude = torch.where(r > 0, r ** (-alpha / 2), 0)  # no DC
    return standardise(torch.fft.irfft2(spectrum * amplitude, s=(size, size)))


def cropped_power_law(alpha, B, C, size=32):
    """Windows on wider fields: like photographs, and unlike power_law, their opposite borders do not meet."""
    return standardise(power_law(alpha, B, C, 2 * size)[..., :size, :size])


def sample_quantiles(inverse_cdf, n):
    """n values in random order whose histogram is the density itself, so that moments carry no sampling noise."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return inverse_cdf(u)[torch.randperm(n)]


def laplace(u):
    return -(u - 0.5).sign() * torch.log1p(-2 * (u - 0.5).abs())


def field_with_gradients(dy, dx):
    """Field (1, 1, n+1, n+1) with ∂y[i, j] = dy[i] and ∂x[i, j] = dx[j]."""
    y, x = (torch.cat([torch.zeros(1, dtype=d.dtype), d.cumsum(0)]) for d in (dy, dx))
    return (y[:, None] + x)[None, None]


@pytest.fixture(scope='module')
def photographs():
    """Grey, red-green and blue-yellow 32 x 32 crops of two photographs, without the empty ones, (B, 3, 32, 32)."""
    crops = []
    for image in load_sample_images().images:
        r, g, b = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) / 255
        opponent = torch.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b])
        crops.append(opponent.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1))
    crops = torch.cat(crops)
    return standardise(crops[crops.std((2, 3)).amin(1) > 0.02])  # 8-bit sky is quantisation steps, not a picture


# -- spectrum ----------------------------------------------------------------------------------------------------------

def naive_radial_power(image, hann):
    """The definition, as a loop over the whole frequency plane; image (H, W) -> list of K."""
    H, W = image.shape
    window = np.ones((H, W))
    if hann:
        window = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in (H, W)))
        window /= np.sqrt((window**2).mean())
    spectrum = np.abs(np.fft.fft2((image - (image * window).sum() / window.sum()) * window)) ** 2 / (H * W)
    rings = {k: [] for k in range(min(H, W) // 2 + 2)}
    for y in range(H):
        for x in range(W):
            fy, fx = min(y, H - y) * min(H, W) / H, min(x, W - x) * min(H, W) / W
            k = int(math.sqrt(fy**2 + fx**2) + 0.5)
            if k in rings:
                rings[k].append(spectrum[y, x])
    return [np.mean(rings[k]) for k in range(1, min(H, W) // 2 + 1)]


@pytest.mark.parametrize('hann', [False, True])
@pytest.mark.parametrize('shape', [(8, 8), (32, 32), (9, 9), (16, 24)])
def test_radial_power_is_the_naive_loop(shape, hann):
    V = 3 + torch.randn(2, 3, *shape, dtype=torch.float64)
    power, k = radial_power(V, hann)
    assert k.tolist() == list(range(1, min(shape) // 2 + 1))
    expected = [[naive_radial_power(channel, hann) for channel in image] for image in V.numpy()]
    np.testing.assert_allclose(power.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize('hann', [False, True])
def test_white_noise_has_its_variance_in_every_ring(hann):
    power, _ = radial_power(2 * torch.randn(100, 6, 32, 32), hann)
    inner = 1 if hann else 0  # the mean that is removed under the Hann window takes some of ring 1 with it
    torch.testing.assert_close(power.mean((0, 1))[inner:], torch.full((16 - inner,), 4.0), rtol=0.05, atol=0)


@pytest.mark.parametrize('alpha', [0.0, 1.0, 2.0, 3.0])
def test_slope_is_exact_on_synthetic_fields(alpha):
    # Power set by the ring number: a straight line, and the exact slope (error < 0.001, the 60 dB floor at α = 3).
    V = power_law(alpha, B=4, random_amplitude=False, r=(radius(32) + 0.5).floor())
    power, k = radial_power(V)
    line = power.log() + alpha * k.log()
    assert (line - line.mean(-1, keepdim=True)).abs().max() < 1e-3
    torch.testing.assert_close(spectrum_slope(V), torch.full((4, 6), alpha), rtol=0, atol=1e-3)
    # Power set by the true radius: ring 1 averages radii 1 and 1.41, which costs 0.000, 0.044, 0.081 and 0.111.
    slope = spectrum_slope(power_law(alpha, B=4, random_amplitude=False))
    binning_error = {0.0: 0.0, 1.0: 0.044, 2.0: 0.081, 3.0: 0.111}[alpha]
    torch.testing.assert_close(slope, torch.full((4, 6), alpha - binning_error), rtol=0, atol=2e-3)


def test_gaussian_field_of_slope_2_reads_188():
    slope = spectrum_slope(power_law(2.0, B=200))
    assert slope.mean().item() == pytest.approx(1.88, abs=0.01)
    assert slope.std().item() == pytest.approx(0.13, abs=0.01)


def test_spectrum_loss_is_its_definition():
    V = power_law(1.0, B=2, C=2).double()
    t = np.log([[[naive_radial_power(c, hann) for c in image] for image in V.numpy()] for hann in (False, True)])
    t += 2.0 * np.log(np.arange(1, 17))
    assert spectrum_loss(V).item() == pytest.approx(t.var(-1).mean(), rel=1e-4)


def test_spectrum_loss_prefers_the_right_slope_at_any_scale():
    V = power_law(2.0)
    losses = [spectrum_loss(V, alpha).item() for alpha in (1.0, 2.0, 3.0)]
    assert losses[1] < min(losses[0], losses[2]) / 3
    assert spectrum_loss(0.1 * V).item() == pytest.approx(losses[1], rel=1e-3)


def test_hann_sees_what_the_borders_hide():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing='ij')
    ramp = (y + 2 * x)[None, None]  # no texture at all: its plain spectrum is that of the jump between the borders
    assert 1.5 < spectrum_slope(ramp).item() < 3
    assert spectrum_slope(ramp, hann=True).item() > 4


# -- edges -------------------------------------------------------------------------------------------------------------

def test_tv_exact_on_a_ramp_and_a_step():
    assert tv_loss(torch.arange(32.0).expand(2, 3, 32, 32)).item() == pytest.approx(1.0)  # ∂x = 1, ∂y = 0
    step = (torch.arange(32.0) >= 16).float()[:, None].expand(2, 3, 32, 32)
    assert tv_loss(step).item() == pytest.approx(1 / 31)


def test_tv_of_noise_falls_with_smoothing():
    V = torch.randn(16, 6, 32, 32)
    tv = [tv_loss(gaussian_blur(V, sigma)).item() for sigma in (0.0, 0.5, 1.0, 2.0)]
    assert tv[0] == pytest.approx(4 / math.sqrt(math.pi), rel=0.02)  # 2 E|a - b| for independent unit normals
    assert tv == sorted(tv, reverse=True) and 0 < tv[-1] < tv[0] / 5


@pytest.mark.parametrize('shape', [(32, 32), (48, 48), (32, 48)])
def test_wavelet_is_pywavelets_and_keeps_energy(shape):
    V = torch.randn(2, 3, *shape, dtype=torch.float64)
    low, *details = wavelet_bands(V, levels=3)
    expected_low, *expected = pywt.wavedec2(V.numpy(), 'db2', mode='periodization', level=3)
    np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-12)
    assert len(details) == len(expected) == 3
    for band, triple in zip(details, expected):
        np.testing.assert_allclose(band.numpy(), np.stack(triple, axis=2), atol=1e-12)
    assert sum(b.square().sum() for b in (low, *details)).item() == pytest.approx(V.square().sum().item(), rel=1e-12)


def test_wavelet_loss_wants_sparse_not_weak():
    gaussian = power_law(2.0)
    sparse = torch.zeros(16, 6, 32, 32)
    sparse[..., 8:24, 8:24] = 1
    assert wavelet_loss(gaussian).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)
    assert wavelet_loss(power_law(0.0)).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)
    assert wavelet_loss(0.01 * gaussian).item() == pytest.approx(wavelet_loss(gaussian).item(), rel=1e-2)
    assert wavelet_loss(standardise(sparse)) < 0.6
    assert wavelet_loss(torch.zeros(1, 1, 32, 32)).item() == pytest.approx(1.0)  # emptiness is not sparse


@pytest.mark.parametrize('inverse_cdf, expected', [(torch.special.ndtri, 3.0), (laplace, 6.0)])
def test_gradient_kurtosis_of_known_densities(inverse_cdf, expected):
    V = field_with_gradients(sample_quantiles(inverse_cdf, 1000), sample_quantiles(inverse_cdf, 1000))
    assert gradient_kurtosis(V).item() == pytest.approx(expected, rel=0.07)  # the tails beyond 1/2000 are missing
    assert gradient_kurtosis(V.float()).item() == pytest.approx(gradient_kurtosis(V).item(), rel=1e-3)


def test_both_gradients_count():
    dy, dx = sample_quantiles(torch.special.ndtri, 1000), sample_quantiles(laplace, 1000)
    ky, kx = scipy.stats.kurtosis(dy, fisher=False), scipy.stats.kurtosis(dx, fisher=False)
    V = field_with_gradients(dy, dx)
    assert gradient_kurtosis(V).item() == pytest.approx((ky + kx) / 2, rel=1e-9)
    assert gradkurt_loss(V).item() == pytest.approx((math.log(6 / ky) ** 2 + math.log(6 / kx) ** 2) / 2, rel=1e-9)


def test_gradkurt_loss_is_a_shortfall():
    laplacian = field_with_gradients(sample_quantiles(laplace, 1000), sample_quantiles(laplace, 1000))
    assert gradkurt_loss(laplacian, target=5.0).item() == 0
    assert gradkurt_loss(power_law(2.0)).item() == pytest.approx(math.log(6 / 3) ** 2, rel=0.05)


# -- channels ----------------------------------------------------------------------------------------------------------

def orthogonal_channels(size=32):
    """Three channels of variance 1/2 and mean 0, uncorrelated with one another, (1, 3, H, W)."""
    x = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    return torch.stack([torch.sin(x).expand(size, size), torch.cos(x).expand(size, size),
                        torch.sin(2 * x)[:, None].expand(size, size)])[None]


@pytest.mark.parametrize('rho', [0.0, 0.6, -1.0])
def test_correlation_and_cov_loss_exact(rho):
    V = orthogonal_channels()
    V[:, 1] = rho * V[:, 0] + math.sqrt(1 - rho**2) * V[:, 1]
    V = V * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + torch.tensor([0.0, 3.0, -7.0])[:, None, None]
    expected = torch.eye(3, dtype=torch.float64)
    expected[0, 1] = expected[1, 0] = rho
    torch.testing.assert_close(channel_correlation(V)[0], expected, atol=1e-6, rtol=1e-6)
    assert cov_loss(V).item() == pytest.approx(2 * rho**2 / 6, abs=1e-6)


def test_cov_loss_of_one_channel_is_zero():
    assert cov_loss(torch.randn(4, 1, 32, 32)).item() == 0


def test_var_loss_exact():
    V = orthogonal_channels() * math.sqrt(2) * torch.tensor([1.0, 0.5, 3.0])[:, None, None]  # sd 1, 0.5 and 3
    assert var_loss(V).item() == pytest.approx((0 + 0.25 + 4) / 3, rel=1e-6)
    assert var_loss(V, target=2.0).item() == pytest.approx((1 + 2.25 + 1) / 3, rel=1e-6)


@pytest.mark.parametrize('sigma, reach', [(0.8, 3), (2.0, 6)])
def test_blur_is_scipy_mirror(sigma, reach):
    V = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    expected = gaussian_filter(V.numpy(), sigma, axes=(2, 3), mode='mirror', radius=reach)
    np.testing.assert_allclose(gaussian_blur(V, sigma).numpy(), expected, atol=1e-12)
    assert gaussian_blur(V, 0) is V


# -- jitter -----------------------------------------------------------------------------------------------------------

def test_shift_is_a_slice_of_the_canvas_with_its_border_repeated():
    V, pad = torch.randn(25, 3, 7, 9), 3
    dy, dx = (d.flatten() for d in torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing='ij'))
    moved = priors.shift(V, dy, dx)
    for v, y, x, result in zip(V.numpy(), dy, dx, moved.numpy()):
        wide = np.pad(v, ((0, 0), (pad, pad), (pad, pad)), mode='edge')
        assert (result == wide[:, pad - y:pad - y + 7, pad - x:pad - x + 9]).all()


def test_cut_out():
    V = torch.randn(3, 2, 8, 8)
    top, left = torch.tensor([0, 2, 6]), torch.tensor([5, 0, 6])
    for v, y, x, result in zip(V, top, left, priors.cut_out(V, top, left, 3)):
        expected = v.clone()
        expected[:, y:y + 3, x:x + 3] = v.mean((1, 2))[:, None, None]
        assert torch.equal(result, expected)


# -- as objectives -----------------------------------------------------------------------------------------------------

LOSSES = {'spectrum': spectrum_loss, 'tv': tv_loss, 'wavelet': lambda V: wavelet_loss(V, levels=2),
          'gradkurt': gradkurt_loss, 'cov': cov_loss, 'var': var_loss, 'blur': lambda V: gaussian_blur(V, 0.5)}


@pytest.mark.parametrize('name', LOSSES)
def test_gradient_by_finite_differences(name):
    V = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (V,), eps=1e-6, atol=1e-7, rtol=1e-4)
    assert torch.autograd.grad(LOSSES[name](V).square().sum(), V)[0].abs().max() > 1e-4


@pytest.mark.parametrize('shape', [(8, 8), (8, 7), (7, 8), (7, 7)])
def test_gradient_of_each_power(shape):
    V = torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(power, (V,), eps=1e-6, atol=1e-7, rtol=1e-4)


def test_terms_are_the_losses_and_the_sum_is_weighted():
    V = power_law(1.0, B=4)
    terms = image_prior_terms(V, alpha=1.5, cell=4)
    assert tuple(terms) == PRIORS
    expected = {name: getattr(priors, f'{name}_loss')(V) for name in PRIORS[1:-1]}
    expected |= {'spectrum': spectrum_loss(V, 1.5), 'lattice': priors.lattice_loss(V, 4)}
    assert all(terms[name].shape == () and torch.equal(terms[name], expected[name]) for name in PRIORS)
    total = sum(WEIGHTS[name] * terms[name].item() for name in WEIGHTS)
    assert image_prior_loss(terms, WEIGHTS).item() == pytest.approx(total, rel=1e-6)
    with pytest.raises(KeyError):
        image_prior_loss(terms, {'spectrun': 1.0})


def test_splitting_a_batch_never_changes_the_objective():
    V = torch.cat([power_law(2.0, B=4), 3 * power_law(0.0, B=4)])  # halves that differ in every term
    V[4:, 1] = V[4:, 0]
    whole, first, second = (image_prior_terms(part, cell=4) for part in (V, V[:4], V[4:]))
    for name in PRIORS:
        assert whole[name].item() == pytest.approx((first[name].item() + second[name].item()) / 2, rel=1e-5), name


def test_photographs_rank_above_noise(photographs):
    n, C = photographs.shape[:2]
    assert n > 150
    photo, white, field = (image_prior_terms(V) for V in (photographs, power_law(0.0, n, C), power_law(2.0, n, C)))
    assert image_prior_loss(photo, WEIGHTS) < 0.4 * image_prior_loss(white, WEIGHTS)
    each = torch.stack([image_prior_loss(image_prior_terms(V[None]), WEIGHTS) for V in photographs[::4]])
    assert (each < image_prior_loss(white, WEIGHTS)).float().mean() > 0.98
    # Against a Gaussian field of the same spectrum only the terms of higher order can tell. (The sum cannot: single
    # photographs scatter about 1/f^2, α = 2.2 ± 0.5, and their colours correlate, so the field scores 0.30, they 0.46.)
    for name in ('tv', 'wavelet', 'gradkurt'):
        assert photo[name] < 0.9 * field[name], name


@pytest.mark.parametrize('V', [torch.zeros(2, 6, 32, 32), torch.full((2, 6, 32, 32), 0.3),
                               torch.full((2, 6, 32, 32), 1000.3), 1e-6 * torch.ones(2, 6, 32, 32).cumsum(3),
                               torch.tensor([0.0, 1.0])[:, None, None] * torch.linspace(0, 1, 32).expand(2, 2, 32, 32)],
                         ids=['zero', 'constant', 'large constant', 'almost flat', 'one flat channel'])
def test_flat_canvases_stay_finite(V):
    V = V.clone().requires_grad_()
    for name, term in image_prior_terms(V).items():
        gradient, = torch.autograd.grad(term, V, retain_graph=True)
        assert term.isfinite() and gradient.isfinite().all(), name
    assert all(value.isfinite().all() for value in statistics(V, cell=4).values())


def test_bfloat16_under_autocast_is_float32():
    V = torch.randn(4, 6, 32, 32, dtype=torch.bfloat16)
    terms, stats = image_prior_terms(V.float()), statistics(V.float(), cell=4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside, stats_inside = image_prior_terms(V), statistics(V, cell=4)
        assert gaussian_blur(V, 0.8).dtype == torch.float32
    assert all(inside[name].dtype == torch.float32 and torch.equal(inside[name], terms[name]) for name in terms)
    assert all(torch.equal(stats_inside[name], stats[name]) for name in stats)


def test_evaluating_in_inference_mode_first_leaves_training_possible():
    V = torch.randn(2, 2, 24, 40, requires_grad=True)  # a size that no other test has cached
    priors.wavelet_matrix.cache_clear()
    with torch.inference_mode():
        image_prior_terms(V)
    image_prior_loss(image_prior_terms(V), WEIGHTS).backward()
    assert V.grad.isfinite().all()


def test_bad_canvases_are_refused():
    for function in (image_prior_terms, statistics, radial_power):
        with pytest.raises(ValueError, match='B, C, H, W'):
            function(torch.zeros(6, 32, 32))
    with pytest.raises(ValueError, match='multiples of 8'):
        wavelet_loss(torch.zeros(1, 1, 20, 20))
    with pytest.raises(ValueError, match='cell'):
        lattice_energy(torch.zeros(1, 1, 32, 32), cell=5)
    for sigma in (-1.0, 11.0):
        with pytest.raises(ValueError, match='sigma'):
            gaussian_blur(torch.zeros(1, 1, 32, 32), sigma)


# -- statistics --------------------------------------------------------------------------------------------------------

def test_statistics_read_what_was_put_in():
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 4.0])
    V = power_law(2.0, B=128) * scale[:, None, None]
    s = statistics(V.requires_grad_(), cell=4)
    assert not any(value.requires_grad for value in s.values())
    assert s['alpha_image'].shape == (128, 6) and torch.equal(s['alpha'], s['alpha_image'].mean(0))
    assert (s['alpha'] - 1.88).abs().max() < 0.05 and (s['alpha_hann'] - 1.74).abs().max() < 0.07
    assert (s['kurtosis'] - 3).abs().max() < 0.1
    torch.testing.assert_close(s['std'], scale, rtol=1e-4, atol=0)
    assert s['tv'].item() == pytest.approx(s['tv_normalised'].item() * scale.mean().item(), rel=0.02)
    assert s['correlation'].shape == (6, 6) and (s['correlation'].diagonal() - 1).abs().max() < 1e-4
    assert s['max_correlation'] < 0.1
    assert s['lattice'] == lattice_energy(V, 4) and statistics(V)['lattice'] == 1


def test_kurtosis_is_a_median():
    V = torch.randn(9, 1, 32, 32)
    V[0] = 0
    V[0, 0, 16, 16] = 1  # a single bright pixel: kurtosis of several hundred
    s = statistics(V)
    assert gradient_kurtosis(V)[0] > 300 and s['kurtosis'].item() == pytest.approx(3, abs=0.3)


def test_correlation_pooled_and_per_image():
    V = torch.randn(64, 2, 32, 32)
    V[:, 1] = V[:, 0] * torch.tensor([1.0, -1.0]).repeat(32)[:, None, None]  # fully correlated in each image
    s = statistics(V)
    assert s['max_correlation'] < 0.1 and s['mean_abs_correlation'] > 0.99
    s = statistics(torch.stack([V[:, 0], -V[:, 0]], 1))
    assert s['max_correlation'] > 0.99 and s['correlation'][0, 1] < -0.99


def test_share_of_variance_that_depends_on_the_sentence():
    shared, own = power_law(2.0, B=1), power_law(2.0, B=100)
    for V, expected in ((shared.expand(100, -1, -1, -1), 0.0), (own, 0.99), (shared + own, 0.497)):
        s = statistics(V)
        assert s['share'].shape == (6,)
        assert (s['share'] - expected).abs().max() < 0.02 and abs(s['share_total'] - expected) < 0.01
    mixed = torch.cat([shared[:, :3].expand(100, -1, -1, -1), 3 * own[:, :3]], 1)  # variance 1 alike, variance 9 own
    s = statistics(mixed)
    assert s['share'][:3].max() < 0.01 and s['share'][3:].min() > 0.97
    assert s['share_total'].item() == pytest.approx(0.9, abs=0.02)
    assert statistics(torch.zeros(8, 2, 32, 32))['share_total'] == 0


def dots(cell, size=32):
    on = (torch.arange(size) % cell == cell // 2).float()
    return standardise((on[:, None] * on)[None, None])


@pytest.mark.parametrize('alpha', [0.0, 2.0, 3.0])
def test_no_lattice_in_power_law_fields(alpha):
    periodic, cropped = power_law(alpha, B=43), cropped_power_law(alpha, B=43, C=6)
    for cell in (2, 4, 8):
        assert 0.6 < lattice_energy(periodic, cell) < 1.5
        assert 0.6 < lattice_energy(cropped, cell) < 1.5  # borders that do not meet are no lattice


@pytest.mark.parametrize('cell, weak', [(2, 0.2), (4, 0.2), (8, 0.3)])  # 4% or 9% of the variance
def test_weak_dot_lattice_is_seen(cell, weak):
    fields, lattice = power_law(2.0, B=43), weak * dots(cell)
    assert lattice_energy(fields + lattice, cell) > 4
    assert lattice_energy(fields + lattice.roll((1, 1), (2, 3)), cell) > 4  # wherever the dots are
    assert lattice_energy(0.01 * (fields + lattice), cell) > 4  # however weak the canvas
    assert lattice_energy(fields + lattice, 1) == 1
    loud = torch.cat([100 * fields[:, :1], fields[:, 1:] + lattice], 1)
    assert lattice_energy(loud, cell) > 3  # nor does one loud channel drown the others


def test_lattice_of_the_other_period_is_not_mistaken():
    V = power_law(2.0, B=43)
    assert 1.5 > lattice_energy(V + 0.3 * dots(3, 33)[..., :32, :32], 4)
    assert lattice_energy(V, 16) == 1  # two periods are no lattice


def test_photographs_have_little_lattice(photographs):
    assert lattice_energy(photographs, 4) < 2


def test_common_is_what_unrelated_canvases_share():
    shared, own = power_law(2.0, B=1), power_law(2.0, B=256)
    V = shared + own
    power = shared.var((2, 3), unbiased=False).mean().item()
    assert abs(priors.common_loss(own).item()) < 0.2 * power
    assert priors.common_loss(V + 7).item() == pytest.approx(priors.common_loss(V).item(), rel=1e-3)
    assert priors.common_loss(V[:1]).item() == 0
    size = shared.sub(shared.mean((2, 3), keepdim=True)).abs()
    expected = power + 2 * size.var((2, 3), unbiased=False).mean().item()
    assert priors.common_loss(shared.expand(4, -1, -1, -1)).item() == pytest.approx(expected, rel=1e-4)
    assert 0.65 * power < priors.common_loss(V).item() < 1.35 * expected             # 128 pairs of a noisy product


def test_the_priors_see_two_rows_at_least():
    V = torch.arange(16.0)[:, None, None, None]
    assert priors.seen(V, 4, 64).flatten().tolist() == [0, 4, 8, 12]
    assert priors.seen(V[:4], 4, 16).flatten().tolist() == [0, 2], 'a small part still has a pair for common_loss'
    assert priors.seen(V, 1, 0).flatten().tolist() == [0, 1] and len(priors.seen(V[:1], 4, 8)) == 1


def test_common_sees_a_patch_whose_sign_varies():
    patch = torch.zeros(32, 32)
    patch[8:14, 8:14] = 3
    V = power_law(2.0, B=256) + patch * torch.randn(256, 1, 1, 1).sign()
    assert priors.common_loss(V).item() > 0.2


def test_lattice_loss_is_the_excess_over_a_field():
    V = standardise(power_law(2.0, B=64))
    dots, holes = torch.zeros(32, 32), torch.fft.rfft2(V)
    dots[::4, ::4] = 1
    holes[..., ::8, ::8] = 0
    plain, dotted, holed = (priors.lattice_loss(x, 4).item() for x in (V, V + dots, torch.fft.irfft2(holes)))
    assert plain < 0.2 and dotted > 2 and holed < 0.02, 'holes are no lattice, but nothing rewards them'
    V = torch.fft.irfft2(holes).requires_grad_()
    (priors.lattice_loss(V[:1], 4)).backward()
    assert not V.grad.any()
    assert priors.lattice_loss(V, 1).item() == 0


def test_random_phases_keep_the_spectrum_and_lose_the_picture():
    V = torch.randn(5, 2, 16, 16).cumsum(-1)
    scrambled = priors.random_phases(V, torch.Generator().manual_seed(0))
    torch.testing.assert_close(*(torch.fft.rfft2(x).abs() for x in (scrambled, V)), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(scrambled.mean((2, 3)), V.mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert (scrambled - V).abs().mean() > 0.5 * V.std()
