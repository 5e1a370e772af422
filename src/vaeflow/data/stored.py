"""Images in a file, read where they are asked for."""

from __future__ import annotations

import os
import weakref

import numpy as np


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
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            content = self._read(start, max(0, stop - start))
        else:
            content = b"".join([self._read(row, 1) for row in np.asarray(rows).tolist()])
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])

    def _read(self, row: int, count: int) -> bytes:
        return os.pread(self._file, count * self._bytes, self._offset + row * self._bytes)
