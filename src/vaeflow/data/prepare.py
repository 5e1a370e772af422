"""The `prepare` stage: checked images, split, as memory-mappable arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from vaeflow.config import Prepare
from vaeflow.data.arrays import ArrayWriter, open_array
from vaeflow.data.sources import image_blocks
from vaeflow.data.splits import SPLITS, assign_splits, pixel_digests
from vaeflow.errors import DataError
from vaeflow.files import atomic_directory, write_json
from vaeflow.workspace import Workspace


def prepare(workspace: Workspace, parameters: Prepare) -> Mapping[str, int]:
    """Read `data/`, check it, and write one array a split to `outputs/prepared`.

    Works through the images in blocks, so that they need not fit into memory. Writes

    - `train.npy`, `validation.npy`, `test.npy`, each uint8 `(count, height, width, channels)`;
    - `index.parquet`, one row an image in the order of `data/`: `id` (its place there), `split`,
      `label` (from `data/labels.npy`, else null), `source` (file, and row of an array), `sha256`
      (of its pixels). The rows of one split are in the order of its array;
    - `dataset.json`, image shape and counts.

    Returns:
        Images per split.

    Raises:
        DataError: the data are missing or refused, a split would be empty, or there are not as many
            labels as images.
    """
    if not workspace.data.exists():
        raise DataError("data/ is missing. Fetch the versioned images: dvc pull")
    labels = _read_labels(workspace.data / "labels.npy")
    with atomic_directory(workspace.prepared) as folder:
        image_shape, counts = _write_splits(folder, workspace.data, labels, parameters)
        images = sum(counts.values())
        if not all(counts.values()):
            raise DataError(
                f"data/: {images} images split into {counts}; every split needs at least one. "
                "Add images, or raise its fraction in params.yaml."
            )
        if labels is not None and len(labels) != images:
            raise _wrong_number_of_labels(labels)
        write_json(folder / "dataset.json", {"image_shape": list(image_shape), "images": counts})
    return counts


def _write_splits(
    folder: Path, data: Path, labels: np.ndarray | None, parameters: Prepare
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Write the arrays and the index; returns the images' shape and the number in each split."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("id", pyarrow.int64()),
            ("split", pyarrow.string()),
            ("label", pyarrow.int64()),
            ("source", pyarrow.string()),
            ("sha256", pyarrow.string()),
        ]
    )
    writers: dict[str, ArrayWriter] = {}
    with ExitStack() as stack:
        index = stack.enter_context(pyarrow.parquet.ParquetWriter(folder / "index.parquet", schema))
        start = 0
        for block in image_blocks(data):
            stop = start + len(block.pixels)
            if labels is not None and len(labels) < stop:
                raise _wrong_number_of_labels(labels)
            if not writers:
                for name in SPLITS:
                    writer = ArrayWriter(folder / f"{name}.npy", block.pixels.shape[1:])
                    writers[name] = stack.enter_context(closing(writer))
            digests = pixel_digests(block.pixels)
            splits = assign_splits(digests, **parameters.model_dump())
            for name, writer in writers.items():
                writer.write(block.pixels[splits == name])
            columns = {
                "id": np.arange(start, stop),
                "split": splits,
                "label": [None] * len(splits) if labels is None else labels[start:stop],
                "source": [name.removeprefix(f"{data}{os.sep}") for name in block.names],
                "sha256": [digest.tobytes().hex() for digest in digests],
            }
            index.write_table(pyarrow.table(columns, schema))
            start = stop
    return block.pixels.shape[1:], {name: writer.rows for name, writer in writers.items()}


def _wrong_number_of_labels(labels: np.ndarray) -> DataError:
    return DataError(
        f"data/labels.npy holds {len(labels)} labels, which is not the number of images; "
        "expected one for each, in the same order."
    )


def _read_labels(path: Path) -> np.ndarray | None:
    """Integer labels `(count,)`, or None where there is no such file."""
    if not path.is_file():
        return None
    with open_array(path) as array:
        if len(array.shape) != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"data/labels.npy: an array of {array.dtype}, shape {array.shape}; "
                "expected integers, shape (count,)."
            )
        return np.concatenate([*array.blocks(), np.empty(0, array.dtype)]).astype(np.int64)


def load_split(prepared: Path, name: str) -> np.ndarray:
    """One split, memory-mapped: uint8 `(count, height, width, channels)`."""
    return np.load(prepared / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def image_shape(prepared: Path) -> tuple[int, int, int]:
    """`(height, width, channels)` of the prepared images."""
    return tuple(json.loads((prepared / "dataset.json").read_text())["image_shape"])
