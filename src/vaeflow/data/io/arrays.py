"""Read arrays of images on disk, in blocks (NPY, NPZ, IDX; plain or gzipped), and their labels.

A header is read first and compared with the size of its file, so that a short file that declares a
large array is refused before anything is allocated. Nothing is ever unpickled: it could run code.

`vaeflow data add` writes `index.csv` beside `images.npy`, with the columns `source` and `label`.
Arrays from elsewhere have their labels in a second array: `labels.npy` beside `images.npy`, or the
IDX file of labels beside that of images (`train-labels-idx1-ubyte` for `train-images-idx3-ubyte`).
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from vaeflow.config.schema import Limits
from vaeflow.errors import BadImageError, DataError

BYTES_PER_BLOCK = 4 << 20
LARGEST_NPY_HEADER = 10_000  # NumPy's own limit

NPY_MAGIC = b"\x93NUMPY"
GZIP_MAGIC = b"\x1f\x8b"
IDX_NAME = re.compile(r"(^|[-._])idx[1-9]([-._]|$)|\.idx(\.gz)?$", re.IGNORECASE)
# The magic number is two zeros, the type and the number of dimensions; then each dimension, as
# four bytes. All is big-endian (http://yann.lecun.com/exdb/mnist).
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGES = "images.npy"
LABELS = "labels.npy"
INDEX = "index.csv"
COLUMNS = ["source", "label"]


def is_array(path: Path) -> bool:
    """Return whether a name is an array's: .npy, .npz, or IDX such as train-images-idx3-ubyte."""
    return path.suffix.lower() in {".npy", ".npz"} or bool(IDX_NAME.search(path.name))


@dataclass(frozen=True)
class ArrayFile:
    """An open array whose header has been read.

    Attributes:
        shape: as declared; the first axis counts the rows.
        dtype: as declared.
        packed: whether it is compressed, so that damage shows only when all of it was read.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: IO[bytes]
    packed: bool = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows in order, some megabytes at a time; to be called once.

        Raises:
            DataError: the file is damaged, shorter or longer than its header says.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        at_once = max(1, BYTES_PER_BLOCK // max(1, row_bytes))
        for start in range(0, self.shape[0], at_once):
            rows = min(at_once, self.shape[0] - start)
            content = self._read(rows * row_bytes)
            if len(content) < rows * row_bytes:
                complete = start + len(content) // row_bytes
                raise BadImageError(
                    self.path,
                    f"cut off after row {complete} of {self.shape[0]}. Fetch the file again.",
                )
            yield np.frombuffer(content, self.dtype).reshape(rows, *self.shape[1:])
        # Reading on to the end is also what makes gzip and zip compare their checksums.
        if self._read(1):
            raise BadImageError(self.path, f"goes on after the {self.shape[0]} rows it declares.")

    def _read(self, size: int) -> bytes:
        with _clear_errors(self.path):
            return self.stream.read(size)


@contextmanager
def open_array(
    path: Path, key: str | None = None, limits: Limits | None = None
) -> Iterator[ArrayFile]:
    """Open an array and read its header.

    Args:
        path: `.npy`, `.npz`, or IDX, plain or gzipped.
        key: which array of an `.npz`; may be left out when it holds one.
        limits: how far a packed array may expand.

    Raises:
        DataError: the file is missing or damaged, its header declares more than the file can hold,
            or an `.npz` has no such key.
    """
    expansion = (limits or Limits()).max_expansion
    with ExitStack() as stack:
        with _clear_errors(path):
            file = stack.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
            match path.suffix.lower():
                case ".npy":
                    opened = _npy(path, file, size)
                case ".npz":
                    opened = _npz(path, file, key, expansion, stack)
                case _:
                    opened = _idx(path, file, size, expansion, stack)
        yield opened


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:  # whatever a damaged file makes of the parsers below
        raise BadImageError(
            path, f"not a readable array ({error or type(error).__name__})."
        ) from None


class NpyHeader(NamedTuple):
    """What an `.npy` file says of its array, and where its numbers begin, in bytes."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int


def read_npy_header(stream: IO[bytes], size: int) -> NpyHeader:
    """Read the header of an array in NumPy's format, version 1 or 2; nothing is unpickled.

    Args:
        stream: at the array's first byte; then at its first number.
        size: of the whole, in bytes; a header that claims to be longer is refused.

    Raises:
        ValueError: it is none. The header is a Python literal: NumPy raises other errors, too.
    """
    start = stream.read(8)
    if start[:6] != NPY_MAGIC:
        raise ValueError("it does not begin as an .npy file does")
    version = tuple(start[6:])
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"version {version} of the format, expected 1.0 or 2.0")
    width = 2 if version == (1, 0) else 4
    length_field = stream.read(width)
    length = int.from_bytes(length_field, "little")
    if len(length_field) < width or length > min(LARGEST_NPY_HEADER, size):
        raise ValueError(f"a header of {length} bytes")
    header = io.BytesIO(length_field + stream.read(length))
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return NpyHeader(*read(header), offset=len(start) + width + length)


def _npy(path: Path, stream: IO[bytes], size: int) -> ArrayFile:
    """Read the header of an NPY file, or of a member of an NPZ file, that is `size` bytes long."""
    shape, fortran_order, dtype, offset = read_npy_header(stream, size)
    if dtype.hasobject:
        raise BadImageError(path, "holds pickled Python objects, which are never opened.")
    if fortran_order and len(shape) > 1:
        raise BadImageError(
            path,
            "stored column by column (Fortran order). "
            "Save it again: numpy.save(path, numpy.ascontiguousarray(array))",
        )
    _check_size(path, shape, dtype, size - offset)
    return ArrayFile(path, shape, dtype, stream)


def _npz(
    path: Path, file: IO[bytes], key: str | None, expansion: int, stack: ExitStack
) -> ArrayFile:
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if key is None and len(members) == 1:
        key = next(iter(members))
    if key not in members:
        asked = f"no array {key!r} in it" if key else "holds several arrays; name one (--key)"
        raise BadImageError(path, f"{asked}. It has: {', '.join(sorted(members)) or 'none'}.")
    member = members[key]
    _check_expansion(path, member.file_size, member.compress_size, expansion)
    array = _npy(path, stack.enter_context(archive.open(member)), member.file_size)
    return replace(array, packed=True)


def _idx(path: Path, file: IO[bytes], size: int, expansion: int, stack: ExitStack) -> ArrayFile:
    packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    stream = file
    if packed:
        stream = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=file)))
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_TYPES or not start[3]:
        raise ValueError(f"wrong magic number {start.hex() or '(empty)'}, expected IDX")
    dtype = np.dtype(IDX_TYPES[start[2]])
    declared = stream.read(4 * start[3])
    shape = struct.unpack(f">{start[3]}I", declared)
    pixels = math.prod(shape) * dtype.itemsize
    if packed:
        _check_expansion(path, pixels, size, expansion)
    else:
        _check_size(path, shape, dtype, size - len(start) - len(declared))
    return ArrayFile(path, shape, dtype, stream, packed)


def _check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype, available: int) -> None:
    declared = math.prod(shape) * dtype.itemsize
    if not shape or declared != available:
        raise BadImageError(
            path,
            f"declares an array of shape {shape}, {declared} bytes, but holds {available}. "
            "It is cut off or damaged: fetch it again.",
        )


def _check_expansion(path: Path, unpacked: int, packed: int, largest: int) -> None:
    if unpacked > largest * max(1, packed):
        raise BadImageError(
            path,
            f"declares {unpacked} bytes packed into {packed}, more than {largest} to 1 "
            "(prepare.max_expansion in params.yaml): refused as a decompression bomb. "
            "Unpack it yourself if you trust it.",
        )


class ArrayWriter:
    """Write an `.npy` file block by block, without knowing how many rows will come.

    Args:
        path: the file.
        row_shape: shape of one row.
        dtype: of its numbers.

    Attributes:
        rows: written so far.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: type = np.uint8) -> None:
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self.rows = 0
        self._file = path.open("wb")
        self._start = self._write_header()

    def write(self, rows: np.ndarray) -> None:
        """Append rows, `(count, *row_shape)`."""
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Write the number of rows into the header, for which NumPy leaves room."""
        self._file.seek(0)
        if self._write_header() != self._start:
            raise AssertionError("the header has grown over the first row")
        self._file.close()

    def _write_header(self) -> int:
        shape = (self.rows, *self.row_shape)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


class Rows:
    """The rows of one array in order, a block at a time.

    Args:
        path: the array of images.
        count: how many rows it has.

    Raises:
        DataError: the index or the labels beside it are damaged, or not as many as the images.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.done = 0
        self._stack = ExitStack()
        self._index = self._open_index()
        self._labels = None if self._index else read_labels(path, count)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, count: int) -> tuple[list[str], Sequence[str | None]]:
        """Return names and labels of the next `count` rows."""
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
    """Return the file that holds an array's labels, if there is one."""
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
    """Read the integer labels of an array's rows, `(count,)`; None where there are none.

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
