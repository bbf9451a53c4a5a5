// The exported model: files with readable errors, three onnxruntime sessions, and reading a canvas word by word.

import { BOS, EOS, PAD, PARA, Tokenizer } from './tokenizer.js';

// An error that the page shows as it is.
export class PageError extends Error {}

const EXPORT = 'Make it with "python -m tools.export" in the repository, start the page with "python -m playground", '
  + 'and reload.';

async function fetchFile(path) {
  let response;
  try {
    response = await fetch(path);
  } catch (error) {
    throw new PageError(`${path} could not be fetched: is the server still running?`);
  }
  if (!response.ok) throw new PageError(`There is no ${path} on this server (HTTP ${response.status}). ${EXPORT}`);
  return response;
}

async function loadOnnxRuntime() {
  const folder = new URL('./node_modules/onnxruntime-web/dist/', import.meta.url).href;
  try {
    const ort = await import(`${folder}ort.wasm.min.mjs`);
    ort.env.wasm.wasmPaths = folder;
    ort.env.wasm.numThreads = 1;        // more need headers that let no other page embed this one
    return ort;
  } catch (error) {
    throw new PageError('onnxruntime-web was not found. Install it once with "npm install --prefix playground" in the '
      + 'repository, then reload this page.');
  }
}

// Lets the browser handle events and paint: a session runs on the page's own thread until it is done.
export function breathe() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

export function cosine(a, b) {
  return a.reduce((sum, value, i) => sum + value * b[i], 0);       // of unit vectors
}

export async function loadModel(folder = 'model') {
  let about;
  try {
    about = await (await fetchFile(`${folder}/model.json`)).json();
  } catch (error) {
    if (error instanceof PageError) throw error;
    throw new PageError(`${folder}/model.json is not JSON. ${EXPORT}`);
  }
  for (const key of ['channels', 'size', 'cells', 'z_dim', 'max_length', 'middle', 'spread', 'tokenizer', 'map']) {
    if (about[key] === undefined) throw new PageError(`${folder}/model.json lacks "${key}". ${EXPORT}`);
  }
  const z = new Float32Array(await (await fetchFile(`${folder}/map.bin`)).arrayBuffer());
  if (z.length !== about.map.sentences.length * about.z_dim) {
    throw new PageError(`${folder}/map.bin is not of the same export as model.json. ${EXPORT}`);
  }
  const ort = await loadOnnxRuntime();
  const sessions = {};
  for (const name of ['encoder', 'reader', 'decoder']) {
    const bytes = await (await fetchFile(`${folder}/${name}.onnx`)).arrayBuffer();
    try {
      sessions[name] = await ort.InferenceSession.create(bytes);
    } catch (error) {
      throw new PageError(`${folder}/${name}.onnx is not a file that this browser can run. ${EXPORT}`);
    }
  }
  return new Model(about, z, sessions, ort);
}

class Model {
  constructor(about, mapZ, sessions, ort) {
    Object.assign(this, { about, mapZ, sessions, ort, tokenizer: new Tokenizer(about.tokenizer) });
  }

  ids(ids) {
    return new this.ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
  }

  // A sentence -> its canvas V (channels * size * size numbers).
  async paint(text) {
    const { V } = await this.sessions.encoder.run({ x: this.ids(this.tokenizer.encode(text, this.about.max_length)) });
    return V.data;
  }

  // A canvas -> { z, memory }: what it means, and what the decoder sees of it.
  async read(V) {
    const { channels, size } = this.about;
    const canvas = new this.ort.Tensor('float32', V, [1, channels, size, size]);
    const { z, memory } = await this.sessions.reader.run({ V: canvas });
    return { z: z.data, memory };
  }

  // The likeliest sentence, token by token: { ids, attention: one map a token, logits: of the first token }, or null as
  // soon as stale() says that nobody waits for it any more. start: BOS says it again, PARA in other words.
  async say(memory, start = BOS, stale = () => false) {
    const [ids, attention, cells] = [[], [], this.about.cells ** 2];
    let first = null;
    while (ids.length < this.about.max_length) {
      const out = await this.sessions.decoder.run({ x: this.ids([start, ...ids]), memory });
      const vocabulary = out.logits.dims[2];
      const logits = out.logits.data.slice(ids.length * vocabulary);
      first ??= logits.slice();
      logits[PAD] = logits[BOS] = logits[PARA] = -Infinity;
      const token = logits.reduce((best, value, i) => (value > logits[best] ? i : best), EOS);
      attention.push(out.attention.data.slice(ids.length * cells));
      ids.push(token);
      if (token === EOS) break;
      await breathe();
      if (stale()) return null;
    }
    return { ids, attention, logits: first, words: this.tokenizer.words(ids) };
  }
}
