"""What an array must be to count as images."""

from __future__ import annotations

import numpy as np

from vaeflow.errors import DataError

LARGEST_EDGE = 16_384
# Height times width: a few kilobytes of PNG can decode to gigabytes.
LARGEST_AREA = 64 * 2**20


def check_images(images: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """Return images as 8-bit pixels of shape `(count, height, width, channels)`.

    Args:
        images: `(count, height, width)` or `(count, height, width, channels)`, either uint8 in
            0..255 or floating point in [0, 1] (rounded to the nearest of 256 levels).
        where: the file, for messages.
        first: index of the first image, when these are a block of more.

    Raises:
        DataError: another shape, type or range, NaN or infinity (the image's index is named), or no
            images at all.
    """
    images = as_batch(images, where)
    if images.dtype == np.uint8:
        return images
    check_range(images, where, first)
    return np.rint(images * 255).astype(np.uint8)


def as_batch(images: np.ndarray, where: str) -> np.ndarray:
    """Check type and shape, and add the axis of channels where it is missing."""
    return images.reshape(check_declared(images.shape, images.dtype, where))


def check_declared(
    shape: tuple[int, ...], dtype: np.dtype, where: str
) -> tuple[int, int, int, int]:
    """Check what a header says before its pixels are read.

    Returns:
        `(count, height, width, channels)`.
    """
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(
            f"{where}: pixels have dtype {dtype}; "
            "expected uint8 in 0..255 or floating point in [0, 1]."
        )
    if len(shape) not in (3, 4):
        raise DataError(
            f"{where}: an array of shape {shape}; expected (count, height, width) or "
            "(count, height, width, channels)."
        )
    if not shape[0]:
        raise DataError(f"{where}: no images in it.")
    if not all(1 <= edge <= LARGEST_EDGE for edge in shape[1:]):
        raise DataError(
            f"{where}: images of shape {shape[1:]}; every edge must be 1..{LARGEST_EDGE}."
        )
    if shape[1] * shape[2] > LARGEST_AREA:
        raise DataError(
            f"{where}: images of {shape[1]} x {shape[2]} pixels; "
            f"no image may have more than {LARGEST_AREA}."
        )
    return shape if len(shape) == 4 else (*shape, 1)


def check_range(images: np.ndarray, where: str, first: int = 0) -> None:
    """Refuse floating-point pixels that are not finite or not in [0, 1], naming the image."""
    pixel_axes = tuple(range(1, images.ndim))
    finite = np.isfinite(images).all(axis=pixel_axes)
    if not finite.all():
        index = first + int(np.argmin(finite))
        raise DataError(f"{where}: image {index} has NaN or infinite pixels.")
    inside = ((images >= 0) & (images <= 1)).all(axis=pixel_axes)
    if not inside.all():
        index = int(np.argmin(inside))
        raise DataError(
            f"{where}: image {first + index} has floating-point pixels from "
            f"{images[index].min():g} to {images[index].max():g}; "
            "scale them to [0, 1], or give uint8 in 0..255."
        )
