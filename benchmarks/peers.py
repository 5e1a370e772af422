"""VAEs of well-known examples, written anew from their descriptions, to stand beside vaeflow's.

Only their networks are their own: objective, draws and evaluation are vaeflow's, so that nothing
else differs. The decoders give logits where the examples end in a sigmoid, which the likelihood
takes instead: the same function.
"""

from __future__ import annotations

import math

import keras
from keras import layers

from vaeflow.config.model import VAEConfig
from vaeflow.config.schema import Train
from vaeflow.model.vae import VAE

# What both examples train with.
SETTINGS = Train(
    binarize="dynamic",
    batch_size=128,
    learning_rate=1e-3,
    learning_rate_schedule="constant",
    weight_average=0.0,
)


class Peer(VAE):
    """A VAE of one size; the config's `filters` and the like mean nothing to it."""

    LATENT_DIM: int

    @classmethod
    def of(cls, image_shape: tuple[int, ...], settings: Train, steps_per_epoch: int) -> Peer:
        """An untrained one; nothing in it depends on how many steps an epoch has."""
        return cls(
            VAEConfig(image_shape, cls.LATENT_DIM, binarize=settings.binarize, seed=settings.seed)
        )


def encoder(images, features, latent_dim: int) -> keras.Model:
    """From images to the two outputs that vaeflow knows."""
    outputs = {
        name: layers.Dense(latent_dim, name=name)(features) for name in ("mean", "log_variance")
    }
    return keras.Model(images, outputs, name="encoder")


@keras.saving.register_keras_serializable(package="vaeflow-benchmarks")
class KerasIoVAE(Peer):
    """keras.io's convolutional VAE: two latent dimensions.

    Encoder: convolutions of 32 and 64 filters, 3x3, stride 2, ReLU; a dense layer of 16. Decoder: a
    dense layer to 7x7x64, transposed convolutions of 64 and 32 filters, stride 2, and one of one
    filter. (28x28 only.)
    """

    LATENT_DIM = 2

    def build_networks(self):
        """Encoder and decoder."""
        strided = {"kernel_size": 3, "strides": 2, "padding": "same", "activation": "relu"}
        images = keras.Input(self.config.image_shape)
        x = layers.Conv2D(32, **strided)(images)
        x = layers.Conv2D(64, **strided)(x)
        x = layers.Dense(16, activation="relu")(layers.Flatten()(x))

        latents = keras.Input((self.config.latent_dim,))
        y = layers.Dense(7 * 7 * 64, activation="relu")(latents)
        y = layers.Reshape((7, 7, 64))(y)
        y = layers.Conv2DTranspose(64, **strided)(y)
        y = layers.Conv2DTranspose(32, **strided)(y)
        logits = layers.Conv2DTranspose(1, 3, padding="same")(y)
        decoder = keras.Model(latents, {"logits": logits}, name="decoder")
        return encoder(images, x, self.config.latent_dim), decoder


@keras.saving.register_keras_serializable(package="vaeflow-benchmarks")
class PyTorchExamplesVAE(Peer):
    """pytorch/examples' VAE: dense layers 784-400-20-400-784, ReLU."""

    LATENT_DIM = 20

    def build_networks(self):
        """Encoder and decoder."""
        images = keras.Input(self.config.image_shape)
        x = layers.Dense(400, activation="relu")(layers.Flatten()(images))

        latents = keras.Input((self.config.latent_dim,))
        y = layers.Dense(400, activation="relu")(latents)
        y = layers.Dense(math.prod(self.config.image_shape))(y)
        decoder = keras.Model(
            latents, {"logits": layers.Reshape(self.config.image_shape)(y)}, name="decoder"
        )
        return encoder(images, x, self.config.latent_dim), decoder
