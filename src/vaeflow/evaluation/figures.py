"""Pictures of what a model does, and of how it got there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from keras import ops

from vaeflow.model.vae import VAE
from vaeflow.pictures import grid, pairs, write_png

SHOWN_PAIRS = 36
SHOWN_SAMPLES = 64


def draw_reconstructions(path: Path, vae: VAE, images: np.ndarray) -> None:
    """Rows of test images, each with the row of its reconstructions below."""
    images = np.asarray(images[:SHOWN_PAIRS])
    outputs = vae(images.astype(np.float32) / 255)
    write_png(path, pairs(images, ops.convert_to_numpy(outputs["reconstruction"])))


def draw_samples(path: Path, vae: VAE, seed: int) -> None:
    """Pixel means decoded from draws of the prior."""
    shape = (SHOWN_SAMPLES, vae.latent_dim)
    latents = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    write_png(path, grid(ops.convert_to_numpy(vae.decode(latents))))


def draw_training_curves(path: Path, history: Path) -> None:
    """ELBO, and its two terms, against the epoch, for both splits.

    Args:
        path: the PNG to write.
        history: the CSV that `train` wrote.
    """
    from matplotlib.figure import Figure

    table = np.genfromtxt(history, delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, term in zip(axes, ("elbo", "log_likelihood", "kl"), strict=True):
        for prefix, label in (("", "train"), ("validation_", "validation")):
            axis.plot(table["epoch"], table[prefix + term], label=label)
        axis.set(title=term.replace("_", " "), xlabel="epoch")
    axes[0].set_ylabel("nats per image")
    axes[0].legend()
    figure.savefig(path, dpi=120)
