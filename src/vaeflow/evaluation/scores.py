"""Anomaly scores, and what is usual among images that the model was not trained on.

A score is minus the ELBO of an image as it comes, never binarised, in nats: what
`vaeflow.bundle.runtime.Bundle.score` answers, so that its quantiles can go with the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from keras import ops

from vaeflow.bundle.reference import write_reference
from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.evaluation.bounds import draws_at_once, scaled_blocks
from vaeflow.model.backend import backend
from vaeflow.model.vae import VAE

REFERENCE_IMAGES = 5_000
LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def compute_scores(vae: VAE, images: np.ndarray) -> np.ndarray:
    """The score of each image, from the draws that a service makes by default.

    Args:
        vae: the model.
        images: uint8, `(images, height, width, channels)`.

    Returns:
        Nats, float32 `(images,)`; larger is stranger.
    """
    # The same for every image, as in Bundle.score: a score does not depend on its neighbours.
    shape = (SCORE_SAMPLES, 1, vae.latent_dim)
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    score = backend().compiled(
        lambda pixels: -vae.terms(pixels, noise).elbo, [(None, *vae.image_shape)]
    )
    at_once = max(1, draws_at_once(vae) // SCORE_SAMPLES)
    blocks = scaled_blocks(images, at_once)
    return np.concatenate([ops.convert_to_numpy(score(pixels)) for pixels in blocks])


def quantiles(scores: np.ndarray) -> Mapping[str, float]:
    """Which score a share of the images stays below: share, "0" to "1", to score in nats."""
    return {f"{level:g}": float(np.quantile(scores, level)) for level in LEVELS}


def keep_reference(path: Path, vae: VAE, images: np.ndarray, scores: np.ndarray, seed: int) -> None:
    """Write what drift is measured against: latent means and scores of some images.

    Args:
        path: the file to write.
        vae: the model.
        images: uint8, `(images, height, width, channels)`; 5,000 of them at most are taken.
        scores: of all of them, `(images,)`.
        seed: of the choice.
    """
    size = min(REFERENCE_IMAGES, len(images))
    rows = np.sort(np.random.default_rng(seed).choice(len(images), size, replace=False))
    means = [
        ops.convert_to_numpy(vae.encoder(pixels)["mean"])
        for pixels in scaled_blocks(images[rows], draws_at_once(vae))
    ]
    write_reference(path, np.concatenate(means), scores[rows])
