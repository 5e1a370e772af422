"""The variational autoencoder as a `keras.Model` with its own training step."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import keras
from keras import ops

from vaeflow.config.model import VAEConfig
from vaeflow.errors import BundleError
from vaeflow.model import objective
from vaeflow.model.likelihoods import LIKELIHOODS, PixelSpec
from vaeflow.model.networks import build_decoder, build_encoder
from vaeflow.model.objective import Tensor, Terms
from vaeflow.model.prior import build_prior
from vaeflow.model.steps import backend
from vaeflow.model.steps.optimizer import Adam


@keras.saving.register_keras_serializable(package="vaeflow")
class VAE(keras.Model):
    """Convolutional VAE with a Gaussian posterior, and N(0, I) or a learned flow as its prior.

    Trains through `compile(optimizer=...)` and `fit`; needs no `loss`, since it maximises an
    objective of `vaeflow.model.objective`. Every metric is a mean per image, in nats: `loss` is
    minus what is maximised, `elbo` and its two terms are always those of the plain ELBO. The
    exception is `skipped_steps`: how many steps were left out, of the means too, because their
    gradient was not finite or too large; `skipped_in_a_row` counts those since the last step made.

    Args:
        config: see `vaeflow.config.model.VAEConfig`.

    Calling the model gives a dict of `mean` and `log_variance`, `(batch, latent_dim)`, and
    `reconstruction`, `(batch, height, width, channels)` in [0, 1], decoded from the posterior mean,
    so that `predict` is deterministic.

    Examples:
        >>> vae = VAE(VAEConfig((28, 28, 1), latent_dim=16))
        >>> vae.compile(optimizer="adam")
        >>> vae.fit(images, batch_size=128, epochs=10)  # images: float in [0, 1]
    """

    def __init__(self, config: VAEConfig, **kwargs: Any) -> None:
        # It casts nothing itself: the networks' layers do, as the global policy says when they are
        # made. So a model trained in mixed precision computes in float32 once it has been loaded.
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.config = config

        # === Networks ===
        spec = PixelSpec(config.image_shape[-1], config.levels, config.mixtures)
        self.pixels = LIKELIHOODS[config.likelihood](ops, spec)
        # The encoder first: gradients are put together in the order of `trainable_variables`.
        self.encoder, self.decoder = self.build_networks()
        self.prior = build_prior(config)

        # === Noise, progress and metrics ===
        self.noise = keras.random.SeedGenerator(config.seed)
        # All images to train on, uint8, where a device keeps them and batches are rows of them; JAX
        # is handed them with the rows, and would make a constant of the program of these.
        self.kept_images = None
        # In how many parts TensorFlow takes a batch; see `vaeflow.model.device.share_cores`.
        self.parts = 1
        # Whether XLA compiles what each of TensorFlow's replicas finds its gradient with.
        self.jit_replicas = False
        # Steps made so far, skipped ones too; saved, so that a loaded model goes on warming up.
        self.steps = self.add_weight(name="steps", shape=(), initializer="zeros", trainable=False)
        self.skipped_in_a_row = self.add_weight(
            name="skipped_in_a_row", shape=(), initializer="zeros", trainable=False
        )
        names = ("loss", "elbo", "log_likelihood", "kl")
        self.term_metrics = [keras.metrics.Mean(name=name) for name in names]
        self.skipped_metric = keras.metrics.Sum(name="skipped_steps")

        # A model whose train_step never calls it counts as not built, and would then be saved
        # without its optimizer and refuse to export: call it once, symbolically.
        self(keras.KerasTensor((None, *self.config.image_shape), dtype="float32"))

    def build_networks(self) -> tuple[keras.Model, keras.Model]:
        """Build encoder and decoder; a subclass may have its own, of the same outputs."""
        return build_encoder(self.config), build_decoder(self.config, self.pixels.parameters)

    def call(self, images: Tensor, training: bool = False) -> dict[str, Tensor]:
        """Return posterior parameters and the reconstruction from the posterior mean."""
        posterior = self.encoder(images, training=training)
        return {**posterior, "reconstruction": self.decode(posterior["mean"], training=training)}

    def decode(self, latents: Tensor, training: bool = False) -> Tensor:
        """Decode latents to pixel means of p(x|t), `(batch, height, width, channels)` in [0, 1]."""
        return self.pixels.mean(**self.decoder(latents, training=training))

    def terms(self, images: Tensor, noise: Tensor, training: bool = False) -> Terms:
        """Encode images, draw latents and judge the images by what is decoded from them.

        Args:
            images: `(batch, height, width, channels)` in [0, 1].
            noise: draws of N(0, I), `(samples, batch, latent_dim)`.
        """
        latents, posterior = self.draw(images, noise, training=training)
        log_likelihood = self.log_likelihood(images, latents, training=training)
        return Terms(log_likelihood, latents, self.prior.correction(latents), **posterior)

    def sample(self, noise: Tensor) -> Tensor:
        """Decode draws of the prior made of draws of N(0, I), `(batch, latent_dim)`."""
        return self.decode(self.prior.sample(noise))

    def draw_pixels(self, latents: Tensor, uniform: Tensor) -> Tensor:
        """Draw an image from p(x|t) of each latent; as `decode`.

        Args:
            latents: `(batch, latent_dim)`.
            uniform: draws from (0, 1), `(batch, height, width, 1 + channels)`.
        """
        return self.pixels.draw(uniform, **self.decoder(latents))

    def draw(
        self, images: Tensor, noise: Tensor, training: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw latents of images, `(samples, batch, latent_dim)`; return them and their posterior.

        Args:
            images, noise: as for `terms`.
        """
        posterior = self.encoder(images, training=training)
        return objective.reparameterise(**posterior, noise=noise), posterior

    def log_likelihood(self, images: Tensor, latents: Tensor, training: bool = False) -> Tensor:
        """Compute log p(x|t) for several latents of each image.

        Args:
            images: `(batch, height, width, channels)`.
            latents: `(samples, batch, latent_dim)`.

        Returns:
            Nats, `(samples, batch)`.
        """
        judge = self.pixels.log_likelihood
        judge = backend().fused(judge) if training else judge
        return judge(images, **self._decode_draws(images, latents, training))

    def log_likelihood_of_places(self, images: Tensor, latents: Tensor) -> Tensor:
        """Compute what each pixel adds to `log_likelihood`.

        Returns:
            Nats, `(samples, batch, height, width)`.
        """
        places = self.pixels.log_likelihood_of_places(images, **self._decode_draws(images, latents))
        return ops.sum(places, axis=-1)

    def _decode_draws(
        self, images: Tensor, latents: Tensor, training: bool = False
    ) -> dict[str, Tensor]:
        """Decode `(samples, batch, latent_dim)` to parameters `(samples, batch, ...)`."""
        flat = ops.reshape(latents, (-1, self.config.latent_dim))
        return {
            name: ops.reshape(values, (-1, ops.shape(images)[0], *values.shape[1:]))
            for name, values in self.decoder(flat, training=training).items()
        }

    def train_step(self, *arguments: Any) -> Any:
        """Make one step of stochastic gradient ascent; the backend finds the gradient."""
        return backend().run(self, self._train, *arguments)

    def test_step(self, *arguments: Any) -> Any:
        """Compute the same terms without a step, on the same noise always: epochs compare."""
        return backend().run(self, self._test, *arguments)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Do nothing: it is built. On several devices Keras would take a batch to build it with."""

    def _train(self, data: Any) -> dict[str, Tensor]:
        images = self._observe(data)
        weight = objective.kl_weight(self.steps, self.config.kl_warmup_steps, self.config.beta)
        find = {
            "elbo": backend().elbo_gradients,
            "importance_weighted": backend().importance_weighted_gradients,
        }[self.config.objective]
        terms, loss, gradients = find(self, images, self._draw_noise(images, self.noise), weight)
        loss, gradients = backend().average([loss, gradients])

        # Slots must exist before the optimizer is applied inside a condition.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        # A single NaN applied to the weights, or kept in Adam's moments, ends a training for good;
        # a step left out costs nothing but is counted, as Child 2021 does.
        norm = backend().global_norm(gradients)
        unit = math.prod(self.config.image_shape)
        sound = (
            ops.isfinite(loss) & ops.isfinite(norm) & (norm <= self.config.gradient_limit * unit)
        )
        if self.config.gradient_clip:
            scale = ops.minimum(1.0, self.config.gradient_clip * unit / norm)
            gradients = [scale * gradient for gradient in gradients]
        backend().apply_if(sound, self.optimizer, gradients, self.trainable_variables)
        skipped = 1.0 - ops.cast(sound, "float32")
        self.steps.assign_add(1.0)
        self.skipped_in_a_row.assign(skipped * (self.skipped_in_a_row + 1.0))
        self.skipped_metric.update_state(skipped / backend().replicas())
        results = self._update_metrics(terms, loss, counted=sound)
        return {**results, self.skipped_metric.name: self.skipped_metric.result()}

    def _test(self, data: Any) -> dict[str, Tensor]:
        images = self._images_of(data)
        terms = backend().terms(self, images, self._draw_noise(images, self.config.seed))
        return self._update_metrics(terms, self.loss_of(terms, self.config.beta))

    def _observe(self, data: Any) -> Tensor:
        """Return the images of a batch, drawn black and white where the model binarises."""
        images = self._images_of(data)
        if self.config.binarize != "dynamic":
            return images
        draws = keras.random.uniform(_shape_of_all(images), seed=self.noise)
        return ops.cast(backend().replica_part(draws, axis=0) < images, "float32")

    def _images_of(self, data: Any) -> Tensor:
        """Convert what `fit` hands over to images in [0, 1].

        That is these or uint8, rows of `kept_images`, or a tuple: `(images, labels, weights)`, or
        rows and the images that they are of.
        """
        images, *others = data if isinstance(data, list | tuple) else (data,)
        if keras.backend.standardize_dtype(images.dtype) == "int32":
            images = ops.take(others[0] if others else self.kept_images, images, axis=0)
        if keras.backend.standardize_dtype(images.dtype) == "uint8":
            return ops.cast(images, "float32") / 255.0
        return images

    def switch_to_importance_weighted(self, samples: int) -> None:
        """Switch training to the importance-weighted bound, with `samples` draws an image.

        From `fit` to `fit`: the optimizer goes on as it is. Burda et al. 2016 (section 5.2) found
        that a VAE trained on so comes near one trained with the tighter bound throughout, whose
        steps cost as much more as it has draws.
        """
        self.config = replace(self.config, objective="importance_weighted", samples=samples)
        # The compiled step knows the objective it was made with: have another made.
        self.compile(
            optimizer=self.optimizer,
            jit_compile=self.jit_compile,
            steps_per_execution=self.steps_per_execution,
        )

    def loss_of(self, terms: Terms, weight: Tensor | float) -> Tensor:
        """Return minus what is maximised: nats per image, a scalar."""
        if self.config.objective == "importance_weighted":
            return -ops.mean(objective.importance_weighted_bound(self.log_weights(terms, weight)))
        kl = objective.kl_per_dimension(terms.mean, terms.log_variance)
        return -objective.weighted_elbo(
            terms.mean_log_likelihood,
            kl,
            weight,
            self.config.free_bits,
            terms.mean_prior_correction,
        )

    def log_weights(self, terms: Terms, weight: Tensor | float) -> Tensor:
        """Compute log importance weights, q's parameters held fixed for the gradient's estimate."""
        mean, log_variance = map(ops.stop_gradient, (terms.mean, terms.log_variance))
        return objective.log_importance_weights(
            terms.log_likelihood,
            terms.latents,
            mean,
            log_variance,
            weight,
            terms.prior_correction,
        )

    def _draw_noise(self, images: Tensor, seed: Any) -> Tensor:
        shape = (self.config.samples, _shape_of_all(images)[0], self.config.latent_dim)
        return backend().replica_part(keras.random.normal(shape, seed=seed), axis=1)

    def _update_metrics(
        self, terms: Terms, loss: Tensor, counted: Tensor | bool = True
    ) -> dict[str, Tensor]:
        """Add a batch to the means, unless it is not counted; return the means so far."""
        log_likelihood, kl = terms.mean_log_likelihood, terms.kl
        values = {
            "loss": ops.broadcast_to(loss, ops.shape(kl)),
            "elbo": objective.elbo(log_likelihood, kl),
            "log_likelihood": log_likelihood,
            "kl": kl,
        }
        weight = ops.cast(counted, "float32")
        for metric in self.term_metrics:
            # Weight zero alone would not do: zero times NaN is NaN.
            value = ops.where(counted, values[metric.name], 0.0)
            metric.update_state(value, sample_weight=weight * ops.ones_like(value))
        return {metric.name: metric.result() for metric in self.term_metrics}

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Reset by Keras at the start of each epoch."""
        return [*self.term_metrics, self.skipped_metric]

    def get_config(self) -> dict[str, Any]:
        """Return every constructor value, the model's own parameters side by side with Keras's."""
        return {**super().get_config(), **asdict(self.config)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VAE:
        """Make the model that `get_config` describes."""
        # A file of an older version lacks what is new, which has the value that was the only one.
        own = {f.name: config[f.name] for f in fields(VAEConfig) if f.name in config}
        others = {name: value for name, value in config.items() if name not in own}
        return cls(VAEConfig(**own), **others)


def _shape_of_all(images: Tensor) -> tuple[Tensor | int, ...]:
    """Return the shape of the whole batch, of which the images are one replica's part.

    Noise is drawn for all, so that it does not depend on how many devices there are.
    """
    count, *shape = ops.shape(images)
    return (backend().replicas() * count, *shape)


def load_vae(path: Path) -> VAE:
    """Load a `.keras` file written by `train`, without running any code it carries.

    Raises:
        BundleError: the file is not a VAE that this version can read.
    """
    try:
        model = keras.models.load_model(path, custom_objects={"Adam": Adam}, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise BundleError(f"{path}: not a readable .keras model ({error}).") from None
    if not isinstance(model, VAE):
        raise BundleError(f"{path}: holds a {type(model).__name__}, expected a vaeflow VAE.")
    return model
