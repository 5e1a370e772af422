"""The machine's own limit: as many multiplications as a step has, in large matrix products."""

from __future__ import annotations

import keras
import numpy as np

from contestants.keras_models import device_memory_mb
from contestants.networks import SHAPE
from vaeflow.config.model import VAEConfig
from vaeflow.model.device import use_gpu_if_any
from vaeflow.model.vae import VAE

SIZE = 2048


def make(name: str, batch_size: int, precision: str, network: dict):
    """The one contestant."""
    return MatrixProducts(precision, network, use_gpu_if_any())


class MatrixProducts:
    """Products of two square matrices, compiled, in the precision of the others."""

    def __init__(self, precision: str, network: dict, device: str):
        self.device = device
        self.per_image = operations(VAE(VAEConfig(SHAPE, **network)))
        kind = "bfloat16" if precision == "mixed_bfloat16" else "float32"
        self.matrix = keras.ops.cast(keras.random.normal((SIZE, SIZE), seed=0), kind)
        if keras.backend.backend() == "jax":
            import jax

            self.multiply = jax.jit(lambda x: x @ x)
        else:
            import tensorflow as tf

            self.multiply = tf.function(lambda x: tf.matmul(x, x))

    def train(self, images: np.ndarray, epochs: int) -> None:
        """As many products as make up the images."""
        for _ in range(self._products(images, epochs)):
            result = self.multiply(self.matrix)
        keras.ops.convert_to_numpy(result[0, 0])

    def images(self, images: np.ndarray, epochs: int) -> float:
        """How many images the products of `train` stand for."""
        return self._products(images, epochs) * 2 * SIZE**3 / self.per_image

    def device_memory_mb(self) -> float | None:
        """The most that was taken on a GPU, if there is one that tells."""
        return device_memory_mb()

    def _products(self, images, epochs) -> int:
        return max(1, round(epochs * len(images) * self.per_image / (2 * SIZE**3)))


def operations(vae: VAE) -> float:
    """Floating-point operations of a training step, per image.

    Each weight is used at each place of the layer's smaller side once forward and twice backward:
    for the gradient in the weight, and in what the layer was given.
    """
    total = 0
    for layer in (*vae.encoder.layers, *vae.decoder.layers):
        if not hasattr(layer, "kernel"):
            continue
        shape = layer.input.shape if "transpose" in type(layer).__name__.lower() else None
        places = np.prod((shape or layer.output.shape)[1:-1], dtype=int)
        total += 3 * 2 * int(np.prod(layer.kernel.shape)) * int(places)
    # Nobody needs the gradient in the images.
    first = next(layer for layer in vae.encoder.layers if hasattr(layer, "kernel"))
    places = np.prod(first.output.shape[1:-1], dtype=int)
    return total - 2 * int(np.prod(first.kernel.shape)) * int(places)
