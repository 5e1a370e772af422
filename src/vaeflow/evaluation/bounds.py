"""The ELBO and the importance-weighted bound of many images, in blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from keras import ops

from vaeflow.data.batches import batches
from vaeflow.model import objective
from vaeflow.model.vae import VAE

IMAGES_PER_BLOCK = 64
# Pixel values decoded at once: bounds memory whatever the image size and the number of samples.
PIXELS_PER_BLOCK = 4_000_000
ACTIVE_VARIANCE = 0.01


class Bounds(NamedTuple):
    """Per image, in nats, shape `(images,)`; and the posterior means, `(images, latent_dim)`."""

    elbo: np.ndarray
    log_likelihood: np.ndarray
    kl: np.ndarray
    importance_weighted_bound: np.ndarray
    means: np.ndarray


def compute_bounds(vae: VAE, images: np.ndarray, samples: int, seed: int) -> Bounds:
    """Estimate both bounds of each image from the same posterior draws.

    Args:
        vae: the model.
        images: uint8, `(images, height, width, channels)`.
        samples: draws per image; the ELBO's expectation is their mean, the importance-weighted
            bound (Burda et al. 2016) the log of their mean weight.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, min(IMAGES_PER_BLOCK, PIXELS_PER_BLOCK // int(np.prod(images.shape[1:]))))
    blocks = [_block(vae, x, samples, generator) for x in batches(images, at_once)]
    return Bounds(*(np.concatenate(values) for values in zip(*blocks, strict=True)))


def _block(vae: VAE, images, samples: int, generator: np.random.Generator) -> Bounds:
    posterior = vae.encoder(images)
    mean, log_variance = posterior["mean"], posterior["log_variance"]
    kl = objective.kl_divergence(mean, log_variance)

    at_once = max(1, PIXELS_PER_BLOCK // int(np.prod(images.shape)))
    log_likelihoods, log_weights = [], []
    for start in range(0, samples, at_once):
        shape = (min(at_once, samples - start), *mean.shape)
        noise = generator.standard_normal(shape, dtype=np.float32)
        latents = objective.reparameterise(mean, log_variance, noise)
        log_likelihood = vae.log_likelihood(images, latents)
        log_likelihoods.append(log_likelihood)
        log_weights.append(
            objective.log_importance_weights(log_likelihood, latents, mean, log_variance)
        )
    log_likelihood = ops.mean(ops.concatenate(log_likelihoods), axis=0)
    bound = objective.importance_weighted_bound(ops.concatenate(log_weights))
    values = (objective.elbo(log_likelihood, kl), log_likelihood, kl, bound, mean)
    return Bounds(*map(ops.convert_to_numpy, values))


def active_units(means: np.ndarray) -> int:
    """Latent dimensions that carry information: Var_x E_q[t] > 0.01 (Burda et al. 2016, sec. 5.2).

    Args:
        means: posterior means, `(images, latent_dim)`.
    """
    return int(np.count_nonzero(means.var(axis=0) > ACTIVE_VARIANCE))
