"""A picture of drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vaeflow.bundle.reference import Reference
from vaeflow.config import Drift

if TYPE_CHECKING:
    from vaeflow.scoring.drift import Comparison, Sample

SHOWN_MARGINALS = 24
USUAL, OTHER = "tab:blue", "tab:red"


def draw_drift(
    path: Path, reference: Reference, sample: Sample, comparison: Comparison, thresholds: Drift
) -> None:
    """Scores of both, how far each number is off, and the discrepancy among its permutations.

    Args:
        path: the PNG to write.
        reference, sample: what was compared.
        comparison: what came of it.
        thresholds: what counted as drift.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    scores, distances, discrepancy = figure.subplots(1, 3)
    _draw_scores(scores, reference.scores, sample.scores)
    _draw_distances(distances, comparison, thresholds)
    _draw_discrepancy(discrepancy, comparison)
    figure.savefig(path, dpi=120)


def _draw_scores(axis, reference: np.ndarray, batch: np.ndarray) -> None:
    for label, values in (("validation images", reference), ("batch", batch)):
        axis.ecdf(values, label=label)
    axis.set(xlabel="score: minus the ELBO, nats", ylabel="share that scores lower")
    axis.legend()


def _draw_distances(axis, comparison: Comparison, thresholds: Drift) -> None:
    shown = sorted(comparison.marginals, key=lambda marginal: -marginal.distance)[:SHOWN_MARGINALS]
    axis.barh(
        [marginal.name for marginal in shown],
        [marginal.distance for marginal in shown],
        color=[OTHER if marginal.drifted else USUAL for marginal in shown],
    )
    axis.axvline(thresholds.smallest_distance, color="black", linestyle=":")
    axis.invert_yaxis()
    axis.tick_params("y", labelsize=7)
    axis.set(xlabel="Kolmogorov-Smirnov distance (red: drifted)", xlim=(0, 1))


def _draw_discrepancy(axis, comparison: Comparison) -> None:
    discrepancy = comparison.discrepancy
    axis.hist(discrepancy.permuted, bins=30, color="lightgrey", label="labels exchanged")
    axis.axvline(
        discrepancy.squared,
        color=OTHER if comparison.discrepancy_drifted else USUAL,
        label=f"batch: distance {discrepancy.distance:.2f}, p = {discrepancy.p_value:.3g}",
    )
    axis.set(xlabel="squared maximum mean discrepancy of the latents", ylabel="permutations")
    axis.legend()
