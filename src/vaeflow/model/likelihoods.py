"""Likelihoods p(x|t) of an image's pixels, independent given the decoder's answer.

Each says which parameters the decoder must give, the log probability of an image under them, and
the image to show for them. `vaeflow.bundle.runtime` holds the same in NumPy, for serving.

Pixels are in [0, 1]. Parameters are `(..., batch, height, width, channels)`, with any number of
leading sample axes; those that are one number a channel have height and width 1. Log likelihoods
are in nats per image, `(..., batch)`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from keras import ops

from vaeflow.data.images import Images
from vaeflow.model.objective import LOG_2_PI, Tensor

HALF_LEVEL = 0.5 / 255
PIXEL_AXES = (-3, -2, -1)


class Parameter(NamedTuple):
    """One output of the decoder.

    Attributes:
        per: a number for every `pixel` and channel, depending on t, or one for each `channel`,
            learned but independent of t.
        bounds: what it stays between, smoothly; None for any value.
        start: where it begins, before training.
    """

    per: Literal["pixel", "channel"] = "pixel"
    bounds: tuple[float, float] | None = None
    start: float = 0.0


class Bernoulli:
    """Binary pixels. For grey ones the value is a cross-entropy, no likelihood of the data."""

    parameters: ClassVar = {"logits": Parameter()}

    @staticmethod
    def log_likelihood(images: Tensor, logits: Tensor) -> Tensor:
        """Compute log p(x|t) from logits."""
        # log p = x log sigmoid(l) + (1 - x) log sigmoid(-l) = x l - softplus(l)
        return ops.sum(images * logits - ops.softplus(logits), axis=PIXEL_AXES)

    @staticmethod
    def mean(logits: Tensor) -> Tensor:
        """Return the probability of a white pixel."""
        return ops.sigmoid(logits)


class Gaussian:
    """Real-valued pixels: a mean for each, and a learned scale for each channel.

    A density, not a probability: of pixels that can be predicted exactly it grows without bound as
    the scale shrinks. The scale stays above exp(-6), about half a grey level of 8 bits. (One
    learned scale, not one a pixel: Rybkin, Daniilidis and Levine 2021.)
    """

    parameters: ClassVar = {
        "mean": Parameter(bounds=(0.0, 1.0), start=0.5),
        "log_scale": Parameter(per="channel", bounds=(-6.0, 1.0), start=-1.5),
    }

    @staticmethod
    def log_likelihood(images: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Compute the log density of the pixels in [0, 1]."""
        standardised = (images - mean) * ops.exp(-log_scale)
        return -ops.sum(0.5 * (LOG_2_PI + ops.square(standardised)) + log_scale, axis=PIXEL_AXES)

    @staticmethod
    def mean(mean: Tensor, log_scale: Tensor) -> Tensor:
        """Return the mean itself."""
        return mean


class DiscretizedLogistic:
    """8-bit pixels: the mass that a logistic distribution has within half a level of each.

    A probability of the 256 levels; black and white take the tails (Kingma et al. 2016;
    Salimans et al. 2017, sec. 2.1).
    """

    parameters: ClassVar = {
        "location": Parameter(start=0.5),
        "log_scale": Parameter(bounds=(-8.0, 1.0), start=-2.0),
    }

    @staticmethod
    def log_likelihood(images: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Compute the log probability of the levels.

        With a and b the standardised upper and lower edge of a level, sigmoid(a) - sigmoid(b) =
        sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logarithm loses no digits anywhere.
        """
        precision = ops.exp(-log_scale)
        below_upper = -ops.softplus(-(images + HALF_LEVEL - location) * precision)
        above_lower = -ops.softplus((images - HALF_LEVEL - location) * precision)
        between = ops.log(-ops.expm1(-2 * HALF_LEVEL * precision))
        black, white = images < HALF_LEVEL, images > 1 - HALF_LEVEL
        middle = below_upper + above_lower + between
        levels = ops.where(black, below_upper, ops.where(white, above_lower, middle))
        return ops.sum(levels, axis=PIXEL_AXES)

    @staticmethod
    def mean(location: Tensor, log_scale: Tensor) -> Tensor:
        """Return the mean of the logistic cut off at 0 and 1: that of the levels, to half a level.

        It is the integral of sigmoid((location - u) / scale) over u from 0 to 1.
        """
        scale = ops.exp(log_scale)
        upper, lower = location / scale, (location - 1) / scale
        return ops.clip(scale * (ops.softplus(upper) - ops.softplus(lower)), 0.0, 1.0)


LIKELIHOODS: dict[str, Any] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
}


def is_binary(images: Images, block: int = 4096) -> bool:
    """Return whether every pixel of uint8 images is 0 or 255; stop at the first other."""
    return all(
        np.isin(images[start : start + block], (0, 255)).all()
        for start in range(0, len(images), block)
    )


def is_proper(likelihood: str, images: Images) -> bool:
    """Return whether the likelihood is one of these images: not Bernoulli on grey pixels.

    Args:
        likelihood: a name of `LIKELIHOODS`.
        images: uint8, as the model sees them, binarised where it asks for that.
    """
    return likelihood != "bernoulli" or is_binary(images)


def likelihood_warning(likelihood: str, images: Images) -> str | None:
    """Return why a likelihood is a poor choice for these images, and a better one; else None.

    Args:
        likelihood: a name of `LIKELIHOODS`.
        images: uint8, as for `is_proper`.
    """
    if not is_proper(likelihood, images):
        return (
            "likelihood bernoulli on grey pixels: the bound is then a cross-entropy, good for "
            "comparing models on these images but no likelihood of them. Set train.binarize to "
            "static or dynamic, or train.likelihood to discretized_logistic."
        )
    if likelihood == "gaussian" and is_binary(images):
        return (
            "likelihood gaussian on pixels that are all black or white: their density grows "
            "without bound as the scale shrinks. Set train.likelihood to bernoulli."
        )
    if likelihood == "discretized_logistic" and is_binary(images):
        return (
            "likelihood discretized_logistic on pixels that are all black or white: 254 of its 256 "
            "levels never occur. Set train.likelihood to bernoulli."
        )
    return None
