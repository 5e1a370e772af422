"""Bounds of many images, kept as they are found: an evaluation that was killed goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vaeflow.common.files import atomic_file
from vaeflow.evaluation.bounds import compute_bounds
from vaeflow.model.vae import VAE

KEPT = ("importance_weighted_bound", "elbo", "kl")


def kept_bounds(
    vae: VAE, folder: Path, images: np.ndarray, samples: int, seed: int, at_once: int = 100
) -> dict[str, np.ndarray]:
    """Bounds of each image in nats, by name.

    Args:
        vae: the model.
        folder: where those found before are, and all are kept.
        images: uint8, `(images, height, width, channels)`.
        samples: per image.
        seed: of the draws; each part of the images adds its first row to it.
        at_once: images between two writes; the draws depend on it.
    """
    path = folder / f"bounds-{samples}-samples-seed-{seed}.npz"
    done = dict(np.load(path)) if path.exists() else {key: np.empty(0) for key in KEPT}
    for start in range(len(done["elbo"]), len(images), at_once):
        block = compute_bounds(vae, images[start : start + at_once], samples, seed + start)
        done = {key: np.concatenate([done[key], getattr(block, key)]) for key in KEPT}
        with atomic_file(path) as fresh, fresh.open("wb") as file:
            np.savez(file, **done)
        nats = -done["importance_weighted_bound"].mean()
        print(f"{len(done['elbo'])} of {len(images)} images: {nats:.3f} nats", flush=True)
    return {key: values[: len(images)] for key, values in done.items()}
