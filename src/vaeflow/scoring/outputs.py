"""Write what a model answered: tables row by row, the shards of a batch run, images, embeddings.

A shard is what a batch run has computed so far, so that a killed one need not compute it again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vaeflow.common.files import atomic_file
from vaeflow.common.pictures import grid, pairs, write_png
from vaeflow.data.io.arrays import ArrayWriter
from vaeflow.errors import VaeflowError

ROWS_PER_GROUP = 16_384  # of Parquet: what is kept in memory until it is written
PART = 32 * "[0-9a-f]" + ".npy"  # see `Parts.name`

Columns = Mapping[str, Any]  # sequences or arrays, of one length


class Table(Protocol):
    """A file in the making."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None: ...

    def write(self, columns: Columns) -> None:
        """Append rows; the columns are the same in every call."""

    def close(self) -> None:
        """Finish the file."""


class ParquetTable:
    """A Parquet file with row groups of one size.

    Args:
        path: the file.
        metadata: of its schema.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        import pyarrow.parquet  # noqa: F401  # if it is missing, better known now than later

        self._path = path
        self._metadata = metadata
        self._writer: Any = None
        self._waiting: list[Any] = []

    def write(self, columns: Columns) -> None:
        """See `Table`."""
        import pyarrow

        table = pyarrow.table(dict(columns)).replace_schema_metadata(self._metadata)
        self._waiting.append(table)
        if sum(len(table) for table in self._waiting) >= ROWS_PER_GROUP:
            waiting = pyarrow.concat_tables(self._waiting)
            whole = len(waiting) // ROWS_PER_GROUP * ROWS_PER_GROUP
            self._flush(waiting[:whole])
            self._waiting = [waiting[whole:]]

    def close(self) -> None:
        """See `Table`."""
        import pyarrow

        if self._waiting:
            self._flush(pyarrow.concat_tables(self._waiting))
        if self._writer:
            self._writer.close()

    def _flush(self, table: Any) -> None:
        import pyarrow.parquet

        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        if len(table):
            self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)


class CsvTable:
    """A CSV file with a header."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._empty = True

    def write(self, columns: Columns) -> None:
        """See `Table`."""
        if self._empty:
            self._rows.writerow(columns)
            self._empty = False
        self._rows.writerows(zip(*columns.values(), strict=True))

    def close(self) -> None:
        """See `Table`."""
        self._file.close()


class ScoreArray:
    """The column `score` alone, as float32 `(count,)` in an `.npy` file."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._array = ArrayWriter(path, (), np.float32)

    def write(self, columns: Columns) -> None:
        """See `Table`."""
        self._array.write(np.asarray(columns["score"]))

    def close(self) -> None:
        """See `Table`."""
        self._array.close()


KINDS: dict[str, type[Table]] = {".csv": CsvTable, ".parquet": ParquetTable, ".npy": ScoreArray}


def kind_of(path: Path) -> type[Table]:
    """Return the table that a file's ending stands for.

    Raises:
        VaeflowError: it stands for none.
    """
    if kind := KINDS.get(path.suffix.lower()):
        return kind
    raise VaeflowError(f"{path}: cannot write this ending; expected {', '.join(KINDS)}.")


class Parts:
    """A folder of arrays, each named by what it was computed from.

    A part is found only by the same model, options and pixels: there is no state beside the names
    that could be out of date, and a run whose source has changed finds what is left of it.

    Args:
        folder: that holds them.
        key: what the numbers depend on apart from the pixels.
    """

    def __init__(self, folder: Path, key: dict[str, object]) -> None:
        self.folder = folder
        self._key = json.dumps(key, sort_keys=True).encode()

    def name(self, digests: np.ndarray) -> str:
        """Return the name of the part for some images.

        Args:
            digests: SHA-256 of each image's pixels, uint8 `(count, 32)`.
        """
        return hashlib.sha256(self._key + digests.tobytes()).hexdigest()[:32] + ".npy"

    def find(self, name: str, shape: tuple[int, int]) -> np.ndarray | None:
        """Read the numbers kept under a name, float32; None where there are none that are sound."""
        try:
            numbers = np.load(self.folder / name, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return numbers if numbers.shape == shape and numbers.dtype == np.float32 else None

    def keep(self, name: str, numbers: np.ndarray) -> None:
        """Write a part: whole or not at all, even when the power fails."""
        with atomic_file(self.folder / name) as fresh, fresh.open("wb") as file:
            np.save(file, numbers)


@contextmanager
def parts_beside(out: Path, key: dict[str, object]) -> Iterator[Parts]:
    """Open the parts of an output; remove them when the block ends well.

    When it does not, the numbers that there are stay for the next run.

    Raises:
        VaeflowError: another process is making the same output, or it cannot be written.
    """
    import fcntl

    folder = out.with_name(f".{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VaeflowError(
                f"{out}: another process is writing it now. Wait for it, or choose another --out."
            ) from None
        try:
            yield Parts(folder, key)
        except BaseException:
            if not any(folder.glob(PART)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


Writer = Callable[[Path], None]


def write_images(path: Path, images: np.ndarray, originals: np.ndarray | None = None) -> None:
    """Write images as a PNG grid, or as they are in `.npy`.

    Args:
        path: ends in .png or .npy.
        images: float32 in [0, 1], `(count, height, width, channels)`.
        originals: uint8, same shape; in the PNG each row of them stands above its images.
    """

    def png(file: Path) -> None:
        write_png(file, grid(images) if originals is None else pairs(originals, images))

    _write(path, {".png": png, ".npy": lambda file: np.save(file, images)})


def write_embeddings(
    path: Path, names: Sequence[str], mean: np.ndarray, log_variance: np.ndarray
) -> None:
    """Write posterior means as `.npy`, or one row an image with both parameters as a table."""
    columns: dict[str, Any] = {"id": names}
    for label, values in (("mean", mean), ("log_variance", log_variance)):
        columns |= {f"{label}_{unit}": values[:, unit] for unit in range(values.shape[1])}
    _write(path, {**_table(columns), ".npy": lambda file: np.save(file, mean)})


def _write(path: Path, writers: Mapping[str, Writer]) -> None:
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise VaeflowError(f"{path}: cannot write this ending; expected {', '.join(writers)}.")
    try:
        with atomic_file(path) as fresh:
            writer(fresh)
    except OSError as error:
        raise VaeflowError(f"{path} cannot be written: {error}") from None


def _table(columns: Mapping[str, Sequence[Any]]) -> dict[str, Writer]:
    def csv(file: Path) -> None:
        import csv

        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def parquet(file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file)

    return {".csv": csv, ".parquet": parquet}
