// What interactive_latent_playground.html computes: augmentations, projection on the manifold, E and D in the browser.

import { PageError, checkLabels, checkTable } from './scene.js';

const SIZE = 28;
export const PATH_STEPS = 33;       // points of the drawn path, both ends included

// The sliders: key -> [label, low, high, step, value at rest, unit].
export const AUGMENTATIONS = {
  translate_x: ['translate x', -8, 8, 0.5, 0, 'px'],
  translate_y: ['translate y', -8, 8, 0.5, 0, 'px'],
  rotation: ['rotation', -90, 90, 1, 0, '°'],
  scale: ['scale', 0.5, 1.6, 0.02, 1, '×'],
  intensity: ['intensity', 0, 1.5, 0.05, 1, '×'],
  noise: ['noise', 0, 0.6, 0.02, 0, 'sd'],
  masking: ['masking', 0, 20, 1, 0, 'px'],
};

export function atRest() {
  return Object.fromEntries(Object.entries(AUGMENTATIONS).map(([key, spec]) => [key, spec[4]]));
}

// 784 standard normal numbers, the same at every call: moving a slider must not redraw the noise.
function fixedNoise() {
  let state = 12345;                                                  // mulberry32
  const uniform = () => {
    state = (state + 0x6D2B79F5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return Float32Array.from({ length: SIZE * SIZE },
    () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}
const NOISE = fixedNoise();

// pixels (784) in [0, 1] -> the same, moved, turned (clockwise) and scaled about the centre, brightened, with noise and
// a black square on the centre. Bilinear; what comes from outside is 0.
export function augment(pixels, a) {
  const angle = a.rotation * Math.PI / 180;
  const cos = Math.cos(angle) / a.scale;
  const sin = Math.sin(angle) / a.scale;
  const middle = (SIZE - 1) / 2;
  const inside = (i) => i >= 0 && i < SIZE;
  const at = (row, column) => (inside(row) && inside(column) ? pixels[row * SIZE + column] : 0);
  const result = new Float32Array(SIZE * SIZE);
  for (let row = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++) {
      const dx = column - middle - a.translate_x;
      const dy = row - middle - a.translate_y;
      const x = cos * dx + sin * dy + middle;
      const y = -sin * dx + cos * dy + middle;
      const left = Math.floor(x);
      const top = Math.floor(y);
      const u = x - left;
      const v = y - top;
      const value = (1 - v) * ((1 - u) * at(top, left) + u * at(top, left + 1))
        + v * ((1 - u) * at(top + 1, left) + u * at(top + 1, left + 1));
      const i = row * SIZE + column;
      const hidden = Math.abs(column - middle) < a.masking / 2 && Math.abs(row - middle) < a.masking / 2;
      result[i] = hidden ? 0 : Math.min(1, Math.max(0, value * a.intensity + a.noise * NOISE[i]));
    }
  }
  return result;
}

// Throws a PageError unless assets fulfil the contract of export_interactive_assets.py.
export function checkAssets(assets, file) {
  const whole = (name, high) => {
    if (!Number.isInteger(assets?.[name]) || assets[name] < 1 || assets[name] > high) {
      throw new PageError(`${file}: "${name}" should be a whole number from 1 to ${high}.`);
    }
    return assets[name];
  };
  const count = whole('num_points', 1e6);
  const dim = whole('latent_dim', 1e4);
  whole('projection_k', count);
  for (const [name, type] of [['experiment', 'string'], ['l2_normalized', 'boolean']]) {
    if (typeof assets[name] !== type) throw new PageError(`${file}: "${name}" should be a ${type}.`);
  }
  checkTable(assets.reference_points, count, 3, 'reference_points', file);
  checkTable(assets.reference_latents, count, dim, 'reference_latents', file);
  checkTable(assets.reference_latents_raw, count, dim, 'reference_latents_raw', file);
  checkLabels(assets.reference_labels, count, 'reference_labels', file);
  checkTable(assets.digit_samples, 10, SIZE * SIZE, 'digit_samples', file);
}

// Returns project(latent) -> [x, y, z]: the mean of the k nearest reference points, each weighted by 1 / squared
// distance of the latents. A latent of the reference lands on its own point.
export function projector(assets) {
  const { num_points: count, latent_dim: dim, projection_k: k, l2_normalized: unit } = assets;
  const reference = new Float32Array(assets.reference_latents.flat());
  return (latent) => {
    const length = unit ? Math.max(Math.hypot(...latent), 1e-12) : 1;
    const nearest = [];                                               // [squared distance, index], ascending, at most k
    for (let i = 0; i < count; i++) {
      let d = 0;
      for (let j = 0; j < dim; j++) d += (latent[j] / length - reference[i * dim + j]) ** 2;
      if (nearest.length === k && d >= nearest[k - 1][0]) continue;
      let place = nearest.length;
      while (place && nearest[place - 1][0] > d) place -= 1;
      nearest.splice(place, 0, [d, i]);
      if (nearest.length > k) nearest.pop();
    }
    const weights = nearest.map(([d]) => 1 / (d + 1e-10));
    const total = weights.reduce((a, b) => a + b);
    return [0, 1, 2].map((axis) => nearest.reduce(
      (sum, [, i], n) => sum + weights[n] / total * assets.reference_points[i][axis], 0));
  };
}

// E and D as functions of flat Float32Arrays of `batch` rows, from the bytes of the two ONNX files.
export async function loadNetworks(ort, encoderBytes, decoderBytes, dim, files) {
  const session = async (bytes, file) => {
    try {
      return await ort.InferenceSession.create(bytes);
    } catch (error) {
      throw new PageError(`${file} is not an ONNX file that this browser can run. Export it again.`);
    }
  };
  const [encoder, decoder] = [await session(encoderBytes, files[0]), await session(decoderBytes, files[1])];
  const encode = async (images, batch = 1) => {
    const { latent } = await encoder.run({ image: new ort.Tensor('float32', images, [batch, 1, SIZE, SIZE]) });
    return latent.data;
  };
  const decode = async (latents, batch = 1) => {
    const { image } = await decoder.run({ latent: new ort.Tensor('float32', latents, [batch, dim]) });
    return image.data;
  };
  try {
    const latent = await encode(new Float32Array(SIZE * SIZE));
    if (latent.length !== dim || (await decode(latent)).length !== SIZE * SIZE) throw new Error('sizes');
  } catch (error) {
    throw new PageError(`The encoder and decoder do not fit the assets (${dim} latent dimensions). `
      + 'Export all three from the same checkpoint.');
  }
  return { encode, decode };
}

export function interpolate(a, b, t) {
  return Float32Array.from(a, (value, i) => (1 - t) * value + t * b[i]);
}
