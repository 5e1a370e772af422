"""The NumPy twins of `vaeflow.model.likelihoods`, for serving; a test holds them together.

Parameters come as the decoder gives them; see there for shapes and units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HALF_LEVEL = np.float32(0.5 / 255)
LOG_2_PI = np.float32(math.log(2 * math.pi))
PIXEL_AXES = (-3, -2, -1)


class Likelihood(NamedTuple):
    """`log_likelihood(images, **parameters)`, `mean(**parameters)`, and the parameters' names."""

    parameters: tuple[str, ...]
    log_likelihood: Callable[..., np.ndarray]
    mean: Callable[..., np.ndarray]


def _softplus(values):
    # Forty times as fast as np.logaddexp(0, values), which took longer than the decoder.
    return np.maximum(values, 0) + np.log1p(np.exp(-np.abs(values)))


def _bernoulli_log_likelihood(images, logits):
    return (images * logits - _softplus(logits)).sum(axis=PIXEL_AXES)


def _bernoulli_mean(logits):
    # Stable on both sides, where exp(-logits) would overflow for very negative ones.
    return np.exp(-_softplus(-logits))


def _gaussian_log_likelihood(images, mean, log_scale):
    standardised = (images - mean) * np.exp(-log_scale)
    return -(0.5 * (LOG_2_PI + np.square(standardised)) + log_scale).sum(axis=PIXEL_AXES)


def _gaussian_mean(mean, log_scale):
    return mean


def _logistic_log_likelihood(images, location, log_scale):
    precision = np.exp(-log_scale)
    below_upper = -_softplus(-(images + HALF_LEVEL - location) * precision)
    above_lower = -_softplus((images - HALF_LEVEL - location) * precision)
    between = np.log(-np.expm1(-2 * HALF_LEVEL * precision))
    levels = np.select(
        [images < HALF_LEVEL, images > 1 - HALF_LEVEL],
        [below_upper, above_lower],
        below_upper + above_lower + between,
    )
    return levels.sum(axis=PIXEL_AXES)


def _logistic_mean(location, log_scale):
    scale = np.exp(log_scale)
    mean = scale * (_softplus(location / scale) - _softplus((location - 1) / scale))
    return np.clip(mean, 0, 1)


LIKELIHOODS = {
    "bernoulli": Likelihood(("logits",), _bernoulli_log_likelihood, _bernoulli_mean),
    "gaussian": Likelihood(("mean", "log_scale"), _gaussian_log_likelihood, _gaussian_mean),
    "discretized_logistic": Likelihood(
        ("location", "log_scale"), _logistic_log_likelihood, _logistic_mean
    ),
}
