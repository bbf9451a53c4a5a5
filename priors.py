"""What makes a canvas look like a picture: eight differentiable priors, and the statistics they are judged by.

    spectrum   power falls as 1/f^2             Field 1987; van der Schaaf & van Hateren 1996
    tv         neighbouring pixels agree        Rudin, Osher & Fatemi 1992
    wavelet    a few large edges, much nothing  Mallat 1989; Simoncelli 1999
    gradkurt   heavy-tailed gradients           Huang & Mumford 1999
    cov        channels say different things    Zbontar et al. 2021 (Barlow Twins); Bardes et al. 2022 (VICReg)
    var        each channel keeps its scale     Bardes et al. 2022, here two-sided

Two more are ours and not the plan's (a weight of 0 is the plan). They hold what a set of photographs has and a network
that paints loses: no picture common to all (common), and no grid of queries showing through (lattice).

A canvas V is (B, C, H, W), of any float dtype. Every function that takes one raises ValueError unless it has four
dimensions, and computes in float32 (float64 stays) outside autocast. Every loss is a scalar and a mean over samples,
so splitting a batch into equal parts never changes the objective.
"""
import math
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F

PRIORS = ('spectrum', 'tv', 'wavelet', 'gradkurt', 'cov', 'var', 'common', 'lattice')
EPS = 1e-8  # a variance this small is a flat canvas; it keeps 0/0 and log 0, and their gradients, finite
DB2 = (-0.12940952255126037, 0.2241438680420134, 0.8365163037378079, 0.48296291314453416)  # low-pass, Daubechies 1988


def in_float32(function):
    """rfft refuses bfloat16, and autocast would round the matrix products below to 8 bits."""
    @wraps(function)
    def wrapped(V, *args, **kwargs):
        if V.ndim != 4:
            raise ValueError(f'a canvas is (B, C, H, W), got shape {tuple(V.shape)}')
        with torch.autocast(V.device.type, enabled=False):
            return function(V if V.dtype == torch.float64 else V.float(), *args, **kwargs)
    return wrapped


# ---- spectrum -------------------------------------------------------------------------------------------------------

def apply_window(V, hann):
    """Remove each channel's mean *under the window*, then window: nothing is left at DC to leak into ring 1."""
    if not hann:
        return centred(V)
    wy, wx = (torch.hann_window(n, device=V.device, dtype=V.dtype) for n in V.shape[2:])
    window = wy[:, None] * wx  # (H, W)
    V = V + (V.flatten(2) @ (-window / window.sum()).flatten())[..., None, None]
    return V * (window / window.square().mean().sqrt())  # mean square 1: white noise keeps its power


@in_float32
def radial_power(V, hann=False):
    """Radially averaged power: power (B, C, K) >= 0 and radius k (K,) = 1..H//2 in cycles per canvas, without DC.

    White noise of variance s^2 has power s^2 in every ring. hann=True windows first: canvas borders do not meet, and
    without a window the jump between them is spread over the spectrum.
    """
    return over_rings(power(apply_window(V, hann)), V)


@in_float32
def spectrum_slope(V, hann=False):
    """Slope α (B, C) of power ~ 1/k^α by least squares of log P_k on -log k; about 2 for photographs.

    Gaussian 32 x 32 fields of true α = 2 read 1.88 ± 0.13: ring 1 also holds radius 1.41, and log is concave.
    """
    log_P, log_k = log_power(power(apply_window(V, hann)), V)
    log_k = log_k - log_k.mean()
    return -(log_P @ log_k) / log_k.square().sum()


@in_float32
def spectrum_loss(V, alpha=2.0, hann=None):
    """Variance over k of log P_k + alpha log k, so 0 on a line of slope -alpha; scalar, nats^2 (Field 1987).

    Mean of the plain and the Hann spectrum, because a canvas trained on the plain one alone games it at its borders.
    hann: hann_power(V), if it is there already.
    """
    spectra = [log_power(P, V) for P in (power(apply_window(V, False)), hann_power(V) if hann is None else hann)]
    off_line = [log_P + alpha * log_k for log_P, log_k in spectra]                                    # (B, C, K)
    return sum((line - line.mean(-1, keepdim=True)).square().mean() for line in off_line) / 2


# ---- tv, wavelet, gradkurt ------------------------------------------------------------------------------------------

def gradients(V):
    """Forward differences ∂y (B, C, H-1, W) and ∂x (B, C, H, W-1)."""
    return V.diff(dim=2), V.diff(dim=3)


@in_float32
def tv_loss(V, d=None):
    """Anisotropic total variation per pixel, mean |∂y| + mean |∂x|; scalar, units of V (Rudin, Osher & Fatemi 1992).
    d: gradients(V), if they are there already."""
    return sum(pixel_mean(d.abs()).mean() for d in (gradients(V) if d is None else d))


@in_float32
def wavelet_bands(V, levels=3):
    """Periodic orthonormal db2 transform (Mallat 1989), ordered as pywt.wavedec2(V, 'db2', 'periodization', levels).

    Returns [low (B, C, h, w), coarsest (B, C, 3, h, w), ..., finest (B, C, 3, H/2, W/2)], h = H / 2^levels, where the 3
    are detail across y, across x and diagonal. Energy is preserved. Raises ValueError if 2^levels does not divide H, W.

    Not Haar: its sparsest pictures are blocks. Pixels trained on the six priors with Haar had 59% of their gradient on
    every fourth column (25% is none), with db2 30%; and db2 tells photographs from Gaussian fields better (1.5 standard
    deviations against 1.0). The price is that the wrap-around at the border counts as an edge.
    """
    H, W = V.shape[2:]
    if H % 2**levels or W % 2**levels:
        raise ValueError(f'{levels} wavelet levels need sides that are multiples of {2**levels}, got {H} x {W}')
    low, details = V, []
    for _ in range(levels):
        down, across = (wavelet_matrix(n, V.device, V.dtype) for n in low.shape[2:])
        bands = (down @ low @ across.T).unflatten(3, (2, -1)).unflatten(2, (2, -1))  # (B, C, 2, h, 2, w): low, detail
        low, detail = bands.permute(4, 2, 0, 1, 3, 5).flatten(0, 1).split((1, 3))    # (1, B, C, h, w), (3, B, C, h, w)
        low, details = low[0], [detail.permute(1, 2, 0, 3, 4), *details]
    return [low, *details]


@in_float32
def wavelet_loss(V, levels=3):
    """Mean magnitude over rms of each wavelet band, averaged; scalar: Gaussian fields 0.80, photographs 0.67, flat 1.

    A ratio, because the cheapest way to small coefficients is a weak canvas (Simoncelli 1999 also fits the shape of the
    density, not its scale); band by band, because strong coarse bands beside weak fine ones would pass for sparse.
    """
    def ratio(band):  # (B, C, 3, h, w) -> (B, C, 3); the floor inside both makes an empty band 1, not sparse
        energy = band.square() + EPS
        return pixel_mean(energy.sqrt()) / pixel_mean(energy).sqrt()
    return sum(ratio(band).mean() for band in wavelet_bands(V, levels)[1:]) / levels


def kurtosis(d):
    """E(d - mean)^4 / Var(d)^2 over the last two axes, (B, C, h, w) -> (B, C): Gaussian 3, Laplace 6, flat 1."""
    d2 = centred(d).square()
    return (pixel_mean(d2.square()) + EPS**2) / (pixel_mean(d2).square() + EPS**2)


@in_float32
def gradient_kurtosis(V):
    """Mean of the kurtoses of ∂y and ∂x, (B, C) >= 1; about 9 for photographs (Huang & Mumford 1999)."""
    return sum(kurtosis(d) for d in gradients(V)) / 2


@in_float32
def gradkurt_loss(V, target=6.0, d=None):
    """Squared shortfall of log kurtosis below log target, mean of ∂y and ∂x; scalar, 0 above the target.
    d: gradients(V), if they are there already."""
    return sum(F.relu((target / kurtosis(d)).log()).square().mean() for d in (gradients(V) if d is None else d)) / 2


# ---- cov, var -------------------------------------------------------------------------------------------------------

@in_float32
def channel_correlation(V):
    """Correlation of the channels over the pixels of each sample, (B, C, C) in [-1, 1]; 0 for a flat channel."""
    V = centred(V).flatten(2)                                          # (B, C, H*W)
    covariance = V @ V.mT / V.shape[2]
    std = (covariance.diagonal(dim1=1, dim2=2) + EPS).sqrt()           # (B, C)
    return covariance / (std[:, :, None] * std[:, None])


def off_diagonal(R):
    """The entries of R (B, C, C) that compare two different channels, (B, C*(C-1)); a single 0 if C = 1."""
    B, C, _ = R.shape
    if C == 1:
        return torch.zeros_like(R[:, 0])
    return R.flatten(1)[:, 1:].reshape(B, C - 1, C + 1)[..., :-1].flatten(1)  # rows of C + 1 end on the diagonal


@in_float32
def cov_loss(V):
    """Mean squared off-diagonal of the channel correlation; scalar in [0, 1]."""
    return off_diagonal(channel_correlation(V)).square().mean()


@in_float32
def var_loss(V, target=1.0):
    """Mean squared distance from target of each channel's standard deviation over its pixels; scalar."""
    variance = pixel_mean(centred(V).square())
    return ((variance + EPS).sqrt() - target).square().mean()


# ---- common, lattice ------------------------------------------------------------------------------------------------

@in_float32
def common_loss(V):
    """What the canvases of unrelated sentences share: <V_i, V_j> a pixel, and twice the same of |V|, over disjoint
    pairs of rows, each channel's mean removed; scalar.

    The expectation is |E V|^2 + 2 |E |V||^2: 0 for natural images, whose mean picture is flat and which are busy
    nowhere in particular. Without the second part the canvases share one patch and vary its sign. An even number of
    rows is used, so splitting a batch into even parts never changes it; it can be negative on a small batch.
    """
    pairs = len(V) // 2
    if not pairs:
        return V.sum() * 0

    def shared(x):
        one, other = x.unflatten(0, (pairs, 2)).unbind(1)
        return pixel_mean(one * other).mean()

    V = centred(V[:2 * pairs])
    size = centred((V.square() + EPS).sqrt())              # |V| with a gradient at 0
    return shared(V) + 2 * shared(size)


def lattice_power(V, cell, P):
    """P = hann_power of canvases like V at the lattice frequencies (B, C, N), and around them (B, C, N, 16), or None
    where no lattice can be told: cell = 1, or fewer than four periods. Raises ValueError unless cell divides H and W.
    Hann, or the borders of any photograph raise the bins on the two axes 2.5-fold over those beside them."""
    H, W = V.shape[2:]
    if cell < 1 or H % cell or W % cell:
        raise ValueError(f'cell must divide the canvas, got {cell} for {H} x {W}')
    if cell == 1 or min(H, W) < 4 * cell:
        return None
    peaks, around = lattice_bins(H, W, cell, P.device)
    P = P.flatten(2)
    return P[..., peaks], P[..., around]


@in_float32
def lattice_loss(V, cell, hann=None):
    """Excess of the power at the frequencies of the query grid over the power around them; scalar, 0 without a lattice.

    The radial spectrum cannot see the grid: its few bins are a twentieth of their rings. The ratio, mean over channels
    and frequencies of a canvas, is 1 in a natural field; what is above 1 counts, or the canvases would get holes there
    instead of peaks. A per-sample mean. hann: hann_power(V), if it is there already."""
    hann = hann_power(V) if hann is None else hann
    powers = lattice_power(V, cell, hann)
    if powers is None:
        return V.sum() * 0
    floor = EPS * (hann.mean((2, 3)) + EPS)[..., None]             # far below any canvas, however weak
    return F.relu((powers[0] / (powers[1].mean(-1) + floor)).mean((1, 2)) - 1).mean()


@torch.no_grad()
@in_float32
def lattice_energy(V, cell):
    """How far a dot lattice of period `cell` pixels stands out of the spectrum; scalar, about 1 without one.

    Batch mean of the power at each multiple of the lattice frequency over the power around it; the largest ratio. A
    canvas painted by a grid of queries, each painting cell x cell pixels, shows that grid here and in no other number.
    Returns 1 where no lattice can be told (lattice_power). Blind to flat blocks, whose spectrum is zero at just these
    frequencies. Wants B*C >= 100: the largest of 15 ratios is 1.2 by chance alone there, and 1.5 at B*C = 16.
    """
    powers = lattice_power(V, cell, hann_power(standardise(V)))
    if powers is None:
        return V.new_ones(())
    peak, around = ((P.mean((0, 1)) + EPS).log() for P in powers)
    # Averaging logs (a geometric mean) is fair to 1/f^α for every α: log f is harmonic,
    # its mean over a ring is its centre.
    return (peak - around.mean(-1)).max().exp()


# ---- all of them ----------------------------------------------------------------------------------------------------

@in_float32
def image_prior_terms(V, alpha=2.0, cell=1):
    """The eight losses, {name: scalar} in the order of PRIORS; cell as in lattice_loss. Safe inside autocast."""
    hann, d = hann_power(V), gradients(V)
    return {'spectrum': spectrum_loss(V, alpha, hann), 'tv': tv_loss(V, d), 'wavelet': wavelet_loss(V),
            'gradkurt': gradkurt_loss(V, d=d), 'cov': cov_loss(V), 'var': var_loss(V),
            'common': common_loss(V), 'lattice': lattice_loss(V, cell, hann)}


def image_prior_loss(terms, weights):
    """Weighted sum of image_prior_terms(V) by weights {name: float}, scalar. Raises KeyError for an unknown name."""
    return sum(weight * terms[name] for name, weight in weights.items())


def seen(V, stride, most):
    """The rows of V that the priors look at: every `stride`-th, `most` of them. Two at least, where there are two, or
    `common_loss` would have no pair: small parts of a batch see more rows."""
    return V[::max(1, min(stride, len(V) // 2))][:max(2, most)]


@torch.no_grad()
@in_float32
def statistics(V, cell=1):
    """What a held-out batch of canvases looks like, {name: tensor}; cell = H // query grid, for the lattice.

    alpha, alpha_hann     (C,) spectral slope, mean over images; alpha_image (B, C): the plain slope of each image
    tv, tv_normalised     scalar, total variation per pixel: raw, and with every channel at unit variance
    kurtosis              (C,) gradient kurtosis, median over images: a mean would be ruled by a few near-flat canvases
    std                   (C,) standard deviation over pixels, mean over images
    correlation           (C, C) over the pixels of the whole batch; max_correlation: scalar, largest |off-diagonal|
    mean_abs_correlation  scalar, mean |off-diagonal| of the correlations of each image, which pooling could cancel
    share, share_total    (C,), scalar in [0, 1]: E|V - mean_b V|^2 / E|V - mean_{b,y,x} V|^2, the part of the variance
                          that depends on the sentence: 0 if all share one canvas, 1 - 1/B if all are independent
    lattice               scalar, lattice_energy(V, cell)
    """
    B, C, H, W = V.shape
    alpha_image = spectrum_slope(V)
    correlation = channel_correlation(V.transpose(0, 1).reshape(1, C, B * H, W))  # (1, C, C)
    varying = (V - V.mean(0)).square().mean((0, 2, 3))
    total = V.var((0, 2, 3), unbiased=False)
    return {
        'alpha': alpha_image.mean(0), 'alpha_hann': spectrum_slope(V, hann=True).mean(0), 'alpha_image': alpha_image,
        'tv': tv_loss(V), 'tv_normalised': tv_loss(standardise(V)),
        'kurtosis': gradient_kurtosis(V).quantile(0.5, dim=0), 'std': V.std((2, 3), unbiased=False).mean(0),
        'correlation': correlation[0], 'max_correlation': off_diagonal(correlation).abs().max(),
        'mean_abs_correlation': off_diagonal(channel_correlation(V)).abs().mean(),
        'share': varying / (total + EPS), 'share_total': varying.sum() / (total.sum() + EPS),
        'lattice': lattice_energy(V, cell),
    }


# ---- what is done to canvases ---------------------------------------------------------------------------------------

def standardise(V):
    """Each channel of each canvas to mean 0 and variance 1, (B, C, H, W); a flat channel becomes 0."""
    V = centred(V)
    return V / (pixel_mean(V.square(), keepdim=True) + EPS).sqrt()               # Tensor.var takes three times as long


@in_float32
def gaussian_blur(V, sigma):
    """Gaussian blur with sigma in pixels and reflected borders, same shape; sigma = 0 returns V.

    Raises ValueError if sigma is negative or its 3-sigma kernel reaches beyond the reflected canvas.
    """
    radius = math.ceil(3 * sigma)
    if sigma < 0 or radius >= min(V.shape[2:]):
        raise ValueError(f'sigma must be >= 0 and less than a third of the canvas, got {sigma}')
    if sigma == 0:
        return V
    x = torch.arange(-radius, radius + 1, device=V.device, dtype=V.dtype)
    kernel = torch.softmax(-x.square() / (2 * sigma**2), 0).view(1, 1, -1)

    def blur(n):      # (n, n), from the right: as a matrix product a tenth of the time of a one-channel convolution
        unit = torch.eye(n, device=V.device, dtype=V.dtype)[:, None]
        return F.conv1d(F.pad(unit, (radius, radius), mode='reflect'), kernel)[:, 0]

    return blur(V.shape[2]).T @ (V @ blur(V.shape[3]))


def shift(V, dy, dx):
    """Move each canvas by whole pixels; the border is repeated. V (B, C, H, W), dy, dx (B,) int64."""
    B, C, H, W = V.shape
    rows = (torch.arange(H, device=V.device) - dy[:, None]).clamp(0, H - 1)           # (B, H)
    columns = (torch.arange(W, device=V.device) - dx[:, None]).clamp(0, W - 1)        # (B, W)
    V = V.gather(2, rows[:, None, :, None].expand(B, C, H, W))
    return V.gather(3, columns[:, None, None, :].expand(B, C, H, W))


def cut_out(V, top, left, side):
    """Replace a side x side square of each canvas by the canvas's own channel means. top, left (B,) int64."""
    H, W = V.shape[-2:]
    row, column = (torch.arange(n, device=V.device) - start[:, None] for start, n in ((top, H), (left, W)))
    hole = (((row >= 0) & (row < side))[:, None, :, None]
            & ((column >= 0) & (column < side))[:, None, None, :])                    # (B, 1, H, W)
    return torch.where(hole, V.mean((2, 3), keepdim=True), V)


def random_phases(V, generator):
    """Gaussian fields with the mean and the power spectrum of each channel of each canvas: what a spectrum alone looks
    like. V (B, C, H, W); the generator is of V's device."""
    spectrum, noise = torch.fft.rfft2(V), torch.fft.rfft2(torch.randn(V.shape, generator=generator, device=V.device))
    phase = noise / noise.abs().clamp(min=1e-9)
    phase[..., 0, 0] = spectrum[..., 0, 0].sgn()
    return torch.fft.irfft2(spectrum.abs() * phase, s=V.shape[-2:])


# ---- what makes them fast --------------------------------------------------------------------------------------------
# Sums without arrays that only a gradient needs, tables made once, one transform for two priors.

def pixel_mean(x, keepdim=False):
    """Mean over the last two axes. The gradient of Tensor.mean is a whole array, divided; that of a sum is repeated."""
    return x.sum((-2, -1), keepdim) / (x.shape[-2] * x.shape[-1])


def centred(V):
    """Each channel of each canvas (B, C, H, W) less its mean. The gradient of a difference would negate an array."""
    return V + -pixel_mean(V, keepdim=True)


class Power(torch.autograd.Function):
    """|rfft2|^2 of V (B, C, H, W): (B, C, H, W//2+1). Its gradient, 2 Re F*(g F V), is one real transform; PyTorch's
    own is a complex one of the whole plane, with which both directions take half as long again."""

    @staticmethod
    def forward(context, V):
        F_V = torch.fft.rfft2(V, norm='ortho')
        context.save_for_backward(F_V)
        context.shape = V.shape[2:]
        return F_V.real.square() + F_V.imag.square()

    @staticmethod
    def backward(context, g):
        F_V, = context.saved_tensors
        once = 2 / columns(context.shape[1], g.device, g.dtype)            # irfft2 adds the mirror images
        return torch.fft.irfft2(F_V * (g * once), s=context.shape, norm='ortho')


power = Power.apply


@in_float32
def hann_power(V):
    """power() of V under a Hann window, whose computation two of the priors share."""
    return power(apply_window(V, hann=True))


@lru_cache
def columns(W, device, dtype):
    """How many columns of the FFT each of rfft2's (W//2+1,) stands for: it leaves the mirror image out."""
    with torch.inference_mode(False):  # or the cached tensor could be one that autograd may not save
        n = torch.full((W // 2 + 1,), 2.0, device=device, dtype=dtype)
        n[0] = 1.0                           # but fx = 0 has none,
        if W % 2 == 0:                       # nor has the Nyquist column of an even W
            n[-1] = 1.0
        return n


@lru_cache
def radial_bins(H, W, device, dtype):
    """Matrix (H*(W//2+1), K) that averages rfft2's half-plane over rings, and the radii of the rings, k = 1..K."""
    with torch.inference_mode(False):  # as above
        size = min(H, W)  # radii in cycles per (shorter) canvas side; ring K = size // 2 is the Nyquist frequency
        fy = torch.fft.fftfreq(H, 1 / size, device=device, dtype=dtype)
        fx = torch.fft.rfftfreq(W, 1 / size, device=device, dtype=dtype)
        k = torch.arange(1, size // 2 + 1, device=device, dtype=dtype)
        ring = torch.hypot(fy[:, None], fx).add(0.5).floor()  # nearest radius, (H, W//2+1)
        bins = (columns(W, device, dtype)[:, None] * (ring[..., None] == k)).flatten(0, 1)     # (H*(W//2+1), K)
        return bins / bins.sum(0), k


def over_rings(P, V):
    """The mean of power P (B, C, H, W//2+1) of canvases like V over each ring (B, C, K), and the radii (K,)."""
    bins, k = radial_bins(*V.shape[2:], P.device, P.dtype)
    return P.flatten(2) @ bins, k


def log_power(P, V):
    """log P_k (B, C, K) and log k (K,) of power P of canvases like V; the floor lies 60 dB below the mean, so that a
    flat canvas has a log too."""
    P, k = over_rings(P, V)
    return (P + 1e-6 * P.mean(-1, keepdim=True) + EPS).log(), k.log()


@lru_cache
def wavelet_matrix(n, device, dtype):
    """One level of the periodic db2 transform of n samples, (n, n) orthonormal: n/2 rows low-pass, n/2 rows detail."""
    with torch.inference_mode(False):
        low = torch.tensor(DB2[::-1], device=device, dtype=dtype)
        high = low.flip(0) * torch.tensor([1, -1, 1, -1], device=device, dtype=dtype)
        shifts = 2 * torch.arange(n // 2, device=device)[:, None] + torch.arange(-1, 3, device=device)    # (n/2, 4)
        rows = torch.zeros(n // 2, n, device=device, dtype=dtype)
        return torch.cat([rows.scatter_add(1, shifts % n, f.expand(n // 2, -1)) for f in (low, high)])


@lru_cache
def lattice_bins(H, W, cell, device):
    """Bins (N,) of the flattened rfft2 at multiples of the lattice frequency, without DC, and the 16 bins (N, 16) on
    the square ring at distance 2 around each: a peak under Hann is three bins wide. Negative columns are mirrored."""
    peaks = torch.cartesian_prod(torch.arange(0, H, H // cell), torch.arange(0, W // 2 + 1, W // cell))[1:]   # (N, 2)
    ring = torch.tensor([(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2])
    y, x = ((peaks[:, None] + ring) % torch.tensor([H, W])).unbind(-1)                      # (N, 16)
    y, x = torch.where(x > W // 2, -y % H, y), torch.where(x > W // 2, W - x, x)            # P(-k) = P(k)
    width = W // 2 + 1
    return (peaks[:, 0] * width + peaks[:, 1]).to(device), (y * width + x).to(device)
