// A model in the browser: it encodes, decodes and scores by the bundle's own ONNX files.
//
// The page holds all of it: facts in #facts (JSON), and as base64, packed with gzip, the bundle's ONNX
// files and ONNX Runtime. Nothing is fetched. Images, latents and likelihoods are those of
// vaeflow.bundle.runtime; a test compares what this computes with that.
'use strict';

const vaeflow = (() => {
  const $ = id => document.getElementById(id);
  const facts = JSON.parse($('facts').textContent);
  const {height, width, channels} = facts.image;
  const size = facts.latent_dim;
  const pixelCount = height * width;

  // === Unpacking ===

  function bytes(base64) {
    const text = atob(base64);
    const found = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
    return found;
  }

  function floats(base64) {
    return new Float32Array(bytes(base64).buffer);
  }

  async function unpacked(id) {
    const packed = new Blob([bytes($(id).textContent.trim())]);
    const stream = packed.stream().pipeThrough(new DecompressionStream('gzip'));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // === The model ===

  const sessions = {};
  let runtime = null;

  function start() {
    if (!runtime) {
      runtime = (async () => {
        const [code, binary] = await Promise.all([unpacked('ort-module'), unpacked('ort-binary')]);
        // It has threads only where a server sends headers for them: one is enough.
        ort.env.wasm.numThreads = 1;
        const address = (content, type) => URL.createObjectURL(new Blob([content], {type}));
        ort.env.wasm.wasmPaths = {
          mjs: address(code, 'text/javascript'),
          wasm: address(binary, 'application/wasm'),
        };
      })();
    }
    return runtime;
  }

  function session(name) {
    if (!sessions[name]) {
      sessions[name] = start().then(async () =>
        ort.InferenceSession.create(await unpacked('model-' + name), {executionProviders: ['wasm']}));
    }
    return sessions[name];
  }

  // A session runs one call after the other.
  let last = Promise.resolve();
  function run(name, inputs) {
    const next = last.then(async () => {
      const tensors = {};
      for (const [input, [values, shape]] of Object.entries(inputs))
        tensors[input] = new ort.Tensor('float32', values, shape);
      const outputs = await (await session(name)).run(tensors);
      const found = {};
      for (const [output, tensor] of Object.entries(outputs)) found[output] = tensor.data;
      return found;
    });
    last = next.catch(() => {});
    return next;
  }

  const decode = latents => run('decoder', {latents: [latents, [latents.length / size, size]]});
  const encode = pixels => run('encoder', {images: [pixels, [1, height, width, channels]]});

  async function priorDraws(count) {
    const noise = Float32Array.from({length: count * size}, normal);
    if (facts.prior !== 'flow') return noise;
    const unused = [new Float32Array(size), [1, size]];
    return (await run('prior', {latents: unused, noise: [noise, [count, size]]})).sample;
  }

  async function priorLogDensity(latents) {
    const count = latents.length / size;
    const unused = [new Float32Array(size), [1, size]];
    const found = await run('prior', {latents: [latents, [count, size]], noise: unused});
    return found.log_density;
  }

  function generator(seed) {  // mulberry32: uniform in (0, 1), the same for the same seed
    return () => {
      seed = (seed + 0x6D2B79F5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
  }

  let uniform = generator(crypto.getRandomValues(new Uint32Array(1))[0]);

  function normal() {
    return Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  }

  // === Likelihoods: the twins of vaeflow.model.likelihoods, one image at a time ===

  const softplus = v => Math.max(v, 0) + Math.log1p(Math.exp(-Math.abs(v)));
  const sigmoid = v => 1 / (1 + Math.exp(-v));

  function logisticMean(location, logScale) {
    const scale = Math.exp(logScale);
    const mean = scale * (softplus(location / scale) - softplus((location - 1) / scale));
    return Math.min(1, Math.max(0, mean));
  }

  function logMass(value, location, logScale) {
    const half = 0.5 / (facts.levels - 1);
    const precision = Math.exp(-logScale);
    const belowUpper = -softplus(-(value + half - location) * precision);
    const aboveLower = -softplus((value - half - location) * precision);
    if (value < half) return belowUpper;
    if (value > 1 - half) return aboveLower;
    return belowUpper + aboveLower + Math.log(-Math.expm1(-2 * half * precision));
  }

  function atLevel(value) {
    if (facts.levels === 256) return value;
    const steps = facts.levels - 1;
    return Math.round(value * steps) / steps;
  }

  function logWeights(logits, start) {
    const mixtures = facts.mixtures;
    const some = logits.subarray(start, start + mixtures);
    const largest = Math.max(...some);
    let total = 0;
    for (const logit of some) total += Math.exp(logit - largest);
    const normaliser = largest + Math.log(total);
    return Array.from(some, logit => logit - normaliser);
  }

  // Of a pixel and component: each channel's location, scale, and coefficients of those before.
  function component(p, index, k) {
    const mixtures = facts.mixtures;
    const at = channel => (index * channels + channel) * mixtures + k;
    const pairs = channels * (channels - 1) / 2;
    let pair = 0;
    return Array.from({length: channels}, (_, channel) => ({
      location: p.location[at(channel)],
      logScale: p.log_scale[at(channel)],
      coefficients: Array.from({length: channel}, () =>
        p.coefficient[(index * pairs + pair++) * mixtures + k]),
    }));
  }

  const likelihoods = {
    bernoulli: {
      mean: (p, out) => out.forEach((_, i) => { out[i] = sigmoid(p.logits[i]); }),
      log: (x, p) => x.reduce((sum, v, i) => sum + v * p.logits[i] - softplus(p.logits[i]), 0),
    },
    gaussian: {
      mean: (p, out) => out.set(p.mean),
      log: (x, p) => x.reduce((sum, v, i) => {
        const scale = p.log_scale[i % channels];
        const away = (v - p.mean[i]) * Math.exp(-scale);
        return sum - 0.5 * (Math.log(2 * Math.PI) + away * away) - scale;
      }, 0),
    },
    discretized_logistic: {
      mean: (p, out) => out.forEach((_, i) => {
        out[i] = logisticMean(p.location[i], p.log_scale[i]);
      }),
      log: (x, p) => x.reduce((sum, v, i) =>
        sum + logMass(atLevel(v), p.location[i], p.log_scale[i]), 0),
    },
    mixture_logistic: {
      mean: (p, out) => {
        out.fill(0);
        for (let index = 0; index < pixelCount; index++) {
          logWeights(p.logits, index * facts.mixtures).forEach((weight, k) => {
            const variances = [];
            component(p, index, k).forEach((one, channel) => {
              let variance = Math.exp(2 * one.logScale);
              one.coefficients.forEach((c, other) => { variance += c * c * variances[other]; });
              variances.push(variance);
              out[index * channels + channel] +=
                Math.exp(weight) * logisticMean(one.location, 0.5 * Math.log(variance));
            });
          });
        }
      },
      log: (x, p) => {
        let sum = 0;
        for (let index = 0; index < pixelCount; index++) {
          const masses = logWeights(p.logits, index * facts.mixtures);
          masses.forEach((_, k) => {
            const moved = [];
            component(p, index, k).forEach((one, channel) => {
              const value = atLevel(x[index * channels + channel]);
              let place = one.location;
              one.coefficients.forEach((c, other) => { place += c * moved[other]; });
              masses[k] += logMass(value, place, one.logScale);
              moved.push(value - one.location);
            });
          });
          const largest = Math.max(...masses);
          sum += largest + Math.log(masses.reduce((total, m) => total + Math.exp(m - largest), 0));
        }
        return sum;
      },
    },
  };
  const likelihood = likelihoods[facts.likelihood];

  // The parameters of one image of many. What is one number a channel has no image's size.
  function one(parameters, index, count) {
    const found = {};
    for (const [name, values] of Object.entries(parameters)) {
      const part = values.length / count;
      found[name] = values.subarray(index * part, (index + 1) * part);
    }
    return found;
  }

  async function decoded(latents) {
    const count = latents.length / size;
    const parameters = await decode(latents);
    return Array.from({length: count}, (_, index) => {
      const image = new Float32Array(pixelCount * channels);
      likelihood.mean(one(parameters, index, count), image);
      return image;
    });
  }

  // Minus the ELBO of an image, nats, by as many draws as the bundle takes.
  async function score(pixels) {
    const {mean, log_variance: logVariance} = await encode(pixels);
    const count = facts.draws;
    uniform = generator(0);
    const latents = new Float32Array(count * size);
    let kl = 0;
    for (let i = 0; i < size; i++)
      kl += 0.5 * (mean[i] * mean[i] + Math.expm1(logVariance[i]) - logVariance[i]);
    for (let i = 0; i < latents.length; i++)
      latents[i] = mean[i % size] + Math.exp(0.5 * logVariance[i % size]) * normal();
    uniform = generator(crypto.getRandomValues(new Uint32Array(1))[0]);
    if (facts.prior === 'flow') {
      const density = await priorLogDensity(latents);
      density.forEach((log, draw) => {
        const point = latents.subarray(draw * size, (draw + 1) * size);
        const standard = point.reduce((sum, v) => sum - 0.5 * (v * v + Math.log(2 * Math.PI)), 0);
        kl -= (log - standard) / count;
      });
    }
    const parameters = await decode(latents);
    let log = 0;
    for (let draw = 0; draw < count; draw++)
      log += likelihood.log(pixels, one(parameters, draw, count)) / count;
    return {score: kl - log, mean};
  }

  // The share of validation images that score less, between the quantiles that the bundle keeps.
  function percentile(value) {
    const all = facts.score_quantiles;
    if (!all.length) return null;
    if (value <= all[0][1]) return 0;
    for (let i = 1; i < all.length; i++) {
      const [[low, from], [high, to]] = [all[i - 1], all[i]];
      if (value < to) return low + (high - low) * (value - from) / (to - from);
    }
    return 1;
  }

  // === Pictures ===

  function paint(canvas, image) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext('2d');
    const data = context.createImageData(width, height);
    for (let i = 0; i < pixelCount; i++) {
      for (let c = 0; c < 3; c++)
        data.data[4 * i + c] = 255 * image[i * channels + (channels === 3 ? c : 0)];
      data.data[4 * i + 3] = 255;
    }
    context.putImageData(data, 0, 0);
  }

  // A file as the model's pixels: scaled by the browser, which is not quite as `data add` does it.
  async function pixelsOf(file) {
    const picture = await createImageBitmap(file);
    const canvas = document.createElement('canvas');
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext('2d', {willReadFrequently: true});
    context.fillStyle = facts.background;
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = 'high';
    const across = width / picture.width, down = height / picture.height;
    const [x, y] = facts.resize === 'exact' ? [across, down]
      : facts.resize === 'fit' ? Array(2).fill(Math.min(across, down))
        : Array(2).fill(Math.max(across, down));
    const [w, h] = [picture.width * x, picture.height * y];
    context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
    const data = context.getImageData(0, 0, width, height).data;
    const pixels = new Float32Array(pixelCount * channels);
    for (let i = 0; i < pixelCount; i++) {
      const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
      if (channels === 1) pixels[i] = Math.round(0.299 * r + 0.587 * g + 0.114 * b) / 255;
      else pixels.set([r / 255, g / 255, b / 255], 3 * i);
    }
    return pixels;
  }

  return {$, facts, size, floats, decoded, score, percentile, paint, pixelsOf, priorDraws};
})();
