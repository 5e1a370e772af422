"""Pictures of what a model does, and of how it got there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from keras import ops

from vaeflow.common.pictures import SMALLEST_TILE, grid, interleaved, shrunk, write_png
from vaeflow.data.images import Images
from vaeflow.data.splits import evenly
from vaeflow.evaluation.anomalies import Noticed
from vaeflow.model.vae import VAE

SHEET, LARGEST_TILE = 1_600, 192  # pixels: a sheet fits a page, whatever the images' size
MOST_COLUMNS, PAIR_ROWS = 12, 3
SHOWN_SAMPLES = 64
SHOWN_DIMENSIONS = 10
STEPS = np.linspace(-3, 3, 11, dtype=np.float32)
SHOWN_POINTS = 5_000
NAMED_LABELS = 20  # more have a colour bar instead of a legend
MOST_BINS = 40
# Told apart by the colour-blind, too (Okabe and Ito 2008), and by shape where there are more.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "o^s"
LINES = ("-", "--", ":", "-.")


def draw_reconstructions(path: Path, vae: VAE, images: Images) -> None:
    """Draw rows of test images, each with the row of its reconstructions below."""
    tile = min(LARGEST_TILE, max(SMALLEST_TILE, *images.shape[1:3]))
    columns = min(MOST_COLUMNS, SHEET // tile)
    images = np.asarray(images[evenly(len(images), PAIR_ROWS * columns)])
    outputs = ops.convert_to_numpy(vae(images.astype(np.float32) / 255)["reconstruction"])
    above, below = (shrunk(shown, LARGEST_TILE) for shown in (images, outputs))
    write_png(path, interleaved(above, below, columns))


def draw_samples(path: Path, vae: VAE, seed: int) -> None:
    """Draw pixel means decoded from draws of the prior."""
    shape = (SHOWN_SAMPLES, vae.config.latent_dim)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    write_png(path, grid(shrunk(ops.convert_to_numpy(vae.sample(noise)), LARGEST_TILE)))


def draw_training_curves(path: Path, history: Path) -> None:
    """Plot the ELBO and its two terms against the epoch, for both splits.

    Args:
        path: the PNG to write.
        history: the CSV that `train` wrote.
    """
    from matplotlib.figure import Figure

    table = np.genfromtxt(history, delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, term in zip(axes, ("elbo", "log_likelihood", "kl"), strict=True):
        for number, (prefix, label) in enumerate((("", "train"), ("validation_", "validation"))):
            values = table[prefix + term]
            axis.plot(table["epoch"], values, LINES[number], color=PALETTE[number], label=label)
        axis.set(title=term.replace("_", " "), xlabel="epoch")
    axes[0].set_ylabel("nats per image")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def draw_traversals(
    path: Path, vae: VAE, latent: np.ndarray, kl: np.ndarray, spread: np.ndarray
) -> None:
    """Draw a row a latent dimension, moved from -3 to 3 with all others held as they are.

    That is in the unit of its spread: one, where the prior is N(0, I). Rows and columns say so.

    Args:
        path: the PNG to write.
        vae: the model.
        latent: where to start from, `(latent_dim,)`.
        kl: mean KL of each dimension, `(latent_dim,)`; those with most are shown, most on top.
        spread: of each dimension, `(latent_dim,)`.
    """
    from matplotlib.figure import Figure

    shown = np.argsort(-kl, kind="stable")[:SHOWN_DIMENSIONS]
    latents = np.tile(np.float32(latent), (len(shown), len(STEPS), 1))
    for row, dimension in zip(latents, shown, strict=True):
        row[:, dimension] = STEPS * spread[dimension]
    means = ops.convert_to_numpy(vae.decode(latents.reshape(-1, vae.config.latent_dim)))
    tiles = shrunk(means, SHEET // len(STEPS))
    sheet = grid(tiles, columns=len(STEPS))
    rows, columns = len(shown), len(STEPS)
    names = [f"{dimension}: {kl[dimension]:.2f} nats" for dimension in shown]
    figure = Figure(figsize=(8, 0.8 + 6.5 * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet)
    axis.set_yticks((np.arange(rows) + 0.5) * sheet.shape[0] / rows, names)
    steps = [f"{step:+.1f}" for step in STEPS]
    axis.set_xticks((np.arange(columns) + 0.5) * sheet.shape[1] / columns, steps)
    axis.tick_params(length=0)
    axis.set(
        xlabel="moved by so many standard deviations of the prior",
        title=f"the {rows} of {len(kl)} latent dimensions with the most KL",
    )
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=200)


def plane(means: np.ndarray) -> np.ndarray:
    """Project latent means onto the plane in which they vary most (principal components).

    Args:
        means: `(images, latent_dim)`; of two dimensions they are returned as they are, one is
            given a second axis of zeros.

    Returns:
        `(images, 2)`.
    """
    if means.shape[1] == 2:
        return means
    if means.shape[1] == 1:
        return np.hstack([means, np.zeros_like(means)])
    centred = means - means.mean(axis=0)
    # Of the covariance, which is small however many images there are.
    _, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, :-3:-1]


def draw_latent_map(path: Path, means: np.ndarray, labels: np.ndarray | None) -> None:
    """Plot the posterior means of images in a plane, coloured by label where there are labels.

    Args:
        path: the PNG to write.
        means: `(images, latent_dim)`.
        labels: text, `(images,)`, or None.
    """
    from matplotlib.figure import Figure

    rows = evenly(len(means), SHOWN_POINTS)
    points = plane(means)[rows]
    labels = None if labels is None else labels[rows]
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axis = figure.subplots()
    if labels is None:
        axis.scatter(points[:, 0], points[:, 1], s=8, color=PALETTE[0])
    elif len(names := np.unique(labels)) <= NAMED_LABELS:
        for index, name in enumerate(names):
            chosen = points[labels == name]
            marker = MARKERS[index // len(PALETTE)]
            colour = PALETTE[index % len(PALETTE)]
            axis.scatter(chosen[:, 0], chosen[:, 1], s=8, color=colour, marker=marker, label=name)
        figure.legend(loc="outside right upper", title="label", markerscale=2)
    else:
        places = np.searchsorted(names, labels)
        figure.colorbar(
            axis.scatter(points[:, 0], points[:, 1], c=places, s=8, cmap="cividis"),
            label="label's place among all",
        )
    what = "latent mean" if means.shape[1] <= 2 else "principal component of the latent means"
    axis.set(xlabel=f"first {what}", ylabel=f"second {what}")
    figure.savefig(path, dpi=120)


def draw_latent_dimensions(path: Path, kl: np.ndarray) -> None:
    """Plot how many nats each latent dimension carries, most first.

    Args:
        path: the PNG to write.
        kl: mean KL of each dimension, `(latent_dim,)`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.bar(np.arange(1, len(kl) + 1), np.sort(kl)[::-1], color=PALETTE[0])
    axis.set(xlabel="latent dimension, by rank", ylabel="KL, nats per image")
    figure.savefig(path, dpi=120)


def draw_noticed(path: Path, noticed: Noticed) -> None:
    """Draw each way to spoil an image, and plot how well the anomaly and the score notice it."""
    from matplotlib.figure import Figure

    kinds = noticed.kinds[::-1]
    figure = Figure(figsize=(8, 0.5 * len(kinds) + 1), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(kinds))
    errors = [kind.standard_error for kind in kinds]
    areas = [kind.auroc for kind in kinds]
    axis.barh(rows, areas, xerr=errors, height=0.6, color=PALETTE[5], label="anomaly")
    axis.plot([kind.score_auroc for kind in kinds], rows, "k|", ms=12, label="minus the ELBO")
    axis.axvline(0.5, color="grey", linestyle=":", label="chance")
    axis.set_yticks(rows, [kind.severity for kind in kinds])
    axis.set(xlim=(0, 1), ylim=(-0.6, len(kinds) - 0.4), xlabel="AUROC against test images")
    for row, kind in zip(rows, kinds, strict=True):
        place = axis.inset_axes((1.02, row - 0.45, 0.12, 0.9), transform=axis.transData)
        place.set(xticks=[], yticks=[])  # and a frame, for white images
        place.imshow(grid(kind.example[None], columns=1))
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def draw_scores(path: Path, scores: Mapping[str, np.ndarray], usual: Mapping[str, float]) -> None:
    """Plot a histogram of the anomaly scores, with two of the quantiles in the bundle.

    Args:
        path: the PNG to write.
        scores: by split, nats, `(images,)`.
        usual: by share, from `vaeflow.evaluation.bounds.quantiles`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    # Of few images few bins: as many as the smallest split's square root.
    bins = int(np.clip(math.sqrt(min(map(len, scores.values()))) + 1, 5, MOST_BINS))
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=bins)
    for number, (split, values) in enumerate(scores.items()):
        axis.hist(
            values,
            list(edges),
            density=True,
            histtype="step",
            color=PALETTE[number],
            linestyle=LINES[number],
            label=f"{split}, {len(values):,} images",
        )
    for share, style in (("0.95", "--"), ("0.99", ":")):
        label = f"{float(share):.0%} of validation score less"
        axis.axvline(usual[share], color="black", linestyle=style, label=label)
    axis.set(xlabel="score: minus the ELBO, nats", ylabel="density")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)
