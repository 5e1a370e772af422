"""What reading images takes and gives: the images, how they are read, what was understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import numpy as np

from vaeflow.config.schema import Limits
from vaeflow.data.io.conversion import (
    Conversion,
    constant,
    constant_error,
)
from vaeflow.data.io.decoding import Pool
from vaeflow.data.io.rules import (
    Arrangement,
    Range,
    Rules,
)
from vaeflow.data.io.tiles import Tiling
from vaeflow.errors import BadImageError


class Images(NamedTuple):
    """Images of one shape, and what is known of each."""

    pixels: np.ndarray  # uint8, (count, height, width, channels)
    digests: np.ndarray  # SHA-256 of each image's pixels, uint8 (count, 32)
    names: Sequence[str]  # "path" for an image file, "path#index" for a row of an array
    labels: Sequence[str | None]
    splits: Sequence[str | None]  # as given; None: their content decides
    # SHA-256 of the pictures of which these are tiles, or of the images themselves. It decides the
    # split: tiles of one picture stay together.
    origins: np.ndarray


def refuse(error: BadImageError) -> NoReturn:
    """Raise the error of a bad file: nothing more is read."""
    raise error


@dataclass
class Seen:
    """What was understood of the files that were read.

    Attributes:
        layouts: images by the layout of their arrays.
        ranges: images by the range of their array's numbers.
        integers, floats: the ranges of arrays of these types.
        pictures: images in files by what is worth saying of them.
        notes: images by what else is.
    """

    layouts: Counter[str] = field(default_factory=Counter)
    ranges: Counter[Range] = field(default_factory=Counter)
    integers: set[Range] = field(default_factory=set)
    floats: set[Range] = field(default_factory=set)
    pictures: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, arrangement: Arrangement, dtype: np.dtype, of: Range, images: int) -> None:
        """Count the images of an array."""
        self.layouts[arrangement.layout] += images
        self.ranges[of] += images
        (self.floats if dtype.kind == "f" else self.integers).add(of)

    def lines(self) -> list[str]:
        """Say it, in a line."""
        said = []
        if self.layouts:
            said.append(f"axes {_listed(self.layouts)}")
            said.append(f"black and white are {_listed(self.ranges)}")
        said += [f"{kind}: {count:,}" for kind, count in sorted(self.pictures.items())]
        said += [f"{note}: {count:,}" for note, count in sorted(self.notes.items())]
        return [f"understood: {'; '.join(said)}"] if said else []


def _listed(counter: Counter[str] | Counter[Range]) -> str:
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{what} ({count:,} images)" for what, count in counter.items())


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        conversion: what is made of each image.
        limits: of what headers may declare.
        key: which array of several in a file, or which column of a table.
        label_key: which array or column has the labels; by default one of a usual name.
        layout: which axis of an array is which; by default found out.
        usual_layout: which it is where that is possible.
        row_shape: `(height, width, channels)` of images that are rows of numbers; by default a
            square of grey.
        every_page: whether all pages of a file are images, or the first alone.
        tiling: how pictures are cut into the images; None: each is one.
        shape: `(height, width, channels)` that all must have; by default, that of the first.
        shape_of: what has that shape, in errors.
        remedy: for an image of another shape, in errors.
        label_folders: whether the first folder below a source is the label of what lies in it.
        splits: `published`: as arrays have it that are named by it; `content`: not even that;
            `folders`: the first folder below a source is the split, the next one the label.
        follow_links: whether links may lead out of the folder that is read.
        allow_constant: whether an image may be of one colour; nothing is learnt from one.
        on_bad: called with each file or row that cannot be used; unless it raises, the rest is
            read.
        on_other: called with the name of each file that is no image, and is left alone.
        pool: what decodes image files; None: the cores of this machine.
        seen: what was understood, filled as images are read.
    """

    conversion: Conversion = field(default_factory=Conversion)
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    label_key: str | None = None
    layout: str | None = None
    usual_layout: str | None = None
    row_shape: tuple[int, int, int] | None = None
    every_page: bool = True
    tiling: Tiling | None = None
    shape: tuple[int, ...] | None = None
    shape_of: str = "what is there"
    remedy: str = "vaeflow data add SOURCE --size WIDTHxHEIGHT --channels 1|3"
    label_folders: bool = False
    splits: str = "published"
    follow_links: bool = True
    allow_constant: bool = True
    on_bad: Callable[[BadImageError], object] = refuse
    on_other: Callable[[str], object] = lambda name: None
    pool: Pool | None = None
    seen: Seen = field(default_factory=Seen)

    def rules(self) -> Rules:
        """Return the rules by which other images are read like those that were."""
        given = self.conversion
        layouts = set(self.seen.layouts)
        integers, floats = self.seen.integers, self.seen.floats
        return Rules(
            size=given.size,
            resize=given.resize,
            channels=given.channels,
            background=given.background,
            layout=layouts.pop() if len(layouts) == 1 else self.layout,
            pictures=None if given.pictures is None else str(given.pictures),
            integers=str(next(iter(integers))) if len(integers) == 1 else None,
            floats=str(next(iter(floats))) if len(floats) == 1 else None,
            pages="all" if self.every_page else "first",
            tile=self.tiling and self.tiling.edge,
            stride=self.tiling and self.tiling.stride,
        )


def varied(images: Images, reading: Reading) -> Images:
    """Select the images that are not of one colour, unless those are allowed."""
    rows = set() if reading.allow_constant else set(constant(images.pixels).tolist())
    for row in sorted(rows):
        reading.on_bad(constant_error(images.names[row], images.pixels[row]))
    if not rows:
        return images
    return select(images, [row for row in range(len(images.pixels)) if row not in rows])


def select(images: Images, rows: Sequence[int]) -> Images:
    """Select some of the images, by their indices."""
    return Images(
        images.pixels[rows],
        images.digests[rows],
        [images.names[row] for row in rows],
        [images.labels[row] for row in rows],
        [images.splits[row] for row in rows],
        images.origins[rows],
    )


def joined(parts: Sequence[Images]) -> Images:
    """Join images of one shape, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.digests for part in parts]),
        [name for part in parts for name in part.names],
        [label for part in parts for label in part.labels],
        [split for part in parts for split in part.splits],
        np.concatenate([part.origins for part in parts]),
    )
