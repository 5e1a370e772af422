"""Images in a file, read where they are asked for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import numpy as np


def row_numbers(rows, count: int) -> Sequence[int]:
    """Which rows of so many a key stands for, as numpy understands it.

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

    Example:
        >>> StoredImages(np.load("train.npy", mmap_mode="r"))[[3, 5]]  # a numpy array
    """

    def __init__(self, images: np.memmap):
        self.shape = images.shape
        self._offset = images.offset
        self._bytes = images[:1].nbytes
        self._file = os.open(images.filename, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        rows = row_numbers(rows, len(self))
        if isinstance(rows, range) and rows.step == 1:
            content = self._read(rows.start, len(rows))
        else:
            content = b"".join([self._read(row, 1) for row in rows])
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])

    def _read(self, row: int, count: int) -> bytes:
        return os.pread(self._file, count * self._bytes, self._offset + row * self._bytes)
