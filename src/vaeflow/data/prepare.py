"""The `prepare` stage: checked images, split, as memory-mappable arrays."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaeflow.common.files import atomic_directory, write_json
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.io.arrays import ArrayWriter
from vaeflow.data.io.reading import Images
from vaeflow.data.splits import ANOMALY, CALIBRATION, SPLITS, for_calibration
from vaeflow.data.survey import Survey, data_blocks, data_rules
from vaeflow.errors import DataError

# Of the index, in this order.
COLUMNS = ("id", "split", "label", "source", "sha256", "given", "picture")


class Prepared(NamedTuple):
    """What `prepare` wrote: images an array, and how many are exact copies of an earlier one."""

    images: Mapping[str, int]
    duplicates: int


def prepare(workspace: Workspace, parameters: Prepare) -> Prepared:
    """Read `data/`, check it, and write one array a split to `outputs/prepared`.

    Works through the images in blocks, so that they need not fit into memory. Writes

    - `train.npy`, `validation.npy`, `calibration.npy` and `test.npy`, each uint8 `(count, height,
      width, channels)`: of the validation split half is kept apart, to calibrate the anomaly
      measure by; and `anomaly.npy`, images that were added as such;
    - `index.parquet`, one row an image in the order of `data/`: `id` (its place there), `split`,
      `label` (text, or null), `source` (where it came from), `sha256` (of its pixels), `given` (the
      part of `data/` that says its split, or null where its content does), `picture` (of a tile:
      the SHA-256 of what it was cut from; otherwise null). The rows of one split are in the order
      of its array;
    - `dataset.json`: image shape, levels of the pixels, images per split, duplicates, a digest of
      the given splits of each part, and the rules by which the images' files were read.

    Raises:
        DataError: the data are missing or refused, or a split would be empty.
    """
    with atomic_directory(workspace.prepared) as folder:
        survey, written, given = _write_splits(folder, workspace, parameters)
        survey.check_splits()
        if not written["validation"]:
            raise DataError(
                f"too few images: all {written[CALIBRATION]} of the validation split are among "
                "those that calibrate the anomaly measure, and none is left to end the training "
                "by. Add images, or raise prepare.validation_fraction in params.yaml."
            )
        prepared = Prepared(written, survey.duplicates)
        assert survey.image_shape is not None  # `check_splits` found images
        about = {
            "image_shape": list(survey.image_shape),
            "levels": survey.levels.count,
            **prepared._asdict(),
            "given": given,
            "reading": data_rules(workspace).model_dump(),
        }
        write_json(folder / "dataset.json", about)
    return prepared


def _write_splits(
    folder: Path, workspace: Workspace, parameters: Prepare
) -> tuple[Survey, dict[str, int], dict[str, str]]:
    """Write the arrays and the index, block by block.

    Returns:
        What was found, images an array, and the digests of given splits.
    """
    survey = Survey(parameters)
    writer: SplitWriter | None = None
    with ExitStack() as stack:
        for block in data_blocks(workspace, parameters):
            if writer is None:
                shape = block.pixels.shape[1:]
                writer = stack.enter_context(closing(SplitWriter(folder, shape, workspace.data)))
            writer.add(block, survey.add(block))
    return survey, *(({}, {}) if writer is None else (writer.counts(), writer.given_digests()))


class SplitWriter:
    """One growing array a split, one for calibration, and the index of them all.

    Args:
        folder: where to.
        image_shape: `(height, width, channels)`.
        root: the folder below which the images lie; the index names them from there.
    """

    def __init__(self, folder: Path, image_shape: tuple[int, ...], root: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._count = 0
        self._root = f"{root}{os.sep}"
        names = (*SPLITS, CALIBRATION, ANOMALY)
        self._arrays = {name: ArrayWriter(folder / f"{name}.npy", image_shape) for name in names}
        self._counts = Counter(dict.fromkeys(self._arrays, 0))
        self._given: dict[str, Any] = {}
        types = {name: pyarrow.int64() if name == "id" else pyarrow.string() for name in COLUMNS}
        self._schema = pyarrow.schema(types.items())
        # Digests are random: neither dictionary nor compression makes them smaller.
        self._index = pyarrow.parquet.ParquetWriter(
            folder / "index.parquet",
            self._schema,
            use_dictionary=["split", "label", "given", "picture"],
            compression={name: "NONE" if name == "sha256" else "SNAPPY" for name in COLUMNS},
        )

    def add(self, images: Images, splits: np.ndarray) -> None:
        """Write a block, with the split of each image."""
        import pyarrow
        import pyarrow.compute

        splits = self._divided(splits, images.origins)
        for name, array in self._arrays.items():
            array.write(images.pixels[splits == name])
            self._counts[name] += int(np.count_nonzero(splits == name))
        names = pyarrow.array(images.names, pyarrow.string())
        columns = {
            "id": np.arange(self._count, self._count + len(splits)),
            "split": splits,
            "label": images.labels,
            "source": pyarrow.compute.utf8_slice_codeunits(names, len(self._root)),
            "sha256": _hexadecimal(images.digests),
            "given": self._parts_of_given(images),
            "picture": _pictures(images),
        }
        self._index.write_table(pyarrow.table(columns, self._schema))
        self._count += len(splits)

    def _divided(self, splits: np.ndarray, origins: np.ndarray) -> np.ndarray:
        """Take from the validation images those to calibrate by."""
        calibration = (splits == "validation") & for_calibration(origins)
        return np.where(calibration, CALIBRATION, splits.astype(object))

    def counts(self) -> dict[str, int]:
        """Return the images that each array has."""
        return dict(self._counts)

    def _parts_of_given(self, images: Images) -> list[str | None]:
        """Return the part of each image whose split was given, and note which split that is."""
        if not any(images.splits):
            return [None] * len(images.splits)
        parts: list[str | None] = []
        for name, split, digest in zip(images.names, images.splits, images.digests, strict=True):
            part = None
            if split is not None:
                part = name.removeprefix(self._root).split("/")[0]
                noted = self._given.setdefault(part, hashlib.sha256())
                noted.update(digest.tobytes() + split.encode())
            parts.append(part)
        return parts

    def given_digests(self) -> dict[str, str]:
        """Return a digest of the given splits of each part that has some."""
        return {part: noted.hexdigest()[:16] for part, noted in self._given.items()}

    def close(self) -> None:
        """Finish the files."""
        self._index.close()
        for array in self._arrays.values():
            array.close()


def _pictures(images: Images) -> list[str | None]:
    """Return the digest of the picture of each tile; None for an image that is none."""
    whole = (images.origins == images.digests).all(axis=1)
    if whole.all():
        return [None] * len(whole)
    return [
        None if own else origin.tobytes().hex()
        for own, origin in zip(whole, images.origins, strict=True)
    ]


def _hexadecimal(digests: np.ndarray) -> Any:
    """Write digests as a column of text, 64 characters each."""
    import pyarrow

    characters = 2 * digests.shape[1]
    offsets = np.arange(0, characters * len(digests) + 1, characters, dtype=np.int32)
    text = digests.tobytes().hex().encode()
    return pyarrow.StringArray.from_buffers(
        len(digests), pyarrow.py_buffer(offsets), pyarrow.py_buffer(text)
    )
