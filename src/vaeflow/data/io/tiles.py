"""Where to cut large pictures into square tiles, and how to put together what became of these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vaeflow.errors import BadImageError, DataError

SMALLEST = 4  # pixels
PLACE = re.compile(r"(.*)@(\d+),(\d+)", re.DOTALL)


class Tiling(NamedTuple):
    """How pictures are cut: the last tile of a row ends with the row, so that nothing is left out.

    Attributes:
        edge: of a tile, in pixels.
        stride: from the left of one to the left of the next, and from row to row.
    """

    edge: int
    stride: int

    @classmethod
    def of(cls, edge: int, stride: int | None = None) -> Tiling:
        """Return tiles that stand side by side, or every `stride` pixels.

        Raises:
            DataError: they would be tiny, or leave gaps.
        """
        stride = edge if stride is None else stride
        if edge < SMALLEST:
            raise DataError(f"tile is {edge}; expected {SMALLEST} pixels or more.")
        if not 1 <= stride <= edge:
            raise DataError(
                f"stride is {stride}; expected 1 to {edge}, the edge of a tile: else there are "
                "gaps."
            )
        return cls(edge, stride)

    def __str__(self) -> str:
        return f"tiles of {self.edge}x{self.edge}, one every {self.stride} pixels"

    def starts(self, length: int) -> list[int]:
        """Return where the tiles of a row start that is `length` pixels long."""
        last = length - self.edge
        return [*range(0, last, self.stride), last]

    def row(self, picture: np.ndarray, top: int) -> np.ndarray:
        """Return the tiles of a row that starts `top` pixels from above, in an array."""
        pixels = picture[top : top + self.edge]
        lefts = self.starts(pixels.shape[1])
        return np.stack([pixels[:, left : left + self.edge] for left in lefts])

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tile of a picture, both `(height, width, channels)`.

        Raises:
            BadImageError: the picture is smaller than a tile.
        """
        height, width, *channels = shape
        if min(height, width) < self.edge:
            raise BadImageError(
                name, f"{width}x{height} pixels, and a tile has {self.edge}x{self.edge}."
            )
        return (self.edge, self.edge, *channels)


class Place(NamedTuple):
    """Where a tile is in its picture: pixels from above and from the left."""

    picture: str
    top: int
    left: int

    def __str__(self) -> str:
        return f"{self.picture}@{self.top},{self.left}"

    @classmethod
    def of(cls, name: str) -> Place:
        """Read it from the name of a tile; what is none is a picture of one tile."""
        match = PLACE.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3])) if match else cls(name, 0, 0)


class Canvas:
    """A picture that is put together again from its tiles, as they come in their order."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []  # of pixels, that lie below each other
        self._row: list[np.ndarray] = []  # of tiles: what each adds to those left of it
        self._top = self._width = self._height = 0

    def add(self, tile: np.ndarray, top: int, left: int) -> None:
        """Add the next tile, `(height, width, channels)`."""
        if top != self._top:
            self._finish_row()
            self._top, self._width = top, 0
        self._row.append(tile[:, self._width - left :])
        self._width = left + tile.shape[1]

    def picture(self) -> np.ndarray:
        """Return it, `(height, width, channels)`."""
        self._finish_row()
        return np.concatenate(self._rows)

    def _finish_row(self) -> None:
        if self._row:
            row = np.concatenate(self._row, axis=1)
            self._rows.append(row[self._height - self._top :])
            self._height = self._top + len(row)
            self._row = []


def stitched(tiling: Tiling, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> np.ndarray:
    """Put maps of tiles together: where tiles overlap, their mean.

    Args:
        tiling: by which the picture was cut.
        shape: of the picture, whose first two are height and width.
        rows: the maps of each row of tiles, `(tiles, edge, edge)`.

    Returns:
        float32, `(height, width)`.
    """
    height, width = shape[:2]
    sums = np.zeros((height, width), np.float32)
    counts = np.zeros((height, width), np.float32)
    for top, maps in zip(tiling.starts(height), rows, strict=True):
        for left, tile in zip(tiling.starts(width), maps, strict=True):
            place = slice(top, top + tiling.edge), slice(left, left + tiling.edge)
            sums[place] += tile
            counts[place] += 1
    return sums / counts
