"""The variational autoencoder as a `keras.Model` with its own training step."""

from pathlib import Path

import keras
from keras import ops

from vaeflow.errors import BundleError
from vaeflow.model import objective
from vaeflow.model.networks import build_decoder, build_encoder


@keras.saving.register_keras_serializable(package="vaeflow")
class VAE(keras.Model):
    """Convolutional VAE with a Gaussian posterior, an N(0, I) prior and Bernoulli pixels.

    Trains through `compile(optimizer=...)` and `fit`; needs no `loss`, since it maximises the ELBO
    of `vaeflow.model.objective`. Every metric is a mean per image, in nats, but `skipped_steps`:
    how many steps were left out, of the means too, because their gradient was not finite.

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: size of the latent t.
        filters: channels of the encoder's stride-2 convolutions; the decoder mirrors them.
        hidden_units: width of the dense layer between convolutions and latent, on both sides.
        seed: of the noise drawn in training and validation.

    Calling the model gives a dict of `mean` and `log_variance`, `(batch, latent_dim)`, and
    `reconstruction`, `(batch, height, width, channels)` in [0, 1], decoded from the posterior mean,
    so that `predict` is deterministic.

    Example:
        >>> vae = VAE(image_shape=(28, 28, 1), latent_dim=16)
        >>> vae.compile(optimizer="adam")
        >>> vae.fit(images, batch_size=128, epochs=10)  # images: float in [0, 1]
    """

    def __init__(
        self, image_shape, latent_dim, filters=(32, 64), hidden_units=128, seed=0, **kwargs
    ):
        super().__init__(**kwargs)
        # === Config ===
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.filters = tuple(filters)
        self.hidden_units = hidden_units
        self.seed = seed

        # === Networks ===
        sizes = (self.image_shape, latent_dim, self.filters, hidden_units)
        self.encoder = build_encoder(*sizes)
        self.decoder = build_decoder(*sizes)

        # === Noise and metrics ===
        self.noise = keras.random.SeedGenerator(seed)
        names = ("loss", "elbo", "log_likelihood", "kl")
        self.term_metrics = [keras.metrics.Mean(name=name) for name in names]
        self.skipped_metric = keras.metrics.Sum(name="skipped_steps")

        # A model whose train_step never calls it counts as not built, and would then be saved
        # without its optimizer and refuse to export: call it once, symbolically.
        self(keras.KerasTensor((None, *self.image_shape), dtype="float32"))

    def call(self, images, training=False):
        """Posterior parameters and the reconstruction from the posterior mean."""
        posterior = self.encoder(images, training=training)
        logits = self.decoder(posterior["mean"], training=training)["logits"]
        return {**posterior, "reconstruction": ops.sigmoid(logits)}

    def terms(self, images, noise, training=False):
        """The ELBO's two terms for one Monte Carlo draw per image.

        Args:
            images: `(batch, height, width, channels)` in [0, 1].
            noise: draws of N(0, I), `(batch, latent_dim)`.

        Returns:
            `(log_likelihood, kl)`, nats per image, each `(batch,)`.
        """
        posterior = self.encoder(images, training=training)
        mean, log_variance = posterior["mean"], posterior["log_variance"]
        latents = objective.reparameterise(mean, log_variance, noise)
        logits = self.decoder(latents, training=training)["logits"]
        log_likelihood = objective.bernoulli_log_likelihood(images, logits)
        return log_likelihood, objective.kl_divergence(mean, log_variance)

    def train_step(self, data):
        """One step of stochastic gradient ascent on the ELBO; TensorFlow finds the gradient."""
        import tensorflow as tf

        images = _images_of(data)
        noise = keras.random.normal((ops.shape(images)[0], self.latent_dim), seed=self.noise)
        with tf.GradientTape() as tape:
            log_likelihood, kl = self.terms(images, noise, training=True)
            # The mean over the batch: the N/M-weighted sum of the lecture, divided by N.
            loss = -ops.mean(objective.elbo(log_likelihood, kl))
        gradients = tape.gradient(loss, self.trainable_variables)

        # Slots must exist before the optimizer is applied inside a condition.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        # A single NaN applied to the weights, or kept in Adam's moments, ends a training for good;
        # a step left out costs nothing but is counted.
        finite = tf.math.is_finite(tf.linalg.global_norm(gradients)) & tf.math.is_finite(loss)
        tf.cond(
            finite,
            lambda: self.optimizer.apply(gradients, self.trainable_variables),
            lambda: None,
        )
        self.skipped_metric.update_state(1.0 - ops.cast(finite, "float32"))
        results = self._update_metrics(log_likelihood, kl, counted=finite)
        return {**results, self.skipped_metric.name: self.skipped_metric.result()}

    def test_step(self, data):
        """The same terms without a step, on the same noise at every call, so epochs compare."""
        images = _images_of(data)
        noise = keras.random.normal((ops.shape(images)[0], self.latent_dim), seed=self.seed)
        return self._update_metrics(*self.terms(images, noise))

    def predict_step(self, data):
        """The model's outputs for one batch."""
        return self(_images_of(data), training=False)

    def _update_metrics(self, log_likelihood, kl, counted=True):
        """Add a batch to the means, unless it is not counted; returns the means so far."""
        elbo = objective.elbo(log_likelihood, kl)
        values = {"loss": -elbo, "elbo": elbo, "log_likelihood": log_likelihood, "kl": kl}
        weight = ops.cast(counted, "float32")
        for metric in self.term_metrics:
            # Weight zero alone would not do: zero times NaN is NaN.
            value = ops.where(counted, values[metric.name], 0.0)
            metric.update_state(value, sample_weight=weight * ops.ones_like(value))
        return {metric.name: metric.result() for metric in self.term_metrics}

    @property
    def metrics(self):
        """Reset by Keras at the start of each epoch."""
        return [*self.term_metrics, self.skipped_metric]

    def get_config(self):
        """Every constructor value."""
        return {
            **super().get_config(),
            "image_shape": self.image_shape,
            "latent_dim": self.latent_dim,
            "filters": self.filters,
            "hidden_units": self.hidden_units,
            "seed": self.seed,
        }


def _images_of(data):
    """`fit` hands over images alone, or a tuple `(images, labels, weights)`."""
    return data[0] if isinstance(data, list | tuple) else data


def load_vae(path: Path) -> VAE:
    """Load a `.keras` file written by `train`, without running any code it carries.

    Raises:
        BundleError: the file is not a VAE that this version can read.
    """
    try:
        model = keras.models.load_model(path, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise BundleError(f"{path}: not a readable .keras model ({error}).") from None
    if not isinstance(model, VAE):
        raise BundleError(f"{path}: holds a {type(model).__name__}, expected a vaeflow VAE.")
    return model
