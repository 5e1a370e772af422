"""Spoil images in ways that cameras, codecs and hands do: what an anomaly measure must notice.

Each way has one severity, written here, and works on images of any size and number of channels.
Lengths are in pixels for images whose shorter side is 32, and grow with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Spoiling(NamedTuple):
    """A way to spoil images.

    Attributes:
        severity: what is done, for a person to read.
        spoil: from images and a generator of random numbers to spoilt ones, both float64 in
            0..255 of shape `(count, height, width, channels)`.
        local: whether it is a part of the image that is spoilt, whose place can be found.
    """

    severity: str
    spoil: Spoil
    local: bool = False


class Spoilt(NamedTuple):
    """Spoilt images, and where they are.

    Attributes:
        images: uint8, `(count, height, width, channels)`.
        where: whether a pixel was in the spoilt part, bool `(count, height, width)`.
    """

    images: np.ndarray
    where: np.ndarray


def spoil(name: str, images: np.ndarray, seed: int) -> Spoilt:
    """Spoil images in one way; the same seed spoils them alike.

    Args:
        name: of `SPOILINGS`.
        images: uint8, `(count, height, width, channels)`.
        seed: of places, noise and permutations.
    """
    generator = np.random.default_rng((seed, *name.encode()))
    changed = SPOILINGS[name].spoil(images.astype(np.float64), generator)
    spoilt = np.rint(np.clip(changed, 0, 255)).astype(np.uint8)
    if not SPOILINGS[name].local:
        return Spoilt(spoilt, np.ones(images.shape[:3], bool))
    return Spoilt(spoilt, (changed != images).any(axis=-1))


def _constant(images: np.ndarray, generator: np.random.Generator, *, level: float) -> np.ndarray:
    return np.full_like(images, level)


def _one_colour(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    colours = generator.integers(0, 256, (len(images), 1, 1, images.shape[-1]))
    return np.broadcast_to(colours, images.shape).astype(np.float64)


def _noise(images: np.ndarray, generator: np.random.Generator, *, sigma: float) -> np.ndarray:
    return images + sigma * generator.standard_normal(images.shape)


def _salt(images: np.ndarray, generator: np.random.Generator, *, share: float) -> np.ndarray:
    drawn = generator.random((*images.shape[:3], 1))
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 255, images))


def _blur(images: np.ndarray, generator: np.random.Generator, *, sigma: float) -> np.ndarray:
    sigma = max(0.5, sigma * min(images.shape[1:3]) / 32)
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    weights /= weights.sum()
    for axis in (1, 2):
        length = images.shape[axis]
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(images, padding, mode="edge")
        shifted = (
            np.take(padded, range(start, start + length), axis) for start in range(len(weights))
        )
        images = np.sum([w * part for w, part in zip(weights, shifted, strict=True)], axis=0)
    return images


def _times(images: np.ndarray, generator: np.random.Generator, *, factor: float) -> np.ndarray:
    return images * factor


def _gamma(images: np.ndarray, generator: np.random.Generator, *, power: float) -> np.ndarray:
    return 255 * (images / 255) ** power


def _inverted(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return 255 - images


def _rectangle(shape: tuple[int, ...], share: float, generator: np.random.Generator) -> np.ndarray:
    """Choose a place in each image for a part with this share of its area: bool."""
    count, height, width, _ = shape
    rows, columns = (max(1, round(length * share**0.5)) for length in (height, width))
    top = generator.integers(0, height - rows + 1, (count, 1))
    left = generator.integers(0, width - columns + 1, (count, 1))
    down = (np.arange(height) >= top) & (np.arange(height) < top + rows)
    across = (np.arange(width) >= left) & (np.arange(width) < left + columns)
    return (down[:, :, None] & across[:, None, :])[..., None]


def _occluded(images: np.ndarray, generator: np.random.Generator, *, share: float) -> np.ndarray:
    return np.where(_rectangle(images.shape, share, generator), 128, images)


def _foreign(images: np.ndarray, generator: np.random.Generator, *, share: float) -> np.ndarray:
    return np.where(_rectangle(images.shape, share, generator), np.roll(images, 1, 0), images)


def _shuffled(images: np.ndarray, generator: np.random.Generator, *, parts: int) -> np.ndarray:
    rows, columns = (length // parts for length in images.shape[1:3])
    spoilt = images.copy()
    corners = [(rows * r, columns * c) for r in range(parts) for c in range(parts)]
    for image, original in zip(spoilt, images, strict=True):
        for (top, left), place in zip(corners, generator.permutation(len(corners)), strict=True):
            y, x = corners[place]
            image[top : top + rows, left : left + columns] = original[y : y + rows, x : x + columns]
    return spoilt


def _stripes(images: np.ndarray, generator: np.random.Generator, *, height: float) -> np.ndarray:
    up = np.arange(images.shape[2]) // 2 % 2 == 0
    return images + np.where(up, height, -height)[:, None]


def _dead_rows(images: np.ndarray, generator: np.random.Generator, *, share: float) -> np.ndarray:
    count, height = images.shape[:2]
    order = generator.permuted(np.tile(np.arange(height), (count, 1)), axis=1)
    return np.where((order < max(1, round(share * height)))[:, :, None, None], 0, images)


def _jpeg(images: np.ndarray, generator: np.random.Generator, *, quality: int) -> np.ndarray:
    from PIL import Image

    def packed(plane: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(plane.astype(np.uint8)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file), np.float64).reshape(plane.shape)

    if images.shape[-1] == 3:
        return np.stack([packed(image) for image in images])
    planes = np.moveaxis(images, -1, 1)
    return np.moveaxis(np.stack([[packed(p) for p in image] for image in planes]), 1, -1)


# By name; `evaluate` tries them all.
SPOILINGS = MappingProxyType(
    {
        "black": Spoiling("every pixel 0", partial(_constant, level=0)),
        "white": Spoiling("every pixel 255", partial(_constant, level=255)),
        "grey": Spoiling("every pixel 128", partial(_constant, level=128)),
        "one_colour": Spoiling("one colour, drawn at random", _one_colour),
        "noise": Spoiling("normal noise, sigma 25 of 255", partial(_noise, sigma=25)),
        "salt": Spoiling("5 % of the pixels black or white", partial(_salt, share=0.05)),
        "blur": Spoiling("Gaussian blur, sigma 1 in 32 pixels", partial(_blur, sigma=1)),
        "dark": Spoiling("exposure a quarter", partial(_times, factor=0.25)),
        "bright": Spoiling("exposure three times, clipped", partial(_times, factor=3)),
        "gamma": Spoiling("gamma 2.5", partial(_gamma, power=2.5)),
        "inverted": Spoiling("255 less each pixel", _inverted),
        "stripes": Spoiling("pairs of columns 32 levels up and down", partial(_stripes, height=32)),
        "dead_rows": Spoiling("a tenth of the rows black", partial(_dead_rows, share=0.1), True),
        "jpeg": Spoiling("JPEG of quality 10", partial(_jpeg, quality=10)),
        "occluded": Spoiling(
            "a grey square on 15 % of the area", partial(_occluded, share=0.15), True
        ),
        "foreign_patch": Spoiling(
            "a square of another image on 25 % of the area", partial(_foreign, share=0.25), True
        ),
        "shuffled_patches": Spoiling("4x4 patches in another order", partial(_shuffled, parts=4)),
    }
)
