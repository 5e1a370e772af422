"""The bounds of many images as a few numbers, and what these say of the model."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from vaeflow.evaluation.bounds import Bounds, active_units
from vaeflow.model.likelihoods import is_proper
from vaeflow.model.vae import VAE

MEANS = ("elbo", "log_likelihood", "kl", "importance_weighted_bound")
COLLAPSED_SHARE = 0.1


def summarise(bounds: Bounds, vae: VAE, images: np.ndarray) -> dict[str, float]:
    """Means over the images with their standard errors, in nats per image, and counts.

    `rate` and `distortion` are the model's point in the plane of Alemi et al. 2018: the KL term and
    minus the log likelihood. The standard error tells how far the mean over other images of the
    same kind may be; with one image there is none.

    Args:
        bounds: of the images.
        vae: the model.
        images: uint8, as the model saw them.
    """
    metrics = {}
    for name in MEANS:
        values = getattr(bounds, name)
        metrics[name] = float(values.mean())
        if len(values) > 1:
            error = values.std(ddof=1) / math.sqrt(len(values))
            metrics[f"{name}_standard_error"] = float(error)
    metrics |= {
        "rate": metrics["kl"],
        "distortion": -metrics["log_likelihood"],
        "active_units": int(np.count_nonzero(active_units(bounds.means))),
        "images": len(images),
        "proper_likelihood": int(is_proper(vae.likelihood, images)),
    }
    if vae.likelihood == "discretized_logistic":
        nats = -metrics["importance_weighted_bound"]
        metrics["bits_per_dimension"] = nats / math.log(2) / math.prod(vae.image_shape)
    return metrics


def why_collapsed(active: int, latent_dim: int) -> str | None:
    """Tell a posterior that ignores the image, or nearly; None for one that does not.

    Args:
        active: how many latent dimensions carry information.
        latent_dim: how many there are.
    """
    if active == 0:
        return (
            "posterior collapse: no latent dimension carries information, the decoder does without "
            "them. Set train.kl_warmup_epochs or train.free_bits, or lower train.beta."
        )
    if active < COLLAPSED_SHARE * latent_dim:
        return (
            f"posterior collapse: only {active} of {latent_dim} latent dimensions carry "
            "information. A smaller train.latent_dim would do as well; train.kl_warmup_epochs or "
            "train.free_bits may bring more of them into use."
        )
    return None


def write_dimensions(path: Path, bounds: Bounds) -> None:
    """One row a latent dimension: mean KL in nats, variance of the posterior means, active or not.

    Args:
        path: the CSV to write.
        bounds: of the images.
    """
    columns = (
        bounds.kl_per_dimension.mean(axis=0),
        bounds.means.var(axis=0),
        active_units(bounds.means).astype(int),
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("dimension", "kl", "mean_variance", "active"))
        for index, row in enumerate(zip(*columns, strict=True)):
            writer.writerow((index, *(value.item() for value in row)))
