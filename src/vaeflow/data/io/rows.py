"""Open whatever file of arrays, and tell of each image in it its name, its label and its split.

`vaeflow data add` writes `index.csv` beside `images.npy`, with the columns `source`, `label` and,
where it is not the images' contents that decide, `split`; of tiles also `picture`, the digest of
what they were cut from. Arrays from elsewhere have their labels
in a second array: `labels.npy` beside `images.npy`, `y_train.npy` beside `x_train.npy`, or the IDX
file of labels beside that of images (`train-labels-idx1-ubyte` for `train-images-idx3-ubyte`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaeflow.config.schema import Limits
from vaeflow.data.io import arrays, matrices
from vaeflow.data.io.arrays import (
    CIFAR_NAME,
    IDX_NAME,
    ArrayFile,
    as_labels,
    as_text,
    clear_errors,
    label_names,
)
from vaeflow.data.splits import GIVEN, as_digests
from vaeflow.errors import BadImageError, DataError

IMAGES = "images.npy"
LABELS = "labels.npy"
INDEX = "index.csv"
COLUMNS = ["source", "label"]
WITH_SPLIT = [*COLUMNS, "split"]
WITH_PICTURE = [*WITH_SPLIT, "picture"]
HEADERS = (COLUMNS, WITH_SPLIT, WITH_PICTURE)
DIGEST = re.compile(r"[0-9a-f]{64}")
SUFFIXES = {".npy", ".npz", *matrices.SUFFIXES}


def is_array(path: Path) -> bool:
    """Return whether a name is an array's, such as a.npy, a.mat or train-images-idx3-ubyte."""
    return (
        path.suffix.lower() in SUFFIXES
        or bool(IDX_NAME.search(path.name))
        or bool(CIFAR_NAME.fullmatch(path.name))
    )


@contextmanager
def open_arrays(
    path: Path, key: str | None = None, limits: Limits | None = None, label_key: str | None = None
) -> Iterator[list[ArrayFile]]:
    """Open the arrays of images in a file and read their headers.

    Args:
        path: `.npy`, `.npz`, IDX, plain or gzipped, CIFAR's `.bin`, HDF5 or `.mat`.
        key: which array of several; may be left out where only one can be images, or where all are
            named by their split, as in `train_images` or `x_test`.
        limits: how far a packed array may expand.
        label_key: which array has the labels; may be left out where it has a usual name.

    Raises:
        DataError: the file is missing or damaged, its header declares more than the file can hold,
            or it has no such key.
    """
    expansion = (limits or Limits()).max_expansion
    with ExitStack() as stack:
        with clear_errors(path):
            file = stack.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
            if path.suffix.lower() == ".npy":
                opened = [arrays.open_npy(path, file, size)]
            elif path.suffix.lower() == ".npz":
                opened = arrays.open_npz(path, file, key, label_key, expansion, stack)
            elif path.suffix.lower() in matrices.SUFFIXES:
                members = matrices.open_members(path, file, size, expansion, stack)
                opened = members.open(key, label_key)
            elif CIFAR_NAME.fullmatch(path.name):
                opened = [arrays.open_cifar(path, size)]
            else:
                opened = [arrays.open_idx(path, file, size, expansion, stack)]
        yield opened


class Row(NamedTuple):
    """What is known of images beside their pixels, a list for each fact."""

    names: list[str]
    labels: Sequence[str | None]
    splits: Sequence[str | None]
    origins: np.ndarray | None = None  # of tiles; see `Images`


class Rows:
    """What is known of the images of one array, in order, a block at a time.

    Args:
        array: of images.
        count: how many those are; None: it is one image.

    Raises:
        DataError: the index or the labels beside it are damaged, or not as many as the images.
    """

    def __init__(self, array: ArrayFile, count: int | None) -> None:
        self.array = array
        self.count = count
        self.done = 0
        self._stack = ExitStack()
        self._index = None if count is None else _open_index(array.path, self._stack)
        self._labels = array.labels
        if self._index is None and self._labels is None and count is not None:
            self._labels = read_labels(array.path, count)
        if self._labels is not None and len(self._labels) != (count or 1):
            raise BadImageError(
                array.name, f"has {len(self._labels)} labels for {count or 1} images."
            )

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, count: int) -> Row:
        """Return what is known of the next `count` images."""
        start, self.done = self.done, self.done + count
        if self._index is not None:
            return self._indexed(count)
        name = as_text(self.array.name)
        names = [name]
        if self.count is not None:
            prefix = f"{name}#"
            names = [f"{prefix}{row}" for row in range(start, self.done)]
        labels = [None] * count
        if self._labels is not None:
            labels = self._labels[start : self.done].tolist()
        return Row(names, labels, [None] * count)

    def _indexed(self, count: int) -> Row:
        assert self._index is not None
        rows = list(islice(self._index, count))
        last = self.done == self.count
        if len(rows) < count or (last and next(self._index, None) is not None):
            raise self._damaged(f"has not as many rows as {IMAGES} ({self.count})")
        columns = {len(row) for row in rows}
        if len(columns) > 1 or not columns <= set(map(len, HEADERS)):
            raise self._damaged("has a row that is not a source, a label and perhaps a split")
        prefix = f"{as_text(str(self.array.path.parent))}/"
        splits = [(row[2] or None) if len(row) > len(COLUMNS) else None for row in rows]
        if unknown := set(splits) - {None, *GIVEN}:
            raise self._damaged(f"has the split {unknown.pop()!r}; expected {', '.join(GIVEN)}")
        origins = None
        if len(WITH_PICTURE) in columns:
            digests = [row[-1] for row in rows]
            if not all(map(DIGEST.fullmatch, digests)):
                raise self._damaged("has a picture that is no SHA-256")
            origins = as_digests(list(map(bytes.fromhex, digests)))
        names, labels = [prefix + row[0] for row in rows], [row[1] or None for row in rows]
        return Row(names, labels, splits, origins)

    def _damaged(self, fault: str) -> DataError:
        return DataError(
            f"{self.array.path.with_name(INDEX)} {fault}: it was changed or damaged. "
            "Get the versioned one back: dvc checkout --force data.dvc"
        )


def _open_index(path: Path, stack: ExitStack) -> Iterator[list[str]] | None:
    """Open the index that `vaeflow data add` wrote beside an array, if it did."""
    if not is_part(path):
        return None
    file = stack.enter_context(path.with_name(INDEX).open(newline="", encoding="utf-8"))
    reader = csv.reader(file)
    next(reader)
    return reader


def is_part(path: Path) -> bool:
    """Return whether an array was written by `vaeflow data add`."""
    index = path.with_name(INDEX)
    if path.name != IMAGES or not index.is_file():
        return False
    with index.open(encoding="utf-8", errors="replace") as file:
        # Another header is somebody else's file of that name.
        return file.readline(100).rstrip("\r\n").split(",") in HEADERS


def labels_path(images: Path) -> Path | None:
    """Return the file that holds an array's labels, if there is one."""
    return next((path for path in labels_candidates(images) if path.is_file()), None)


def labels_candidates(images: Path) -> list[Path]:
    """Return the files that may hold an array's labels, the likeliest first."""
    if IDX_NAME.search(images.name):
        plain = images.name.removesuffix(".gz").replace("images", "labels")
        plain = re.sub(r"idx\d", "idx1", plain)
        names = [plain, f"{plain}.gz"]
    elif images.suffix.lower() == ".npy":
        names = [LABELS] if images.name == IMAGES else []
        names += [f"{name}{images.suffix}" for name in label_names(images.stem)]
    else:
        return []
    return [images.with_name(name) for name in names if name != images.name]


def read_labels(images: Path, count: int) -> np.ndarray | None:
    """Read the labels of an array's rows, text `(count,)`; None where there are none.

    Raises:
        BadImageError: they are damaged, several an image, or not as many as the images.
    """
    path = labels_path(images)
    if path is None:
        return None
    with open_arrays(path) as (array,):
        labels = as_labels(array.whole())
        if labels is None:
            raise BadImageError(
                path,
                f"an array of {array.dtype}, shape {array.shape}; "
                "expected integers or text, shape (count,).",
            )
        if len(labels) != count:
            raise BadImageError(
                path,
                f"holds {len(labels)} labels for the {count} images of {images.name}; "
                "expected one for each, in the same order.",
            )
        return labels
