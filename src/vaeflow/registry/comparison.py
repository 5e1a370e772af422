"""Whether one model is better than another, on the same images and the same noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vaeflow.bundle.runtime import Bundle

STANDARD_ERRORS = 2


class Comparison(NamedTuple):
    """Two importance-weighted bounds and their paired difference, in nats per image.

    Attributes:
        challenger, champion: the means over the images.
        difference: challenger - champion; larger is better.
        standard_error: of that mean, from the differences image by image. Most of what makes one
            image harder than another is the same for both models, and cancels.
        images: how many.
    """

    challenger: float
    champion: float
    difference: float
    standard_error: float
    images: int

    def is_better(self, min_improvement: float) -> bool:
        """Whether the difference is large enough, and more than chance would make it."""
        return (
            self.difference >= min_improvement
            and self.difference > STANDARD_ERRORS * self.standard_error
        )

    def __str__(self) -> str:
        return (
            f"{self.challenger:.3f} nats against {self.champion:.3f}: a difference of "
            f"{self.difference:+.3f} with a standard error of {self.standard_error:.3f}, "
            f"on {self.images:,} test images"
        )


def compare(challenger: Bundle, champion: Bundle, images: np.ndarray, samples: int) -> Comparison:
    """Compare two models.

    Args:
        challenger, champion: models of the same images, under likelihoods that compare.
        images: uint8, `(count, height, width, channels)`; at least two.
        samples: draws per image in the bound.
    """
    ours, theirs = (
        model.importance_weighted_bound(images, samples).astype(np.float64)
        for model in (challenger, champion)
    )
    differences = ours - theirs
    return Comparison(
        challenger=float(ours.mean()),
        champion=float(theirs.mean()),
        difference=float(differences.mean()),
        standard_error=float(differences.std(ddof=1) / math.sqrt(len(differences))),
        images=len(differences),
    )
