"""The `prepare` stage: checked images, split, as memory-mappable arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vaeflow.config import Prepare
from vaeflow.data.sources import read_images
from vaeflow.data.splits import SPLITS, split_of
from vaeflow.errors import DataError
from vaeflow.files import atomic_directory, write_json
from vaeflow.workspace import Workspace


def prepare(workspace: Workspace, parameters: Prepare) -> Mapping[str, int]:
    """Read `data/`, check it, and write one array a split to `outputs/prepared`.

    Writes `train.npy`, `validation.npy`, `test.npy`, each uint8 `(count, height, width, channels)`,
    and `dataset.json` (image shape and counts).

    Returns:
        Images per split.

    Raises:
        DataError: the data are missing or refused, or a split would be empty.
    """
    if not workspace.data.exists():
        raise DataError("data/ is missing. Fetch the versioned images: dvc pull")
    images, _ = read_images(workspace.data)
    splits = np.array(
        [
            split_of(
                image,
                parameters.seed,
                parameters.validation_fraction,
                parameters.test_fraction,
            )
            for image in images
        ]
    )
    counts = {name: int(np.count_nonzero(splits == name)) for name in SPLITS}
    if not all(counts.values()):
        raise DataError(
            f"data/: {len(images)} images split into {counts}; every split needs at least one. "
            "Add images, or raise its fraction in params.yaml."
        )
    with atomic_directory(workspace.prepared) as folder:
        for name in SPLITS:
            np.save(folder / f"{name}.npy", images[splits == name])
        write_json(
            folder / "dataset.json", {"image_shape": list(images.shape[1:]), "images": counts}
        )
    return counts


def load_split(prepared: Path, name: str) -> np.ndarray:
    """One split, memory-mapped: uint8 `(count, height, width, channels)`."""
    return np.load(prepared / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def image_shape(prepared: Path) -> tuple[int, int, int]:
    """`(height, width, channels)` of the prepared images."""
    return tuple(json.loads((prepared / "dataset.json").read_text())["image_shape"])
