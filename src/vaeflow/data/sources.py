"""Reading images: arrays, image files, and folders of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaeflow.data.arrays import BYTES_PER_BLOCK, is_array, open_array
from vaeflow.data.checks import check_declared, check_images
from vaeflow.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


class Images(NamedTuple):
    """Images of one shape, and a name for each."""

    pixels: np.ndarray  # uint8, (count, height, width, channels)
    names: list[str]  # "path" for an image file, "path#index" for a row of an array


def read_images(*sources: Path | str) -> Images:
    """Read images of one shape from files and folders, all at once; see `image_blocks`."""
    return _joined(list(image_blocks(*sources)))


def image_blocks(*sources: Path | str) -> Iterator[Images]:
    """Read images of one shape from files and folders, some megabytes at a time.

    Args:
        sources: each an array (`.npy`; `.npz` holding one array; IDX, plain or gzipped), an image
            file, or a folder. A folder that holds `images.npy` is that array; any other is read
            with its subfolders, in the order of the paths.

    Raises:
        DataError: a source is missing, unreadable, empty, or of another shape than the first.
    """
    first: Images | None = None
    for source in map(Path, sources):
        files = _files_of(source)
        for block in _read_array(files[0]) if is_array(files[0]) else _read_pictures(files):
            first = block if first is None else first
            _check_same_shape(first, block)
            yield block


def _files_of(source: Path) -> Sequence[Path]:
    """The files a source stands for, in a fixed order: one array, or one or more pictures."""
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    if source.is_file():
        if not (is_array(source) or source.suffix.lower() in IMAGE_SUFFIXES):
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
    return ".npy, .npz, IDX, or " + ", ".join(sorted(IMAGE_SUFFIXES))


def _read_array(path: Path) -> Iterator[Images]:
    start, where = 0, str(path)
    with open_array(path) as array:
        check_declared(array.shape, array.dtype, where)
        for block in array.blocks():
            pixels = check_images(block, where, start)
            stop = start + len(pixels)
            yield Images(pixels, [f"{where}#{index}" for index in range(start, stop)])
            start = stop


def _read_pictures(paths: Sequence[Path]) -> Iterator[Images]:
    """Blocks of image files, all of the first one's shape."""
    parts: list[Images] = []
    for path in paths:
        part = _read_picture(path)
        if parts:
            _check_same_shape(parts[0], part)
        parts.append(part)
        if len(parts) * part.pixels.nbytes >= BYTES_PER_BLOCK:
            yield _joined(parts)
            parts = []
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Images]) -> Images:
    pixels = parts[0].pixels if len(parts) == 1 else np.concatenate([p.pixels for p in parts])
    return Images(pixels, [name for part in parts for name in part.names])


def _read_picture(path: Path) -> Images:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # From the header, before anything is decoded.
            if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}:
                raise ValueError(f"pixel mode {image.mode}; expected 8-bit grey or colour")
            width, height = image.size
            check_declared((1, height, width), np.dtype(np.uint8), str(path))
            array = np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
    except DataError:
        raise
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
