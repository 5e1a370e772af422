"""Compare a scored batch with the images that its model was validated on; tell Prefect of drift.

Two questions are asked of the batch and the bundle's reference (`vaeflow.bundle.manifest`):
whether any one number of an image, a latent mean or the score, is distributed otherwise (two-sample
Kolmogorov-Smirnov tests); and whether the latent means are, taken together (maximum mean
discrepancy, by permutation), which sees a change in how they depend on each other too.

Each answer is yes only where the difference is both large enough to matter and larger than chance
makes it. Of thousands of images tiny differences are sure, and no reason to train anew; of few,
large ones are chance. `docs/decisions.md` says how often either errs.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaeflow.bundle.manifest import Reference, bundle_sha256, read_reference, read_verified
from vaeflow.common.files import atomic_file, write_json
from vaeflow.config.schema import Drift
from vaeflow.errors import DataError, VaeflowError
from vaeflow.registry.model import locate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MMD_IMAGES = 1_000  # of each side: the kernel has a number for every pair of them
PERMUTATIONS = 1_999
SEED = 0  # of the choice of images, and of the permutations
SHOWN_MARGINALS = 24
DRIFT_DETECTED = "vaeflow.drift.detected"
WATCHED = re.compile(r"^[^#\n]*resource\.id\S*\s*[\"']?vaeflow\.model\.([^\s\"'}]+)", re.MULTILINE)


class Sample(NamedTuple):
    """Rows of a table of scores, and what its metadata say."""

    means: np.ndarray  # (images, latent_dim)
    scores: np.ndarray  # (images,)
    rows: int  # of the whole table
    metadata: dict[str, str]


@dataclass(frozen=True)
class Marginal:
    """One latent mean or the score, in the batch and in the reference.

    Attributes:
        name: `score`, or `mean_0`, `mean_1`, ...
        distance: the largest between the two distribution functions, 0 to 1.
        p_value: of a distance as large if both were the same.
        adjusted_p_value: the chance of one as sure among all these tests if nothing had changed.
        drifted: whether it counts.
    """

    name: str
    distance: float
    p_value: float
    adjusted_p_value: float
    drifted: bool


class Discrepancy(NamedTuple):
    """The maximum mean discrepancy of two samples.

    Attributes:
        distance: between the two distributions, 0 to 1: 0 for the same, 1 for two that have nothing
            in common. A shift of every latent by d standard deviations makes about d / 2 of it. An
            estimate, from which what chance adds has been taken off.
        squared: the statistic of the test.
        p_value: of one as large if both were from the same distribution.
        bandwidth: of the kernel.
        permuted: the statistic with the labels exchanged at random, `(permutations,)`.
    """

    distance: float
    squared: float
    p_value: float
    bandwidth: float
    permuted: np.ndarray


class DriftTests(NamedTuple):
    """A batch beside its reference."""

    marginals: list[Marginal]
    discrepancy: Discrepancy
    discrepancy_drifted: bool

    @property
    def drifted(self) -> bool:
        """Whether anything counts as drift."""
        return self.discrepancy_drifted or any(marginal.drifted for marginal in self.marginals)


def measure_drift(table: Path, model: str, out: Path, thresholds: Drift) -> dict[str, object]:
    """Compare a table of scores with its model's reference; write a report and a figure.

    Args:
        table: from `vaeflow.scoring.score`, Parquet, with latents.
        model: a bundle's folder, or an address in the registry; must be what scored the table.
        out: the JSON to write; the figure is beside it, as PNG.
        thresholds: what counts as drift.

    Returns:
        The report, as it is written: `drifted`, what the table and the model are, `marginals` and
        `discrepancy` (see `DriftTests`), and the `thresholds`.

    Raises:
        BundleError: the bundle has no reference.
        DataError: the table has no latents, or was scored by another model.
    """
    if out.suffix.lower() != ".json":
        raise VaeflowError(f"{out}: cannot write this ending; expected .json.")
    folder = locate(model).folder
    reference = read_reference(folder, read_verified(folder))
    sample = read_sample(table, thresholds.images, reference.means.shape[1])
    if sample.metadata["bundle_sha256"] != bundle_sha256(folder):
        raise DataError(
            f"{table} was scored by {sample.metadata['model_name']} version "
            f"{sample.metadata['model_version']}, and {model} is another. Give that one as --model,"
            " or score the images again."
        )
    comparison = run_tests(reference, sample, thresholds)
    report = _report(table, sample, reference, comparison, thresholds)
    try:
        with atomic_file(out) as fresh:
            write_json(fresh, report)
        with atomic_file(out.with_suffix(".png")) as fresh:
            draw_drift(fresh, reference, sample, comparison, thresholds)
    except OSError as error:
        raise VaeflowError(f"{out} cannot be written: {error}") from None
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """Report what a person wants to know, a fact a line."""
    drifted = [entry for entry in report["marginals"] if entry["drifted"]]
    names = ", ".join(f"{entry['name']} (by {entry['distance']:.2f})" for entry in drifted)
    discrepancy = report["discrepancy"]
    return [
        f"drift: {'yes' if report['drifted'] else 'no'}, {report['images_compared']:,} of "
        f"{report['images']:,} images beside {report['reference_images']:,} of validation",
        f"differ by themselves: {names or 'none'}, of {len(report['marginals'])}",
        f"latents together: by {discrepancy['distance']:.2f}, p = {discrepancy['p_value']:.3g}"
        + (", they differ" if discrepancy["drifted"] else ""),
    ]


def read_sample(table: Path, images: int, latent_dim: int) -> Sample:
    """Read rows chosen at random, in memory that does not grow with the table.

    Raises:
        DataError: it is no table that `vaeflow score --latents` wrote.
    """
    import pyarrow
    import pyarrow.parquet

    columns = ["score", *(f"mean_{unit}" for unit in range(latent_dim))]
    if not table.exists():
        raise DataError(
            f"{table}: no such file. Make it: vaeflow score ... --latents --out {table}"
        )
    try:
        # Unless it is told, it keeps all that it has read.
        file = pyarrow.parquet.ParquetFile(table, pre_buffer=False)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{table}: not a readable Parquet file ({error}).") from None
    with file:
        metadata = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing or "bundle_sha256" not in metadata:
            raise DataError(
                f"{table} does not hold scores and latents ({', '.join(missing) or 'metadata'} "
                "missing). Make it: vaeflow score SOURCE --latents --out FILE.parquet"
            )
        count = file.metadata.num_rows
        size = min(images, count)
        chosen = np.sort(np.random.default_rng(SEED).choice(count, size, replace=False))
        lengths = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        ends = np.cumsum(lengths, dtype=np.int64)
        parts = []
        for group in np.unique(np.searchsorted(ends, chosen, side="right")).tolist():
            start = ends[group] - lengths[group]
            for batch in file.iter_batches(row_groups=[group], columns=columns):
                rows = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
                parts.append(np.column_stack([column.to_numpy()[rows] for column in batch.columns]))
                start += len(batch)
    numbers = np.concatenate(parts) if parts else np.empty((0, len(columns)))
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise DataError(f"{table}: expected at least two rows, and finite numbers in all of them.")
    return Sample(numbers[:, 1:], numbers[:, 0], count, metadata)


def run_tests(reference: Reference, sample: Sample, thresholds: Drift) -> DriftTests:
    """Make all tests; see the module."""
    from scipy import stats

    names = ["score", *(f"mean_{unit}" for unit in range(sample.means.shape[1]))]
    ours = np.column_stack([sample.scores, sample.means])
    theirs = np.column_stack([reference.scores, reference.means])
    # The asymptotic p-value: the exact one takes seconds for thousands of images.
    tests = stats.ks_2samp(ours, theirs, method="asymp")
    adjusted = holm(tests.pvalue)
    # Half of the false alarms for these, half for the discrepancy.
    level, floor = thresholds.false_alarms / 2, thresholds.smallest_distance
    drifted = (adjusted <= level) & (tests.statistic >= floor)
    rows = zip(names, tests.statistic, tests.pvalue, adjusted, drifted, strict=True)
    marginals = [
        Marginal(name, float(distance), float(p_value), float(adjusted_p_value), bool(drift))
        for name, distance, p_value, adjusted_p_value, drift in rows
    ]
    random = np.random.default_rng(SEED)
    discrepancy = maximum_mean_discrepancy(
        _at_most(MMD_IMAGES, sample.means, random),
        _at_most(MMD_IMAGES, reference.means, random),
        PERMUTATIONS,
        random,
    )
    differ = discrepancy.p_value <= level and discrepancy.distance >= floor
    return DriftTests(marginals, discrepancy, differ)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values for being many (Holm 1979).

    The question is whether anything has drifted, so what is bounded is the chance that anything is
    said to have where nothing has, and that however the tests depend on each other: latents and the
    score do, some of them negatively. The false discovery rate would be another question, and
    Benjamini and Hochberg's procedure bounds it for independent or positively dependent tests only.

    Args:
        p_values: `(tests,)`.

    Returns:
        For each the smallest level at which it counts, `(tests,)`.
    """
    order = np.argsort(p_values)
    times = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(times * p_values[order]), 1)
    return adjusted


def maximum_mean_discrepancy(
    first: np.ndarray, second: np.ndarray, permutations: int, random: np.random.Generator
) -> Discrepancy:
    """Test whether two samples are from one distribution (Gretton et al. 2012).

    The kernel is exp(-|x - y|^2 / 2 h^2), where h is the median distance of all pairs.

    Args:
        first, second: `(count, dimensions)` each; their counts may differ. The distance is by the
            measure of the second, the reference.
        permutations: random exchanges of which sample a point belongs to.
        random: draws them.
    """
    points = np.concatenate([first, second]).astype(np.float64)
    points -= points.mean(axis=0)  # changes no distance, and keeps them exact
    norms = np.square(points).sum(axis=1)
    squares = np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0)
    bandwidth = _bandwidth(squares)
    kernel = np.exp(-squares / (2 * bandwidth**2))
    # With weights 1/m and -1/n the statistic (their eq. 5) is a quadratic form of the kernel.
    weights = np.repeat([1 / len(first), -1 / len(second)], [len(first), len(second)])
    shuffled = np.stack([random.permutation(weights) for _ in range(permutations)], axis=1)
    squared = float(weights @ kernel @ weights)
    permuted = np.einsum("ij,ij->j", kernel @ shuffled, shuffled)
    # The given order counts as one of the permutations, which makes the test exact.
    p_value = (1 + np.count_nonzero(permuted >= squared)) / (1 + permutations)
    return Discrepancy(_distance(squares, len(first)), squared, float(p_value), bandwidth, permuted)


def _bandwidth(squares: np.ndarray) -> float:
    """Return the median distance of all pairs, from the squares of all distances."""
    pairs = squares[np.triu_indices(len(squares), 1)]
    # Most points may be the same, or there may be one only.
    return float(np.sqrt(np.median(pairs))) or 1.0 if len(pairs) else 1.0


def _distance(squares: np.ndarray, count: int) -> float:
    """Scale the discrepancy by the largest there is, of distributions without common points.

    The kernel is as wide as the second sample: in that of both, two that lie far apart would look
    nearer than they are.

    Args:
        squares: of the distances of all pairs of points.
        count: the first so many are one sample.
    """
    kernel = np.exp(-squares / (2 * _bandwidth(squares[count:, count:]) ** 2))
    within = [
        (part.sum() - np.trace(part)) / max(1, len(part) * (len(part) - 1))  # of different points
        for part in (kernel[:count, :count], kernel[count:, count:])
    ]
    return float(np.sqrt(max(0.0, 1 - 2 * kernel[:count, count:].mean() / sum(within))))


def _at_most(count: int, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= count else random.choice(rows, count, replace=False)


def _report(
    table: Path, sample: Sample, reference: Reference, comparison: DriftTests, thresholds: Drift
) -> dict[str, object]:
    discrepancy = comparison.discrepancy
    return {
        "drifted": comparison.drifted,
        "table": str(table),
        **sample.metadata,
        "images": sample.rows,
        "images_compared": len(sample.scores),
        "reference_images": len(reference.scores),
        "marginals": [asdict(marginal) for marginal in comparison.marginals],
        "discrepancy": {
            "distance": discrepancy.distance,
            "squared": discrepancy.squared,
            "p_value": discrepancy.p_value,
            "bandwidth": discrepancy.bandwidth,
            "drifted": comparison.discrepancy_drifted,
        },
        "thresholds": thresholds.model_dump(),
    }


USUAL, OTHER = "tab:blue", "tab:red"


def draw_drift(
    path: Path, reference: Reference, sample: Sample, comparison: DriftTests, thresholds: Drift
) -> None:
    """Plot the scores of both, how far each number is off, and the discrepancy among permutations.

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


def _draw_scores(axis: Axes, reference: np.ndarray, batch: np.ndarray) -> None:
    for label, values in (("validation images", reference), ("batch", batch)):
        axis.ecdf(values, label=label)
    axis.set(xlabel="score: minus the ELBO, nats", ylabel="share that scores lower")
    axis.legend()


def _draw_distances(axis: Axes, comparison: DriftTests, thresholds: Drift) -> None:
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


def _draw_discrepancy(axis: Axes, comparison: DriftTests) -> None:
    discrepancy = comparison.discrepancy
    axis.hist(discrepancy.permuted, bins=30, color="lightgrey", label="labels exchanged")
    axis.axvline(
        discrepancy.squared,
        color=OTHER if comparison.discrepancy_drifted else USUAL,
        label=f"batch: distance {discrepancy.distance:.2f}, p = {discrepancy.p_value:.3g}",
    )
    axis.set(xlabel="squared maximum mean discrepancy of the latents", ylabel="permutations")
    axis.legend()


def emit_drift(report: dict[str, Any]) -> bool:
    """Send the event `vaeflow.drift.detected` to the Prefect server in `PREFECT_API_URL`.

    Its resource is `vaeflow.model.NAME`, the model that scored the batch. Its payload are the
    report's `model_version`, `bundle_sha256`, `data_md5`, `table` and `images`; the names of what
    `drifted`; and `discrepancy_p_value`. An automation or a deployment's trigger answers to it:

        triggers:
          - expect: ["vaeflow.drift.detected"]
            match: {prefect.resource.id: "vaeflow.model.digits-vae"}

    Args:
        report: from `vaeflow.scoring.drift.measure_drift`.

    Returns:
        Whether it was given to Prefect, which has sent it by then, or says in the log that the
        server does not answer. Where none is named there is nobody to tell, and that
        is no error.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return False
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker

    name = report["model_name"]
    resource = {"prefect.resource.id": f"vaeflow.model.{name}", "prefect.resource.name": name}
    kept = ("model_version", "bundle_sha256", "data_md5", "table", "images")
    payload = {key: report[key] for key in kept}
    payload["drifted"] = [entry["name"] for entry in report["marginals"] if entry["drifted"]]
    payload["discrepancy_p_value"] = report["discrepancy"]["p_value"]
    emit_event(event=DRIFT_DETECTED, resource=resource, payload=payload)
    EventsWorker.instance().wait_until_empty()
    return True


def unmatched_trigger_warning(deployments: Path, name: str) -> str | None:
    """Return a warning where drift of a model starts none of the triggers in `prefect.yaml`.

    Args:
        deployments: `prefect.yaml`; it may be missing.
        name: of the model.
    """
    if not deployments.is_file():
        return None
    watched = set(WATCHED.findall(deployments.read_text(encoding="utf-8")))
    if not watched or name in watched or "*" in watched:
        return None
    return (
        f"{deployments.name} retrains on drift of {', '.join(sorted(watched))}, and this model is "
        f"{name}: write vaeflow.model.{name} there, and deploy again"
    )
