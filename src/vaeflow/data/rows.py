"""What the rows of an array stand for: where each image came from, and its label.

`vaeflow data add` writes `index.csv` beside `images.npy`, with the columns `source` and `label`.
Arrays from elsewhere have their labels in a second array: `labels.npy` beside `images.npy`, or the
IDX file of labels beside that of images (`train-labels-idx1-ubyte` for `train-images-idx3-ubyte`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from vaeflow.data.arrays import IDX_NAME, open_array
from vaeflow.errors import BadImageError, DataError

IMAGES = "images.npy"
LABELS = "labels.npy"
INDEX = "index.csv"
COLUMNS = ["source", "label"]


class Rows:
    """The rows of one array in order, a block at a time.

    Args:
        path: the array of images.
        count: how many rows it has.

    Raises:
        DataError: the index or the labels beside it are damaged, or not as many as the images.
    """

    def __init__(self, path: Path, count: int):
        self.path = path
        self.count = count
        self.done = 0
        self._stack = ExitStack()
        self._index = self._open_index()
        self._labels = None if self._index else read_labels(path, count)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def take(self, count: int) -> tuple[list[str], Sequence[str | None]]:
        """Names and labels of the next `count` rows."""
        start, self.done = self.done, self.done + count
        if self._index is None:
            prefix = f"{self.path}#"
            names = [f"{prefix}{row}" for row in range(start, self.done)]
            if self._labels is None:
                return names, [None] * count
            return names, self._labels[start : self.done].astype(str).tolist()
        rows = list(islice(self._index, count))
        last = self.done == self.count
        if len(rows) < count or (last and next(self._index, None) is not None):
            raise self._damaged(f"has not as many rows as {IMAGES} ({self.count})")
        if any(len(row) != len(COLUMNS) for row in rows):
            raise self._damaged("has a row that is not a source and a label")
        prefix = f"{self.path.parent}/"
        return [prefix + source for source, _ in rows], [label or None for _, label in rows]

    def _open_index(self) -> Iterator[list[str]] | None:
        path = self.path.with_name(INDEX)
        if self.path.name != IMAGES or not path.is_file():
            return None
        file = self._stack.enter_context(path.open(newline="", encoding="utf-8"))
        reader = csv.reader(file)
        # Another header is somebody else's file of that name.
        return reader if next(reader, None) == COLUMNS else None

    def _damaged(self, fault: str) -> DataError:
        return DataError(
            f"{self.path.with_name(INDEX)} {fault}: it was changed or damaged. "
            "Get the versioned one back: dvc checkout --force data.dvc"
        )


def labels_path(images: Path) -> Path | None:
    """The file that holds an array's labels, if there is one."""
    if images.name == IMAGES:
        candidates = [images.with_name(LABELS)]
    elif IDX_NAME.search(images.name):
        plain = images.name.removesuffix(".gz").replace("images", "labels")
        plain = re.sub(r"idx\d", "idx1", plain)
        candidates = [images.with_name(plain), images.with_name(f"{plain}.gz")]
    else:
        return None
    return next((path for path in candidates if path != images and path.is_file()), None)


def read_labels(images: Path, count: int) -> np.ndarray | None:
    """Integer labels of an array's rows, `(count,)`, or None where there are none.

    Raises:
        BadImageError: they are damaged, no integers, or not as many as the images.
    """
    path = labels_path(images)
    if path is None:
        return None
    with open_array(path) as array:
        if len(array.shape) != 1 or array.dtype.kind not in "iu":
            raise BadImageError(
                path,
                f"an array of {array.dtype}, shape {array.shape}; "
                "expected integers, shape (count,).",
            )
        if array.shape[0] != count:
            raise BadImageError(
                path,
                f"holds {array.shape[0]} labels for the {count} images of {images.name}; "
                "expected one for each, in the same order.",
            )
        return np.concatenate([*array.blocks(), np.empty(0, array.dtype)])
