"""Read arrays on disk in blocks: NumPy's `.npy` and `.npz`, IDX, CIFAR's `.bin`.

A header is read first and compared with the size of its file, so that a short file that declares a
large array is refused before anything is allocated. Nothing is ever unpickled: it could run code.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np

from vaeflow.errors import BadImageError, DataError

BYTES_PER_BLOCK = 4 << 20
LARGEST_NPY_HEADER = 10_000  # NumPy's own limit

NPY_MAGIC = b"\x93NUMPY"
GZIP_MAGIC = b"\x1f\x8b"
IDX_NAME = re.compile(r"(^|[-._])idx[1-9]([-._]|$)|\.idx(\.gz)?$", re.IGNORECASE)
# The magic number is two zeros, the type and the number of dimensions; then each dimension, as
# four bytes. All is big-endian (http://yann.lecun.com/exdb/mnist).
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
USUAL_LABELS = ("labels", "label", "y", "Y", "targets", "target", "classes")


# Krizhevsky 2009: a byte or two of labels an image, then its red, green and blue.
CIFAR_NAME = re.compile(r"(data_batch_\d+|test_batch|train|test)\.bin", re.IGNORECASE)
CIFAR_SHAPE = (3, 32, 32)
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
WORD = re.compile(r"[A-Za-z]+")


class Values(Protocol):
    """What can be indexed like an array, and is read when it is."""

    def __getitem__(self, key: Any) -> Any: ...


@dataclass(frozen=True)
class ArrayFile:
    """An open array whose header has been read.

    Attributes:
        path: the file.
        shape: as declared.
        dtype: as declared.
        values: of the array; None: they come from `stream` alone, in C order.
        stream: at the first number.
        packed: whether it is compressed, so that damage shows only when all of it was read.
        member: its name, where a file has several.
        labels: of the images, where the same file has them, `(count,)`.
        unread_labels: the name of an array of labels that has several an image.
        split: that its publisher has put all of it in.
        layout: of its axes, where the format lays it down.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: IO[bytes] | None = None
    values: Values | None = None
    packed: bool = False
    member: str | None = None
    labels: np.ndarray | None = None
    unread_labels: str | None = None
    split: str | None = None
    layout: str | None = None

    @property
    def name(self) -> str:
        """The file, and the array in it where there are several."""
        return str(self.path) if self.member is None else f"{self.path}#{self.member}"

    def blocks(self, axis: int = 0) -> Iterator[np.ndarray]:
        """Yield the array in parts along one axis, some megabytes at a time; to be called once.

        Raises:
            DataError: the file is damaged, shorter or longer than its header says.
        """
        count = self.shape[axis]
        item_bytes = math.prod(self.shape) // max(1, count) * self.dtype.itemsize
        at_once = max(1, BYTES_PER_BLOCK // max(1, item_bytes))
        if self.values is None and axis == 0:
            yield from self._in_turn(at_once, item_bytes)
            return
        values = self.values if self.values is not None else self._whole()
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            with clear_errors(self.path):
                block = np.asarray(values[(slice(None),) * axis + (part,)])
            yield block

    def whole(self) -> np.ndarray:
        """Return all of it."""
        with clear_errors(self.path):
            return np.asarray(self._whole() if self.values is None else self.values[...])

    def _in_turn(self, at_once: int, row_bytes: int) -> Iterator[np.ndarray]:
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
        self._check_end()

    def _whole(self) -> np.ndarray:
        size = math.prod(self.shape) * self.dtype.itemsize
        if len(content := self._read(size)) < size:
            raise BadImageError(self.path, "cut off. Fetch the file again.")
        self._check_end()
        return np.frombuffer(content, self.dtype).reshape(self.shape)

    def _check_end(self) -> None:
        # Reading on to the end is also what makes gzip and zip compare their checksums.
        if self._read(1):
            raise BadImageError(self.path, f"goes on after the {self.shape[0]} rows it declares.")

    def _read(self, size: int) -> bytes:
        assert self.stream is not None  # where there are no values
        with clear_errors(self.path):
            return self.stream.read(size)


@contextmanager
def clear_errors(path: Path, what: str = "array", remedy: str = "") -> Iterator[None]:
    """Turn whatever a damaged file makes of the parsers into a BadImageError.

    Args:
        path: of the file.
        what: it should be.
        remedy: a sentence for the error, after a space.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:
        reason = f"not a readable {what} ({error or type(error).__name__}).{remedy}"
        raise BadImageError(path, reason) from None


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


def open_npy(path: Path, stream: IO[bytes], size: int) -> ArrayFile:
    """Read the header of an NPY file, or of a member of an NPZ file, that is `size` bytes long."""
    shape, fortran_order, dtype, offset = read_npy_header(stream, size)
    if dtype.hasobject:
        raise BadImageError(
            path,
            "holds pickled Python objects, which are never opened. Where you trust them, save "
            "them as one array: numpy.save(path, numpy.stack(list_of_images))",
        )
    _check_size(path, shape, dtype, size - offset)
    if not fortran_order or len(shape) < 2:
        return ArrayFile(path, shape, dtype, stream)
    # Column by column: what is first on disk is last in the array.
    if path.suffix.lower() == ".npy" and 0 not in shape:
        return ArrayFile(
            path, shape, dtype, values=np.memmap(path, dtype, "r", offset, shape, order="F")
        )
    reverse = ArrayFile(path, shape[::-1], dtype, stream)
    return ArrayFile(path, shape, dtype, values=reverse.whole().T)


def open_npz(
    path: Path,
    file: IO[bytes],
    key: str | None,
    label_key: str | None,
    expansion: int,
    stack: ExitStack,
) -> list[ArrayFile]:
    """Open the arrays of an NPZ file; see `vaeflow.data.io.rows.open_arrays`."""
    archive = stack.enter_context(zipfile.ZipFile(file))
    infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def open_member(name: str) -> ArrayFile:
        info = infos[name]
        check_expansion(path, info.file_size, info.compress_size, expansion)
        array = open_npy(path, stack.enter_context(archive.open(info)), info.file_size)
        return replace(array, packed=True, member=name if len(infos) > 1 else None)

    def shape_of(name: str) -> tuple[int, ...]:
        if not infos[name].filename.endswith(".npy"):
            return ()  # something else, which is in the way only when it is asked for
        with archive.open(infos[name]) as stream:
            return read_npy_header(stream, infos[name].file_size).shape

    return Members(path, {name: shape_of(name) for name in infos}, open_member).open(key, label_key)


@dataclass(frozen=True)
class Members:
    """The arrays of a file that has several.

    Attributes:
        path: the file.
        shapes: of each, by its name.
        open_member: opens one.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    open_member: Callable[[str], ArrayFile]

    def open(self, key: str | None, label_key: str | None) -> list[ArrayFile]:
        """Open those that hold images, with their labels.

        Raises:
            BadImageError: there is none of that name, or several may be meant.
        """
        keys = [key] if key is not None else self._images()
        for each in (*keys, *([label_key] if label_key else ())):
            if each not in self.shapes:
                raise BadImageError(
                    self.path, f"no array {each!r} in it. It has: {self._listed()}."
                )
        return [self._with_labels(each, label_key, len(keys) > 1) for each in keys]

    def _images(self) -> list[str]:
        if len(self.shapes) == 1:
            return list(self.shapes)
        found = [name for name, shape in self.shapes.items() if len(shape) in (3, 4)]
        if len(found) > 1 and len({split_named(name) for name in found} - {None}) == len(found):
            return found
        if len(found) != 1:
            raise BadImageError(
                self.path, f"holds several arrays; name one (--key). It has: {self._listed()}."
            )
        return found

    def _with_labels(self, key: str, label_key: str | None, of_several: bool) -> ArrayFile:
        array = self.open_member(key)
        if label_key is None:
            names = (*label_names(key), *(USUAL_LABELS if not of_several else ()))
            label_key = next((name for name in names if name in self.shapes), None)
        labels, unread = None, None
        if label_key is not None and label_key != key:
            labels = as_labels(self.open_member(label_key).whole())
            unread = label_key if labels is None else None
        split = split_named(key) if of_several else None
        return replace(array, labels=labels, unread_labels=unread, split=split)

    def _listed(self) -> str:
        return ", ".join(f"{name} {shape}" for name, shape in sorted(self.shapes.items())) or "none"


def split_named(key: str) -> str | None:
    """Return the split that a name such as x_train or val_images says."""
    words = [SPLIT_OF[word] for word in WORD.findall(key.lower()) if word in SPLIT_OF]
    return words[0] if len(words) == 1 else None


def label_names(images: str) -> list[str]:
    """Return what the labels of an array of images are usually called, by its name."""
    names = [
        re.sub(r"(?<![A-Za-z])(images|imgs|data)(?![A-Za-z])", "labels", images),
        re.sub(r"(?<![A-Za-z])x(?![A-Za-z])", "y", images),
        re.sub(r"(?<![A-Za-z])X(?![A-Za-z])", "y", images),
    ]
    return [name for name in names if name != images]


def as_labels(values: np.ndarray) -> np.ndarray | None:
    """Return labels as text, `(count,)`; None for what has several an image."""
    values = values.reshape(-1) if values.size == max(values.shape, default=0) else values
    if values.ndim != 1:
        return None
    if values.dtype.kind == "f" and (values == np.rint(values)).all():
        values = values.astype(np.int64)  # as MATLAB has them
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    return values.astype(str) if values.dtype.kind in "iuU" else None


def cifar_split(path: Path) -> str:
    """Return which split the publisher has put a batch in."""
    return split_named(path.name) or "train"


def open_cifar(path: Path, size: int) -> ArrayFile:
    """Open a batch of CIFAR-10 or of CIFAR-100, whose last label is the finer one."""
    pixels = math.prod(CIFAR_SHAPE)
    labels = 2 if CIFAR_NAME.fullmatch(path.name)[1].lower() in {"train", "test"} else 1  # type: ignore[index]
    if not size or size % (labels + pixels):
        raise ValueError(f"{size} bytes, which are no whole images of {labels + pixels} bytes")
    rows = np.memmap(path, np.uint8, "r").reshape(-1, labels + pixels)
    return ArrayFile(
        path,
        (len(rows), *CIFAR_SHAPE),
        rows.dtype,
        values=rows[:, labels:].reshape(-1, *CIFAR_SHAPE),
        labels=as_labels(np.asarray(rows[:, labels - 1])),
        split=cifar_split(path),
        layout="NCHW",
    )


def open_idx(path: Path, file: IO[bytes], size: int, expansion: int, stack: ExitStack) -> ArrayFile:
    """Read the header of an IDX file, plain or gzipped, that is `size` bytes long."""
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
        check_expansion(path, pixels, size, expansion)
    else:
        _check_size(path, shape, dtype, size - len(start) - len(declared))
    layout = "NHW" if len(shape) == 3 else None
    return ArrayFile(path, shape, dtype, stream, packed=packed, layout=layout)


def _check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype, available: int) -> None:
    declared = math.prod(shape) * dtype.itemsize
    if not shape or declared != available:
        raise BadImageError(
            path,
            f"declares an array of shape {shape}, {declared} bytes, but holds {available}. "
            "It is cut off or damaged: fetch it again.",
        )


def check_expansion(path: Path, unpacked: int, packed: int, largest: int) -> None:
    """Refuse what would be more than `largest` times as large as it is packed."""
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


def as_text(name: str) -> str:
    """Return a path as text: bytes that are no UTF-8, and control characters, by escapes."""
    try:
        if min(name.encode(), default=32) >= 32:
            return name
    except UnicodeEncodeError:
        name = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if ord(c) >= 32 else f"\\x{ord(c):02x}" for c in name)
