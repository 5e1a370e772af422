"""What an array must be to count as images."""

from __future__ import annotations

import numpy as np

from vaeflow.config import Limits
from vaeflow.errors import BadImageError

LARGEST_EDGE = 16_384
DEFAULT = Limits()  # to make one takes longer than the checks


def as_batch(images: np.ndarray, where: str) -> np.ndarray:
    """Check type and shape, and add the axis of channels where it is missing."""
    return images.reshape(check_declared(images.shape, images.dtype, where))


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Floating point in [0, 1] as the nearest of 256 levels; uint8 as it is."""
    return images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)


def check_declared(
    shape: tuple[int, ...], dtype: np.dtype, where: str, limits: Limits = DEFAULT
) -> tuple[int, int, int, int]:
    """Check what a header says before its pixels are read.

    Returns:
        `(count, height, width, channels)`.
    """
    if dtype != np.uint8 and dtype.kind != "f":
        raise BadImageError(
            where,
            f"pixels have dtype {dtype}; expected uint8 in 0..255 or floating point in [0, 1].",
        )
    if len(shape) not in (3, 4):
        raise BadImageError(
            where,
            f"an array of shape {shape}; expected (count, height, width) or "
            "(count, height, width, channels).",
        )
    if not shape[0]:
        raise BadImageError(where, "no images in it.")
    if not all(1 <= edge <= LARGEST_EDGE for edge in shape[1:]):
        raise BadImageError(
            where, f"images of shape {shape[1:]}; every edge must be 1..{LARGEST_EDGE}."
        )
    if len(shape) == 4 and shape[1] in (1, 3) and shape[2] > 4 and shape[3] > 4:
        raise BadImageError(
            where,
            f"an array of shape {shape} has its channels first; expected them last. "
            "Save it again: numpy.save(path, numpy.moveaxis(array, 1, -1).copy())",
        )
    if shape[1] * shape[2] > limits.max_pixels:
        raise BadImageError(
            where,
            f"images of {shape[1]} x {shape[2]} pixels; no image may have more than "
            f"{limits.max_pixels} (prepare.max_pixels in params.yaml).",
        )
    return shape if len(shape) == 4 else (*shape, 1)


def check_range(images: np.ndarray, where: str) -> None:
    """Refuse floating-point pixels that are not finite or not in [0, 1], naming the image."""
    for index, fault in out_of_range(images).items():
        raise BadImageError(where, f"image {index} has {fault}.")


def out_of_range(images: np.ndarray) -> dict[int, str]:
    """What is wrong with which image of a block: NaN, infinity, or pixels outside [0, 1]."""
    # Of most blocks two numbers tell that all is well; with a NaN in it neither comparison holds.
    if images.dtype == np.uint8 or (images.min() >= 0 and images.max() <= 1):
        return {}
    pixel_axes = tuple(range(1, images.ndim))
    finite = np.isfinite(images).all(axis=pixel_axes)
    with np.errstate(invalid="ignore"):
        inside = ((images >= 0) & (images <= 1)).all(axis=pixel_axes)
    return {
        int(index): "NaN or infinite pixels"
        if not finite[index]
        else f"floating-point pixels from {images[index].min():g} to {images[index].max():g}; "
        "scale them to [0, 1], or give uint8 in 0..255"
        for index in np.flatnonzero(~(finite & inside))
    }


def constant(images: np.ndarray) -> np.ndarray:
    """Which images have one colour everywhere: indices, `(found,)`.

    Args:
        images: uint8, `(count, height, width, channels)`.
    """
    pixels = images.reshape(len(images), -1, images.shape[-1])
    # Almost every image differs within a few pixels: only what does not is compared whole.
    sparse = pixels[:, :: max(1, pixels.shape[1] // 16)]
    candidates = np.flatnonzero((sparse == sparse[:, :1]).all(axis=(1, 2)))
    whole = pixels[candidates]
    return candidates[(whole == whole[:, :1]).all(axis=(1, 2))]


def constant_error(name: object, image: np.ndarray) -> BadImageError:
    """What is wrong with an image of one colour, `(height, width, channels)`."""
    colour = ", ".join(str(value) for value in image[0, 0])
    return BadImageError(name, f"every pixel is {colour}.")
