"""How much gradient estimates scatter: the two of the ELBO, and the two of the tighter bound.

    python benchmarks/gradient_variance.py

trains a small VAE on the sample digits for some seconds and then, with its weights held fixed,
estimates the gradient in the posterior means of eight digits many times over, from 1 to 64 draws of
t each. Writes `docs/gradient_variance.png`: the variance of one number of that gradient (the mean
over images and latent dimensions) against the draws, by

- the score function (the log-derivative trick) and the reparameterised draw, for the ELBO;
- the plain and the doubly reparameterised gradient (DReG), for the importance-weighted bound.

Both of a pair have the same mean, as `tests/model/test_estimators.py` shows. Not measured: the time
an estimate takes, which is about the same for all four.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from vaeflow.config.model import VAEConfig
from vaeflow.model import objective
from vaeflow.model.vae import VAE

FIGURE = Path(__file__).parents[1] / "docs" / "gradient_variance.png"
REPEATS = 400
SAMPLES = (1, 2, 4, 8, 16, 32, 64)


def trained_vae(images) -> VAE:
    """A VAE after ten epochs: neither untrained nor at rest."""
    keras.utils.set_random_seed(0)
    vae = VAE(VAEConfig((8, 8, 1), latent_dim=4, filters=(16, 32), hidden_units=64))
    vae.compile(optimizer=keras.optimizers.Adam(3e-3))
    vae.fit(images, batch_size=64, epochs=10, verbose=0)
    return vae


def score_function(vae, images, mean, log_variance, noise):
    """Gradient of the expected log likelihood by the log-derivative trick."""
    latents = tf.stop_gradient(objective.reparameterise(mean, log_variance, noise))
    with tf.GradientTape() as tape:
        tape.watch(mean)
        log_density = objective.gaussian_log_density(latents, mean, log_variance)
        values = vae.log_likelihood(images, latents)
        surrogate = objective.score_function_surrogate(values, log_density)
        surrogate -= objective.kl_divergence(mean, log_variance)
    return tape.gradient(surrogate, mean)


def reparameterised(vae, images, mean, log_variance, noise):
    """Gradient of the ELBO through the draw."""
    with tf.GradientTape() as tape:
        tape.watch(mean)
        latents = objective.reparameterise(mean, log_variance, noise)
        log_likelihood = tf.reduce_mean(vae.log_likelihood(images, latents), axis=0)
        elbo = objective.elbo(log_likelihood, objective.kl_divergence(mean, log_variance))
    return tape.gradient(elbo, mean)


def plain(vae, images, mean, log_variance, noise):
    """Gradient of the importance-weighted bound through everything."""
    with tf.GradientTape() as tape:
        tape.watch(mean)
        latents = objective.reparameterise(mean, log_variance, noise)
        log_weights = objective.log_importance_weights(
            vae.log_likelihood(images, latents), latents, mean, log_variance
        )
        bound = objective.importance_weighted_bound(log_weights)
    return tape.gradient(bound, mean)


def doubly_reparameterised(vae, images, mean, log_variance, noise):
    """The same in the mean, through the latents alone."""
    latents = objective.reparameterise(mean, log_variance, noise)
    with tf.GradientTape() as tape:
        tape.watch(latents)
        log_weights = objective.log_importance_weights(
            vae.log_likelihood(images, latents), latents, mean, log_variance
        )
        bound = objective.importance_weighted_bound(log_weights)
    factor = objective.doubly_reparameterised_factor(log_weights)[..., None]
    # The latents' derivative in the mean is 1.
    return tf.reduce_sum(factor * tape.gradient(bound, latents), axis=0)


def variance(estimate, vae, images, samples: int) -> float:
    """Variance over `REPEATS` estimates, averaged over images and latent dimensions."""
    posterior = vae.encoder(images)
    repeated = [
        tf.repeat(values, REPEATS, axis=0)
        for values in (images, posterior["mean"], posterior["log_variance"])
    ]
    noise = tf.random.stateless_normal((samples, *repeated[1].shape), seed=(0, samples))
    gradients = estimate(vae, *repeated, noise)
    return float(np.reshape(gradients, (len(images), REPEATS, -1)).var(axis=1, ddof=1).mean())


def main() -> None:
    """Measure, print, draw."""
    images = (load_digits().images[..., None] / 16).astype(np.float32)
    vae = trained_vae(images)
    pairs = {
        "ELBO": {"score function": score_function, "reparameterised": reparameterised},
        "importance-weighted bound": {"plain": plain, "doubly reparam.": doubly_reparameterised},
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (title, estimates) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
        for name, estimate in estimates.items():
            values = [variance(estimate, vae, images[:8], samples) for samples in SAMPLES]
            print(f"{name:<18}" + " ".join(f"{value:10.3g}" for value in values))
            axis.loglog(SAMPLES, values, marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="draws of t", ylabel="variance, nats²")
        axis.legend()
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
