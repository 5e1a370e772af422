"""Whether one model is better than another, on the same images and the same noise.

One such comparison errs by chance now and then; a model that is trained anew every night is
compared hundreds of times a year, on the same test images. So the chance of any error at all is
fixed beforehand and spent on the comparisons, a smaller part on each than on the one before
(alpha-spending; Foster and Stine 2008, Tian and Ramdas 2021). The parts add up to no more than the
whole, however many comparisons there are and however they depend on each other. That the champion
was itself chosen by these images makes it look better on them than it is, and a later error less
likely, not more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vaeflow.bundle.runtime import Bundle

# After so many tries, a year of nights, half of what may be spent is spent. Fewer favour the first
# tries, more the later ones.
HALF_SPENT = 365
POWER = 0.9


def level_of_try(attempt: int, whole: float) -> float:
    """Return the error that a try may spend: `whole` times h / ((i + h - 1) (i + h)).

    Args:
        attempt: i, from 1.
        whole: what all tries together may spend, however many; half of it in the first h = 365.
    """
    before = attempt - 1 + HALF_SPENT
    return whole * HALF_SPENT / (before * (before + 1))


def error_spent_by(attempt: int, whole: float) -> float:
    """Return what a try and all before it have spent: `whole` times i / (i + h).

    Args:
        attempt: i; 0 before the first.
        whole: see `level_of_try`.
    """
    return whole * attempt / (attempt + HALF_SPENT)


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

    @property
    def p_value(self) -> float:
        """The chance of a difference as large where there is none: Student's t, one-sided."""
        from scipy import stats

        if not self.standard_error:  # the same difference on every image
            return 0.0 if self.difference > 0 else 1.0
        return float(stats.t.sf(self.difference / self.standard_error, self.images - 1))

    def smallest_gain(self, level: float) -> float:
        """Return the true gain, in nats per image, that would be seen nine times out of ten.

        Args:
            level: which the p-value must not exceed.
        """
        from scipy import stats

        quantiles = stats.t.isf(level, self.images - 1) + stats.t.ppf(POWER, self.images - 1)
        return float(quantiles * self.standard_error)

    def __str__(self) -> str:
        return (
            f"{self.challenger:.3f} nats against {self.champion:.3f}: a difference of "
            f"{self.difference:+.3f} with a standard error of {self.standard_error:.3f}, "
            f"on {self.images:,} test images"
        )


class Decision(NamedTuple):
    """A comparison as one of many tries.

    Attributes:
        comparison: what was found.
        attempt: which try on these images it is, from 1.
        whole: the error that all tries together may spend.
        min_improvement: nats that are asked for.
    """

    comparison: Comparison
    attempt: int
    whole: float
    min_improvement: float

    @property
    def level(self) -> float:
        """What the p-value must not exceed."""
        return level_of_try(self.attempt, self.whole)

    @property
    def better(self) -> bool:
        """Whether the difference is large enough, and more than chance would make it."""
        found = self.comparison
        return found.difference >= self.min_improvement and found.p_value <= self.level

    def numbers(self) -> dict[str, float]:
        """Return all of it, by name."""
        return {
            **self.comparison._asdict(),
            "p_value": self.comparison.p_value,
            "level": self.level,
            "attempt": self.attempt,
            "spent": error_spent_by(self.attempt, self.whole),
            "smallest_gain": self.comparison.smallest_gain(self.level),
        }

    def __str__(self) -> str:
        numbers = self.numbers()
        asked = f" and {self.min_improvement:g} nats" * bool(self.min_improvement)
        return (
            f"{self.comparison}; p = {numbers['p_value']:.2g} (wanted: at most {self.level:.2g}"
            f"{asked}). Try {self.attempt} on these images: {100 * numbers['spent']:.2g} % of the "
            f"{100 * self.whole:g} % allowed for false promotions is spent; it would have seen a "
            f"gain of {numbers['smallest_gain']:.2g} nats nine times out of ten"
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
