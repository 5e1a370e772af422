"""Check that an array holds images, and bring images to one size and number of channels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vaeflow.config.schema import Limits
from vaeflow.data.io.rules import (
    BLACK,
    BYTE,
    CHANNELS,
    UNIT,
    Range,
    Rules,
    colour,
    for_type,
    outside,
    over,
    parse_range,
)
from vaeflow.errors import BadImageError, DataError

# Only pictures need Pillow, so it is imported where one is made: a GPU's machine may lack it.
if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["fit", "crop", "exact"]
# A large picture is first reduced by averaging whole pixels, to no less than twice what is asked
# for: the result is nearly the same, in a fraction of the time (Pillow makes thumbnails likewise).
REDUCING_GAP = 2.0
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LARGEST_EDGE = 65_535  # JPEG has no larger ones
WITHOUT_ASKING = 2**26  # pixels for which no machine need be asked whether it has the memory
BYTES_PER_PIXEL = 12  # of a picture while it is decoded, turned and converted
DEFAULT = Limits()  # to make one takes longer than the checks


@dataclass(frozen=True)
class Conversion:
    """What is made of each image; as it stands, only its pixels are taken.

    Attributes:
        size: `(width, height)` to resize to, or None to keep each image's own.
        resize: `crop` fills the size and cuts off what stands over, evenly on both sides; `fit`
            shows the whole image, with black beside it; `exact` stretches it. All filter with
            Lanczos's kernel.
        channels: 1 (grey, by ITU-R 601-2 luma), 3 (red, green, blue) or 4 (any four, as they are);
            None keeps grey grey and colour colour, and puts what has alpha over the background.
        background: `#rrggbb`, what is behind transparent pixels.
        pictures, integers, floats: which numbers are black and white in image files, arrays of
            integers and arrays of floating point; None: found out.

    Raises:
        DataError: a value is not one of those.
    """

    size: tuple[int, int] | None = None
    resize: str = "crop"
    channels: int | None = None
    background: str = BLACK
    pictures: Range | None = None
    integers: Range | None = None
    floats: Range | None = None

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise DataError(f"resize is {self.resize!r}; expected {', '.join(get_args(Resize))}.")
        if self.channels not in {None, *MODES}:
            raise DataError(f"channels is {self.channels}; expected 1, 3 or 4.")
        if self.channels == 4 and self.size is not None:
            raise DataError("images of 4 channels cannot be resized; leave out --size or channels.")

    @classmethod
    def by(cls, rules: Rules) -> Conversion:
        """Return the conversion that a data set's rules describe."""
        texts = (rules.pictures, rules.integers, rules.floats)
        ranges = (None if text is None else parse_range(text) for text in texts)
        return cls(rules.size, rules.resize, rules.channels, rules.background, *ranges)

    def range_of_array(self, dtype: np.dtype) -> Range | None:
        """Return the range that was laid down for arrays of a type, if any was."""
        given = self.floats if dtype.kind == "f" else self.integers
        return given and for_type(given, dtype)

    def shape_of(self, width: int, height: int, mode: str) -> tuple[int, int, int]:
        """Return the `(height, width, channels)` that a picture of that size and mode gets."""
        width, height = self.size or (width, height)
        return height, width, self.channels or (1 if mode in GREY_MODES else 3)

    def of_picture(self, picture: Image.Image) -> np.ndarray:
        """Convert a Pillow image of 8 bits to pixels, uint8 `(height, width, channels)`."""
        mode = MODES[self.shape_of(*picture.size, picture.mode)[2]]
        if picture.has_transparency_data and self.channels != 4:
            picture = self._opaque(picture)
        if picture.mode != mode:
            picture = picture.convert(mode)
        if self.size is not None and picture.size != self.size:
            picture = METHODS[self.resize](picture, *self.size)
        pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]

    def _opaque(self, picture: Image.Image) -> Image.Image:
        """Put a picture with transparency over the background."""
        from PIL import Image

        grey = picture.mode in GREY_MODES
        seen = picture.convert("LA" if grey else "RGBA")
        behind = Image.new("RGB", seen.size, colour(self.background)).convert(
            "L" if grey else "RGB"
        )
        behind.paste(seen.convert(behind.mode), mask=seen.getchannel("A"))
        return behind

    def shape_of_array(self, path: Path, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the `(height, width, channels)` that the images of an array get.

        Raises:
            BadImageError: it has neither 1, 3 nor 4 channels, and something is to be done to them.
        """
        height, width, channels = shape
        if channels == self.channels or (channels not in CHANNELS and not self.channels):
            if channels in MODES or self.size is None:
                return *(self.size or (width, height))[::-1], channels
        elif channels in CHANNELS and self.channels != 4:
            return self.shape_of(width, height, MODES[channels])
        raise BadImageError(
            path,
            f"images of {channels} channels can be neither resized nor converted; "
            "only those of 1, 3 or 4 (colour with alpha) can.",
        )

    def of_array(self, pixels: np.ndarray) -> np.ndarray:
        """Convert an array of images whose shape was accepted by `shape_of_array`.

        Args:
            pixels: uint8, `(count, height, width, channels)`.
        """
        if pixels.shape[3] == 4 and self.channels != 4:
            pixels = over(pixels, colour(self.background))
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


def parse_pixels(text: str) -> tuple[int, int, int]:
    """Parse `(height, width, channels)` from a text such as 28x28 or 32x32x3.

    Raises:
        DataError: it is none.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise DataError(f"pixels is {text!r}; expected HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS.")
    height, width, *channels = map(int, parts)
    return height, width, *(channels or (1,))


def as_batch(images: np.ndarray, where: str) -> np.ndarray:
    """Check type and shape, and add the axis of channels where it is missing.

    Args:
        images: uint8 or floating point, `(count, height, width[, channels])`.
        where: they are, in errors.
    """
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise BadImageError(
            where,
            f"pixels have dtype {images.dtype}; expected uint8 in 0..255 or floating point in "
            "[0, 1].",
        )
    if images.ndim not in (3, 4):
        raise BadImageError(
            where,
            f"an array of shape {images.shape}; expected (count, height, width) or "
            "(count, height, width, channels).",
        )
    count, height, width, *channels = images.shape
    shape = (count, height, width, *(channels or (1,)))
    check_shape(shape, where)
    return images.reshape(shape)


def check_type(dtype: np.dtype, where: str) -> None:
    """Refuse an array whose numbers cannot be pixels, by what its header says."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise BadImageError(
            where, f"numbers of type {dtype}; expected booleans, integers or floating point."
        )


def check_shape(
    shape: tuple[int, int, int, int], where: str, limits: Limits = DEFAULT
) -> tuple[int, int, int, int]:
    """Check what a header says before its pixels are read.

    Args:
        shape: `(count, height, width, channels)`, which is returned.
        where: the file.
        limits: of the pixels of one image.
    """
    count, height, width, channels = shape
    if not count:
        raise BadImageError(where, "no images in it.")
    if not all(1 <= edge <= LARGEST_EDGE for edge in (height, width, channels)):
        raise BadImageError(
            where, f"images of shape {shape[1:]}; every edge must be 1..{LARGEST_EDGE}."
        )
    if height * width > limits.max_pixels:
        raise BadImageError(
            where,
            f"images of {height} x {width} pixels; no image may have more than "
            f"{limits.max_pixels}. If you trust it: {limits.raised_by}.",
        )
    if height * width > WITHOUT_ASKING:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if (needed := height * width * BYTES_PER_PIXEL) > memory // 2:
            raise BadImageError(
                where,
                f"images of {height} x {width} pixels; to decode one takes {needed >> 20:,} MB, "
                f"more than half of this machine's {memory >> 20:,}.",
            )
    return shape


def check_range(images: np.ndarray, where: str) -> None:
    """Refuse floating-point pixels that are not finite or not in [0, 1], naming the image."""
    for index, fault in outside(images, BYTE if images.dtype == np.uint8 else UNIT).items():
        raise BadImageError(where, f"image {index} has {fault}.")


def constant(images: np.ndarray) -> np.ndarray:
    """Find images that have one colour everywhere: indices, `(found,)`.

    Args:
        images: uint8, `(count, height, width, channels)`.
    """
    height, width, channels = images.shape[1:]
    pixels = images.reshape(len(images), height * width, channels)
    # Almost every image differs within a few pixels: only what does not is compared whole.
    sparse = pixels[:, :: max(1, pixels.shape[1] // 16)]
    candidates = np.flatnonzero((sparse == sparse[:, :1]).all(axis=(1, 2)))
    whole = pixels[candidates]
    return candidates[(whole == whole[:, :1]).all(axis=(1, 2))]


def is_constant(image: np.ndarray) -> bool:
    """Return whether an image, `(height, width, channels)`, has one colour everywhere."""
    # Two pixels tell of almost every image that it has not.
    if image[0, 0].tobytes() != image[image.shape[0] // 2, image.shape[1] // 2].tobytes():
        return False
    return bool(len(constant(image[np.newaxis])))


def constant_error(name: object, image: np.ndarray, transparent: bool = False) -> BadImageError:
    """Describe an image of one colour, `(height, width, channels)`."""
    values = ", ".join(str(value) for value in image[0, 0])
    behind = " It has transparent pixels: show others in their place (--background white)."
    return BadImageError(name, f"every pixel is {values}.{behind if transparent else ''}")
