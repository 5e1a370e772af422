"""Tell what the numbers of an array mean: which axis is which, and what is black and white.

What can be known is found out and said; what cannot is asked for. The answer is kept with the data
and in the bundle as `Rules`, so that a model's new images are read as those it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vaeflow.errors import DataError

AXES = "NHWC"  # images, height, width, channels
CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha
LEAST_EDGE = 5  # an axis of 1 to 4 is no edge of a picture where it can be channels
# In the order in which they are tried where several fit the shape that a model takes.
LAYOUTS = ("NHWC", "NHW", "HWC", "NCHW", "CHW", "HWCN", "HWN", "CHWN", "HW")
BLACK = "#000000"
# How much of the images a range must hold: the others are then the bad ones, and are reported.
MOST = 0.5
# Rows beyond a range after which no more are read to find the range out.
SURE = 1_000

Shape = tuple[int, ...]


class Rules(BaseModel):
    """How the files of a data set were read.

    Attributes:
        size: `(width, height)` that images were resized to.
        resize: `crop`, `fit` or `exact`.
        channels: that images were brought to.
        background: what was put behind transparent pixels.
        layout: of arrays, such as `NCHW`.
        pictures, integers, floats: which numbers are black and white in image files, in arrays of
            integers and of floating point; None: as their type has it.
        pages: `first`, or `all`.
        tile, stride: of pictures that were cut into tiles, in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[tuple[int, int] | None, Field(strict=False)] = None
    resize: str = "crop"
    channels: int | None = None
    background: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")] = BLACK
    layout: Annotated[str | None, Field(pattern=r"^[NHWC]{2,4}$")] = None
    pictures: str | None = None
    integers: str | None = None
    floats: str | None = None
    pages: str = "all"
    tile: Annotated[int | None, Field(ge=1)] = None
    stride: Annotated[int | None, Field(ge=1)] = None


def shared_rules(rules: Iterable[Rules]) -> Rules:
    """Return what all have in common; where they differ, nothing is laid down."""
    kept = list(rules)
    found = {
        name: getattr(kept[0], name)
        for name in Rules.model_fields
        if kept and len({getattr(one, name) for one in kept}) == 1
    }
    return Rules(**found)


class Arrangement(NamedTuple):
    """The axes of an array of images.

    Attributes:
        layout: a letter of `AXES` an axis.
        shape: `(count, height, width, channels)`.
    """

    layout: str
    shape: tuple[int, int, int, int]

    @property
    def one_image(self) -> bool:
        """Whether the array is one image, and not a list of them."""
        return "N" not in self.layout

    def to_nhwc(self, block: np.ndarray) -> np.ndarray:
        """Order the axes of a block, `(count, height, width, channels)`."""
        present = [self.layout.index(axis) for axis in AXES if axis in self.layout]
        ordered = block.transpose(present)
        sizes = iter(ordered.shape)
        return ordered.reshape([next(sizes) if axis in self.layout else 1 for axis in AXES])


def parse_layout(text: str) -> str:
    """Parse a layout such as NHWC, of either case.

    Raises:
        DataError: it is none.
    """
    layout = text.upper()
    if not set("HW") <= set(layout) <= set(AXES) or len(set(layout)) != len(layout):
        raise DataError(
            f"layout is {text!r}; expected an order of N (images), H (height), W (width) and C "
            f"(channels) such as {', '.join(LAYOUTS)}."
        )
    return layout


def arrange(shape: Shape, layout: str) -> Arrangement | None:
    """Name the axes of an array; None where it has another number of them."""
    if len(shape) != len(layout):
        return None
    sizes = dict(zip(layout, shape, strict=True))
    count, height, width, channels = (sizes.get(axis, 1) for axis in AXES)
    return Arrangement(layout, (count, height, width, channels))


def find_layout(shape: Shape, among_equals: bool = False, like: Shape | None = None) -> str | None:
    """Find out which axis is which.

    Args:
        shape: of the array.
        among_equals: whether files of such arrays lie beside it: each is one image then.
        like: `(height, width, channels)` that the images should have; others may come.

    Returns:
        The layout, or None where it cannot be known.
    """
    if like is not None:
        fitting = (arrange(shape, layout) for layout in LAYOUTS)
        for arrangement in fitting:
            if arrangement is not None and arrangement.shape[1:] == tuple(like):
                return arrangement.layout
    match len(shape):
        case 4:
            return _of_four(shape)
        case 3:
            return _of_three(shape, among_equals)
        case 2 if among_equals:
            return "HW"
        case _:
            return None


def _of_four(shape: Shape) -> str | None:
    found = [layout for layout in LAYOUTS if _may_be(shape, layout)]
    if found[:1] == ["NHWC"] and set(found) <= {"NHWC", "CHWN"}:
        return "NHWC"  # three or four images are likelier than the rare CHWN
    if len(found) == 1:
        return found[0]
    return "NHWC" if not found and shape[3] in CHANNELS else None


def _of_three(shape: Shape, among_equals: bool) -> str | None:
    if _may_be(shape, "HWC"):
        return "HWC"
    if _may_be(shape, "CHW"):
        if among_equals:
            return "CHW"
        return "NHW" if shape[0] == 1 else None
    # Of (28, 28, 500) nobody knows whether it is 28 images or 500.
    return None if shape[0] == shape[1] != shape[2] else "NHW"


def _may_be(shape: Shape, layout: str) -> bool:
    arrangement = arrange(shape, layout)
    if arrangement is None or "C" not in layout:
        return False
    _, height, width, channels = arrangement.shape
    return channels in CHANNELS and min(height, width) >= LEAST_EDGE


class Range(NamedTuple):
    """Which numbers stand for black and white."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


UNIT, SIGNED, BYTE, WORD = Range(0, 1), Range(-1, 1), Range(0, 255), Range(0, 65_535)
RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)")


def parse_range(text: str) -> Range:
    """Parse a range such as 0..255 or -1..1.

    Raises:
        DataError: it is none.
    """
    match = RANGE.fullmatch(text.strip())
    if not match or float(match[1]) >= float(match[2]):
        raise DataError(f"range is {text!r}; expected BLACK..WHITE, such as 0..1, 0..255 or -1..1.")
    return Range(float(match[1]), float(match[2]))


def for_type(given: Range, dtype: np.dtype) -> Range:
    """Return a range that was laid down, or 0..255 for bytes that cannot hold it."""
    beyond = dtype == np.uint8 and (given.high > BYTE.high or given.low < 0)
    return BYTE if beyond else given


class RangeFinder:
    """Finds the range of an array's numbers, block by block.

    A few images may be damaged: the smallest range that holds nearly all of them is taken, and
    those outside it are found when they are converted.

    Args:
        dtype: of the array.
    """

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype
        self._ranges = (UNIT, SIGNED, BYTE, WORD) if dtype.kind == "f" else (UNIT, BYTE, WORD)
        self._seen = 0
        self._inside = dict.fromkeys(self._ranges, 0)
        self._smallest, self._largest = np.inf, -np.inf

    def add(self, images: np.ndarray) -> None:
        """Look at some images, `(count, ...)`."""
        flat = images.reshape(len(images), -1)
        low, high = flat.min(axis=1).astype(np.float64), flat.max(axis=1).astype(np.float64)
        finite = np.isfinite(low) & np.isfinite(high)
        low, high = low[finite], high[finite]
        if not len(low):
            return
        self._smallest = min(self._smallest, float(low.min()))
        self._largest = max(self._largest, float(high.max()))
        # One of a single value says little of the others.
        low, high = low[low < high], high[low < high]
        self._seen += len(low)
        for each in self._ranges:
            inside = (low >= each.low) & (high <= each.high)
            self._inside[each] += int(np.count_nonzero(inside))

    @property
    def sure(self) -> bool:
        """Whether no further image can make a difference."""
        if self._dtype != np.uint8:
            return self._dtype.kind == "b"
        beyond = self._seen - self._inside[UNIT]
        return beyond >= SURE and beyond > (1 - MOST) * self._seen

    def find(self) -> Range:
        """Return the range.

        Raises:
            DataError: it cannot be known.
        """
        if self._dtype.kind == "b" or self._smallest > self._largest:
            return UNIT  # without one sound image, whatever is said of it
        if self._seen:
            fitting = (r for r in self._ranges if self._inside[r] >= MOST * self._seen)
        else:
            low, high = self._smallest, self._largest
            fitting = (r for r in self._ranges if r.low <= low and high <= r.high)
        found = next(fitting, None)
        if found == WORD and self._largest < 2**15:
            found = None  # ten or twelve bits in sixteen: white would be nearly black
        if found is None:
            raise DataError(
                f"its numbers go from {self._smallest:g} to {self._largest:g}, and which of them "
                "are black and white is not known. Say so: --range BLACK..WHITE, such as 0..4095."
            )
        return found


def outside(images: np.ndarray, of: Range) -> dict[int, str]:
    """Describe which image of a block is wrong: NaN, infinity, or numbers outside a range."""
    if images.dtype == np.uint8 and of == BYTE:
        return {}
    # Of most blocks two numbers tell that all is well; with a NaN in it neither comparison holds.
    if not images.size or (images.min() >= of.low and images.max() <= of.high):
        return {}
    pixel_axes = tuple(range(1, images.ndim))
    finite = np.isfinite(images).all(axis=pixel_axes)
    with np.errstate(invalid="ignore"):
        inside = ((images >= of.low) & (images <= of.high)).all(axis=pixel_axes)
    return {
        int(index): "NaN or infinite pixels"
        if not finite[index]
        else f"pixels from {images[index].min():g} to {images[index].max():g}, outside of {of}; "
        "scale them, or name the range of all (--range)"
        for index in np.flatnonzero(~(finite & inside))
    }


def to_bytes(images: np.ndarray, of: Range) -> np.ndarray:
    """Bring numbers of a range to the nearest of 256 levels, uint8."""
    if images.dtype == np.uint8 and of == BYTE:
        return images
    if of == BYTE and images.dtype.kind in "iu":
        return images.astype(np.uint8)
    if images.dtype.kind != "f":
        images = images.astype(np.float64)
    elif images.dtype.itemsize == 2:
        images = images.astype(np.float32)  # half precision cannot tell 256 levels from halves
    shifted = images - of.low if of.low else images
    return np.rint(shifted * (BYTE.high / (of.high - of.low))).astype(np.uint8)


def parse_background(text: str) -> str:
    """Parse a colour such as white or #ffffff to `#rrggbb`.

    Raises:
        DataError: it is none.
    """
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise DataError(
            f"background is {text!r}; expected a colour such as black, white or #808080."
        ) from None
    return f"#{red:02x}{green:02x}{blue:02x}"


def colour(background: str) -> tuple[int, int, int]:
    """Return red, green and blue of `#rrggbb`."""
    red, green, blue = bytes.fromhex(background[1:])
    return red, green, blue


def over(pixels: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """Put colour with alpha over a background.

    Args:
        pixels: uint8, `(..., channels + 1)`; the last channel is alpha.
        background: a value a channel.

    Returns:
        uint8, `(..., channels)`, the nearest of 256 levels.
    """
    alpha = pixels[..., -1:].astype(np.uint32)
    mixed = pixels[..., :-1] * alpha + np.asarray(background, np.uint32) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)
