"""vaeflow, and a VAE as keras.io's example has it: its own step, `fit` on numpy arrays."""

from __future__ import annotations

import keras
import numpy as np

from contestants.networks import NETWORKS, SHAPE
from vaeflow.config.model import VAEConfig
from vaeflow.data.batches import Batches
from vaeflow.model.device import (
    all_devices,
    choose_batches_at_once,
    choose_jit,
    choose_steps_per_execution,
    count_devices,
    keep_on_device,
    layers_in,
    share_cores,
    use_gpu_if_any,
)
from vaeflow.model.steps.optimizer import Adam
from vaeflow.model.vae import VAE
from vaeflow.training.callbacks import Callbacks

# What vaeflow reaches the bound fastest with: `train.batch_size`, `train.learning_rate` and
# `train.weight_average`.
FASTEST = {"batch_size": 100, "learning_rate": 0.0035, "weight_average": 0.98}


def make(name: str, batch_size: int, precision: str, network: dict):
    """The contestant of that name, its devices taken."""
    device = use_gpu_if_any()
    return {"vaeflow": Vaeflow, "keras-io": KerasIo}[name](batch_size, precision, network, device)


class KerasModel:
    """What the contestants that are Keras models share."""

    def __init__(self, batch_size: int, precision: str, network: dict, device: str):
        self.batch_size, self.precision, self.device = batch_size, precision, device
        self.network = network
        self.reset()

    def reset_for_bound(self) -> dict:
        """Untrained, with the settings that reach a bound; returns those that are its own."""
        self.reset()
        return {}

    def images(self, images: np.ndarray, epochs: int) -> int:
        """How many `train` has seen."""
        return epochs * len(images)

    def device_memory_mb(self) -> float | None:
        """The most that was taken on a GPU, if there is one that tells."""
        return device_memory_mb()


class Vaeflow(KerasModel):
    """The model, its batches and its choices as `vaeflow train` has them."""

    def reset(self, learning_rate: float = 0.002, weight_average: float = 0.0) -> None:
        """Untrained, with the learning rate of the preset."""
        parts = share_cores(self.batch_size, choose_jit("auto"))
        keras.utils.set_random_seed(0)
        with all_devices():
            with layers_in(self.precision):
                self.model = VAE(VAEConfig(SHAPE, **self.network, binarize="dynamic"))
            self.model.parts = parts
            optimizer = Adam(learning_rate, use_ema=weight_average > 0, ema_momentum=weight_average)
            self.model.compile(
                optimizer=optimizer,
                jit_compile=choose_jit("auto"),
                steps_per_execution=choose_steps_per_execution(),
            )
            optimizer.build(self.model.trainable_variables)
        self.raw = RawWeights()
        self.batches = None

    def reset_for_bound(self) -> dict:
        """Untrained, with the settings that reach a bound; returns those that are its own."""
        self.batch_size = FASTEST["batch_size"]
        self.reset(FASTEST["learning_rate"], FASTEST["weight_average"])
        return FASTEST

    def train(self, images: np.ndarray, epochs: int) -> None:
        """One `fit`; the images given first stay on the device, if it is one of its own."""
        if self.batches is None:
            self.given, self.model.kept_images = images, keep_on_device(images)
            self.batches = self._batches(self.model.kept_images, shuffle_seed=0)
        batches = self.batches if images is self.given else self._batches(images, shuffle_seed=0)
        self.raw.restore_parameters()
        self.model.fit(
            batches.feed(),
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=Callbacks([self.raw], self.model),
        )

    def elbo(self, images: np.ndarray) -> float:
        """Mean over images that are black and white, nats."""
        batches = self._batches(images).feed()
        return self.model.evaluate(batches, verbose=0, return_dict=True)["elbo"]

    def _batches(self, images, **kwargs) -> Batches:
        return Batches(
            images,
            self.batch_size,
            multiple_of=count_devices(),
            at_once=choose_batches_at_once(),
            **kwargs,
        )


class RawWeights(keras.callbacks.Callback):
    """The weights that training goes on from, where Keras puts their averages after each `fit`."""

    values = None

    def on_epoch_end(self, epoch, logs=None):
        """Keep them."""
        if self.model.optimizer.use_ema:
            self.values = [variable.numpy() for variable in self.model.trainable_variables]

    def restore_parameters(self):
        """Have the model go on from them."""
        if self.values is not None:
            for variable, value in zip(self.model.trainable_variables, self.values, strict=True):
                variable.assign(value)


class KerasIo(KerasModel):
    """keras.io's example, with vaeflow's network: sigmoid, cross-entropy, `train_step`."""

    def reset(self) -> None:
        """Untrained, with the example's optimizer."""
        keras.utils.set_random_seed(0)
        with layers_in(self.precision):
            self.model = keras_io_model(*keras_networks(NETWORKS["conv"]))
        self.model.compile(optimizer=keras.optimizers.Adam(0.001))

    def train(self, images: np.ndarray, epochs: int) -> None:
        """One `fit` on black and white images, drawn beforehand for the epoch."""
        for _ in range(epochs):
            draws = np.random.default_rng().random(images.shape, dtype=np.float32)
            self.model.fit(
                (draws < images / np.float32(255)).astype("float32"),
                batch_size=self.batch_size,
                verbose=0,
            )

    def elbo(self, images: np.ndarray) -> float:
        """Mean over images that are black and white, nats."""
        return -self.model.evaluate(
            images / np.float32(255), batch_size=self.batch_size, verbose=0, return_dict=True
        )["loss"]


def keras_networks(sizes: dict) -> tuple[keras.Model, keras.Model]:
    """Encoder and decoder, vaeflow's `conv` of `presets/mnist.yaml`, of Keras's own layers."""
    from keras import layers

    convolution = {"strides": 2, "padding": "same", "activation": "silu"}
    images = keras.Input(SHAPE)
    x = layers.Conv2D(32, 3, **convolution)(images)
    x = layers.Conv2D(64, 3, **convolution)(x)
    x = layers.Dense(sizes["hidden_units"], activation="silu")(layers.Flatten()(x))
    mean = layers.Dense(sizes["latent_dim"], dtype="float32")(x)
    log_variance = layers.Dense(sizes["latent_dim"], dtype="float32")(x)
    posterior = {"mean": mean, "log_variance": 12 * keras.ops.tanh(log_variance / 12)}

    latents = keras.Input((sizes["latent_dim"],))
    x = layers.Dense(sizes["hidden_units"], activation="silu")(latents)
    x = layers.Dense(7 * 7 * 64, activation="silu")(x)
    x = layers.Conv2DTranspose(64, 3, **convolution)(layers.Reshape((7, 7, 64))(x))
    x = layers.Conv2D(4, 3, padding="same", dtype="float32")(x)
    x = layers.Permute((1, 3, 2, 4), dtype="float32")(layers.Reshape((14, 14, 2, 2))(x))
    logits = layers.Reshape((28, 28, 1), dtype="float32")(x)
    return keras.Model(images, posterior), keras.Model(latents, {"logits": logits})


def keras_io_model(encoder, decoder) -> keras.Model:
    """TensorFlow's gradient tape is what that example is written with."""
    import tensorflow as tf
    from keras import ops

    class Example(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder
            self.noise = keras.random.SeedGenerator(0)
            self.tracker = keras.metrics.Mean(name="loss")

        @property
        def metrics(self):
            return [self.tracker]

        def loss_of(self, images):
            mean, log_variance = self.encoder(images).values()
            noise = keras.random.normal(ops.shape(mean), seed=self.noise)
            latents = mean + ops.exp(0.5 * log_variance) * noise
            pixels = ops.sigmoid(self.decoder(latents)["logits"])
            cross_entropy = keras.losses.binary_crossentropy(images, pixels)
            reconstruction = ops.mean(ops.sum(cross_entropy, axis=(1, 2)))
            kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            return reconstruction + ops.mean(ops.sum(kl, axis=1))

        def train_step(self, images):
            with tf.GradientTape() as tape:
                loss = self.loss_of(images)
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            self.tracker.update_state(loss, sample_weight=ops.shape(images)[0])
            return {"loss": self.tracker.result()}

        def test_step(self, images):
            self.tracker.update_state(self.loss_of(images), sample_weight=ops.shape(images)[0])
            return {"loss": self.tracker.result()}

    return Example()


def device_memory_mb() -> float | None:
    """The most that was taken on the first GPU; None without one."""
    if keras.backend.backend() == "jax":
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] / 2**20 if statistics else None
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
