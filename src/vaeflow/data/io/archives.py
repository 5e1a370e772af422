"""Read image files out of archives and tables, without unpacking them to disk.

A zip or tar archive of image files; a Parquet table with a column of them. One file is in memory at
a time. Links, devices and paths that lead out of an archive are refused, and so is what expands
beyond the limits.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import as_text, check_expansion, clear_errors
from vaeflow.data.io.decoding import Picture
from vaeflow.errors import BadImageError

OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".tar": lambda file: file,
    ".tar.gz": lambda file: gzip.GzipFile(fileobj=file),
    ".tgz": lambda file: gzip.GzipFile(fileobj=file),
    ".tar.bz2": bz2.BZ2File,
    ".tar.xz": lzma.LZMAFile,
}
ENDINGS = (".zip", ".parquet", *OPENERS)
# Of one image file, packed as it is: raw pixels of 16 bits with alpha are no larger.
BYTES_PER_PIXEL_IN_FILE = 8
SLACK = 64 << 20  # that an archive may expand to before the ratio counts
ROWS_AT_ONCE, BYTES_AT_ONCE = 256, 2 << 20  # of a table, whichever is less
BLOCK = 512  # of a tar archive, which ends with some that are zero
ENCRYPTED = 1


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        name: its path in the archive.
        read: returns its content.
        fault: why it cannot be read; empty where it can.
    """

    name: str
    read: Callable[[], bytes]
    fault: str = ""


def is_archive(path: Path | str) -> bool:
    """Return whether a name is that of an archive or a table of image files."""
    return str(path).lower().endswith(ENDINGS)


def members(path: Path, limits: Limits) -> Iterator[Member]:
    """Yield the files of a zip or tar archive, in its order; each is to be read in its turn.

    Raises:
        BadImageError: the archive is damaged, encrypted, or a decompression bomb.
    """
    with _clear_errors(path):
        if path.suffix.lower() == ".zip":
            yield from _zip(path, limits)
        else:
            yield from _tar(path, limits)


def _clear_errors(path: Path) -> AbstractContextManager[None]:
    return clear_errors(path, "archive", " Fetch it again.")


def _zip(path: Path, limits: Limits) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = info.external_attr >> 28  # of Unix's modes: 8 is a file, 10 a link
            fault = _fault(info.filename, info.file_size, limits)
            if kind not in {0, 8}:
                fault = "a link or a device in an archive, which is not followed."
            elif info.flag_bits & ENCRYPTED:
                fault = "encrypted. Unpack the archive yourself, and add the folder."
            if not fault:
                try:
                    check_expansion(path, info.file_size, info.compress_size, limits.max_expansion)
                except BadImageError as error:
                    fault = error.reason

            def read(info: zipfile.ZipInfo = info) -> bytes:
                return archive.read(info)

            yield Member(info.filename, read, fault)


def _tar(path: Path, limits: Limits) -> Iterator[Member]:
    ending = next(e for e in OPENERS if path.name.lower().endswith(e))
    with path.open("rb") as packed:
        stream = _Watched(OPENERS[ending](packed), packed, path, limits)
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            while (info := archive.next()) is not None:
                # It would keep them all.
                archive.members = []  # type: ignore[attr-defined]
                if info.isdir():
                    continue
                fault = _fault(info.name, info.size, limits)
                if not info.isreg():
                    fault = "a link or a device in an archive, which is not followed."

                def read(info: tarfile.TarInfo = info) -> bytes:
                    file = archive.extractfile(info)
                    assert file is not None  # it is a regular one
                    content = file.read()
                    if len(content) < info.size:
                        raise BadImageError(path, f"cut off in {as_text(info.name)}.")
                    return content

                yield Member(info.name, read, fault)
            stream.check_end(archive.offset)


class _Watched(io.RawIOBase):
    """A stream that is read once, and compared with how much was packed."""

    def __init__(self, stream: Any, packed: IO[bytes], path: Path, limits: Limits) -> None:
        self._stream = stream
        self._packed = packed
        self._path = path
        self._limits = limits
        self._count = 0
        self._last = b""
        self._used = 0  # bytes to the last that is not zero

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._stream.read(size)
        self._count += len(content)
        if content:
            self._last = content[-BLOCK:]
            if used := len(content.rstrip(b"\0")):
                self._used = self._count - len(content) + used
        if self._count > SLACK:
            largest = self._limits.max_expansion
            check_expansion(self._path, self._count, self._packed.tell(), largest)
        return content

    def check_end(self, offset: int) -> None:
        """Refuse an archive that is cut off, or goes on behind a damaged header.

        tarfile minds neither.

        Args:
            offset: where it ended.
        """
        while self.read(1 << 20):
            pass
        if self._last.strip(b"\0") or len(self._last) < BLOCK or self._used > offset:
            raise BadImageError(self._path, "cut off, or damaged in it. Fetch it again.")


def _fault(name: str, size: int, limits: Limits) -> str:
    path = name.replace("\\", "/")  # a path object would cost as much as the header
    if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/"):
        return "a path that leads out of its archive."
    if size > limits.max_pixels * BYTES_PER_PIXEL_IN_FILE:
        return f"declares {size} bytes, more than an image may have ({limits.raised_by})."
    return ""


def table_pictures(
    path: Path,
    key: str | None,
    label_key: str | None,
    limits: Limits,
    on_bad: Callable[[BadImageError], object],
) -> Iterator[Picture]:
    """Yield the image files in a column of a Parquet table: bytes, or `{bytes, path}`.

    Args:
        path: of the table.
        key: the column; may be left out where only one can be it.
        label_key: the column of labels; by default `label`, or `labels`, where there is one.
        limits: how far the table may expand.
        on_bad: called with each row that holds no bytes.
    """
    import pyarrow
    import pyarrow.parquet

    # Unless it is told, it keeps all that it has read.
    sparing = {"pre_buffer": False, "buffer_size": 1 << 20}
    with _clear_errors(path), pyarrow.parquet.ParquetFile(path, **sparing) as table:
        schema = table.schema_arrow
        images = {
            field.name
            for field in schema
            if _is_bytes(field.type)
            or (
                pyarrow.types.is_struct(field.type)
                and field.type.get_field_index("bytes") >= 0
                and _is_bytes(field.type.field("bytes").type)
            )
        }
        column = _chosen(path, key, images, schema.names, "a column of image files", "--key")
        usual = {"label", "labels"} & set(schema.names)
        label = label_key
        if label is not None or len(usual) == 1:
            label = _chosen(path, label, usual, schema.names, "a column of labels", "--label-key")
        unpacked = _check_table(path, table.metadata, limits)
        rows_at_once = BYTES_AT_ONCE * table.metadata.num_rows // max(1, unpacked)
        rows_at_once = min(ROWS_AT_ONCE, max(1, rows_at_once))
        row = 0
        columns = [column, *([label] if label else ())]
        for batch in table.iter_batches(rows_at_once, columns=columns):
            cells = batch.column(column)
            if pyarrow.types.is_struct(cells.type):
                cells = cells.field("bytes")
            labels = batch.column(label).to_pylist() if label else [None] * len(cells)
            for content, text in zip(cells, labels, strict=True):
                name = f"{as_text(str(path))}#{row}"
                row += 1
                if not content.is_valid:
                    on_bad(BadImageError(name, f"no bytes in the column {column!r}."))
                    continue
                label_text = None if text is None else str(text)
                yield Picture(name, content.as_py(), label=label_text)
        if row != table.metadata.num_rows:
            raise BadImageError(path, f"has {row} rows and declares {table.metadata.num_rows}.")


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _chosen(
    path: Path, asked: str | None, usual: set[str], names: list[str], what: str, option: str
) -> str:
    if asked is None and len(usual) == 1:
        return next(iter(usual))
    if asked in names and (asked in usual or what.endswith("labels")):
        return str(asked)
    fault = f"{asked!r} is not {what}" if asked else f"not clear which is {what}"
    raise BadImageError(
        path, f"{fault}; name it ({option}). The columns are: {', '.join(names) or 'none'}."
    )


def _check_table(path: Path, metadata: Any, limits: Limits) -> int:
    """Return how many bytes a table has when it is unpacked.

    Raises:
        BadImageError: too many.
    """
    unpacked = sum(
        metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)
    )
    check_expansion(path, unpacked, path.stat().st_size, limits.max_expansion)
    return int(unpacked)


def count_pictures(path: Path, is_picture: Callable[[str], bool]) -> int:
    """Count the image files of an archive, where its index says; 0 for tar, which has none."""
    with _clear_errors(path):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                return sum(is_picture(name) for name in archive.namelist())
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(path).num_rows)
    return 0
