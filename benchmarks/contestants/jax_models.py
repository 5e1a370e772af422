"""The same network in plain JAX with optax: an epoch is one compiled loop, as its users write it.

The order is drawn on the device, weights and moments are changed in place, and there is nothing
else: no metrics, no step left out, no checkpoint.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
from jax import numpy as jnp

from contestants.networks import SHAPE

LAYOUT = ("NHWC", "HWIO", "NHWC")


def make(name: str, batch_size: int, precision: str, network: dict):
    """The one contestant."""
    return PlainJax(batch_size, precision, network)


class Layers:
    """Makes a network's weights when it runs for the first time, and takes them when it runs again.

    Args:
        weights: those made before, or None.
        key: to make them with.
    """

    def __init__(self, weights=None, key=None):
        self.made = [] if weights is None else weights
        self.key = key if weights is None else None
        self.next = 0

    def _pair(self, shape, zero=False):
        if self.key is not None:
            fan = np.prod(shape[:-2], dtype=int) * (shape[-2] + shape[-1])
            self.key, draw = jax.random.split(self.key)
            limit = 0.0 if zero else np.sqrt(6 / fan)
            kernel = jax.random.uniform(draw, shape, minval=-limit, maxval=limit)
            self.made.append((kernel, jnp.zeros(shape[-1])))
        self.next += 1
        return self.made[self.next - 1]

    def dense(self, x, units):
        """A dense layer, in the precision of what it is given."""
        kernel, bias = self._pair((x.shape[-1], units))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)

    def conv(self, x, channels, strides=1, zero=False):
        """A 3x3 convolution."""
        kernel, bias = self._pair((3, 3, x.shape[-1], channels), zero)
        window = (strides, strides)
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), window, "SAME", dimension_numbers=LAYOUT
        )
        return y + bias.astype(x.dtype)

    def double(self, x, channels):
        """A transposed convolution of stride 2."""
        kernel, bias = self._pair((3, 3, x.shape[-1], channels))
        y = jax.lax.conv_transpose(
            x, kernel.astype(x.dtype), (2, 2), "SAME", dimension_numbers=LAYOUT
        )
        return y + bias.astype(x.dtype)

    def blocks(self, x, count):
        """Pre-activation residual blocks."""
        for _ in range(count):
            inner = self.conv(jax.nn.silu(x), x.shape[-1])
            x = x + self.conv(jax.nn.silu(inner), x.shape[-1], zero=True)
        return x


def encode(layers: Layers, images, sizes: dict):
    """Mean and log variance, float32."""
    x, filters, depth = images, sizes["filters"], sizes["depth"]
    if sizes["network"] == "conv":
        for channels in filters:
            x = jax.nn.silu(layers.conv(x, channels, strides=2))
    else:
        x = layers.conv(x, filters[0])
        for channels in filters:
            x = layers.conv(layers.blocks(x, depth), channels, strides=2)
        x = jax.nn.silu(layers.blocks(x, depth))
    x = jax.nn.silu(layers.dense(x.reshape(len(x), -1), sizes["hidden_units"]))
    x = x.astype("float32")
    mean, log_variance = (layers.dense(x, sizes["latent_dim"]) for _ in range(2))
    return mean, 12 * jnp.tanh(log_variance / 12)


def decode(layers: Layers, latents, sizes: dict):
    """Logits, float32."""
    filters, depth = sizes["filters"], sizes["depth"]
    edge = SHAPE[0] // 2 ** len(filters)
    x = jax.nn.silu(layers.dense(latents, sizes["hidden_units"]))
    x = jax.nn.silu(layers.dense(x, edge * edge * filters[-1]))
    x = x.reshape(-1, edge, edge, filters[-1])
    if sizes["network"] == "conv":
        for level in reversed(range(1, len(filters))):
            x = jax.nn.silu(layers.double(x, filters[level]))
        x = layers.conv(x.astype("float32"), 4)
        x = x.reshape(-1, SHAPE[0] // 2, SHAPE[1] // 2, 2, 2).transpose(0, 1, 3, 2, 4)
        return x.reshape(-1, *SHAPE)
    x = layers.blocks(x, depth)
    for level in reversed(range(len(filters))):
        x = layers.blocks(layers.double(x, filters[max(0, level - 1)]), depth)
    return layers.conv(jax.nn.silu(x).astype("float32"), 1)


class PlainJax:
    """Adam at 0.001, batches shuffled and drawn black and white on the device."""

    def __init__(self, batch_size: int, precision: str, network: dict):
        self.batch_size, self.sizes = batch_size, network
        device = jax.devices()[0]
        self.device = "CPU" if device.platform == "cpu" else f"GPU: {device.device_kind}"
        self.kind = "bfloat16" if precision == "mixed_bfloat16" else "float32"
        self.optimizer = optax.adam(0.001)
        self.epoch = jax.jit(self._epoch, donate_argnums=0)
        self.loss = jax.jit(self._loss)
        self.reset()

    def reset(self) -> None:
        """Untrained."""
        key = jax.random.key(0)
        layers = Layers(key=key)
        mean, _ = encode(layers, jnp.zeros((1, *SHAPE), self.kind), self.sizes)
        decode(layers, mean.astype(self.kind), self.sizes)
        self.state = (layers.made, self.optimizer.init(layers.made), key)
        self.given = None

    def reset_for_bound(self) -> dict:
        """The same: none of its settings are chosen for that."""
        self.reset()
        return {}

    def _loss(self, weights, images, key):
        """Minus the ELBO, mean over black and white images, nats."""
        layers = Layers(weights)
        mean, log_variance = encode(layers, images.astype(self.kind), self.sizes)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        logits = decode(layers, latents.astype(self.kind), self.sizes)
        log_likelihood = images * logits - jax.nn.softplus(logits)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        return (kl.sum() - log_likelihood.sum()) / len(images)

    def _epoch(self, state, pixels):
        steps = len(pixels) // self.batch_size
        weights, moments, key = state
        key, order = jax.random.split(key)
        rows = jax.random.permutation(order, len(pixels))[: steps * self.batch_size]

        def step(state, rows):
            weights, moments, key = state
            key, draw, noise = jax.random.split(key, 3)
            grey = pixels[rows].astype("float32") / 255
            images = (jax.random.uniform(draw, grey.shape) < grey).astype("float32")
            loss, gradients = jax.value_and_grad(self._loss)(weights, images, noise)
            updates, moments = self.optimizer.update(gradients, moments)
            return (optax.apply_updates(weights, updates), moments, key), loss

        rows = rows.reshape(steps, self.batch_size)
        state, losses = jax.lax.scan(step, (weights, moments, key), rows)
        return state, losses[-1]

    def train(self, images: np.ndarray, epochs: int) -> None:
        """An epoch at a time."""
        if self.given is not images:
            self.given, self.pixels = images, jax.device_put(images)
        for _ in range(epochs):
            self.state, loss = self.epoch(self.state, self.pixels)
        loss.block_until_ready()

    def images(self, images: np.ndarray, epochs: int) -> int:
        """How many `train` has seen."""
        return epochs * (len(images) // self.batch_size * self.batch_size)

    def elbo(self, images: np.ndarray) -> float:
        """Mean over images that are black and white, nats."""
        draw = partial(self.loss, self.state[0])
        size = self.batch_size
        starts = range(0, len(images) - size + 1, size)
        parts = (images[start : start + size] / np.float32(255) for start in starts)
        keys = jax.random.split(jax.random.key(1), len(starts))
        return -float(np.mean([draw(part, key) for part, key in zip(parts, keys, strict=True)]))

    def device_memory_mb(self) -> float | None:
        """The most that was taken on a GPU; None without one."""
        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] / 2**20 if statistics else None
