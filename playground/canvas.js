// What is done to a canvas, and how it is shown. A canvas is a Float32Array of channels x size x size.

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Every operation returns a new canvas. `at` says which old pixel stands at (row, column) of a channel.
function resample(V, { channels, size }, at) {
  const result = new Float32Array(V.length);
  for (let c = 0; c < channels; c++) {
    for (let row = 0; row < size; row++) {
      for (let column = 0; column < size; column++) {
        result[(c * size + row) * size + column] = V[c * size * size + at(row, column)];
      }
    }
  }
  return result;
}

// Moved by whole pixels; the border is repeated (p3_jitter.shift).
export function shifted(V, about, dy, dx) {
  const last = about.size - 1;
  return resample(V, about, (row, column) => clamp(row - dy, 0, last) * about.size + clamp(column - dx, 0, last));
}

// A share of the pixels, in [0, 1], each put where the next one of a fixed random order was: 1 moves them all.
export function shuffled(V, about, share) {
  const order = randomOrder(about.size ** 2);
  const count = Math.round(share * order.length);
  const from = Int32Array.from(order.keys());
  for (let i = 0; i < count; i++) from[order[i]] = order[(i + 1) % count];
  return resample(V, about, (row, column) => from[row * about.size + column]);
}

function randomOrder(n) {
  const order = Array.from({ length: n }, (_, i) => i);
  let state = 12345;
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;          // the constants of Numerical Recipes
    const j = Math.floor(state / 2 ** 32 * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// Gaussian blur with reflected borders (priors.gaussian_blur); sigma in pixels.
export function blurred(V, about, sigma) {
  if (!sigma) return V.slice();
  const { channels, size } = about;
  const radius = Math.ceil(3 * sigma);
  const kernel = Array.from({ length: 2 * radius + 1 }, (_, i) => Math.exp(-((i - radius) ** 2) / (2 * sigma * sigma)));
  const total = kernel.reduce((a, b) => a + b);
  const mirror = (i) => (i < 0 ? -i : i >= size ? 2 * size - 2 - i : i);
  let from = V;
  for (const stride of [size, 1]) {                                  // down, then across
    const to = new Float32Array(V.length);
    for (let i = 0; i < V.length; i++) {
      const place = Math.floor(i / stride) % size;
      for (let k = -radius; k <= radius; k++) {
        to[i] += kernel[k + radius] / total * from[i + (mirror(place + k) - place) * stride];
      }
    }
    from = to;
  }
  return from;
}

// The square of `side` pixels around (row, column) becomes the mean of its channel (p3_jitter.cut_out).
export function cutOut(V, { channels, size }, row, column, side) {
  const result = V.slice();
  const [top, left] = [row, column].map((i) => clamp(i - (side >> 1), 0, size - side));
  for (let c = 0; c < channels; c++) {
    const offset = c * size * size;
    const mean = V.subarray(offset, offset + size * size).reduce((a, b) => a + b) / (size * size);
    for (let y = top; y < top + side; y++) {
      result.fill(mean, offset + y * size + left, offset + y * size + left + side);
    }
  }
  return result;
}

// A soft brush of `amount` spreads (model.json) around (row, column) on the channels that are `on`.
export function brushed(V, { channels, size, spread }, row, column, amount, on, radius = 2) {
  const result = V.slice();
  for (let c = 0; c < channels; c++) {
    if (!on[c]) continue;
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < size; x++) {
        const near = Math.exp(-((y - row) ** 2 + (x - column) ** 2) / (radius * radius));
        if (near > 0.02) result[(c * size + y) * size + x] += amount * spread[c] * near;
      }
    }
  }
  return result;
}

export function mixed(A, B, t) {
  return Float32Array.from(A, (value, i) => (1 - t) * value + t * B[i]);
}

// ---- shown ----------------------------------------------------------------------------------------------------------

function linear(value) {
  return 255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055);
}

// Oklab (Ottosson 2020) -> sRGB, 0 to 255, which an ImageData clamps.
function oklab(L, a, b) {
  const [l, m, s] = [L + 0.3963377774 * a + 0.2158037573 * b, L - 0.1055613458 * a - 0.0638541728 * b,
    L - 0.0894841775 * a - 1.2914855480 * b].map((x) => x ** 3);
  return [linear(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
    linear(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    linear(-0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s)];
}

function put(canvas, size, colour) {
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext('2d');
  const image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) image.data.set([...colour(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

// All channels as one picture: their sums in pairs are lightness, green to red, and blue to yellow. The scale is that
// of the evaluation pack, the same for all sentences.
export function drawPicture(canvas, V, { channels, size, middle, spread }) {
  const pixels = size * size;
  put(canvas, size, (i) => {
    const axis = [0, 0, 0];
    for (let c = 0; c < channels; c++) axis[c % 3] += (V[c * pixels + i] - middle[c]) / spread[c];
    return oklab(clamp(0.66 + 0.24 * axis[0], 0, 1), 0.14 * axis[1], 0.14 * axis[2]);
  });
}

// One channel between two colours, [r, g, b] each: below and above its middle, which is `paper`.
export function drawChannel(canvas, V, c, { size, middle, spread }, { below, paper, above }) {
  const pixels = size * size;
  put(canvas, size, (i) => {
    const value = clamp((V[c * pixels + i] - middle[c]) / spread[c], -1, 1);
    const end = value < 0 ? below : above;
    return paper.map((p, k) => p + (end[k] - p) * Math.abs(value) ** 0.8);
  });
}

// Where a word looked: everything else is veiled. cells x cells weights; null takes the veil away.
export function drawVeil(canvas, weights, cells) {
  canvas.hidden = !weights;
  if (!weights) return;
  const most = Math.max(...weights);
  canvas.width = canvas.height = cells;
  const context = canvas.getContext('2d');
  const image = context.createImageData(cells, cells);
  weights.forEach((weight, i) => image.data.set([12, 12, 16, 225 * (1 - Math.sqrt(weight / most))], 4 * i));
  context.putImageData(image, 0, 0);
}
