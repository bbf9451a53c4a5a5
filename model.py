"""The nets of every phase: TextEncoder (x -> V), Readout (V -> z), TextDecoder (V, z -> logits), UNet
(V_t, t -> noise). build() makes them from a run's settings.

Shapes: x (B, T) token ids, 0 is padding; V (B, C, H, W) the canvas; z (B, E) unit vectors.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from data import BOS, EOS, PAD, PARA


# ---- attention ------------------------------------------------------------------------------------------------------

def rotation(positions, d):
    """How far rotary positions (Su et al. 2021) turn the pairs (i, i + d/2) of d numbers; positions (T,) integers ->
    cosines and signed sines (2, T, d). The same for all layers, heads and samples."""
    frequency = 10_000.0 ** (-torch.arange(d // 2, device=positions.device, dtype=torch.float32) / (d // 2))
    angle = positions[:, None].float() * frequency                               # (T, d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rope(q, turn):
    """q (B, heads, T, d), turned by a rotation."""
    cos, sin = turn.to(q.dtype)
    return torch.addcmul(q * cos, q.roll(q.shape[-1] // 2, -1), sin)             # rolled: the partner of each


def alignment(heads, tokens, cells, longest):
    """Bias on the scores of cross-attention between two readings of one page: half of the heads begin with what stands
    at the same place, the others look anywhere (ALiBi, Press et al. 2022, whose slopes are gentler). Without it, which
    cell holds which token is found by chance, late, and for the lengths of the corpus only (docs/LOG.md).
    tokens (T,): their positions among the `longest` that a page of so many cells holds -> (heads, T, cells) float32."""
    half, place = heads // 2, torch.arange(cells, device=tokens.device) * (longest / cells)
    slopes = F.pad(4 * 0.5 ** torch.arange(half, device=tokens.device, dtype=torch.float32), (0, heads - half))
    return -slopes[:, None, None] * (tokens[:, None] - place).abs()


def attend(q, k, v, mask=None, dropout=0.0, maps=False):
    """softmax(q kᵀ / √d) v -> (output, weights or None). mask (broadcastable) is True where attention may go, or a float
    that is added to the scores.
    q may have batch 1, queries that do not depend on the sample (a batched product copies them). On a CPU explicit
    products are half the time of the fused kernel's backward; on CUDA the fused kernel wins, unless the weights are
    asked for (maps)."""
    if q.is_cuda and not maps:
        q = q.expand(k.shape[0], -1, -1, -1)
        mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                     # (B, heads, Tq, Tk)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask.to(scores.dtype)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -1e4)                                 # finite: a row of padding stays finite
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v, weights


class Attention(nn.Module):
    """Multi-head attention. Queries and keys start large enough for scores with a standard deviation of 3: the usual
    small start is uniform attention, a bag of words, and takes long to leave (docs/LOG.md)."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=(3 / dim) ** 0.5)
        for layer in (self.value, self.out):
            nn.init.normal_(layer.weight, std=dim ** -0.5)

    def split(self, x):
        B, T, D = x.shape
        return x.view(B, T, self.heads, D // self.heads).transpose(1, 2)         # (B, heads, T, d)

    def keys_values(self, source):
        return self.split(self.key(source)), self.split(self.value(source))

    def forward(self, q, k, v, mask=None, maps=False):
        """q (B, heads, Tq, d), k and v (B, heads, Tk, d), already projected -> (B, Tq, D), weights
        (B, heads, Tq, Tk)."""
        y, weights = attend(q, k, v, mask, self.dropout if self.training else 0.0, maps)
        B, _, T, _ = y.shape
        return self.out(y.transpose(1, 2).reshape(B, T, -1)), weights


def feed_forward(dim, hidden, dropout):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim),
                         nn.Dropout(dropout))


class SelfBlock(nn.Module):
    """Pre-norm transformer block with rotary positions, `turn` as from rotation(); `cache` (k, v) of the positions
    before start is extended in place."""

    def __init__(self, dim, heads, hidden, dropout):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, dropout)
        self.drop, self.mlp = nn.Dropout(dropout), feed_forward(dim, hidden, dropout)

    def forward(self, x, mask, turn, cache=None, start=0):
        h = self.norm(x)
        q, (k, v) = self.attention.split(self.attention.query(h)), self.attention.keys_values(h)
        q, k = rope(q, turn), rope(k, turn)
        if cache is not None:
            T = x.shape[1]
            cache[0][:, :, start:start + T], cache[1][:, :, start:start + T] = k, v
            k, v = cache[0][:, :, :start + T], cache[1][:, :, :start + T]
        x = x + self.drop(self.attention(q, k, v, mask)[0])
        return x + self.mlp(x)


class CrossBlock(nn.Module):
    """Pre-norm block: x attends to a source (projected keys and values, already normalised), then an MLP."""

    def __init__(self, dim, heads, hidden, dropout):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, dropout)
        self.drop, self.mlp = nn.Dropout(dropout), feed_forward(dim, hidden, dropout)

    def forward(self, x, k, v, mask=None, maps=False):
        y, weights = self.attention(self.attention.split(self.attention.query(self.norm(x))), k, v, mask, maps)
        x = x + self.drop(y)
        return x + self.mlp(x), weights


# ---- x -> V ---------------------------------------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """Sentence -> canvas. A transformer over the tokens, then a grid of learned queries that reads the token states by
    cross-attention and is painted as C channels (plan, Phase 1).

    x (B, T) int64, 0 = padding -> V (B, C, size, size) float32. query_grid = size is the plan's 1024 queries; the
    queries of a coarser grid paint overlapping strokes.
    gist > 0 adds a coarse picture of the words. aligned: attention begins in the order of reading. slots > 0 replaces
    the grid by slot attention and Gaussian splats. smoothing adds the depthwise 3x3 + 1x1 head.
    """

    def __init__(self, vocab_size, channels=6, size=32, query_grid=32, dim=384, layers=6, heads=8, hidden=1536,
                 cross_layers=2, cross_hidden=768, dropout=0.1, smoothing=False, slots=0, max_length=64, gist=0,
                 aligned=False):
        super().__init__()
        self.size, self.query_grid, self.max_length, self.heads = size, query_grid, max_length, heads
        self.aligned = aligned
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=PAD)
        self.position = nn.Embedding(max_length, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(SelfBlock(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.slots = SlotSplat(dim, slots, channels, size) if slots else None
        if not slots:
            self.place = nn.Parameter(torch.randn(1, 64, query_grid, query_grid))
            self.place_conv = nn.Sequential(nn.Conv2d(64, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 1))
            self.cross = nn.ModuleList(CrossBlock(dim, heads, cross_hidden, dropout) for _ in range(cross_layers))
            self.cross_norm = nn.LayerNorm(dim)
            self.paint = nn.Conv2d(dim, channels, 1) if query_grid == size else Strokes(dim, query_grid, size, channels)
        self.smooth = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.GELU(),
                                    nn.Conv2d(channels, channels, 1)) if smoothing else None
        self.gist = Gist(dim, gist, size, channels) if gist else None

    def tokens(self, x, soft=None):
        """(B, T) -> normalised token states h (B, T, D) and the attention mask (B, 1, 1, T), True at real tokens.
        soft (B, T, vocab) stands for one-hot rows where a gradient has to reach the choice of tokens (P5)."""
        mask = (x != PAD)[:, None, None]
        if soft is None and len(parts := similar_lengths(x)) > 1:
            h = [self.states(trim(x[rows])) for rows in parts]
            h = torch.cat([F.pad(part, (0, 0, 0, x.shape[1] - part.shape[1])) for part in h])
            return h[torch.cat(parts).argsort()], mask
        return self.states(x, soft), mask

    def states(self, x, soft=None):
        """tokens() of sentences of about the same length, without the mask."""
        mask = (x != PAD)[:, None, None]
        positions = torch.arange(x.shape[1], device=x.device)
        embedded = self.embedding(x) if soft is None else soft @ self.embedding.weight
        h = self.drop(embedded + self.position(positions))
        turn = rotation(positions, h.shape[-1] // self.heads)
        for block in self.blocks:
            h = block(h, mask, turn)
        return self.norm(h)

    def forward(self, x, maps=False, soft=None):
        """-> V; with maps also the last cross-attention (B, heads, queries, T), None for slots."""
        h, mask = self.tokens(x, soft)
        weights = None
        if self.slots is not None:
            V = self.slots(h, mask)
        else:
            q = self.place_conv(self.place).flatten(2).transpose(1, 2)           # (1, g*g, D): same for every sample
            looks = mask
            if self.aligned:
                bias = alignment(self.heads, torch.arange(x.shape[1], device=x.device), q.shape[1], self.max_length)
                looks = bias.transpose(1, 2).masked_fill(~mask, -1e4)            # (B, heads, g*g, T)
            for block in self.cross:
                q, weights = block(q, *block.attention.keys_values(h), looks, maps)
            q = self.cross_norm(q).transpose(1, 2).unflatten(2, (self.query_grid, self.query_grid))   # (B, D, g, g)
            V = self.paint(q)
        V = V if self.smooth is None else V + self.smooth(V)
        if self.gist is not None:
            V = V + self.gist(self.embedding(x) if soft is None else soft @ self.embedding.weight, h, mask)
        # A CPU's convolution leaves the channels innermost, where norms, pooling and FFTs are slow.
        V = V.to(torch.float32, memory_format=torch.contiguous_format)
        return (V, weights) if maps else V


class Gist(nn.Module):
    """A coarse picture of the words of a sentence, hardly of their order: a weighted mean of their embeddings
    (B, T, D), painted in the lowest count x count spatial frequencies -> (B, channels, size, size). The blocks over the
    tokens turn words into places, where contrast would have to find the words again (docs/LOG.md). Amplitudes fall as
    1/f, as in natural images."""

    def __init__(self, dim, count, size, channels):
        super().__init__()
        self.weigh, self.paint = nn.Linear(dim, 1), nn.Linear(dim, channels * count ** 2, bias=False)
        nn.init.normal_(self.paint.weight, std=dim ** -0.5)
        frequency, place = torch.arange(count, dtype=torch.float32)[:, None], torch.arange(size) + 0.5
        radius = (frequency.square() + frequency.T.square()).sqrt().clamp(min=1)
        self.register_buffer('waves', torch.cos(torch.pi / size * frequency * place), persistent=False)
        self.register_buffer('amplitude', 0.5 / radius, persistent=False)                    # (count, count)

    def forward(self, embedded, h, mask):
        weights = self.weigh(h).float().masked_fill(~mask[:, 0, 0, :, None], -1e4).softmax(1)     # (B, T, 1)
        mean = F.layer_norm((weights * embedded).sum(1), embedded.shape[-1:])                     # (B, D)
        numbers = self.paint(mean).unflatten(1, (-1, *self.amplitude.shape)).float() * self.amplitude
        with torch.autocast(numbers.device.type, enabled=False):
            return self.waves.T @ numbers @ self.waves                            # (B, channels, size, size)


class Strokes(nn.Module):
    """(B, D, g, g) -> (B, channels, size, size): each query paints a learned stroke three cells wide, and the strokes
    add up. They start as Gaussian noise under a Hann window, so that neighbours overlap without a seam."""

    def __init__(self, dim, grid, size, channels):
        super().__init__()
        stride = self.stride = size // grid
        self.paint = nn.ConvTranspose2d(dim, channels, 3 * stride, stride=stride, padding=stride)
        window = torch.hann_window(3 * stride + 2)[1:-1]
        strokes = torch.randn(dim, channels, 3 * stride, 3 * stride) * window[:, None] * window
        with torch.no_grad():
            self.paint.weight.copy_(strokes * dim ** -0.5)

    def forward(self, y):
        """The transposed convolution `paint`, computed from where it lands: each cell's stride x stride pixels are a
        3x3 convolution of the queries around it. In bf16 on a CPU 23 ms instead of 37, forward and backward."""
        s, (dim, channels) = self.stride, self.paint.weight.shape[:2]
        weight = self.paint.weight.view(dim, channels, 3, s, 3, s).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
        cells = F.conv2d(y, weight.reshape(-1, dim, 3, 3), self.paint.bias.repeat_interleave(s * s), padding=1)
        return F.pixel_shuffle(cells, s)


class SlotSplat(nn.Module):
    """Slot attention (Locatello et al. 2020) on the token states, each slot then splatted on the grid as a Gaussian
    with its own mean, scale and channel mixture. h (B, T, D) -> V (B, C, size, size)."""

    def __init__(self, dim, slots, channels, size, iterations=3):
        super().__init__()
        self.iterations, self.size = iterations, size
        self.start = nn.Parameter(torch.randn(1, slots, dim))
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.update, self.norm = nn.GRUCell(dim, dim), nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, dim, 0.0)
        self.splat = nn.Linear(dim, 4 + channels)                                # mean (2), log scale (2), mixture (C)
        self.background = nn.Parameter(torch.zeros(1, channels, size, size))

    def forward(self, h, mask):
        B, K, D = len(h), self.start.shape[1], h.shape[-1]
        k, v = self.key(h), self.value(h)
        slots = self.start.expand(B, -1, -1)
        for _ in range(self.iterations):
            scores = self.query(self.norm(slots)) @ k.transpose(1, 2) * D ** -0.5        # (B, K, T)
            share = scores.float().softmax(1).masked_fill(~mask[:, 0], 0.0)              # slots compete for tokens
            share = (share / (share.sum(-1, keepdim=True) + 1e-6)).to(v.dtype)
            slots = self.update((share @ v).flatten(0, 1), slots.flatten(0, 1)).view(B, K, D)
            slots = slots + self.mlp(slots)
        mean, log_scale, mixture = self.splat(slots).float().split((2, 2, self.background.shape[1]), dim=-1)
        axis = torch.linspace(-1, 1, self.size, device=h.device)
        distance = ((axis - mean.tanh()[..., None])
                    * torch.exp(1.0 - log_scale[..., None].clamp(-2, 2)))                # (B, K, 2, size)
        y, x = torch.exp(-0.5 * distance.square()).unbind(2)                             # separable Gaussian
        return torch.einsum('bkc,bkh,bkw->bchw', mixture, y, x) + self.background


# ---- V -> z ---------------------------------------------------------------------------------------------------------

class Readout(nn.Module):
    """g(V): means and variances over a pyramid of cells (1x1, 2x2, 4x4), then an MLP -> z (B, dim) unit vectors.
    pyramid=False pools the whole canvas only, as in the plan: twelve numbers that do not know place."""

    def __init__(self, channels=6, dim=256, hidden=512, pyramid=True):
        super().__init__()
        self.cells = (1, 2, 4) if pyramid else (1,)
        features = 2 * channels * sum(n * n for n in self.cells)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, V):
        pooled = []
        for n in self.cells:
            mean = F.adaptive_avg_pool2d(V, n)
            pooled += [mean, F.adaptive_avg_pool2d(V.square(), n) - mean.square()]
        return F.normalize(self.mlp(torch.cat([p.flatten(1) for p in pooled], dim=1)).float(), dim=-1)


# ---- V_t, t -> noise ------------------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm; the time embedding scales and shifts between them.
    (B, in_channels, H, W) -> (B, out_channels, H, W)"""

    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2, self.conv2 = nn.GroupNorm(8, out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)       # a block starts as its skip

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class UNet(nn.Module):
    """The velocity of a noisy canvas, which tells its noise (p6_diffusion.predict_eps; Ho et al. 2020):
    V_t (B, C, H, W), t (B,) in [0, 1] -> (B, C, H, W) float32.

    Three levels (H, H/2, H/4; dim, 2 dim and 4 dim channels), attention at the coarsest: 8x8 for a canvas of 32x32. dim
    is a multiple of 8, and H and W of 4."""

    def __init__(self, channels=6, dim=48, heads=4):
        super().__init__()
        self.dim, time_dim = dim, 4 * dim
        self.time = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.enter = nn.Conv2d(channels, dim, 3, padding=1)
        self.down = nn.ModuleList([ResidualBlock(dim, dim, time_dim), ResidualBlock(dim, 2 * dim, time_dim),
                                   ResidualBlock(2 * dim, 4 * dim, time_dim)])
        self.norm, self.attention = nn.GroupNorm(8, 4 * dim), Attention(4 * dim, heads)
        self.middle = ResidualBlock(4 * dim, 4 * dim, time_dim)
        self.up = nn.ModuleList([ResidualBlock(8 * dim, 2 * dim, time_dim), ResidualBlock(4 * dim, dim, time_dim),
                                 ResidualBlock(2 * dim, dim, time_dim)])
        self.leave = nn.Sequential(nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight), nn.init.zeros_(self.leave[-1].bias)   # starts as the guess

    def embed_time(self, t):
        """Sinusoids of t in [0, 1] (Vaswani et al. 2017), frequencies 0.1 to 1000 radians: (B,) -> (B, dim)."""
        angle = 1000 * t[:, None].float() * 10_000.0 ** -torch.linspace(0, 1, self.dim // 2, device=t.device)
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    def forward(self, V_t, t):
        time = self.time(self.embed_time(t))
        h, skips = self.enter(V_t), []
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if level else h, time)
            skips.append(h)
        tokens = self.norm(h).flatten(2).transpose(1, 2)                         # (B, H/4 * W/4, 4 dim)
        q = self.attention.split(self.attention.query(tokens))
        h = h + self.attention(q, *self.attention.keys_values(tokens))[0].transpose(1, 2).view_as(h)
        h = self.middle(h, time)
        for level, block in enumerate(self.up):
            h = block(torch.cat((F.interpolate(h, scale_factor=2.0) if level else h, skips.pop()), dim=1), time)
        return self.leave(h).float()


# ---- V, z -> text ---------------------------------------------------------------------------------------------------

class TextDecoder(nn.Module):
    """Causal transformer with cross-attention over the flattened canvas and the pooled z.

    V (B, C, size, size), z (B, E), x (B, T) -> logits (B, T, vocab) for the token that follows each prefix BOS x[:t].
    patch > 1 reads the canvas in patch x patch pieces. memory says what it may see: 'both', 'canvas', 'z' or 'none' (a
    language model); the last three are the controls of P4. allowed (vocab,) bool is the vocabulary mask.
    """

    def __init__(self, vocab_size, channels=6, size=32, patch=1, z_dim=256, dim=384, layers=4, heads=8, hidden=1536,
                 dropout=0.1, memory='both', max_length=64, aligned=False):
        super().__init__()
        self.patch, self.memory_kind, self.heads, self.max_length = patch, memory, heads, max_length
        self.cells = (size // patch) ** 2 if aligned and memory in ('both', 'canvas') else 0     # that have places
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=PAD)
        self.position = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList(SelfBlock(dim, heads, hidden, dropout) for _ in range(layers))
        self.cross = (nn.ModuleList(CrossBlock(dim, heads, hidden, dropout) for _ in range(layers))
                      if memory != 'none' else None)
        if memory in ('both', 'canvas'):
            self.from_canvas = nn.Conv2d(channels, dim, patch, stride=patch)
            self.place = nn.Parameter(0.5 * torch.randn(1, (size // patch) ** 2, dim))
        if memory in ('both', 'z'):
            self.from_z = nn.Linear(z_dim, dim)
        self.memory_norm = nn.LayerNorm(dim) if memory != 'none' else None
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)
        self.drop = nn.Dropout(dropout)
        self.register_buffer('allowed', torch.ones(vocab_size, dtype=torch.bool))

    def memory(self, V, z):
        """One (k, v) pair a layer; computed once for a sentence, whatever its length."""
        if self.memory_kind == 'none':
            return None
        parts = []
        if self.memory_kind != 'z':
            parts.append(self.from_canvas(V).flatten(2).transpose(1, 2) + self.place)     # (B, cells, D)
        if self.memory_kind != 'canvas':
            parts.append(self.from_z(z)[:, None])                                         # (B, 1, D), the last key
        memory = self.memory_norm(torch.cat(parts, dim=1))
        return [block.attention.keys_values(memory) for block in self.cross]

    def decode(self, x, memory, start=0, cache=None, maps=False):
        """Input tokens x (B, T) at positions start... -> logits (B, T, vocab),
        cross-attention of each layer if maps. memory may be of fewer canvases, each of as many rows of x in turn."""
        T = x.shape[1]
        positions = torch.arange(start, start + T, device=x.device)
        mask = (None if cache is not None and T == 1                # one token, which may look at all before it
                else torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start))
        h, attention = self.drop(self.embedding(x) + self.position(positions)), []
        turn, looks = rotation(positions, h.shape[-1] // self.heads), None
        if memory is not None and self.cells:
            looks = alignment(self.heads, positions.repeat(x.shape[0] // memory[0][0].shape[0]), self.cells,
                              self.max_length)
            looks = F.pad(looks, (0, memory[0][0].shape[2] - self.cells))             # z has no place
        for layer, block in enumerate(self.blocks):
            h = block(h, mask, turn, None if cache is None else cache[layer], start)
            if memory is not None:
                k, v = memory[layer]                                  # all sentences of a canvas look at it at once
                y, weights = self.cross[layer](h.view(k.shape[0], -1, h.shape[2]), k, v, looks, maps)
                h = y.view_as(h)
                attention.append(weights)
        # Cheaper than masking the logits; no larger than it must be, for all digits of a sum count in the exports.
        bias = self.head.bias.masked_fill(~self.allowed, -256.0)
        return F.linear(self.norm(h), self.head.weight, bias).float(), attention

    def forward(self, x, V, z=None, start=BOS):
        """Teacher forcing: logits (B, T, vocab) that predict x itself. A sentence that starts with BOS says again what
        the canvas holds, one that starts with PARA says it in other words (P5). Or of x (B, K, T), K sentences of each
        canvas that begin with the K tokens of start: logits (B, K, T, vocab)."""
        if x.dim() == 2:
            return self.decode(shift(x, start), self.memory(V, z))[0]
        inputs = torch.stack([shift(*one) for one in zip(x.unbind(1), start)], dim=1)
        return self.decode(inputs.flatten(0, 1), self.memory(V, z))[0].unflatten(0, x.shape[:2])

    @torch.no_grad()
    def generate(self, V, z, length, start=BOS, top_p=0.0, u=None):
        """Free run, one sentence a row -> ids (B, length), closed by EOS and then padding. Keys and values are cached.

        top_p = 0 is greedy. Otherwise nucleus sampling (Holtzman et al. 2020) with the uniform numbers u (B, length):
        whoever draws them for a whole batch gets the same sentences on any number of ranks. Of u (B * k, length) each
        canvas has k rows in turn, and as many sentences."""
        B, heads, dim = len(V if u is None else u), self.heads, self.embedding.embedding_dim
        memory = self.memory(V, z)
        memory = memory and [(k.contiguous(), v.contiguous()) for k, v in memory]    # once, not at every token
        autocast = torch.is_autocast_enabled(V.device.type)
        dtype = torch.get_autocast_dtype(V.device.type) if autocast else V.dtype
        cache = [[torch.zeros(B, heads, length, dim // heads, dtype=dtype, device=V.device) for _ in range(2)]
                 for _ in self.blocks]
        token, ended, out = (torch.full((B,), start, device=V.device),
                             torch.zeros(B, dtype=torch.bool, device=V.device), [])
        for t in range(length):
            logits = self.decode(token[:, None], memory, t, cache)[0][:, 0]
            for unsaid in (PAD, BOS, PARA):      # no sentence holds them; a list of ids would be copied to the device
                logits[:, unsaid] = -1e4
            token = nucleus(logits, top_p, u[:, t]) if top_p > 0 else logits.argmax(-1)
            token = token.masked_fill(ended, PAD)
            ended = ended | (token == EOS)
            out.append(token)
            if V.device.type == 'cpu' and ended.all():                           # elsewhere asking would be waiting
                break
        return F.pad(torch.stack(out, dim=1), (0, length - len(out)), value=PAD)


# ---- from the settings of a run --------------------------------------------------------------------------------------

# The settings that fix the shapes of weights, or what they do: a checkpoint holds them, no later phase changes them.
SIZES = ('vocab_size', 'channels', 'size', 'query_grid', 'dim', 'layers', 'heads', 'hidden', 'cross_layers',
         'cross_hidden', 'smoothing', 'slots', 'max_length', 'rec_dim', 'rec_layers', 'patch', 'z_dim',
         'readout_hidden', 'pyramid', 'gist', 'aligned', 'dec_dim', 'dec_layers', 'dec_heads', 'dec_hidden', 'unet_dim')


def sizes(config):
    """The sizes among the settings of a run, {name: value}."""
    return {name: config[name] for name in SIZES if name in config}


def size_error(config):
    """What is wrong with sizes that do not fit together, in one line; '' if nothing is."""
    # The auxiliary decoder has TextDecoder's 8 heads.
    for width, heads in (('dim', config['heads']), ('rec_dim', 8), ('dec_dim', config.get('dec_heads'))):
        if width in config and (config[width] < 1 or config[width] % (2 * heads)):
            return (f'--{width}={config[width]}: expects a multiple of {2 * heads}, an even number for each of the '
                    f'{heads} heads (rotary positions turn pairs)')
    if config['size'] < 16 or config['size'] % 8:
        return f"--size={config['size']}: expects a multiple of 8, at least 16 (wavelets and readout halve it)"
    for part in ('query_grid', 'patch'):
        if config['size'] % config[part]:
            return f"--{part}={config[part]}: expects a divisor of the canvas's side, {config['size']}"
    if config['aligned'] and (config['slots'] or config['query_grid'] * config['patch'] != config['size']
                              or min(config['heads'], config.get('dec_heads', 2)) < 2):
        return ('--aligned=true: expects --slots=0, two heads at least, and --query_grid times --patch to be --size, so '
                'that the cells that are painted are those that are read')
    if config['gist'] > config['size']:
        return f"--gist={config['gist']}: expects at most --size={config['size']}, which has no more frequencies"
    return ''


def build_encoder(c):
    return TextEncoder(c.vocab_size, c.channels, c.size, c.query_grid, c.dim, c.layers, c.heads, c.hidden,
                       c.cross_layers, c.cross_hidden, c.dropout, c.smoothing, c.slots, c.max_length, c.gist,
                       c.aligned)


def build_auxiliary(c):
    """The decoder of P1 to P3, which sees the canvas alone and is thrown away after them."""
    return TextDecoder(c.vocab_size, c.channels, c.size, c.patch, dim=c.rec_dim, layers=c.rec_layers,
                       hidden=2 * c.rec_dim, dropout=c.dropout, memory='canvas', max_length=c.max_length,
                       aligned=c.aligned)


def build_readout(c):
    return Readout(c.channels, c.z_dim, c.readout_hidden, c.pyramid)


def build_decoder(c, memory='both'):
    return TextDecoder(c.vocab_size, c.channels, c.size, c.patch, c.z_dim, c.dec_dim, c.dec_layers, c.dec_heads,
                       c.dec_hidden, c.dec_dropout, memory, c.max_length, c.aligned)


def build_unet(c):
    return UNet(c.channels, c.unet_dim)


CONTROLS = {'canvas only': 'canvas', 'z only': 'z', 'no canvas': 'none'}      # decoders of P4: what each may see
# In the order in which random weights are drawn.
BUILDERS = {'auxiliary': build_auxiliary, 'encoder': build_encoder, 'readout': build_readout, 'decoder': build_decoder,
            **{name: partial(build_decoder, memory=memory) for name, memory in CONTROLS.items()}, 'unet': build_unet}


def build(config, *names):
    """nn.ModuleDict of these nets, in this order, from the settings of a run (a runtime.Config)."""
    nets = {name: builder(config) for name, builder in BUILDERS.items() if name in names}
    return nn.ModuleDict({name: nets[name] for name in names})


def embed_views(nets, x):
    """Sentences x (n, K, views, T) -> embeddings z (n, K, views, E)."""
    return nets.readout(nets.encoder(x.flatten(0, 2))).unflatten(0, x.shape[:3])


# ---- tokens ---------------------------------------------------------------------------------------------------------

SIMILAR = 16        # sentences in a part: smaller ones save no time


def similar_lengths(x):
    """Which of the sentences x (B, ..., T) go together: on a CPU, where most of a batch of English would be padding, up
    to eight parts by length, a list of index tensors; elsewhere, and where a net is traced, all are one part."""
    # In this order: a net that is traced may not be asked for the size of its batch, or it would be for one size alone.
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or len(x) < 2 * SIMILAR:
        return [slice(None)]
    lengths = (x != PAD).sum(-1).reshape(len(x), -1).amax(1)
    return [slice(None)] if lengths.min() == lengths.max() else list(lengths.argsort().chunk(min(8, len(x) // SIMILAR)))


def trim(x):
    """Token ids (..., T) without the last columns that are padding in every row; only on a CPU, where looking is not
    waiting for the device."""
    return x[..., :max(1, int((x != PAD).sum(-1).max()))] if x.device.type == 'cpu' else x


def shift(x, start=BOS):
    """Targets (B, T) -> decoder inputs: the start token, then all but the last."""
    return torch.cat((torch.full_like(x[:, :1], start), x[:, :-1]), dim=1)


def nucleus(logits, top_p, u):
    """One draw a row from the smallest set of tokens whose probability reaches top_p. logits (B, vocab), u (B,) in
    [0, 1) -> (B,) ids."""
    probability, order = logits.softmax(-1).sort(-1, descending=True)
    total = probability.cumsum(-1)
    kept = probability * (total - probability < top_p)                           # mass ahead of the token below top_p
    total = kept.cumsum(-1)
    choice = (total < u[:, None] * total[:, -1:]).sum(-1)                        # inverse of the distribution function
    return order.gather(-1, choice.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0]


def cross_entropy(logits, x):
    """Token cross-entropy (..., T) in nats, 0 at padding."""
    return F.cross_entropy(logits.flatten(0, -2), x.flatten(), ignore_index=PAD, reduction='none').view_as(x)
