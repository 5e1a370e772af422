"""The `prepare` stage: checked images, split, as memory-mappable arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaeflow.config import Prepare
from vaeflow.data.arrays import ArrayWriter, open_array
from vaeflow.data.sources import image_blocks
from vaeflow.data.splits import SPLITS, assign_splits, pixel_digests
from vaeflow.errors import DataError
from vaeflow.files import atomic_directory, write_json
from vaeflow.workspace import Workspace


class Prepared(NamedTuple):
    """What `prepare` found: images per split, and how many are exact copies of an earlier one."""

    images: Mapping[str, int]
    duplicates: int


def prepare(workspace: Workspace, parameters: Prepare) -> Prepared:
    """Read `data/`, check it, and write one array a split to `outputs/prepared`.

    Works through the images in blocks, so that they need not fit into memory. Writes

    - `train.npy`, `validation.npy`, `test.npy`, each uint8 `(count, height, width, channels)`;
    - `index.parquet`, one row an image in the order of `data/`: `id` (its place there), `split`,
      `label` (from `data/labels.npy`, else null), `source` (file, and row of an array), `sha256`
      (of its pixels). The rows of one split are in the order of its array;
    - `dataset.json`: image shape, images per split, duplicates.

    Raises:
        DataError: the data are missing or refused, a split would be empty, or there are not as many
            labels as images.
    """
    if not workspace.data.exists():
        raise DataError("data/ is missing. Fetch the versioned images: dvc pull")
    labels = _read_labels(workspace.data / "labels.npy")
    with atomic_directory(workspace.prepared) as folder:
        splits = _write_splits(folder, workspace.data, labels, parameters)
        if not all(splits.images.values()):
            raise DataError(
                f"data/: {splits.count} images split into {splits.images}; every split needs at "
                "least one. Add images, or raise its fraction in params.yaml."
            )
        prepared = Prepared(splits.images, splits.duplicates)
        about = {"image_shape": list(splits.image_shape), **prepared._asdict()}
        write_json(folder / "dataset.json", about)
    return prepared


def _write_splits(
    folder: Path, data: Path, labels: np.ndarray | None, parameters: Prepare
) -> SplitWriter:
    """Write the arrays and the index, block by block."""
    inside = f"{data}{os.sep}"
    with ExitStack() as stack:
        writer: SplitWriter | None = None
        for block in image_blocks(data):
            if writer is None:
                shape = block.pixels.shape[1:]
                writer = stack.enter_context(closing(SplitWriter(folder, shape, parameters)))
            sources = [name.removeprefix(inside) for name in block.names]
            stop = writer.count + len(sources)
            if labels is not None and len(labels) < stop:
                raise _wrong_number_of_labels(labels)
            writer.add(
                block.pixels, sources, None if labels is None else labels[writer.count : stop]
            )
    if labels is not None and len(labels) != writer.count:
        raise _wrong_number_of_labels(labels)
    return writer


class SplitWriter:
    """One growing array a split, and the index of them all.

    Attributes:
        image_shape: `(height, width, channels)`.
        count: images written so far.
    """

    def __init__(self, folder: Path, image_shape: tuple[int, ...], parameters: Prepare):
        import pyarrow
        import pyarrow.parquet

        self.image_shape = image_shape
        self.count = 0
        self._parameters = parameters
        self._arrays = {name: ArrayWriter(folder / f"{name}.npy", image_shape) for name in SPLITS}
        self._schema = pyarrow.schema(
            [
                ("id", pyarrow.int64()),
                ("split", pyarrow.string()),
                ("label", pyarrow.int64()),
                ("source", pyarrow.string()),
                ("sha256", pyarrow.string()),
            ]
        )
        self._index = pyarrow.parquet.ParquetWriter(folder / "index.parquet", self._schema)
        self._digests: list[np.ndarray] = []

    def add(self, images: np.ndarray, sources: Sequence[str], labels: np.ndarray | None) -> None:
        """Write a block: uint8 `(count, *image_shape)`, a source and perhaps a label for each."""
        import pyarrow

        digests = pixel_digests(images)
        splits = assign_splits(digests, **self._parameters.model_dump())
        for name, array in self._arrays.items():
            array.write(images[splits == name])
        columns = {
            "id": np.arange(self.count, self.count + len(images)),
            "split": splits,
            "label": [None] * len(images) if labels is None else labels,
            "source": sources,
            "sha256": [digest.hex() for digest in digests.view("V32")[:, 0].tolist()],
        }
        self._index.write_table(pyarrow.table(columns, self._schema))
        self.count += len(images)
        # Half a digest tells images apart as surely, in half the memory.
        self._digests.append(digests[:, :16].copy())

    def close(self) -> None:
        """Finish the files."""
        self._index.close()
        for array in self._arrays.values():
            array.close()

    @property
    def images(self) -> dict[str, int]:
        """Images per split."""
        return {name: array.rows for name, array in self._arrays.items()}

    @property
    def duplicates(self) -> int:
        """How many images are exact copies of an earlier one."""
        return self.count - len(np.unique(np.concatenate(self._digests).view("V16")))


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
