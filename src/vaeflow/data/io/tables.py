"""Read images from CSV files: a row an image, its pixels as numbers, perhaps with a label.

Known are `label,pixel0,pixel1,...` with the names in the first row, the same without them, and a
column `pixels` that holds all of an image's numbers with spaces between.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaeflow.errors import BadImageError, DataError

ENDINGS = (".csv", ".csv.gz")
USUAL_LABELS = {"label", "labels", "class", "y", "target", "emotion"}
PIXELS = "pixels"
LONGEST_ROW = 16 << 20  # characters: some million numbers


class Block(NamedTuple):
    """Some rows: their numbers, float64 `(count, pixels)`, and labels, `(count,)`."""

    pixels: np.ndarray
    labels: Sequence[str | None]


class _Columns(NamedTuple):
    names: list[str]
    label: str | None
    header: bool
    pixels: list[str]  # the columns of numbers, or the one that has them all


def is_table(path: Path) -> bool:
    """Return whether a name is that of a CSV file."""
    return path.name.lower().endswith(ENDINGS)


def table_blocks(path: Path, label_key: str | None = None) -> Iterator[Block]:
    """Yield the rows of a CSV file, some megabytes at a time.

    Args:
        path: plain or gzipped.
        label_key: the column of labels; by default one with a usual name, or, without names, the
            first of one more than a square number.

    Raises:
        BadImageError: it is damaged, or has a value that is no number.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    try:
        columns = _columns(path, label_key)
        spaced = columns.pixels == [PIXELS]
        types = dict.fromkeys(columns.pixels, pyarrow.string() if spaced else pyarrow.float64())
        if columns.label:
            types[columns.label] = pyarrow.string()
        reader = arrow_csv.open_csv(
            path,
            arrow_csv.ReadOptions(
                column_names=columns.names, skip_rows=int(columns.header), block_size=LONGEST_ROW
            ),
            arrow_csv.ParseOptions(),
            arrow_csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
        for batch in reader:
            yield _block(path, batch, columns, spaced)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:  # whatever a damaged file makes of the parser
        raise BadImageError(path, f"not a readable table of pixels ({error}).") from None


def _block(path: Path, batch: Any, columns: _Columns, spaced: bool) -> Block:
    labels: Sequence[str | None] = [None] * len(batch)
    if columns.label:
        labels = batch.column(columns.label).to_pylist()
    if not spaced:
        numbers = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns.pixels]
        return Block(np.column_stack(numbers), labels)
    rows = [np.array(text.split(), np.float64) for text in batch.column(PIXELS).to_pylist()]
    if len({len(row) for row in rows}) > 1:
        raise BadImageError(path, "rows of different numbers of pixels.")
    return Block(np.stack(rows) if rows else np.empty((0, 0)), labels)


def _columns(path: Path, label_key: str | None) -> _Columns:
    """Find out which columns hold what, by the first row."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
        first = next(csv.reader([file.readline(LONGEST_ROW)]), [])
    header = not all(_is_number(text) for text in first)
    names = first if header else [str(number) for number in range(len(first))]
    if len(set(names)) < len(names):
        raise BadImageError(path, "two columns have the same name.")
    usual = [name for name in names if name.lower() in USUAL_LABELS]
    # 785 numbers are a label and 28 x 28 pixels.
    if not header and _is_square(len(names) - 1) and not _is_square(len(names)):
        usual = [names[0]]
    label = label_key if label_key is not None else next(iter(usual), None)
    if label is not None and label not in names:
        few = ", ".join(names[:6])
        raise BadImageError(path, f"no column {label!r}; the first are: {few}.")
    if PIXELS in names:
        return _Columns(names, label, header, [PIXELS])
    pixels = [name for name in names if name != label]
    if not pixels:
        raise BadImageError(path, "no columns of pixels.")
    return _Columns(names, label, header, pixels)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
