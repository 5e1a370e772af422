"""Describe a set of images: its statistics, and pictures of some images of each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vaeflow.common.files import atomic_file
from vaeflow.common.pictures import grid, interleaved, sections, write_png
from vaeflow.common.versioning import data_is_versioned, require_data
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.io.reading import Images, Reading, refuse
from vaeflow.data.io.rules import Rules, shared_rules
from vaeflow.data.io.sources import image_blocks
from vaeflow.data.similar import Fingerprints
from vaeflow.data.splits import ANOMALY, LEFT_OUT, SPLITS, SplitRule, digest_keys
from vaeflow.errors import BadImageError, DataError, StageError

RULES = "rules.json"  # of a part: how its files were read
SHOWN_REJECTED = 5
SHOWN_LABELS = 12
LEVELS = 256
# Evenly spaced ones that are told from any bytes; more have steps of less than four.
FEWEST_LEVELS, MOST_LEVELS = 2, 64
USEFUL = 100  # images, of which each split can be expected to have some
DIM = 64  # of 255: what no image goes beyond is likely of another range
HEADER = (
    f"{'split':<11}{'images':>10}{'channel':>9}{'min':>5}{'max':>5}"
    f"{'mean':>8}{'std':>8}{'at 0':>8}{'at 255':>8}"
)


def reading_of(
    parameters: Prepare, on_bad: Callable[[BadImageError], None] = refuse, **options: Any
) -> Reading:
    """Return how a data set is read: no constant images, within the limits of params.yaml."""
    return Reading(limits=parameters, allow_constant=False, on_bad=on_bad, **options)


def data_blocks(
    workspace: Workspace, parameters: Prepare, on_bad: Callable[[BadImageError], None] = refuse
) -> Iterator[Images]:
    """Yield the images in `data/`, some megabytes at a time.

    Raises:
        DataError: it is missing, or what is in it cannot be used.
    """
    require_data(workspace)
    yield from image_blocks(workspace.data, reading=reading_of(parameters, on_bad))


def data_rules(workspace: Workspace) -> Rules:
    """Return the rules by which the files of all parts of `data/` were read."""
    found = []
    for part in sorted(path for path in workspace.data.iterdir() if path.is_dir()):
        path = part / RULES
        if not path.is_file():
            found.append(Rules())
            continue
        try:
            found.append(Rules.model_validate_json(path.read_text(encoding="utf-8")))
        except (ValueError, OSError):
            raise DataError(
                f"{path} is not what `vaeflow data add` wrote: it was changed or damaged. "
                "Get the versioned one back: dvc checkout --force data.dvc"
            ) from None
    return shared_rules(found)


class PixelLevels:
    """How few evenly spaced values, from black to white, all pixels are among.

    Seventeen are at 0, 16, 32, 48, 64, 80, 96, 112, 128, 143, ... of 255: whoever scaled them to
    bytes rounded.
    """

    def __init__(self) -> None:
        self._seen = np.zeros(LEVELS, bool)
        self.count = FEWEST_LEVELS

    def add(self, pixels: np.ndarray) -> None:
        """Count a block."""
        if self.count == LEVELS:
            return
        self._seen[pixels.reshape(-1)] = True
        values = np.flatnonzero(self._seen)
        while self.count < LEVELS and not _are_among(values, self.count):
            self.count = self.count + 1 if self.count < MOST_LEVELS else LEVELS


def _are_among(values: np.ndarray, levels: int) -> bool:
    """Return whether bytes are rounded ones, up or down, of as many evenly spaced levels."""
    step = (LEVELS - 1) / (levels - 1)
    return bool(np.all(np.abs(values - np.round(values / step) * step) <= 0.5))


class Survey:
    """Counts over the blocks of a data set.

    Attributes:
        count: images.
        image_shape: `(height, width, channels)`, or None before the first block.
        smallest, largest: pixel values.
        levels: how many there are of these.
        labels: images by label; those without one are left out.
        splits: images by split.
        given: images whose split is not decided by their content.
        left_out: images that are in no split, for they are too like some of two.
        anomalies: images that are known to be some; of their values nothing is said.
    """

    def __init__(self, parameters: Prepare) -> None:
        self.count = 0
        self.image_shape: tuple[int, ...] | None = None
        self.smallest, self.largest = 255, 0
        self.levels = PixelLevels()
        self.labels: Counter[str] = Counter()
        self.splits: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
        self.given = 0
        self.left_out = 0
        self.anomalies = 0
        self._parameters = parameters
        self._keys: list[np.ndarray] = []
        self._origins: list[np.ndarray] = []

    def add(self, images: Images) -> np.ndarray:
        """Count a block.

        Args:
            images: of the same shape in every call.

        Returns:
            The split of each image, or `LEFT_OUT` or `ANOMALY`; `(count,)`.

        Raises:
            DataError: they are of another shape than those before.
        """
        shape = images.pixels.shape[1:]
        if self.image_shape not in {None, shape}:
            raise DataError(
                f"{images.names[0]}: images of shape {shape} (height, width, channels) do not go "
                f"with those of {self.image_shape}. Bring all to one: --size, --channels."
            )
        splits = SplitRule.of(self._parameters).assign(images.origins, images.splits)
        self.count += len(splits)
        self.left_out += int(np.count_nonzero(splits == LEFT_OUT))
        anomalies = splits == ANOMALY
        self.anomalies += int(np.count_nonzero(anomalies))
        ordinary = [split for split in images.splits if split != ANOMALY]
        self.given += len(ordinary) - ordinary.count(None)
        self.image_shape = shape
        pixels = images.pixels[~anomalies] if anomalies.any() else images.pixels
        if self.smallest > 0:  # when both ends are known, nothing more is to be looked for
            self.smallest = min(self.smallest, int(pixels.min(initial=LEVELS - 1)))
        if self.largest < LEVELS - 1:
            self.largest = max(self.largest, int(pixels.max(initial=0)))
        self.levels.add(pixels)
        self.labels.update(label for label in images.labels if label is not None)
        self.splits.update({name: int(np.count_nonzero(splits == name)) for name in SPLITS})
        self._keys.append(digest_keys(images.digests))
        self._origins.append(digest_keys(images.origins))
        return splits

    def move(self, before: Sequence[str], changed: Mapping[int, str]) -> None:
        """Count again images that got another split than they had, by their row numbers."""
        for row, split in changed.items():
            self.splits[before[row]] -= 1
            if split == LEFT_OUT:
                self.left_out += 1
            else:
                self.splits[split] += 1

    @property
    def keys(self) -> np.ndarray:
        """What tells the images apart, in their order; see `digest_keys`."""
        return np.concatenate([np.empty(0, "V16"), *self._keys])

    @property
    def origins(self) -> np.ndarray:
        """The same of the pictures of which these are tiles, or of the images themselves."""
        return np.concatenate([np.empty(0, "V16"), *self._origins])

    @property
    def duplicates(self) -> int:
        """How many images are exact copies of an earlier one."""
        keys = self.keys
        if len(np.unique(keys.view(np.uint64)[::2])) == self.count:
            return 0  # the common case, sooner known
        return self.count - len(np.unique(keys))

    def check_splits(self) -> None:
        """Refuse a set that leaves a split empty.

        Raises:
            DataError: some split would have no image.
        """
        empty = [name for name in SPLITS if not self.splits[name]]
        if not empty:
            return
        different = self.count - self.duplicates
        of = f" ({different:,} different)" if different < self.count else ""
        if self.given:
            remedy = (
                "The folders or the publisher say which image is in which split: add images to "
                "that, or let the contents decide (--splits content)."
            )
        else:
            remedy = (
                "An image's content decides its split, and copies stay together: the smallest set "
                f"that is likely to fill all three has some {USEFUL} different images, and to "
                "train a useful model takes some thousand. Add images, or raise the fraction in "
                "params.yaml (prepare.validation_fraction, prepare.test_fraction)."
            )
        raise DataError(
            f"too few images: of {self.count:,}{of} none is in {' or '.join(empty)}, and every "
            f"split needs at least one. {remedy}"
        )


@dataclass
class Report:
    """What was found in a data set, for a person.

    Attributes:
        survey: of the images that can be used.
        rejected: files and rows that cannot.
        ignored: names of files that are no images.
    """

    survey: Survey
    rejected: list[BadImageError] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Report what was found, a fact a line."""
        survey = self.survey
        if not survey.count:
            return ["no images that can be used", *self._rejections()]
        assert survey.image_shape is not None  # known with the first image
        height, width, channels = survey.image_shape
        splits = ", ".join(f"{survey.splits[name]:,} {name}" for name in SPLITS)
        lines = [
            f"{survey.count:,} images of {height} x {width} (height x width), "
            f"channels: {channels}, values {survey.smallest}..{survey.largest}",
            f"split: {splits}",
            f"exact copies of other images: {survey.duplicates:,}",
        ]
        if survey.anomalies:
            lines.append(f"anomalies, kept apart: {survey.anomalies:,}")
        if survey.left_out:
            lines.append(f"in no split, for they are too like images of two: {survey.left_out:,}")
        if survey.labels:
            lines.append(f"labels: {_counts(survey.labels)}")
            if len(survey.labels) == 1:
                lines.append("note: all images have one label, so it tells nothing of any")
        if survey.largest < DIM:
            lines.append(
                f"note: no pixel is brighter than {survey.largest} of 255; if that is white, name "
                "the range: --range"
            )
        return lines + left_alone(self.ignored) + self._rejections()

    def _rejections(self) -> list[str]:
        if not self.rejected:
            return []
        shown = [f"  {error}" for error in self.rejected[:SHOWN_REJECTED]]
        more = len(self.rejected) - len(shown)
        lines = [f"rejected: {len(self.rejected):,}", *shown]
        return [*lines, f"  and {more:,} more"] if more else lines


def left_alone(names: Iterable[str]) -> list[str]:
    """Report files that are no images, by ending."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    if not endings:
        return []
    listed = ", ".join(f"{ending} ({count:,})" for ending, count in endings.most_common())
    return [f"no images, and left alone: {sum(endings.values()):,}: {listed}"]


def _counts(counter: Counter[str]) -> str:
    if len(counter) > SHOWN_LABELS:
        fewest, most = min(counter.values()), max(counter.values())
        return f"{len(counter):,} different ones, of {fewest:,} to {most:,} images each"
    return ", ".join(f"{label} ({count:,})" for label, count in sorted(counter.items()))


def check(workspace: Workspace, parameters: Prepare) -> tuple[Report, list[str]]:
    """Survey what is in `data/` now.

    Returns:
        The report, and what is wrong, a sentence each: bad or damaged files, too few images, images
        that `data.dvc` does not stand for.
    """
    report = Report(Survey(parameters))
    wrong = []
    try:
        for block in data_blocks(workspace, parameters, report.rejected.append):
            report.survey.add(block)
        report.survey.check_splits()
    except DataError as error:
        wrong.append(str(error))
    if report.rejected:
        wrong.append("Some images cannot be used: add them again, with --skip-bad.")
    try:
        if workspace.data.exists() and not data_is_versioned(workspace):
            wrong.append("data/ differs from data.dvc: version it (dvc add data), or dvc checkout.")
    except StageError as error:  # data.dvc is damaged
        wrong.append(str(error))
    return report, wrong


class Glance:
    """Random images of one split, and a histogram of all its pixels.

    Attributes:
        count: images seen.
        images: at most `shown` of them, each as likely as any other.
        histogram: pixels by channel and value, `(channels, 256)`.
    """

    def __init__(self, shown: int, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        self.count = 0
        self.images = np.empty((0, *shape), np.uint8)
        self.histogram = np.zeros((shape[-1], LEVELS), np.int64)
        self._shown = shown
        self._lots = np.empty(0)
        self._generator = generator

    def add(self, pixels: np.ndarray) -> None:
        """Add a block, uint8 `(count, *shape)`."""
        self.count += len(pixels)
        for channel, counts in enumerate(self.histogram):
            counts += np.bincount(pixels[..., channel].ravel(), minlength=LEVELS)
        # Every image draws a lot; those with the smallest stay.
        lots = np.concatenate([self._lots, self._generator.random(len(pixels))])
        kept = np.argsort(lots)[: self._shown]
        mine, new = kept[kept < len(self._lots)], kept[kept >= len(self._lots)] - len(self._lots)
        self.images = np.concatenate([self.images[mine], pixels[new]])
        self._lots = np.concatenate([lots[mine], lots[new + len(self._lots)]])

    def lines(self, name: str) -> Iterator[str]:
        """Report the count and, for each channel, statistics of its values, as table rows."""
        values = np.arange(LEVELS)
        for channel, counts in enumerate(self.histogram):
            present, shares = np.flatnonzero(counts), counts / counts.sum()
            mean = shares @ values
            deviation = np.sqrt(shares @ np.square(values - mean))
            yield (
                f"{name:<11}{self.count:>10,}{channel:>9}{present[0]:>5}{present[-1]:>5}"
                f"{mean:>8.2f}{deviation:>8.2f}{shares[0]:>8.1%}{shares[-1]:>8.1%}"
            )


def show(workspace: Workspace, parameters: Prepare, out: Path, shown: int, seed: int) -> list[str]:
    """Write a contact sheet of `data/` as a PNG: random images of each split.

    Args:
        workspace: whose `data/`.
        parameters: of `prepare`, which decide the splits.
        out: the file to write.
        shown: images of each split at most.
        seed: of the choice.

    Returns:
        A table of pixel statistics, line by line.
    """
    survey = Survey(parameters)
    generator = np.random.default_rng(seed)
    glances: dict[str, Glance] = {}
    for block in data_blocks(workspace, parameters):
        splits = survey.add(block)
        for name in SPLITS:
            if name not in glances:
                glances[name] = Glance(shown, block.pixels.shape[1:], generator)
            glances[name].add(block.pixels[splits == name])
    survey.check_splits()
    sheets = {
        f"{name}: {len(glance.images)} of {glance.count:,}": grid(glance.images)
        for name, glance in glances.items()
    }
    _write_sheet(out, sections(sheets))
    return [HEADER, *(line for name, glance in glances.items() for line in glance.lines(name))]


def show_near_duplicates(
    workspace: Workspace, parameters: Prepare, out: Path, shown: int
) -> list[str]:
    """Write pairs of near-duplicates in `data/` as a PNG, the earlier above the later.

    Args:
        workspace: whose `data/`.
        parameters: of `prepare`, which decide the splits.
        out: the file to write.
        shown: pairs at most; exact copies are counted, not shown.

    Returns:
        What was found, and the names of the pairs shown, line by line.
    """
    survey = Survey(parameters)
    names: list[str] = []
    with (
        TemporaryDirectory() as scratch,
        closing(Fingerprints(Path(scratch) / "cells")) as fingerprints,
    ):
        for block in data_blocks(workspace, parameters):
            fingerprints.add(block, survey.add(block))
            names += [name.removeprefix(f"{workspace.data}/") for name in block.names]
        pairs, splits = fingerprints.pairs(), fingerprints.splits
    chosen = [names_of for names_of in pairs if not fingerprints.same(names_of)]
    straddling = sum(splits[earlier] != splits[later] for earlier, later in pairs)
    lines = [
        f"exact copies: {len(pairs) - len(chosen):,}; near-duplicates: {len(chosen):,} pairs; "
        f"in two splits: {straddling:,} pairs"
    ]
    if not chosen:
        return [*lines, "no picture is written"]
    chosen = chosen[:shown]
    wanted = {row for pair in chosen for row in pair}
    pixels: dict[int, np.ndarray] = {}
    first = 0
    for block in data_blocks(workspace, parameters):
        here = range(first, first + len(block.pixels))
        pixels |= {row: block.pixels[row - first] for row in wanted if row in here}
        first += len(block.pixels)
    earlier, later = (np.stack([pixels[pair[side]] for pair in chosen]) for side in (0, 1))
    _write_sheet(out, interleaved(earlier, later))
    return [
        *lines,
        *(f"{names[a]} ({splits[a]}) | {names[b]} ({splits[b]})" for a, b in chosen),
    ]


def _write_sheet(out: Path, sheet: np.ndarray) -> None:
    try:
        with atomic_file(out) as fresh:
            write_png(fresh, sheet)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from None
