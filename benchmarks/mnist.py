"""MNIST, for the benchmarks that are given its files; needs nothing but numpy."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from vaeflow.data.images import Binarized

FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
BINARIZE_SEED = 0  # of the test images: one and the same test set whatever the seed of training
HEADER_BYTES = 16


def mnist(folder: Path, split: str) -> np.ndarray:
    """MNIST's images; those to test on black and white."""
    path = folder / FILES[split]
    if not path.exists():
        raise SystemExit(
            f"{path} is missing. Download MNIST's {' and '.join(FILES.values())} "
            "and say where they are: --data FOLDER"
        )
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=HEADER_BYTES)
    pixels = values.reshape(-1, 28, 28, 1)
    return Binarized(pixels, BINARIZE_SEED)[:] if split == "test" else pixels
