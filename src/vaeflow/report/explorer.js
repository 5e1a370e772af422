// The latent explorer: a map of latents, sliders, a walk between two images, a picture of one's own.
//
// Its state is a point `t` of the latent space; whatever is moved, moves that, and the decoder's
// picture follows.
'use strict';

(() => {
  const {$, facts, size} = vaeflow;
  const map = $('map'), decoded = $('decoded');
  const context = map.getContext('2d');
  const points = facts.points;  // of images: latents, names, labels, numbers; null without any
  const latents = points ? vaeflow.floats(points.latents) : new Float32Array(0);
  const count = latents.length / size;
  const sprite = $('sprite');
  const plane = facts.plane.map(one => Float32Array.from(one));  // mean, and two principal components
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const shown = value => Number(value.toPrecision(3)).toString();
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  let t = plane[0].slice();
  let axes = 'components';  // or two dimensions
  let view = {x: 0, y: 0, scale: 1};  // of the map: its centre, and pixels per unit
  let chosen = -1;  // an image
  let hovered = -1;
  let own = null;  // latents of a picture of one's own
  const ends = {from: null, to: null};  // of a walk

  // === The map's plane ===

  function dimensionsOnMap() {
    return [Number($('across').value), Number($('down').value)];
  }

  function project(latent, start = 0) {
    if (axes === 'dimensions') return dimensionsOnMap().map(d => latent[start + d]);
    return [1, 2].map(c => {
      let sum = 0;
      for (let i = 0; i < size; i++) sum += (latent[start + i] - plane[0][i]) * plane[c][i];
      return sum;
    });
  }

  // Move t in the map's plane alone: what the map does not show stays.
  function moved(x, y) {
    const to = t.slice();
    if (axes === 'dimensions') {
      const [across, down] = dimensionsOnMap();
      to[across] = x;
      to[down] = y;
      return to;
    }
    const [fromX, fromY] = project(t);
    return to.map((value, i) => value + (x - fromX) * plane[1][i] + (y - fromY) * plane[2][i]);
  }

  function moveTo(x, y) {
    t = moved(x, y);
  }

  let places = [];  // of the points, on the plane
  function lay() {
    places = Array.from({length: count}, (_, i) => project(latents, i * size));
  }

  const toScreen = ([x, y]) =>
    [map.clientWidth / 2 + (x - view.x) * view.scale, map.clientHeight / 2 - (y - view.y) * view.scale];
  const fromScreen = (left, top) =>
    [view.x + (left - map.clientWidth / 2) / view.scale, view.y - (top - map.clientHeight / 2) / view.scale];

  function fit() {
    const all = places.length ? places : [[-3, -3], [3, 3]];
    const [low, high] = [0, 1].map(end => [0, 1].map(axis => {
      const sorted = all.map(place => place[axis]).sort((a, b) => a - b);
      return sorted[Math.round((end ? 0.995 : 0.005) * (sorted.length - 1))];
    }));
    view = {
      x: (low[0] + high[0]) / 2,
      y: (low[1] + high[1]) / 2,
      scale: 0.9 * Math.min(
        map.clientWidth / Math.max(1e-3, high[0] - low[0]),
        map.clientHeight / Math.max(1e-3, high[1] - low[1])),
    };
  }

  function zoom(by, left = map.clientWidth / 2, top = map.clientHeight / 2) {
    const [x, y] = fromScreen(left, top);
    view.scale = clamp(view.scale * by, 1e-3, 1e6);
    const [afterX, afterY] = fromScreen(left, top);
    view.x += x - afterX;
    view.y += y - afterY;
    draw();
  }

  function nearest(left, top, within = Infinity) {
    let best = -1, least = within * within;
    places.forEach((place, i) => {
      const [x, y] = toScreen(place);
      const away = (x - left) ** 2 + (y - top) ** 2;
      if (away < least) [best, least] = [i, away];
    });
    return best;
  }

  // === Colours: labels by colour and shape, numbers from dark to light ===

  const PALETTE = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#888888'];
  const labels = points && points.labels ? [...new Set(points.labels)].sort() : [];

  function shade(share) {  // cividis, roughly: blue to yellow, told apart by lightness alone
    const ends = [[0, 34, 78], [124, 123, 120], [254, 232, 56]];
    const place = clamp(share, 0, 1) * 2, low = Math.min(1, Math.floor(place)), part = place - low;
    return `rgb(${ends[low].map((v, c) => Math.round(v + part * (ends[low + 1][c] - v))).join()})`;
  }

  let marks = [];  // of each point: colour and shape
  function paintMarks() {
    const by = $('colour').value, legend = $('legend');
    legend.replaceChildren();
    if (by === 'label') {
      const index = new Map(labels.map((label, i) => [label, i]));
      const mark = i => [PALETTE[i % PALETTE.length], Math.floor(i / PALETTE.length) % 3];
      marks = points.labels.map(label => mark(index.get(label)));
      labels.slice(0, 21).forEach((label, i) => {
        const [fill, shape] = mark(i), entry = document.createElement('li');
        const key = document.createElement('canvas');
        key.width = key.height = 12;
        drawMark(key.getContext('2d'), 6, 6, fill, shape, 4);
        entry.append(key, label);
        legend.append(entry);
      });
      if (labels.length > 21) legend.append(`and ${labels.length - 21} more`);
    } else if (by) {
      const values = points[by], sorted = [...values].sort((a, b) => a - b);
      const low = sorted[Math.floor(0.01 * count)], high = sorted[Math.ceil(0.99 * (count - 1))];
      marks = values.map(value => [shade((value - low) / Math.max(1e-9, high - low)), 0]);
      const entry = document.createElement('li'), key = document.createElement('span');
      key.className = 'shades';
      entry.append(`${by} ${shown(low)}`, key, shown(high));
      legend.append(entry);
    }
  }

  function drawMark(on, x, y, fill, shape, radius) {
    on.fillStyle = fill;
    on.beginPath();
    if (shape === 0) on.arc(x, y, radius, 0, 2 * Math.PI);
    else if (shape === 1) on.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    else {
      on.moveTo(x, y - 1.3 * radius);
      on.lineTo(x + 1.2 * radius, y + radius);
      on.lineTo(x - 1.2 * radius, y + radius);
    }
    on.fill();
  }

  // === Drawing ===

  function thumbnail(on, index, x, y, edge) {
    const {columns, width, height} = points.sprite;
    const largest = Math.max(width, height);
    const [w, h] = [edge * width / largest, edge * height / largest];
    on.drawImage(sprite, (index % columns) * width, Math.floor(index / columns) * height, width, height,
      x - w / 2, y - h / 2, w, h);
  }

  // Where there are no images to show, the map has what the decoder makes of its places.
  const TILE = 44;
  let tiles = [], tilings = 0, tiled = '', soon = 0;
  function retile() {
    clearTimeout(soon);
    soon = setTimeout(async () => {
      const wanted = JSON.stringify([view, axes, dimensionsOnMap(), Array.from(moved(0, 0)), map.clientWidth]);
      if (wanted === tiled || !map.clientWidth) return;
      tiled = wanted;
      const centres = [];
      for (let y = TILE / 2; y < map.clientHeight; y += TILE)
        for (let x = TILE / 2; x < map.clientWidth; x += TILE) centres.push(fromScreen(x, y));
      const all = new Float32Array(centres.length * size);
      centres.forEach((place, i) => all.set(moved(...place), i * size));
      const images = await vaeflow.decoded(all);
      tiles = images.map((image, i) => {
        const canvas = document.createElement('canvas');
        vaeflow.paint(canvas, image);
        return [centres[i], canvas];
      });
      tilings += 1;
      draw();
    }, 150);
  }

  // All that stays while the point moves: drawn again only when one of these has changed.
  const layer = document.createElement('canvas');
  let layered = '';
  function drawLayer(w, h, ratio) {
    const scheme = colour('--page'), loaded = sprite ? sprite.complete : true;
    const now = JSON.stringify([w, h, ratio, view, axes, dimensionsOnMap(), $('colour').value,
      $('thumbnails').checked, tilings, scheme, loaded]);
    if (now === layered) return;
    layered = now;
    layer.width = Math.round(w * ratio);
    layer.height = Math.round(h * ratio);
    const on = layer.getContext('2d');
    on.setTransform(ratio, 0, 0, ratio, 0, 0);
    on.imageSmoothingEnabled = false;
    on.strokeStyle = colour('--rule');
    on.lineWidth = 1;
    for (const [from, to] of [[toScreen([0, -1e4]), toScreen([0, 1e4])], [toScreen([-1e4, 0]), toScreen([1e4, 0])]]) {
      on.beginPath();
      on.moveTo(clamp(from[0], -9, w + 9), clamp(from[1], -9, h + 9));
      on.lineTo(clamp(to[0], -9, w + 9), clamp(to[1], -9, h + 9));
      on.stroke();
    }
    for (const [place, canvas] of tiles) {
      const [x, y] = toScreen(place), scale = (TILE - 5) / Math.max(canvas.width, canvas.height);
      on.drawImage(canvas, x - canvas.width * scale / 2, y - canvas.height * scale / 2,
        canvas.width * scale, canvas.height * scale);
    }
    const pictures = $('thumbnails').checked && points, edge = 30, plain = colour('--s0');
    const taken = new Set();  // cells that have a thumbnail already
    places.forEach((place, i) => {
      const [x, y] = toScreen(place);
      if (x < -edge || y < -edge || x > w + edge || y > h + edge) return;
      const [fill, shape] = marks[i] || [plain, 0];
      const cell = `${Math.floor(x / edge)},${Math.floor(y / edge)}`;
      if (pictures && !taken.has(cell)) {
        taken.add(cell);
        thumbnail(on, i, x, y, edge - 4);
        on.strokeStyle = fill;
        on.lineWidth = 2;
        on.strokeRect(x - edge / 2 + 1, y - edge / 2 + 1, edge - 2, edge - 2);
        drawMark(on, x - edge / 2 + 2, y - edge / 2 + 2, fill, shape, 4);
      } else if (!pictures) drawMark(on, x, y, fill, shape, 3.5);
    });
  }

  function draw() {
    if (!points) retile();
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [map.clientWidth, map.clientHeight];
    if (!w || !h) return;
    drawLayer(w, h, ratio);
    if (map.width !== layer.width || map.height !== layer.height) {
      map.width = layer.width;
      map.height = layer.height;
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, map.width, map.height);
    context.drawImage(layer, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingEnabled = false;
    if (ends.from && ends.to) {
      context.strokeStyle = colour('--ink');
      context.lineWidth = 1.5;
      context.beginPath();
      context.moveTo(...toScreen(project(ends.from)));
      context.lineTo(...toScreen(project(ends.to)));
      context.stroke();
    }
    for (const index of new Set([hovered, chosen])) {
      if (index < 0) continue;
      const [x, y] = toScreen(places[index]);
      thumbnail(context, index, x, y, 56);
      context.strokeStyle = colour('--link');
      context.lineWidth = 2;
      context.strokeRect(x - 29, y - 29, 58, 58);
    }
    if (own) cross(toScreen(project(own)), colour('--s1'), 'yours');
    cross(toScreen(project(t)), colour('--ink'), '');
  }

  function cross([x, y], stroke, text) {
    for (const [style, width] of [[colour('--page'), 5], [stroke, 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.beginPath();
      context.arc(x, y, 6, 0, 2 * Math.PI);
      context.moveTo(x - 11, y);
      context.lineTo(x + 11, y);
      context.moveTo(x, y - 11);
      context.lineTo(x, y + 11);
      context.stroke();
    }
    context.fillStyle = stroke;
    context.font = '13px system-ui, sans-serif';
    context.fillText(text, x + 12, y - 8);
  }

  // === The decoder's picture: the last point that was asked for ===

  let asked = 0, busy = false;
  async function show() {
    sliders.forEach(({dimension, input, output}) => {
      input.value = t[dimension];
      output.textContent = t[dimension].toFixed(2);
    });
    draw();
    asked += 1;
    if (busy) return;
    busy = true;
    try {
      for (let done = 0; done !== asked;) {
        done = asked;
        const [image] = await vaeflow.decoded(t.slice());
        vaeflow.paint(decoded, image);
        decoded.dataset.done = done;
      }
    } catch (error) {
      say(`The decoder does not run in this browser: ${error.message || error}`);
    }
    busy = false;
  }

  const say = text => { $('status').textContent = text; };

  function choose(index) {
    if (index < 0) return;
    chosen = index;
    t = latents.slice(index * size, (index + 1) * size);
    const about = [points.names[index]];
    if (points.labels) about.push(points.labels[index]);
    for (const name of ['score', 'anomaly'])
      if (points[name]) about.push(`${name} ${shown(points[name][index])}`);
    say(about.join(', '));
    $('chosen-caption').textContent = about.join(', ');
    const canvas = $('chosen'), {width, height, columns} = points.sprite;
    canvas.width = width;
    canvas.height = height;
    canvas.getContext('2d').drawImage(sprite, (index % columns) * width,
      Math.floor(index / columns) * height, width, height, 0, 0, width, height);
    canvas.setAttribute('aria-label', about.join(', '));
    $('chosen-figure').hidden = false;
    show();
  }

  // === Sliders ===

  const sliders = facts.dimensions.map(({dimension, low, high, name}) => {
    const row = document.createElement('label'), input = document.createElement('input');
    const output = document.createElement('output'), text = document.createElement('span');
    text.textContent = name;
    Object.assign(input, {type: 'range', min: low, max: high, step: (high - low) / 200});
    input.addEventListener('input', () => { t[dimension] = Number(input.value); show(); });
    row.append(text, input, output);
    $('sliders').append(row);
    for (const id of ['across', 'down']) $(id).add(new Option(name, dimension));
    return {dimension, input, output};
  });
  if (sliders.length > 1) $('down').selectedIndex = 1;

  // === Drag, wheel, keys ===

  const held = new Map();  // pointers that are down
  function at(event) {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
  let travelled = 0;
  map.addEventListener('pointerdown', event => {
    map.setPointerCapture(event.pointerId);
    held.set(event.pointerId, at(event));
    travelled = 0;
  });
  map.addEventListener('pointermove', event => {
    const now = at(event), before = held.get(event.pointerId);
    if (!before) {
      const index = nearest(...now, 20);
      if (index !== hovered) { hovered = index; draw(); }
      return;
    }
    if (held.size === 2) {  // two fingers: zoom about the one that rests
      const [other] = [...held].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const span = place => Math.hypot(place[0] - other[0], place[1] - other[1]);
      held.set(event.pointerId, now);
      if (span(before) > 5) zoom(span(now) / span(before), ...other);
      return;
    }
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    held.set(event.pointerId, now);
    if (travelled < 4) return;
    hovered = -1;
    if ($('drag').value === 'move' || event.shiftKey) {
      view.x -= (now[0] - before[0]) / view.scale;
      view.y += (now[1] - before[1]) / view.scale;
      draw();
    } else {
      moveTo(...fromScreen(...now));
      show();
    }
  });
  for (const type of ['pointerup', 'pointercancel'])
    map.addEventListener(type, event => {
      const place = held.get(event.pointerId);
      held.delete(event.pointerId);
      if (type !== 'pointerup' || !place || travelled >= 4) return;
      const index = nearest(...place, 20);
      if (index >= 0) choose(index);
      else { moveTo(...fromScreen(...place)); show(); }
    });
  map.addEventListener('pointerleave', () => { if (hovered >= 0) { hovered = -1; draw(); } });
  map.addEventListener('wheel', event => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), ...at(event));
  }, {passive: false});

  const STEP = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
  map.addEventListener('keydown', event => {
    const step = STEP[event.key];
    if (step) {
      const by = 12 / view.scale, [x, y] = project(t);
      if (event.shiftKey) { view.x += 4 * by * step[0]; view.y += 4 * by * step[1]; draw(); }
      else { moveTo(x + by * step[0], y + by * step[1]); show(); }
    } else if (event.key === 'Enter' || event.key === ' ') choose(nearest(...toScreen(project(t))));
    else if (event.key === '+' || event.key === '=') zoom(1.25);
    else if (event.key === '-') zoom(0.8);
    else if (event.key === '0') { fit(); draw(); }
    else return;
    event.preventDefault();
  });

  $('nearer').addEventListener('click', () => zoom(1.5));
  $('farther').addEventListener('click', () => zoom(1 / 1.5));
  $('whole').addEventListener('click', () => { fit(); draw(); });
  $('thumbnails').addEventListener('change', draw);
  $('colour').addEventListener('change', () => { paintMarks(); draw(); });
  const relay = () => {
    axes = $('axes').value;
    $('dimensions').hidden = axes !== 'dimensions';
    lay();
    fit();
    draw();
  };
  for (const id of ['axes', 'across', 'down']) $(id).addEventListener('change', relay);

  // === A walk between two images, draws, a picture of one's own ===

  const walk = $('walk');
  for (const end of ['from', 'to'])
    $(end).addEventListener('click', () => {
      ends[end] = t.slice();
      $(end).setAttribute('aria-pressed', 'true');
      walk.disabled = !(ends.from && ends.to);
      walk.value = end === 'to' ? 1 : 0;
      draw();
    });
  walk.addEventListener('input', () => {
    const share = Number(walk.value);
    t = ends.from.map((value, i) => value + share * (ends.to[i] - value));
    show();
  });

  $('random').addEventListener('click', async () => {
    t = (await vaeflow.priorDraws(1)).slice();
    say('A point drawn from the prior.');
    show();
  });

  $('more').addEventListener('click', async () => {
    const target = $('more-samples'), {width, height} = facts.image;
    const each = 24;
    const images = await vaeflow.decoded(await vaeflow.priorDraws(each));
    target.replaceChildren(...images.map(image => {
      const canvas = document.createElement('canvas');
      vaeflow.paint(canvas, image);
      return canvas;
    }));
    target.setAttribute('aria-label', `${each} new images of ${width} x ${height}, drawn by the model`);
  });

  async function take(file) {
    if (!file || !takes) return;
    let pixels;
    try {
      pixels = await vaeflow.pixelsOf(file);
    } catch {
      say(`${file.name} is no picture that this browser can read.`);
      return;
    }
    try {
      const {score, mean} = await vaeflow.score(pixels);
      own = mean.slice();
      t = own.slice();
      vaeflow.paint($('own'), pixels);
      const share = vaeflow.percentile(score);
      const than = share === null ? '' : `: larger than of ${(100 * share).toFixed(0)} % of validation images`;
      const text = `score ${shown(score)} nats${than}`;
      $('own-caption').textContent = `${file.name}: ${text}`;
      $('own').setAttribute('aria-label', `${file.name}, as the model sees it`);
      $('own').dataset.score = score;
      $('own-figure').hidden = false;
      say(`${file.name}: ${text}. Beside it is its reconstruction.`);
      show();
    } catch (error) {
      say(`${file.name} was not scored: ${error.message || error}`);
    }
  }
  const takes = [1, 3].includes(facts.image.channels);  // what a picture has
  $('file').closest('.tools').hidden = !takes;
  $('file').addEventListener('change', event => take(event.target.files[0]));
  const explorer = $('explorer-area');
  explorer.addEventListener('dragover', event => {
    event.preventDefault();
    explorer.classList.add('over');
  });
  explorer.addEventListener('dragleave', () => explorer.classList.remove('over'));
  explorer.addEventListener('drop', event => {
    event.preventDefault();
    explorer.classList.remove('over');
    take(event.dataTransfer.files[0]);
  });

  // === Begin ===

  vaeflow.point = () => Array.from(t);
  vaeflow.waiting = () => busy;
  vaeflow.tiles = () => tiles.length;

  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  dark.addEventListener('change', draw);
  new ResizeObserver(draw).observe(map);
  explorer.hidden = false;
  if (points) paintMarks();
  relay();
  if (sprite && !sprite.complete) sprite.addEventListener('load', draw);
  say('Loading the decoder …');
  show().then(() => {
    if (decoded.dataset.done) say('Drag on the map: the picture follows.');
  });
})();
