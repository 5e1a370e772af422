"""Check that an array holds images, and bring images to one size and number of channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vaeflow.config.schema import Limits
from vaeflow.errors import BadImageError, DataError

# Only pictures need Pillow, so it is imported where one is made: a GPU's machine may lack it.
if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["fit", "crop", "exact"]
# A large picture is first reduced by averaging whole pixels, to no less than twice what is asked
# for: the result is nearly the same, in a fraction of the time (Pillow makes thumbnails likewise).
REDUCING_GAP = 2.0
GREY_MODES = {"1", "L", "LA"}
MODES = {1: "L", 3: "RGB"}
LARGEST_EDGE = 16_384
DEFAULT = Limits()  # to make one takes longer than the checks


@dataclass(frozen=True)
class Conversion:
    """What is made of each image; as it stands, only its pixels are taken.

    Attributes:
        size: `(width, height)` to resize to, or None to keep each image's own.
        resize: `crop` fills the size and cuts off what stands over, evenly on both sides; `fit`
            shows the whole image, with black beside it; `exact` stretches it. All filter with
            Lanczos's kernel.
        channels: 1 (grey, by ITU-R 601-2 luma) or 3 (red, green, blue); None keeps grey grey and
            colour colour.

    Raises:
        DataError: a value is not one of those.
    """

    size: tuple[int, int] | None = None
    resize: str = "crop"
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise DataError(f"resize is {self.resize!r}; expected {', '.join(get_args(Resize))}.")
        if self.channels not in {None, *MODES}:
            raise DataError(f"channels is {self.channels}; expected 1 or 3.")

    def shape_of(self, width: int, height: int, mode: str) -> tuple[int, int, int]:
        """Return the `(height, width, channels)` that a picture of that size and mode gets."""
        width, height = self.size or (width, height)
        return height, width, self.channels or (1 if mode in GREY_MODES else 3)

    def of_picture(self, picture: Image.Image) -> np.ndarray:
        """Convert a Pillow image to pixels, uint8 `(height, width, channels)`."""
        mode = MODES[self.shape_of(*picture.size, picture.mode)[2]]
        if picture.mode != mode:
            picture = picture.convert(mode)
        if self.size is not None and picture.size != self.size:
            picture = METHODS[self.resize](picture, *self.size)
        pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]

    def shape_of_array(self, path: Path, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the `(height, width, channels)` that the images of an array get.

        Raises:
            BadImageError: it has neither 1 nor 3 channels, and something is to be done to them.
        """
        height, width, channels = shape
        if channels in MODES:
            return self.shape_of(width, height, MODES[channels])
        if self.size is None and self.channels is None:
            return shape
        raise BadImageError(
            path,
            f"images of {channels} channels can be neither resized nor converted; "
            "only those of 1 or 3 can.",
        )

    def of_array(self, pixels: np.ndarray) -> np.ndarray:
        """Convert an array of images whose shape was accepted by `shape_of_array`.

        Args:
            pixels: uint8, `(count, height, width, channels)`.
        """
        height, width, channels = pixels.shape[1:]
        if self.size in {None, (width, height)} and self.channels in {None, channels}:
            return pixels
        if not len(pixels):
            height, width, channels = self.shape_of(width, height, MODES[channels])
            return np.empty((0, height, width, channels), np.uint8)
        from PIL import Image

        squeezed = pixels[..., 0] if channels == 1 else pixels
        return np.stack([self.of_picture(Image.fromarray(image)) for image in squeezed])


def _exact(picture: Image.Image, width: int, height: int, box: Any = None) -> Image.Image:
    from PIL import Image

    return picture.resize(
        (width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP
    )


def _crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(picture.width / width, picture.height / height)
    # Rounding must not put the box outside.
    left = max(0.0, (picture.width - scale * width) / 2)
    top = max(0.0, (picture.height - scale * height) / 2)
    box = (left, top, picture.width - left, picture.height - top)
    return _exact(picture, width, height, box)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    scale = max(picture.width / width, picture.height / height)
    inner = max(1, round(picture.width / scale)), max(1, round(picture.height / scale))
    sheet = Image.new(picture.mode, (width, height))
    sheet.paste(_exact(picture, *inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return sheet


METHODS = {"crop": _crop, "fit": _fit, "exact": _exact}


def parse_size(text: str) -> tuple[int, int]:
    """Parse `(width, height)` from a text such as 32x24.

    Raises:
        DataError: it is none.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts):
        raise DataError(f"size is {text!r}; expected WIDTHxHEIGHT, such as 32x32, each 1..4096.")
    return int(parts[0]), int(parts[1])


def as_batch(images: np.ndarray, where: str) -> np.ndarray:
    """Check type and shape, and add the axis of channels where it is missing."""
    return images.reshape(check_declared(images.shape, images.dtype, where))


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Round floating point in [0, 1] to the nearest of 256 levels; return uint8 as it is."""
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
    count, height, width, *channels = shape
    return count, height, width, *(channels or (1,))


def check_range(images: np.ndarray, where: str) -> None:
    """Refuse floating-point pixels that are not finite or not in [0, 1], naming the image."""
    for index, fault in out_of_range(images).items():
        raise BadImageError(where, f"image {index} has {fault}.")


def out_of_range(images: np.ndarray) -> dict[int, str]:
    """Describe which image of a block is wrong: NaN, infinity, or pixels outside [0, 1]."""
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
    """Find images that have one colour everywhere: indices, `(found,)`.

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
    """Describe an image of one colour, `(height, width, channels)`."""
    colour = ", ".join(str(value) for value in image[0, 0])
    return BadImageError(name, f"every pixel is {colour}.")
