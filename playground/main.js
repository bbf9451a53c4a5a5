// The page: what is typed or changed by hand, what is computed from it, and where it is shown.

import { brushed, blurred, cutOut, drawChannel, drawPicture, drawVeil, mixed, shifted, shuffled } from './canvas.js';
import { barycentre, createMap } from './map.js';
import { PageError, breathe, cosine, loadModel } from './model.js';
import { BOS, PARA, normalize } from './tokenizer.js';

const $ = (id) => document.getElementById(id);
const CUT = 6;                    // side of the square, as in P3
const BRUSH = 0.25;               // what one touch of the brush adds, in spreads of the channel
const EXAMPLES = [1, 3, 6, 8];    // sentences of the map to try, which show what can be typed

async function start() {
  const model = await loadModel();
  const { about } = model;
  const state = {
    model, text: null, text2: null, tool: 'move', on: new Array(about.channels).fill(true),
    painted: null,                // the canvas of A as the encoder paints it
    paintedZ: null,
    base: null,                   // the same after what the mouse did
    shown: null,                  // and after the sliders: what is drawn and read
    z: null, said: null, other: null,
    second: null, secondZ: null,  // canvas of B
    mix: null, mixed: null,       // canvas between the two, and what it says
    marker: null, cursor: [16, 16], milliseconds: [],
  };
  window.playground = state;
  $('loading').hidden = true;
  $('page').hidden = false;       // before the map is made, which measures itself
  $('page').inert = true;         // until there is a canvas to work on

  // ---- shown ----
  const map = createMap($('map'), about, {
    show: (sentence) => { $('point').textContent = sentence || '\u00a0'; },
    take: (sentence) => type($('text'), sentence),
  });
  const channels = Array.from({ length: about.channels }, (_, c) => {
    const button = document.createElement('button');
    const canvas = document.createElement('canvas');
    button.append(canvas);
    button.setAttribute('aria-label', `channel ${c}, painted on by the brush`);
    button.setAttribute('aria-pressed', 'true');
    button.onclick = () => {
      state.on[c] = !state.on[c];
      button.setAttribute('aria-pressed', String(state.on[c]));
    };
    $('channels').append(button);
    return canvas;
  });
  $('facts').textContent = `${(about.parameters / 1e6).toFixed(1)}M parameters, ${about.phase.toUpperCase()}, all in `
    + 'this browser.';
  $('count').textContent = about.map.sentences.length;
  for (const sentence of EXAMPLES.map((i) => about.map.sentences[i]).filter(Boolean)) {
    const button = Object.assign(document.createElement('button'), { textContent: sentence });
    button.onclick = () => type($('text'), sentence);
    $('examples').append(button, ' ');
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(['below', 'paper', 'above'].map((name) => {
      const hex = style.getPropertyValue(`--${name}`).trim();
      return [name, [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16))];
    }));
  }

  function drawCanvas() {
    const [blur, shuffle] = ['blur', 'shuffle'].map((id) => Number($(id).value));
    $('blur-value').textContent = `${blur} px`;
    $('shuffle-value').textContent = `${shuffle}%`;
    state.shown = blur ? blurred(state.base, about, blur) : state.base;
    if (shuffle) state.shown = shuffled(state.shown, about, shuffle / 100);
    drawPicture($('picture'), state.shown, about);
    const colours = theme();
    channels.forEach((canvas, c) => drawChannel(canvas, state.shown, c, about, colours));
    drawVeil($('veil'), null);
    $('reset').disabled = state.shown === state.painted;
  }

  function drawMix() {
    state.mix = mixed(state.shown, state.second, Number($('t').value));
    drawPicture($('picture-a'), state.shown, about);
    drawPicture($('picture-b'), state.second, about);
    drawPicture($('picture-mix'), state.mix, about);
  }

  function drawWords() {
    const words = state.said.words.map(({ word, ids }, i) => {
      const button = Object.assign(document.createElement('button'), { textContent: word, tabIndex: i ? -1 : 0 });
      const look = () => {
        const maps = ids.map((id) => state.said.attention[id]);
        drawVeil($('veil'), maps[0].map((_, cell) => maps.reduce((sum, m) => sum + m[cell], 0)), about.cells);
      };
      const away = () => drawVeil($('veil'), null);
      Object.assign(button, { onpointerenter: look, onfocus: look, onpointerleave: away, onblur: away });
      return button;
    });
    $('said').replaceChildren(...words.flatMap((word) => [word, ' ']));
    if (!words.length) $('said').textContent = '(nothing)';
  }
  $('said').addEventListener('keydown', (event) => {          // one tab stop; arrows go from word to word
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const words = [...$('said').querySelectorAll('button')];
    const next = words[words.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    words.forEach((word) => { word.tabIndex = word === next ? 0 : -1; });
    next.focus();
  });

  // ---- computed: one thing at a time; when something changes meanwhile, the rest is dropped and begins again ----
  let running = null;
  let stale = false;
  let pressed = null;             // when the last key was hit
  const isStale = () => stale;

  async function paint() {
    if (state.text !== $('text').value) {
      const since = pressed;
      state.text = $('text').value;
      state.painted = state.base = await model.paint(state.text);
      state.paintedZ = null;
      $('blur').value = $('shuffle').value = 0;
      const tooLong = model.tokenizer.encode(state.text, Infinity).length > about.max_length;
      $('cut').textContent = tooLong ? `Only its first ${about.max_length - 1} tokens are read.` : '';
      drawCanvas();
      if (since !== null) state.milliseconds.push(performance.now() - since);
    }
    if (state.text2 !== $('text2').value) {
      state.text2 = $('text2').value;
      state.second = await model.paint(state.text2);
      state.secondZ = (await model.read(state.second)).z;
    }
    drawMix();
  }

  async function readCanvas() {
    const { z, memory } = await model.read(state.shown);
    if (state.shown === state.painted) state.paintedZ = z;
    state.paintedZ ??= (await model.read(state.painted)).z;
    state.z = z;
    const kept = cosine(z, state.paintedZ);
    $('cosine').textContent = state.shown === state.painted ? (normalize(state.text) ? '\u00a0' : 'the empty sentence')
      : `cosine with the canvas as painted: ${kept.toFixed(2)}`;
    $('between').textContent = `cosine of A and B: ${cosine(z, state.secondZ).toFixed(2)}`;
    state.marker = barycentre(z, about, model.mapZ);
    map.set({ B: barycentre(state.secondZ, about, model.mapZ), A: state.marker });
    await breathe();
    if (stale) return;
    const said = await model.say(memory, BOS, isStale);
    if (!said) return;
    state.said = said;
    drawWords();
    $('said').classList.remove('waiting');
    const other = await model.say(memory, PARA, isStale);
    if (!other) return;
    state.other = other;
    $('other').textContent = model.tokenizer.decode(other.ids);
    $('other').classList.remove('waiting');
  }

  async function readMix() {
    const { z, memory } = await model.read(state.mix);
    const [a, b] = [state.z, state.secondZ].map((end) => cosine(z, end).toFixed(2));
    $('mix-cosine').textContent = `cosine with A ${a}, with B ${b}`;
    map.set({ '': barycentre(z, about, model.mapZ), B: barycentre(state.secondZ, about, model.mapZ), A: state.marker });
    const said = await model.say(memory, BOS, isStale);
    if (!said) return;
    state.mixed = said;
    $('mix').textContent = model.tokenizer.decode(said.ids);
    $('mix').classList.remove('waiting');
  }

  let wanted = { canvas: false, mix: false };     // what has to be read again
  async function compute() {
    do {
      stale = false;
      await paint();
      await breathe();
      if (stale) continue;
      if (wanted.canvas) await readCanvas();
      if (stale) continue;
      wanted.canvas = false;
      if (wanted.mix) await readMix();
      if (!stale) wanted.mix = false;
    } while (stale);
  }
  function update(what = 'canvas') {
    stale = true;
    wanted.mix = true;
    $('mix').classList.add('waiting');
    if (what === 'canvas') {
      wanted.canvas = true;
      $('said').classList.add('waiting');
      $('other').classList.add('waiting');
    }
    running ??= compute().catch(showMessage).finally(() => { running = null; });
    return running;
  }
  state.settled = async () => { while (running) await running; };

  // ---- typed ----
  function fit(area) {
    area.style.height = 'auto';
    area.style.height = `${area.scrollHeight}px`;
  }
  function type(area, sentence) {
    area.value = sentence;
    pressed = performance.now();
    fit(area);
    update();
  }
  for (const id of ['text', 'text2']) {
    $(id).addEventListener('input', (event) => {
      if (id === 'text') pressed = event.timeStamp;
      fit($(id));
      update();
    });
    $(id).addEventListener('keydown', (event) => { if (event.key === 'Enter') event.preventDefault(); });
  }
  window.addEventListener('resize', () => ['text', 'text2'].forEach((id) => fit($(id))));

  // ---- changed by hand ----
  function change(base) {
    state.base = base;
    drawCanvas();
    update();
  }
  const TOUCH = {
    paint: (V, row, column) => brushed(V, about, row, column, BRUSH, state.on),
    unpaint: (V, row, column) => brushed(V, about, row, column, -BRUSH, state.on),
    cut: (V, row, column) => cutOut(V, about, row, column, CUT),
  };
  // What is changed by hand is what is seen: a blurred or shuffled canvas stays so, and the sliders begin anew.
  function keepSliders() {
    state.base = state.shown;
    $('blur').value = $('shuffle').value = 0;
    drawCanvas();
  }
  const picture = $('picture');
  const at = (event) => {
    const box = picture.getBoundingClientRect();
    return [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width]
      .map((share) => Math.floor(share * about.size));
  };
  let drag = null;
  picture.addEventListener('pointerdown', (event) => {
    if (!state.base) return;
    picture.setPointerCapture(event.pointerId);
    keepSliders();
    drag = { from: at(event), base: state.base };
    showCursor(false);
    if (TOUCH[state.tool]) change(TOUCH[state.tool](state.base, ...drag.from));
  });
  picture.addEventListener('pointermove', (event) => {
    if (!drag) return;
    const to = at(event);
    const [rows, columns] = [0, 1].map((axis) => to[axis] - drag.from[axis]);
    if (!TOUCH[state.tool]) {
      change(shifted(drag.base, about, rows, columns));
      return;
    }
    const steps = Math.max(Math.abs(rows), Math.abs(columns));        // a fast stroke has no gaps
    let V = state.base;
    for (let i = 1; i <= steps; i++) {
      V = TOUCH[state.tool](V, ...[rows, columns].map((by, axis) => drag.from[axis] + Math.round(by * i / steps)));
    }
    drag.from = to;
    if (steps) change(V);
  });
  for (const name of ['pointerup', 'pointercancel']) picture.addEventListener(name, () => { drag = null; });

  function showCursor(visible) {
    const side = state.tool === 'cut' ? CUT : 3;
    const share = 100 / about.size;
    $('cursor').hidden = !visible || !TOUCH[state.tool];
    Object.assign($('cursor').style, { width: `${side * share}%`, height: `${side * share}%`,
      top: `${(state.cursor[0] - (side >> 1)) * share}%`, left: `${(state.cursor[1] - (side >> 1)) * share}%` });
  }
  picture.addEventListener('keydown', (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const touch = TOUCH[state.tool];
    if (!step && event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    if (!touch || !step) keepSliders();
    if (!touch) {
      if (step) change(shifted(state.base, about, ...step));
      return;
    }
    if (step) state.cursor = state.cursor.map((i, axis) => Math.min(about.size - 1, Math.max(0, i + step[axis])));
    else change(touch(state.base, ...state.cursor));
    showCursor(true);
  });
  picture.addEventListener('blur', () => showCursor(false));

  for (const button of document.querySelectorAll('[data-tool]')) {
    button.onclick = () => {
      state.tool = picture.dataset.tool = button.dataset.tool;
      document.querySelectorAll('button[data-tool]').forEach((other) => {
        other.setAttribute('aria-pressed', String(other === button));
      });
    };
  }
  $('reset').onclick = () => {
    $('blur').value = $('shuffle').value = 0;
    change(state.painted);
  };
  for (const id of ['blur', 'shuffle']) $(id).addEventListener('input', () => change(state.base));
  $('t').addEventListener('input', () => {
    drawMix();
    update('mix');
  });

  // ---- map and theme ----
  function legend() {
    $('legend').replaceChildren(...map.legend().map(([name, colour]) => {
      const entry = document.createElement('span');
      const dot = document.createElement('i');
      dot.style.background = colour;
      entry.append(dot, name);
      return entry;
    }));
  }
  $('by').addEventListener('input', () => {
    map.colourBy($('by').value);
    legend();
  });
  legend();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    if (state.base) drawCanvas();
    map.draw();
  });

  ['text', 'text2'].forEach((id) => fit($(id)));
  await update();
  $('page').inert = false;
  state.ready = true;
}

function showMessage(error) {
  $('loading').hidden = true;
  $('page').hidden = true;
  $('message').textContent = error instanceof PageError ? error.message
    : `Something went wrong: ${error.message ?? error}`;
  $('message').hidden = false;
}

start().catch(showMessage);
