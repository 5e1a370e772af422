"""Views of stored images that are read a batch at a time, in grey or in black and white.

A grey pixel of level x is white with probability x / 255. `static` draws each training image once,
`dynamic` anew in every step (in `VAE.train_step`); what a model is validated and tested on is drawn
once under both, so that figures compare.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np


def row_numbers(rows: Any, count: int) -> Sequence[int]:
    """Return which rows a key stands for, as numpy understands it.

    Args:
        rows: a slice, or a list or an array of row numbers, negative ones from the end, or of as
            many booleans as there are rows.
        count: of the rows there are.

    Raises:
        IndexError: there is no such row.
    """
    if isinstance(rows, slice):
        return range(count)[rows]
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (count,):
        return np.flatnonzero(rows).tolist()
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise IndexError(
            f"{rows.dtype} of shape {rows.shape} picks no rows of {count}; expected a slice, "
            "row numbers, or one boolean a row."
        )
    numbers = rows.tolist()
    if numbers and not -count <= min(numbers) <= max(numbers) < count:
        raise IndexError(f"rows {min(numbers)} to {max(numbers)} of {count}.")
    return [number % count for number in numbers]


class StoredImages:
    """A view of memory-mapped images that reads them from their file instead.

    Linux counts all that has been touched of a mapped file, and as much as two megabytes around it,
    as the process's memory: a few shuffled batches, and that is the whole file. Stands in for an
    array of images where these are counted, sliced or picked by an array of indices.

    Args:
        images: uint8, `(count, height, width, channels)`, in C order.

    Examples:
        >>> StoredImages(np.load("train.npy", mmap_mode="r"))[[3, 5]]  # a numpy array
    """

    def __init__(self, images: np.memmap) -> None:
        assert images.filename is not None
        self.shape: tuple[int, ...] = images.shape
        self._offset = images.offset
        self._bytes = images[:1].nbytes
        self._file = os.open(images.filename, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = row_numbers(rows, len(self))
        if isinstance(rows, range) and rows.step == 1:
            content = self._read(rows.start, len(rows))
        else:
            content = b"".join([self._read(row, 1) for row in rows])
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])

    def _read(self, row: int, count: int) -> bytes:
        return os.pread(self._file, count * self._bytes, self._offset + row * self._bytes)


class Binarized:
    """A view of images as black and white, drawn as they are read, the same at every reading.

    An image's draw depends on the seed and on its index alone, so images may be read in any order
    and never need to be in memory together. Stands in for an array of images where these are
    counted, sliced or picked by an array of indices.

    Args:
        images: uint8, `(count, height, width, channels)`, typically memory-mapped.
        seed: of the draws.

    Examples:
        >>> Binarized(images, seed=0)[[3, 5]]  # uint8, (2, height, width, channels), 0 and 255
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.shape: tuple[int, ...] = images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> np.ndarray:
        pixels = np.asarray(self.images[rows])
        thresholds = [self._thresholds(row) for row in row_numbers(rows, len(self))]
        # White for x of the 255 thresholds 0..254: never for 0, always for 255.
        white = pixels > np.reshape(thresholds, pixels.shape)
        return np.where(white, np.uint8(255), np.uint8(0))

    def _thresholds(self, index: int) -> np.ndarray:
        # A counter-based generator: the image's own stretch of it is reached without the rest.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, index]))
        return generator.integers(0, 255, self.shape[1:], dtype=np.uint8)


def binarized(images: Images, binarize: str, seed: int) -> Images:
    """Return images to validate or test on: drawn once, or as they are with `binarize: none`."""
    return images if binarize == "none" else Binarized(images, seed)


# What batches are taken from.
Images: TypeAlias = np.ndarray | StoredImages | Binarized
