"""The rows of a batch's table, from the numbers of its images: one an image, or one a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaeflow.bundle.runtime import Bundle
from vaeflow.common.files import atomic_file
from vaeflow.common.pictures import overlay, write_png
from vaeflow.data.io.tiles import Canvas, Place, Tiling, stitched
from vaeflow.scoring.outputs import Columns

LONGEST_NAME = 100  # characters of an image's own name in that of its picture


class Shard(NamedTuple):
    """Some images in turn; of each a row of numbers: score, anomaly if known, then the latents."""

    names: Sequence[str]
    pixels: np.ndarray
    numbers: np.ndarray
    resumed: bool


class Answers(NamedTuple):
    """Rows of the table; the pixels of each, where they are kept; how many were scored before."""

    columns: Columns
    pixels: np.ndarray | list[np.ndarray]
    resumed: int


def of_images(
    shards: Iterator[Shard], bundle: Bundle, false_alarm_rate: float | None
) -> Iterator[Answers]:
    """Say of each image what the columns of `vaeflow.scoring.score.score` are."""
    for names, pixels, numbers, resumed in shards:
        score, *others = numbers.T
        columns = {"id": names, "score": score}
        if bundle.manifest.score_quantiles:
            columns["percentile"] = 100 * bundle.score_rank(score)
        if bundle.detects:
            anomaly, *others = others
            columns["anomaly"] = anomaly
            columns["p_value"] = bundle.measure.calibration.p_value(anomaly)
            columns["anomalous"] = anomaly > bundle.threshold(false_alarm_rate)
        columns |= {f"mean_{unit}": values for unit, values in enumerate(others)}
        yield Answers(columns, pixels, resumed * len(names))


def of_pictures(
    shards: Iterator[Shard], bundle: Bundle, rate: tuple[float | None] | None, keep: bool
) -> Iterator[Answers]:
    """Join the tiles of each picture, which come one after the other, to what is said of it.

    Args:
        shards: of tiles.
        bundle: what scored them.
        rate: of false alarms, in which None is that of the bundle; None where nothing can be said
            of alarms.
        keep: whether to put the pictures together again.
    """
    current: _Picture | None = None
    resumed = 0
    for shard in shards:
        done = []
        for row, name in enumerate(shard.names):
            place = Place.of(name)
            if (place.top, place.left) == (0, 0):
                done += [] if current is None else [current]
                current = _Picture(place.picture)
            assert current is not None  # the first tile of a picture comes first
            current.add(place, shard.numbers[row].tolist(), shard.pixels[row] if keep else None)
        resumed += shard.resumed * len(shard.names)
        if done:
            yield _answers_on(done, bundle, rate, keep, resumed)
            resumed = 0
    if current is not None:
        yield _answers_on([current], bundle, rate, keep, resumed)


class _Picture:
    """What is known of a picture from its tiles until now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tiles = 0
        self.canvas = Canvas()
        self.score = self.most = -math.inf
        self.top = self.left = 0

    def add(self, place: Place, numbers: Sequence[float], pixels: np.ndarray | None) -> None:
        """Add a tile: its numbers, score and anomaly if known, and its pixels if they are kept."""
        self.tiles += 1
        self.score = max(self.score, numbers[0])
        if numbers[-1] > self.most:
            self.most, self.top, self.left = numbers[-1], place.top, place.left
        if pixels is not None:
            self.canvas.add(pixels, place.top, place.left)


def _answers_on(
    pictures: Sequence[_Picture],
    bundle: Bundle,
    rate: tuple[float | None] | None,
    keep: bool,
    resumed: int,
) -> Answers:
    columns: dict[str, Any] = {
        "id": [picture.name for picture in pictures],
        "tiles": [picture.tiles for picture in pictures],
        "score": np.array([picture.score for picture in pictures], np.float32),
    }
    if bundle.detects:
        columns["anomaly"] = most = np.array([picture.most for picture in pictures], np.float32)
        if rate is not None:
            assert bundle.measure.pictures is not None  # as there is a rate
            columns["p_value"] = bundle.measure.pictures.p_value(most)
            columns["anomalous"] = most > bundle.threshold(*rate, of_pictures=True)
    columns["top"] = [picture.top for picture in pictures]
    columns["left"] = [picture.left for picture in pictures]
    pixels = [picture.canvas.picture() for picture in pictures] if keep else []
    return Answers(columns, pixels, resumed)


def path_of_map(folder: Path, number: int, name: str) -> Path:
    """Name a picture by its place among all, and its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    own = re.sub(r"[^\w.-]+", "_", name)[-LONGEST_NAME:]
    return folder / f"{number:07}-{own}.png"


def draw(bundle: Bundle, pixels: np.ndarray, tiling: Tiling | None, path: Path) -> None:
    """Draw an image or a whole picture with red where it is unusual."""
    if tiling is None:
        map_ = _maps(bundle, pixels[None])[0]
    else:
        rows = (tiling.row(pixels, top) for top in tiling.starts(len(pixels)))
        map_ = stitched(tiling, pixels.shape, (_maps(bundle, row) for row in rows))
    with atomic_file(path) as fresh:
        write_png(fresh, overlay(pixels, map_))


def _maps(bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    maps = bundle.detect(pixels, maps=True).maps
    assert maps is not None
    return maps
