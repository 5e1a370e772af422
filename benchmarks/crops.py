"""Colour images that every installation has: crops from the two photographs of scikit-learn."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

EDGE = 32
TEST_COLUMNS = 192  # of 640, on the right
TRAINING_CROPS = 50_000
FORMATS = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WebP", "lossless": True, "quality": 100, "method": 6},
}


def photograph_crops(
    split: str, edge: int = EDGE, count: int = TRAINING_CROPS, grey: bool = False
) -> np.ndarray:
    """Crops for training or testing, uint8, `(count, edge, edge, 3 or 1)`; the two share no pixel.

    Those to train on are taken anywhere in the left part of the photographs, and overlap; those to
    test on tile the right part, in an order in which the first few come from everywhere.
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    if grey:
        photographs = [np.asarray(Image.fromarray(photo).convert("L")) for photo in photographs]
        photographs = [photo[..., None] for photo in photographs]
    generator = np.random.default_rng(0)
    if split == "test":
        tiles = np.concatenate([_tiles(photo[:, -TEST_COLUMNS:], edge) for photo in photographs])
        return generator.permutation(tiles)
    left = [photo[:, :-TEST_COLUMNS] for photo in photographs]
    return np.stack([_crop(left[n % len(left)], edge, generator) for n in range(count)])


def _tiles(part: np.ndarray, edge: int) -> np.ndarray:
    """Crops side by side."""
    rows, columns = part.shape[0] // edge, part.shape[1] // edge
    whole = part[: rows * edge, : columns * edge]
    grid = whole.reshape(rows, edge, columns, edge, -1).swapaxes(1, 2)
    return grid.reshape(-1, edge, edge, part.shape[-1])


def _crop(part: np.ndarray, edge: int, generator: np.random.Generator) -> np.ndarray:
    """A crop from anywhere."""
    top, left = (generator.integers(0, length - edge + 1) for length in part.shape[:2])
    return part[top : top + edge, left : left + edge]


def bits_of_files(images: np.ndarray, name: str) -> dict[str, float]:
    """Bits per dimension of images stored without loss as `png` or `webp`.

    Returns:
        `{name}_bits_per_dimension`: one file an image. `{name}_bits_per_dimension_together`: one
            file of all of them, above each other, so that headers hardly count.
    """
    apart = sum(_bytes(image, name) for image in images)
    together = _bytes(images.reshape(-1, *images.shape[2:]), name)
    key = f"{name}_bits_per_dimension"
    return {
        key: round(8 * apart / images.size, 4),
        f"{key}_together": round(8 * together / images.size, 4),
    }


def _bytes(image: np.ndarray, name: str) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, **FORMATS[name])
    return file.tell()
