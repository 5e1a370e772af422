"""Describe an image by numbers, by what a model makes of it and by how it looks.

An odd image may have any of them too low or too high: a black frame is easier to encode than any
photograph (Nalisnick et al. 2019; Serrà et al. 2020). Among them are the ELBO's terms, the latent's
place, how surprising the parts of the image are, and the textures of the image and of what the
reconstruction leaves over. What makes an anomaly of them is in `vaeflow.bundle.anomaly`.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, Self

import numpy as np

from vaeflow.model.likelihoods import LOG_2_PI

LEVEL = 1 / 255
SCALES = (1, 2, 4)  # of textures: pixels that are averaged
WINDOWS = (10, 5, 3)  # as many fit beside each other
# Of the mixture of latents.
MOST_COMPONENTS, IMAGES_PER_NUMBER, LEAST_VARIANCE = 10, 5, 0.05


class Look(NamedTuple):
    """What a model makes of some images, from some draws of each.

    Attributes:
        means, log_variances: of q(t|x), `(count, latent_dim)`.
        kl: from the prior, nats, `(count,)`.
        surprise: minus what each place adds to log p(x|t), nats, `(count, height, width)`.
        reconstruction: from the posterior mean, in [0, 1], `(count, height, width, channels)`.
    """

    means: np.ndarray
    log_variances: np.ndarray
    kl: np.ndarray
    surprise: np.ndarray
    reconstruction: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """Minus the ELBO, nats, `(count,)`."""
        return self.kl + self.surprise.sum(axis=(1, 2))


class Places(NamedTuple):
    """What is usual at each place of an image.

    Attributes:
        surprise, surprise_scale: mean and standard deviation of `Look.surprise`, `(height, width)`.
        residual, residual_scale: of the squared residual's mean over channels, `(height, width)`.
    """

    surprise: np.ndarray
    surprise_scale: np.ndarray
    residual: np.ndarray
    residual_scale: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, look: Look) -> Self:
        """Learn it from images, float32 in [0, 1], and what a model makes of them."""
        residual = _squared_residual(images, look)
        return cls(*_mean_and_scale(look.surprise), *_mean_and_scale(residual))

    def maps(self, images: np.ndarray, look: Look) -> np.ndarray:
        """Say how unusual each place is, by surprise and by residual, in standard deviations.

        Returns:
            `(2, count, height, width)`.
        """
        surprise = (look.surprise - self.surprise) / self.surprise_scale
        residual = (_squared_residual(images, look) - self.residual) / self.residual_scale
        return np.stack([surprise, residual])


class Latents(NamedTuple):
    """Where posterior means usually lie: a mixture of normal distributions.

    The prior is where they lie together, if training came to its end; the classes of images, whose
    gaps hold what is odd, it does not know.

    Attributes:
        constants: of each component, what its log density has beside the distance, `(components,)`.
        centres: `(components, latent_dim)`.
        whitenings: which make a component's latents uncorrelated, of variance 1, `(components,
            latent_dim, latent_dim)`.
    """

    constants: np.ndarray
    centres: np.ndarray
    whitenings: np.ndarray

    @classmethod
    def of(cls, means: np.ndarray, seed: int) -> Self:
        """Learn it from posterior means, `(count, latent_dim)`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        count, size = means.shape
        to_white, centre = whitening(means), means.mean(axis=0)
        mixture = GaussianMixture(
            max(1, min(MOST_COMPONENTS, count // (IMAGES_PER_NUMBER * size))),
            reg_covar=LEAST_VARIANCE,
            max_iter=50,
            random_state=seed,
        )
        with warnings.catch_warnings():
            # Where it has got to by then is as good as where it would end.
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit((means - centre) @ to_white)
        roots = mixture.precisions_cholesky_
        log_volumes = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
        back = np.linalg.inv(to_white)
        return cls(
            np.log(mixture.weights_) + log_volumes - 0.5 * size * LOG_2_PI,
            centre + mixture.means_ @ back,
            to_white @ roots,
        )

    def surprise(self, means: np.ndarray) -> np.ndarray:
        """Return minus the log density of posterior means, up to a constant, `(count,)`."""
        away = (means[:, None, None] - self.centres[:, None]) @ self.whitenings
        logs = self.constants - 0.5 * np.square(away[:, :, 0]).sum(axis=-1)
        largest = logs.max(axis=1)
        return -largest - np.log(np.exp(logs - largest[:, None]).sum(axis=1))


def _squared_residual(images: np.ndarray, look: Look) -> np.ndarray:
    return np.square(images - look.reconstruction).mean(axis=-1)


def _mean_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each place, the latter at least a bit of all's."""
    floor = 0.05 * values.std() + 1e-6
    return values.mean(axis=0), values.std(axis=0) + floor


def whitening(values: np.ndarray) -> np.ndarray:
    """Return W, `(numbers, numbers)`, with which (values - mean) W has covariance I.

    The covariance is shrunk towards a multiple of I, by as much as few images ask for (Ledoit and
    Wolf 2004).
    """
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(values)
    variances, directions = np.linalg.eigh(covariance)
    return directions / np.sqrt(np.maximum(variances, 1e-9))


# === Statistics ===


def statistics(images: np.ndarray, look: Look, places: Places, latents: Latents) -> np.ndarray:
    """Describe images by numbers, each of which an odd image may have too low or too high.

    Args:
        images: float32 in [0, 1], `(count, height, width, channels)`.
        look: what the model makes of them.
        places, latents: what is usual.

    Returns:
        `(count, statistics)`; how many depends on the images' size and channels alone.
    """
    pixels = np.moveaxis(images, -1, 0)
    residuals = pixels - np.moveaxis(look.reconstruction, -1, 0)
    columns = [
        *_of_model(look, latents),
        *_of_levels(pixels, residuals),
        *_of_textures(pixels, residuals),
        *_of_parts(pixels.mean(axis=0), residuals.mean(axis=0), places.maps(images, look)),
        *_of_lines(pixels.mean(axis=0)),
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def _of_model(look: Look, latents: Latents) -> list[np.ndarray]:
    """Return the ELBO's terms, and where and how sharp the latent is."""
    surprise = look.surprise.sum(axis=(1, 2))
    return [
        look.kl + surprise,
        latents.surprise(look.means),
        look.kl,
        surprise,
        look.log_variances.sum(axis=1),
        np.log(np.square(look.means).sum(axis=1) + 1e-6),
    ]


def _of_levels(pixels: np.ndarray, residuals: np.ndarray) -> list[np.ndarray]:
    """Return how bright the channels are, and how much of the image is black, white or even."""
    whole = (-2, -1)
    few = 0.5 / math.prod(pixels.shape[-2:])

    def share(of: np.ndarray) -> np.ndarray:
        return np.log(of.mean(axis=(0, *whole)) + few)

    return [
        *pixels.mean(axis=whole),
        *np.log(pixels.std(axis=whole) + 0.5 * LEVEL),
        *pixels.min(axis=whole),
        *pixels.max(axis=whole),
        *residuals.mean(axis=whole),
        share(pixels < 2 * LEVEL),
        share(pixels > 1 - 2 * LEVEL),
        *(share(_steps(pixels, axis) == 0) for axis in whole if pixels.shape[axis] > 1),
    ]


def _of_textures(pixels: np.ndarray, residuals: np.ndarray) -> list[np.ndarray]:
    """Return how strong differences of neighbours are, and differences of these, at some scales.

    Each of the image, of its residual, and of the differences between their channels.
    """
    channels = len(pixels)
    planes = [pixels, residuals]
    if channels > 1:
        planes += [_steps(pixels, 0), _steps(residuals, 0)]
    values = np.concatenate(planes)
    sizes = [len(group) for group in planes]
    found = []
    for scale in SCALES:
        if scale > 1:
            values = _halved(values)
        if min(values.shape[-2:]) < 3:
            break
        for axis in (-2, -1):
            once = _steps(values, axis)
            found += [_power(once), _power(_steps(once, axis))]
    starts = np.cumsum([0, *sizes[:-1]])
    return [
        energy / size
        for powers in found
        for energy, size in zip(np.add.reduceat(powers, starts), sizes, strict=True)
    ]


def _of_parts(grey: np.ndarray, residual: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    """Return the oddest and the plainest part, by windows of some sizes."""
    edge = min(grey.shape[-2:])
    sizes = sorted({min(edge, max(2, edge // count)) for count in WINDOWS})
    whole = (-2, -1)
    sums = integral(maps)
    found = []
    for size in sizes:
        means = window_means(sums, size)
        found += [*np.log1p(np.maximum(means.max(axis=whole), -0.9)), *means.min(axis=whole)]
    both = np.stack([grey, residual])
    size = sizes[len(sizes) // 2]
    sums = integral(np.concatenate([both, np.square(both)]))
    means = window_means(sums, size)
    variances = np.maximum(means[2:] - np.square(means[:2]), 0)
    found += [*_root(variances.min(axis=whole)), *_root(variances.max(axis=whole))]
    return found


def _of_lines(grey: np.ndarray) -> list[np.ndarray]:
    """Return how much the straightest edges stand out, which whatever was pasted has.

    Of each line between two rows, or columns, how much more it steps than the lines beside it, in
    the mean over its pixels of the step's logarithm: the most of all lines, and of three.
    """
    found = []
    for axis in (1, 2):
        steps = np.log(np.abs(_steps(grey, axis)) + 0.5 * LEVEL)
        if min(steps.shape[1:]) < 3:
            continue
        lines = steps.mean(axis=3 - axis)
        more = lines[:, 1:-1] - 0.5 * (lines[:, :-2] + lines[:, 2:])
        highest = np.sort(more, axis=1)[:, -3:]
        found += [highest[:, -1], highest.mean(axis=1)]
    return found


def _steps(values: np.ndarray, axis: int) -> np.ndarray:
    return np.diff(values, axis=axis)


def _power(values: np.ndarray) -> np.ndarray:
    """Return the logarithm of the root mean square of each plane, `(planes, count)`."""
    return _root(np.einsum("pnhw,pnhw->pn", values, values) / math.prod(values.shape[-2:]))


def _root(squares: np.ndarray) -> np.ndarray:
    return 0.5 * np.log(squares + np.square(0.5 * LEVEL))


def _halved(values: np.ndarray) -> np.ndarray:
    """Average 2x2 pixels."""
    height, width = (length // 2 * 2 for length in values.shape[-2:])
    rows = values[..., 0:height:2, :width] + values[..., 1:height:2, :width]
    return 0.25 * (rows[..., 0::2] + rows[..., 1::2])


def integral(values: np.ndarray) -> np.ndarray:
    """Return sums over all that is above and to the left, with a row and a column of zeros."""
    *leading, height, width = values.shape
    sums = np.zeros((*leading, height + 1, width + 1))
    np.cumsum(values, axis=-2, out=sums[..., 1:, 1:])
    np.cumsum(sums[..., 1:, 1:], axis=-1, out=sums[..., 1:, 1:])
    return sums


def window_means(sums: np.ndarray, size: int) -> np.ndarray:
    """Return means over all windows of `size` x `size`, from `_integral`."""
    down = sums[..., size:, :] - sums[..., :-size, :]
    return (down[..., size:] - down[..., :-size]) / size**2
