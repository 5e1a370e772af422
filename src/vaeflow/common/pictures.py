"""Images as PNG grids that a person can look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

OVERLAY, RED, RED_SHARE = 256, (255, 32, 0), 0.75
MAP_RANGE = (2, 12)  # standard deviations that are no red and all red
TITLE = 32  # rows of a title
SMALLEST_TILE = 48  # screen pixels; smaller images are enlarged by whole factors


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay images out in rows, with a white gap between them.

    Args:
        images: `(count, height, width, channels)`, uint8 or floating point in [0, 1]. One channel
            is grey, three are red, green, blue; of any other number the first is shown.
        columns: images per row; by default the grid is about square.

    Returns:
        uint8, `(rows, columns, 3)`.
    """
    images = coloured(images)
    enlarge = max(1, math.ceil(SMALLEST_TILE / max(images.shape[1:3])))
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)

    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 2
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def shrunk(images: np.ndarray, edge: int) -> np.ndarray:
    """Shrink images whose longer edge is more than `edge` pixels to that; leave others.

    Args:
        images: uint8 or floating point in [0, 1], `(count, height, width, channels)`.
        edge: in pixels.

    Returns:
        uint8 alike, the mean of each area.
    """
    from PIL import Image

    images = _as_bytes(images)
    height, width = images.shape[1:3]
    if max(height, width) <= edge:
        return images
    scale = edge / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    channels = np.moveaxis(images, -1, 1)  # Pillow knows no other numbers of them than 1, 3 and 4
    small = [
        [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BOX)) for plane in image]
        for image in channels
    ]
    return np.moveaxis(np.array(small), 1, -1)


def pairs(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 12) -> np.ndarray:
    """Lay out rows of originals, each with the row of its reconstructions below.

    Args:
        originals: uint8, `(count, height, width, channels)`.
        reconstructions: floating point in [0, 1], same shape.

    Returns:
        uint8, `(rows, columns, 3)`.
    """
    return interleaved(originals, _as_bytes(reconstructions), columns)


def interleaved(above: np.ndarray, below: np.ndarray, columns: int = 12) -> np.ndarray:
    """Lay out rows of images, each with the row of their partners below.

    Args:
        above, below: uint8, `(count, height, width, channels)`.
        columns: pairs in a row at most.

    Returns:
        uint8, `(rows, columns, 3)`.
    """
    columns = min(columns, len(above))
    blank = np.full((-len(above) % columns, *above.shape[1:]), 255, np.uint8)
    rows = []
    for images in (above, below):
        padded = np.concatenate([images, blank])
        rows.append(padded.reshape(-1, columns, *above.shape[1:]))
    return grid(np.stack(rows, axis=1).reshape(-1, *above.shape[1:]), columns)


def sections(sheets: Mapping[str, np.ndarray]) -> np.ndarray:
    """Stack pictures, each below its title.

    Args:
        sheets: uint8 `(rows, columns, 3)` by title; of different sizes, if need be.

    Returns:
        uint8, `(rows, columns, 3)`.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=TITLE // 2)
    width = max(sheet.shape[1] for sheet in sheets.values())
    height = sum(TITLE + sheet.shape[0] for sheet in sheets.values())
    canvas = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for title, sheet in sheets.items():
        draw.text((6, top + TITLE // 4), title, fill="black", font=font)
        canvas.paste(Image.fromarray(sheet), (0, top + TITLE))
        top += TITLE + sheet.shape[0]
    return np.asarray(canvas)


def overlay(image: np.ndarray, unusual: np.ndarray) -> np.ndarray:
    """Lay an image beside itself with red where it is unusual.

    Args:
        image, unusual: as for `reddened`.

    Returns:
        uint8, `(rows, columns, 3)`, enlarged to 256 pixels or so.
    """
    times = max(1, OVERLAY // max(unusual.shape))
    both = np.stack([coloured(image), reddened(image, unusual)])
    return grid(both.repeat(times, axis=1).repeat(times, axis=2), columns=2)


def reddened(image: np.ndarray, unusual: np.ndarray) -> np.ndarray:
    """Lay red over an image where it is unusual.

    Args:
        image: uint8, `(height, width, channels)`; shown as by `grid`.
        unusual: by so many standard deviations, `(height, width)`.

    Returns:
        uint8, `(height, width, 3)`.
    """
    low, high = MAP_RANGE
    share = RED_SHARE * np.clip((unusual - low) / (high - low), 0, 1)[..., None]
    return np.rint((1 - share) * coloured(image) + share * np.array(RED)).astype(np.uint8)


def coloured(images: np.ndarray) -> np.ndarray:
    """Bring images, of whatever leading axes, to uint8 and three channels; see `grid`."""
    images = _as_bytes(images)
    return images if images.shape[-1] == 3 else images[..., :1].repeat(3, axis=-1)


def _as_bytes(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 `(height, width, 3)` as a PNG file."""
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")
