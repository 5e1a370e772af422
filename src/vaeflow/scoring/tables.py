"""Tables that are written row by row, whatever their length: the file's ending decides which."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vaeflow.data.arrays import ArrayWriter
from vaeflow.errors import VaeflowError

ROWS_PER_GROUP = 16_384  # of Parquet: what is kept in memory until it is written

Columns = Mapping[str, Sequence]


class Table(Protocol):
    """A file in the making."""

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

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        import pyarrow.parquet  # noqa: F401  # if it is missing, better known now than later

        self._path = path
        self._metadata = metadata
        self._writer = None
        self._waiting = []

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

    def _flush(self, table) -> None:
        import pyarrow.parquet

        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        if len(table):
            self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)


class CsvTable:
    """A CSV file with a header."""

    def __init__(self, path: Path, _: Mapping[str, str]):
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

    def __init__(self, path: Path, _: Mapping[str, str]):
        self._array = ArrayWriter(path, (), np.float32)

    def write(self, columns: Columns) -> None:
        """See `Table`."""
        self._array.write(columns["score"])

    def close(self) -> None:
        """See `Table`."""
        self._array.close()


KINDS = {".csv": CsvTable, ".parquet": ParquetTable, ".npy": ScoreArray}


def kind_of(path: Path) -> type[Table]:
    """The table that a file's ending stands for.

    Raises:
        VaeflowError: it stands for none.
    """
    if kind := KINDS.get(path.suffix.lower()):
        return kind
    raise VaeflowError(f"{path}: cannot write this ending; expected {', '.join(KINDS)}.")
