// The map of held-out sentences, with A, B and their mixture where their neighbours are.

import { cosine } from './model.js';

const NEIGHBOURS = 8;
const THINGS = { red: '#d23b31', blue: '#2f62c9', green: '#2f9a50', yellow: '#ecc81f', orange: '#ee8a24',
  purple: '#7d3fb2', black: '#17171a', white: '#ffffff', brown: '#8a5a34', pink: '#f291b6', gray: '#8d8d93',
  cyan: '#26b5c4' };
const SERIES = ['#d1495b', '#2f7fc1', '#2a9d7f', '#d9a21b', '#8e44ad', '#77767f', '#e8793b', '#49b6c9'];

// Where a unit vector z belongs: the mean of the places of its nearest sentences, weighted by 1 / squared distance.
// A sentence of the map lands on its own point.
export function barycentre(z, about, mapZ) {
  const near = about.map.xy.map((xy, i) => ({ xy,
    d: Math.max(0, 2 - 2 * cosine(z, mapZ.subarray(i * about.z_dim, (i + 1) * about.z_dim))) }))
    .sort((a, b) => a.d - b.d).slice(0, NEIGHBOURS).map(({ xy, d }) => ({ xy, weight: 1 / (d + 1e-7) }));
  const total = near.reduce((sum, { weight }) => sum + weight, 0);
  return [0, 1].map((axis) => near.reduce((sum, { xy, weight }) => sum + weight / total * xy[axis], 0));
}

// canvas: the element; show(sentence or ''): what is pointed at; take(sentence): it was chosen.
// Returns { set(markers {name: [x, y]}), colourBy(attribute), draw(), legend() -> [[name, colour]], markers }.
export function createMap(canvas, about, { show, take }) {
  const { xy, sentences } = about.map;
  let markers = {};
  let attribute = 'relation';
  let selected = -1;

  const names = () => [...new Set(about.map[attribute])].sort((a, b) => !a - !b || a.localeCompare(b));
  const palette = () => Object.fromEntries(names().map((name, i) => [name, !name ? '#9a9a9a'
    : attribute === 'colour' ? THINGS[name] ?? '#9a9a9a' : SERIES[i % SERIES.length]]));
  const box = () => canvas.getBoundingClientRect();
  const place = ([x, y]) => [18 + x * (box().width - 36), 18 + y * (box().height - 36)];

  function draw() {
    const { width, height } = box();
    const ratio = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const style = getComputedStyle(document.documentElement);
    const [ink, paper] = ['--ink', '--paper'].map((name) => style.getPropertyValue(name).trim());
    const context = canvas.getContext('2d');
    const disc = (point, radius, fill, stroke, line) => {
      context.beginPath();
      context.arc(...place(point), radius, 0, 2 * Math.PI);
      Object.assign(context, { fillStyle: fill, strokeStyle: stroke, lineWidth: line });
      context.fill();
      context.stroke();
    };
    context.scale(ratio, ratio);
    const colours = palette();
    const radius = width < 500 ? 2.6 : 3.6;
    xy.forEach((point, i) => disc(point, radius, colours[about.map[attribute][i]], `${ink}55`, 0.7));
    if (selected >= 0) disc(xy[selected], radius + 3, 'transparent', ink, 1.6);
    for (const [name, point] of Object.entries(markers)) {
      disc(point, name ? 11 : 6, ink, paper, 2.5);
      Object.assign(context, { fillStyle: paper, font: '600 12px system-ui, sans-serif', textAlign: 'center',
        textBaseline: 'middle' });
      context.fillText(name, ...place(point).map((value, axis) => value + axis * 0.5));
    }
  }

  function select(index) {
    selected = index;
    canvas.style.cursor = index < 0 ? 'default' : 'pointer';
    show(index < 0 ? '' : sentences[index]);
    draw();
  }

  function nearest(event) {
    const { left, top } = box();
    let [best, within] = [-1, 14];
    xy.forEach((point, i) => {
      const [x, y] = place(point);
      const d = Math.hypot(x - event.clientX + left, y - event.clientY + top);
      if (d < within) [best, within] = [i, d];
    });
    return best;
  }

  canvas.addEventListener('pointermove', (event) => select(nearest(event)));
  canvas.addEventListener('pointerleave', () => select(-1));
  canvas.addEventListener('click', (event) => {
    const index = nearest(event);
    if (index >= 0) take(sentences[index]);
  });
  canvas.addEventListener('keydown', (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === 'Enter' && selected >= 0) take(sentences[selected]);
    if (!direction) return;
    event.preventDefault();
    const [x, y] = place(selected >= 0 ? xy[selected] : markers.A ?? [0.5, 0.5]);
    let [best, least] = [selected, Infinity];
    xy.forEach((point, i) => {                      // the nearest that lies in the direction of the key
      const [px, py] = place(point);
      const along = (px - x) * direction[0] + (py - y) * direction[1];
      const across = Math.abs((px - x) * direction[1]) + Math.abs((py - y) * direction[0]);
      if (i !== selected && along > 0 && along >= across && along + 2 * across < least) {
        [best, least] = [i, along + 2 * across];
      }
    });
    select(best);
  });
  new ResizeObserver(draw).observe(canvas);

  return {
    draw,
    set(points) { markers = points; draw(); },
    colourBy(name) { attribute = name; draw(); },
    legend: () => Object.entries(palette()).filter(([name]) => name),
  };
}
