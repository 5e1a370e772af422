"""Reading images: arrays, image files, and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaeflow.data.checks import LARGEST_EDGE, check_images
from vaeflow.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


MAGIC = b"\x93NUMPY"


class Images(NamedTuple):
    """Images of one shape, and a name for each."""

    pixels: np.ndarray  # uint8, (count, height, width, channels)
    names: list[str]  # "path" for an image file, "path#index" for a row of an array


def read_images(*sources: Path | str) -> Images:
    """Read images of one shape from files and folders.

    Args:
        sources: each a `.npy` array, an image file, or a folder. A folder that holds `images.npy`
            is that array; any other is read with its subfolders, in the order of the paths.

    Raises:
        DataError: a source is missing, unreadable, empty, or of another shape than the first.
    """
    parts: list[Images] = []
    for source in map(Path, sources):
        for path in _files_of(source):
            part = _read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path)
            if parts:
                _check_same_shape(parts[0], part)
            parts.append(part)
    pixels = parts[0].pixels if len(parts) == 1 else np.concatenate([p.pixels for p in parts])
    return Images(pixels, [name for part in parts for name in part.names])


def _files_of(source: Path) -> Sequence[Path]:
    """The files a source stands for, in a fixed order; never none."""
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    if source.is_file():
        if source.suffix.lower() not in {".npy", *IMAGE_SUFFIXES}:
            raise DataError(f"{source}: unknown kind of file; expected {_expected()}.")
        return [source]
    pictures = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    array = source / "images.npy"
    if array.is_file() and pictures:
        raise DataError(f"{source}: holds both images.npy and {pictures[0].name}; keep one kind.")
    if array.is_file():
        return [array]
    if not pictures:
        raise DataError(
            f"{source}: no images in this folder; expected images.npy, "
            f"or files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return pictures


def _expected() -> str:
    return ".npy or " + ", ".join(sorted(IMAGE_SUFFIXES))


def _read_array(path: Path) -> Images:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it does not begin as one")
        # Mapped, so that a large array is not held twice; never unpickled: it could run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged header makes of NumPy's parser
        raise DataError(f"{path}: not a readable .npy array of numbers ({error}).") from None
    pixels = check_images(array, str(path))
    return Images(pixels, [f"{path}#{index}" for index in range(len(pixels))])


def _read_picture(path: Path) -> Images:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # From the header, before anything is decoded.
            if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}:
                raise ValueError(f"pixel mode {image.mode}; expected 8-bit grey or colour")
            if max(image.size) > LARGEST_EDGE:
                raise ValueError(f"{image.size} pixels; no edge may exceed {LARGEST_EDGE}")
            array = np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
    except Exception as error:  # whatever a damaged file makes of Pillow's decoders
        raise DataError(f"{path}: not a readable image ({error}).") from None
    return Images(check_images(array[np.newaxis], str(path)), [str(path)])


def _check_same_shape(first: Images, other: Images) -> None:
    if first.pixels.shape[1:] != other.pixels.shape[1:]:
        raise DataError(
            f"images of two shapes (height, width, channels): {first.names[0]} is "
            f"{first.pixels.shape[1:]}, {other.names[0]} is {other.pixels.shape[1:]}. "
            "Bring all to one shape."
        )
