// What both pages share: libraries from node_modules, files with readable errors, a cloud of labelled points in 3-D.

// Ten colours found by search to stay apart for colour-blind readers; test_grounding.py measures how far.
export const PALETTE = ['#f27697', '#5000ce', '#c0c675', '#1a691b', '#847fff',
  '#270028', '#3cc0f0', '#e4b40c', '#971c96', '#4b4745'];
const INSTALL = 'Install it once with "npm install --prefix grounding" in the repository, then reload this page.';

// An error that the page shows as it is.
export class PageError extends Error {}

export async function loadThree() {
  try {
    const THREE = await import('three');
    const { OrbitControls } = await import('three/addons/controls/OrbitControls.js');
    return { THREE, OrbitControls };
  } catch (error) {
    throw new PageError(`three.js was not found in grounding/node_modules. ${INSTALL}`);
  }
}

export async function loadOnnxRuntime() {
  const folder = new URL('./node_modules/onnxruntime-web/dist/', import.meta.url).href;
  try {
    const ort = await import(`${folder}ort.wasm.min.mjs`);
    ort.env.wasm.wasmPaths = folder;
    ort.env.wasm.numThreads = 1;      // threads need headers that python -m http.server does not send
    return ort;
  } catch (error) {
    throw new PageError(`onnxruntime-web was not found in grounding/node_modules. ${INSTALL}`);
  }
}

// The URL that a query parameter names. It must lie on this server: the page has no business elsewhere.
export function parameter(name, example) {
  const value = new URLSearchParams(location.search).get(name);
  if (!value) throw new PageError(`The address lacks "${name}". Add for example ?${name}=${example}`);
  const url = new URL(value, location.href);
  if (url.origin !== location.origin) throw new PageError(`"${name}" must be a path on this server, not ${url.origin}`);
  return url;
}

export async function fetchFile(url, command) {
  let response;
  try {
    response = await fetch(url);
  } catch (error) {
    throw new PageError(`${url.pathname} could not be fetched: is the server still running?`);
  }
  if (!response.ok) {
    throw new PageError(`${url.pathname} is not there (HTTP ${response.status}). Make it with `
      + `"python grounding/${command} --config …", and serve the repository's root.`);
  }
  return response;
}

export async function fetchJson(url, command) {
  const response = await fetchFile(url, command);
  try {
    return await response.json();
  } catch (error) {
    throw new PageError(`${url.pathname} is not JSON. Write it again with grounding/${command}.`);
  }
}

// Throws unless value is a list of `rows` lists of `columns` finite numbers (columns 0: a list of numbers).
export function checkTable(value, rows, columns, name, file) {
  const number = (x) => typeof x === 'number' && Number.isFinite(x);
  const row = (r) => (columns ? Array.isArray(r) && r.length === columns && r.every(number) : number(r));
  if (!Array.isArray(value) || value.length !== rows || !value.every(row)) {
    throw new PageError(`${file}: "${name}" should be ${rows} ${columns ? `rows of ${columns} numbers` : 'numbers'}.`);
  }
}

export function checkLabels(labels, rows, name, file) {
  checkTable(labels, rows, 0, name, file);
  if (!labels.every((c) => Number.isInteger(c) && c >= 0 && c <= 9)) {
    throw new PageError(`${file}: "${name}" should hold the digits 0 to 9.`);
  }
}

export function showMessage(error) {
  const box = document.getElementById('message');
  box.textContent = error instanceof PageError ? error.message : `Something went wrong: ${error.message ?? error}`;
  box.hidden = false;
}

// Paints 784 values in [0, 1] (dark ink on white) onto a 28 x 28 canvas.
export function paint(canvas, pixels) {
  const context = canvas.getContext('2d');
  const image = context.createImageData(28, 28);
  for (let i = 0; i < 784; i++) {
    const grey = 255 - 255 * Math.min(1, Math.max(0, pixels[i]));
    image.data.set([grey, grey, grey, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

// A texture of what draw(context, size) paints. What stays transparent is white, not black as a canvas has it:
// filtering would draw a dark line around everything.
function texture(THREE, size, draw) {
  const context = Object.assign(document.createElement('canvas'), { width: size, height: size }).getContext('2d');
  draw(context, size);
  const { data } = context.getImageData(0, 0, size, size);
  for (let i = 0; i < data.length; i += 4) if (!data[i + 3]) data.fill(255, i, i + 3);
  const map = new THREE.DataTexture(new Uint8Array(data.buffer), size, size);
  Object.assign(map, { flipY: true, generateMipmaps: true, needsUpdate: true, colorSpace: THREE.SRGBColorSpace,
    magFilter: THREE.LinearFilter, minFilter: THREE.LinearMipmapLinearFilter });
  return map;
}

function disc(context, size) {
  context.fillStyle = '#fff';
  context.arc(size / 2, size / 2, size / 2 - 2, 0, 2 * Math.PI);
  context.fill();
}

// A letter or digit in colour with a white halo, always facing the reader and in front of everything.
export function labelSprite(THREE, text, colour) {
  const map = texture(THREE, 128, (context, size) => {
    Object.assign(context, { font: 'bold 84px system-ui, sans-serif', textAlign: 'center', textBaseline: 'middle',
      lineWidth: 14, lineJoin: 'round', strokeStyle: '#fff', fillStyle: colour });
    context.strokeText(text, size / 2, size / 2 + 4);
    context.fillText(text, size / 2, size / 2 + 4);
  });
  const sprite = new THREE.Sprite(new THREE.SpriteMaterial({ map, depthTest: false, fog: false }));
  sprite.scale.setScalar(0.17);
  sprite.renderOrder = 1;           // after the points
  return sprite;
}

// A scene that fills `container`: points (N x 3), coloured by labels (N), with orbit, legend and picking.
// Returns { scene, camera, canvas, pick(event) -> index or -1, frames() -> frames drawn so far }.
export function createCloud({ THREE, OrbitControls }, container, points, labels) {
  let renderer;
  try {
    renderer = new THREE.WebGLRenderer({ antialias: true });
  } catch (error) {
    throw new PageError('This browser offers no WebGL, which the 3-D view needs.');
  }
  renderer.setPixelRatio(Math.min(2, devicePixelRatio));
  container.append(renderer.domElement);
  const scene = new THREE.Scene();
  scene.background = new THREE.Color('#fbfaf7');
  scene.fog = new THREE.Fog('#fbfaf7');                  // what is far is pale: the cue of depth in a still picture
  const camera = new THREE.PerspectiveCamera(45, 1, 0.01, 50);
  const controls = new OrbitControls(camera, renderer.domElement);
  // From this side, nearly all points fill the view; a few outliers must not make the rest small.
  const towards = new THREE.Vector3(1.4, 0.9, 1.8).normalize();
  const right = new THREE.Vector3(0, 1, 0).cross(towards).normalize();
  const up = towards.clone().cross(right);
  const span = (axis) => {
    const along = points.map((p) => axis.x * p[0] + axis.y * p[1] + axis.z * p[2]).sort((a, b) => a - b);
    const [low, high] = [0.01, 0.99].map((share) => along[Math.round(share * (along.length - 1))]);
    controls.target.addScaledVector(axis, (low + high) / 2);
    return (high - low) / 2 || 1;
  };
  const [width, height, depth] = [right, up, towards].map(span);
  const aspect = container.clientWidth / Math.max(1, container.clientHeight);
  const away = depth + 1.15 * Math.max(height, width / aspect) / Math.tan(camera.fov / 2 * Math.PI / 180);
  camera.position.copy(controls.target).addScaledVector(towards, away);
  controls.enableDamping = true;

  const geometry = new THREE.BufferGeometry();
  geometry.setAttribute('position', new THREE.BufferAttribute(new Float32Array(points.flat()), 3));
  const colours = PALETTE.map((hex) => new THREE.Color(hex));
  geometry.setAttribute('color', new THREE.BufferAttribute(
    new Float32Array(labels.flatMap((c) => colours[c].toArray())), 3));
  const cloud = new THREE.Points(geometry, new THREE.PointsMaterial({
    size: 0.034, vertexColors: true, map: texture(THREE, 64, disc), transparent: true, alphaTest: 0.1 }));
  scene.add(cloud);
  for (let c = 0; c < 10; c++) {    // at the median of its class: the cloud can be read without telling colours apart
    const members = points.filter((_, i) => labels[i] === c);
    if (!members.length) continue;
    const middle = (axis) => members.map((p) => p[axis]).sort((a, b) => a - b)[members.length >> 1];
    const sprite = labelSprite(THREE, `${c}`, PALETTE[c]);
    sprite.position.set(middle(0), middle(1), middle(2));
    scene.add(sprite);
  }

  const resize = () => {
    const { clientWidth: width, clientHeight: height } = container;
    renderer.setSize(width, height);
    camera.aspect = width / Math.max(1, height);
    camera.updateProjectionMatrix();
  };
  new ResizeObserver(resize).observe(container);
  resize();

  const raycaster = new THREE.Raycaster();
  raycaster.params.Points.threshold = 0.022;
  const pick = (event) => {
    const box = renderer.domElement.getBoundingClientRect();
    const pointer = new THREE.Vector2(2 * (event.clientX - box.left) / box.width - 1,
      1 - 2 * (event.clientY - box.top) / box.height);
    raycaster.setFromCamera(pointer, camera);
    const hits = raycaster.intersectObject(cloud);
    if (!hits.length) return -1;
    return hits.reduce((a, b) => (b.distanceToRay < a.distanceToRay ? b : a)).index;
  };

  let frames = 0;
  renderer.setAnimationLoop(() => {
    controls.update();
    const distance = camera.position.distanceTo(controls.target);
    [scene.fog.near, scene.fog.far] = [distance - 0.6 * depth, distance + 3 * depth];
    renderer.render(scene, camera);
    frames += 1;
  });
  return { scene, camera, pick, canvas: renderer.domElement, frames: () => frames };
}

// asymmetric_resnet8_autoencoder -> asymmetric resnet8 autoencoder, which can be broken into lines.
export function readable(name) {
  return name.replaceAll('_', ' ');
}

export function drawLegend(element, labels) {
  for (let c = 0; c < 10; c++) {
    const row = document.createElement('div');
    const swatch = document.createElement('span');
    swatch.className = 'swatch';
    swatch.style.background = PALETTE[c];
    row.append(swatch, `${c}`, Object.assign(document.createElement('small'),
      { textContent: `${labels.filter((label) => label === c).length}` }));
    element.append(row);
  }
}
