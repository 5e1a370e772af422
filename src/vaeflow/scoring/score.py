"""Scoring any number of images: streamed, on all cores, and gone on with after a kill.

The images go by in shards, whose size depends on the model alone. A shard's numbers are kept beside
the output as soon as they are there (see `vaeflow.scoring.outputs`). A run that is started again
reads the images again, which is little work, and scores those that no part stands for. The output
is written in one pass from the first row to the last, and takes its name when it is complete.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vaeflow.bundle.runtime import SCORE_SAMPLES, Bundle
from vaeflow.common.progress import Progress
from vaeflow.data.io.reading import Images, Reading, refuse
from vaeflow.data.io.rules import Rules
from vaeflow.data.io.sources import reach
from vaeflow.data.survey import left_alone
from vaeflow.errors import BadImageError, DataError, VaeflowError
from vaeflow.registry.model import Model, locate
from vaeflow.scoring.engines import Engine, Result, open_engine, programs
from vaeflow.scoring.images import Asked, blocks, count, in_shards, reading_for, tiling_by
from vaeflow.scoring.outputs import Parts, Table, kind_of, parts_beside
from vaeflow.scoring.rows import Shard, draw, of_images, of_pictures, path_of_map

BLOCKS_PER_SHARD = 64
BLOCKS_PER_TASK = 8
TASKS_PER_SHARD = BLOCKS_PER_SHARD // BLOCKS_PER_TASK
FEWEST_AHEAD = 2  # shards being computed while the one before them is written
SHOWN_REJECTED = 5


@dataclass(frozen=True)
class Batch:
    """What to score, with what, and where to.

    Attributes:
        sources: files, folders, URLs, and names of known data sets.
        model: a bundle's folder, or an address in the registry, which is resolved once.
        out: the file to write; `.parquet`, `.csv`, or `.npy` for the scores alone.
        latents: whether the posterior means are written too.
        false_alarm_rate: the share of usual images that may count as anomalous; None for that of
            the model.
        a_day: how many images come a day; None where nobody says.
        maps: the folder for pictures of what counts as anomalous, with red where; None for none.
            Of pictures that are cut into tiles those are stitched together.
        asked: what is said of the files; see `reading_for`.
        skip_bad: go on without what cannot be used; otherwise the first such file ends it.
        engine: what computes: `local`, the cores of this machine, or `ray`.
        address: of the Ray cluster; None for one of this machine's own.
    """

    sources: tuple[str, ...]
    model: str
    out: Path
    latents: bool = False
    false_alarm_rate: float | None = None
    a_day: int | None = None
    maps: Path | None = None
    asked: Asked = field(default_factory=Asked)
    skip_bad: bool = False
    engine: str = "local"
    address: str | None = None


@dataclass
class Scored:
    """What a run came to.

    Attributes:
        out: the file it wrote.
        bundle: the folder of what scored them.
        model: which that is: `model_name`, `model_version`, `bundle_sha256`, `data_md5`.
        of: what was scored: `images`, `pictures` that were cut, or their `tiles`.
        count: of these.
        alarms: those that count as anomalous; None where the bundle cannot tell.
        uncalibrated: a sentence on why nothing is said of alarms; or none.
        expected: a sentence on how many false alarms are to be expected; or none.
        maps: the folder with pictures of these.
        resumed: how many images an earlier run had scored.
        rejected: files and rows that could not be used.
        ignored: names of files that are no images.
    """

    out: Path
    bundle: Path
    model: dict[str, str]
    of: str = "images"
    count: int = 0
    alarms: int | None = None
    uncalibrated: str = ""
    expected: str = ""
    maps: Path | None = None
    resumed: int = 0
    rejected: list[BadImageError] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Report what a person wants to know of it, a fact a line."""
        name, version = self.model["model_name"], self.model["model_version"]
        lines = [f"{self.out}: {self.count:,} {self.of}, scored by {name} version {version}"]
        lines += [self.uncalibrated] if self.uncalibrated else []
        if self.alarms is not None:
            share = self.alarms / max(1, self.count)
            shown = f"; pictures of them in {self.maps}/" if self.maps and self.alarms else ""
            lines.append(f"anomalous: {self.alarms:,} ({share:.2%}){shown}")
        if self.expected:
            lines.append(self.expected)
        if self.resumed:
            lines.append(f"scored before by a run that did not end: {self.resumed:,}")
        lines += left_alone(self.ignored)
        if self.rejected:
            lines.append(f"rejected: {len(self.rejected):,}")
            lines += [f"  {error}" for error in self.rejected[:SHOWN_REJECTED]]
        return lines


def score(batch: Batch) -> Scored:
    """Score all images of a batch and write a row for each, in their order.

    The columns are `id` (the file, or file#row), `score` (minus the ELBO, in nats), `percentile`
    (of the validation images, those that score lower), `anomaly` (about 1 is usual), `p_value` (how
    often usual images have as much), `anomalous` (whether that is too seldom; these four are left
    out where the bundle does not know), and `mean_0`, `mean_1`, ... with `latents`. Parquet's
    metadata hold `Scored.model`.

    Pictures that are cut into tiles have a row each, unless `latents` asks for a row a tile:
    `tiles` (how many), `score` and `anomaly` (the largest of its tiles'), `p_value` and `anomalous`
    (how often pictures have as much), `top` and `left` (where the most unusual tile is, pixels).

    Raises:
        BundleError: a rate of false alarms is asked for, and the bundle has no anomaly measure.
        DataError: a source cannot be used. What was scored until then is kept for the next run.
        VaeflowError: the output cannot be written.
    """
    kind = kind_of(batch.out)
    if batch.latents and batch.out.suffix.lower() == ".npy":
        raise VaeflowError(f"{batch.out}: holds scores alone; with --latents, write .parquet.")
    reach(*batch.sources)
    model = Model.load(locate(batch.model), threads=1)
    scored = Scored(batch.out, model.folder, model.description, maps=batch.maps)
    on_bad = scored.rejected.append if batch.skip_bad else refuse
    image = model.bundle.manifest.image
    reading = reading_for(image, batch.asked, on_bad, scored.ignored.append)
    if reading.tiling is not None:  # latents are those of tiles, and drift compares them
        scored.of = "tiles" if batch.latents else "pictures"
    if _raises_alarms(model.bundle, batch, reading, scored):
        scored.alarms = 0
        scored.expected = _expected(model.bundle, batch, scored.of)
    key = {**scored.model, "latents": batch.latents, **programs()}
    try:
        with (
            parts_beside(batch.out, key) as parts,
            closing(open_engine(batch.engine, batch.address, model, batch.latents)) as engine,
        ):
            fresh = parts.folder / batch.out.name
            with closing(kind(fresh, scored.model)) as table:
                scoring = _Scoring(model.bundle, batch.latents, parts, engine)
                _fill(table, batch, reading, scoring, scored)
            fresh.replace(batch.out)
    except OSError as error:
        raise VaeflowError(f"{batch.out} cannot be written: {error}") from None
    return scored


def _raises_alarms(bundle: Bundle, batch: Batch, reading: Reading, scored: Scored) -> bool:
    """Return whether it can be said what is anomalous; refuse what is asked for and cannot be."""
    asked = any(o is not None for o in (batch.false_alarm_rate, batch.a_day, batch.maps))
    if not bundle.detects and not asked:
        return False
    usual = tiling_by(bundle.manifest.image.reading or Rules())
    joined = scored.of == "pictures"
    if bundle.detects and joined and reading.tiling != usual:
        of = f"{usual}" if usual else "whole images"
        scored.uncalibrated = (
            f"which pictures are anomalous is not known: the model was calibrated with {of}, and "
            f"these are {reading.tiling} (vaeflow data add --tile --stride)"
        )
        if asked:
            raise DataError(f"{scored.uncalibrated}.")
        return False
    bundle.threshold(batch.false_alarm_rate, of_pictures=joined)  # may be refused: before work
    return True


def _expected(bundle: Bundle, batch: Batch, of: str) -> str:
    alarm = bundle.manifest.anomaly
    if batch.a_day is None or alarm is None:
        return ""
    if of == "pictures" and alarm.of_pictures is not None:
        alarm = alarm.of_pictures
    rate = batch.false_alarm_rate or alarm.false_alarm_rate
    return (
        f"of {batch.a_day:,} usual {of} a day {rate * batch.a_day:,.0f} are flagged by mistake, "
        "in the mean"
    )


def _fill(table: Table, batch: Batch, reading: Reading, scoring: _Scoring, scored: Scored) -> None:
    """Write the rows of all images, or of all pictures that are cut into images."""
    total, bundle = count(batch.sources, reading), scoring.bundle
    size = BLOCKS_PER_SHARD * bundle.images_at_once(SCORE_SAMPLES)
    shards = in_shards(blocks(batch.sources, reading), size)
    with Progress("scoring", total, unit=scored.of) as progress:
        finished = scoring.run(shards)
        tiling = reading.tiling if scored.of == "pictures" else None
        if tiling is None:
            answers = of_images(finished, bundle, batch.false_alarm_rate)
        else:
            rate = None if scored.alarms is None else (batch.false_alarm_rate,)
            answers = of_pictures(finished, bundle, rate, keep=batch.maps is not None)
        for columns, pixels, resumed in answers:
            table.write(columns)
            if scored.alarms is not None:
                rows = np.flatnonzero(columns["anomalous"]).tolist()
                if batch.maps:
                    for row in rows:
                        path = path_of_map(batch.maps, scored.count + row, columns["id"][row])
                        draw(bundle, pixels[row], tiling, path)
                scored.alarms += len(rows)
            written = len(columns["id"])
            scored.count += written
            scored.resumed += resumed
            progress.total = max(total, scored.count)  # of a tar archive nobody knows it before
            progress.advance(written)
    if not scored.count:
        scored.alarms = None
        reasons = "\n".join(scored.lines()[1:])
        raise DataError(f"no images that can be scored.\n{reasons}")


class _Scoring:
    """The numbers of shards, found among the parts or computed and kept there."""

    def __init__(self, bundle: Bundle, latents: bool, parts: Parts, engine: Engine):
        self.bundle = bundle
        self._columns = 1 + bundle.detects + latents * bundle.latent_dim
        self._parts = parts
        self._engine = engine
        # The eldest shard is waited for and written while these are in work.
        self._ahead = max(FEWEST_AHEAD, 1 + math.ceil(engine.tasks / TASKS_PER_SHARD))

    def run(self, shards: Iterator[Images]) -> Iterator[Shard]:
        """Yield the shards in their order, computed a few ahead of the reader."""
        running: deque[tuple[Images, str, np.ndarray | list[Result]]] = deque()
        for images in shards:
            name = self._parts.name(images.digests)
            running.append((images, name, self._find_or_start(images, name)))
            if len(running) > self._ahead:
                yield self._finish(*running.popleft())
        while running:
            yield self._finish(*running.popleft())

    def _find_or_start(self, images: Images, name: str) -> np.ndarray | list[Result]:
        found = self._parts.find(name, (len(images.names), self._columns))
        if found is not None:
            return found
        size = BLOCKS_PER_TASK * self.bundle.images_at_once(SCORE_SAMPLES)
        return [
            self._engine.start(images.pixels[start : start + size])
            for start in range(0, len(images.pixels), size)
        ]

    def _finish(self, images: Images, name: str, numbers: np.ndarray | list[Result]) -> Shard:
        if isinstance(numbers, np.ndarray):
            return Shard(images.names, images.pixels, numbers, resumed=True)
        numbers = np.concatenate([result() for result in numbers])
        self._parts.keep(name, numbers)
        return Shard(images.names, images.pixels, numbers, resumed=False)
