"""Writing what a model answered: the file's ending decides the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vaeflow.errors import VaeflowError
from vaeflow.files import atomic_file
from vaeflow.pictures import grid, pairs, write_png

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
    columns = {"id": names}
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


def _table(columns: Mapping[str, Sequence]) -> dict[str, Writer]:
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
