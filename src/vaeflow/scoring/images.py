"""The images that a model is asked about, as it takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vaeflow.bundle.manifest import ImageSpec
from vaeflow.config.schema import Limits
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.known import COUNTS, known_blocks
from vaeflow.data.io.listing import STANDARD_INPUT
from vaeflow.data.io.reading import Images, Reading, joined, refuse
from vaeflow.data.io.rules import CHANNELS, Range, Rules, parse_layout, parse_range
from vaeflow.data.io.sources import count_images, image_blocks
from vaeflow.data.io.tiles import Tiling
from vaeflow.errors import BadImageError, DataError


@dataclass(frozen=True)
class Asked:
    """What a person says of the files to read; None: as those of the model's data were.

    Attributes:
        resize: how other sizes and colours are brought to the model's: `crop`, `fit` or `exact`.
        key: which array of several in a file, or which column.
        layout: which axis of an array is which.
        value_range: which numbers are black and white.
        pages: `all`, or `first`.
        max_pixels: of one image.
        tiling: how pictures are cut into images.
    """

    resize: str | None = None
    key: str | None = None
    layout: str | None = None
    value_range: str | None = None
    pages: str | None = None
    max_pixels: int | None = None
    tiling: Tiling | None = None


def reading_for(
    image: ImageSpec,
    asked: Asked | None = None,
    on_bad: Callable[[BadImageError], object] = refuse,
    on_other: Callable[[str], object] = lambda name: None,
) -> Reading:
    """Return how sources are read for a model: by the rules of the data it was trained on.

    Args:
        image: what it takes, and those rules.
        asked: what goes before them.
        on_bad: called with each file or row that cannot be used.
        on_other: called with the name of each file that is no image, and is left alone.
    """
    asked = asked or Asked()
    rules = image.reading or Rules()
    shape = image.shape
    tiling = asked.tiling or tiling_by(rules)
    if tiling is not None and shape[:2] != (tiling.edge, tiling.edge):
        raise DataError(
            f"tile is {tiling.edge}; the model takes images of {shape[1]}x{shape[0]} pixels, and "
            "tiles have to be of that size."
        )
    given = None if asked.value_range is None else parse_range(asked.value_range)
    every = (asked.pages or rules.pages) == "all"
    limits = Limits() if asked.max_pixels is None else Limits(max_pixels=asked.max_pixels)
    return Reading(
        conversion=_conversion(shape, rules, asked.resize, given, tiling is not None),
        limits=limits,
        key=asked.key,
        layout=None if asked.layout is None else parse_layout(asked.layout),
        usual_layout=rules.layout,
        every_page=every,
        tiling=tiling,
        shape=shape,
        shape_of="the model's",
        remedy="--resize crop|fit|exact",
        on_bad=on_bad,
        on_other=on_other,
    )


def tiling_by(rules: Rules) -> Tiling | None:
    """Return how the pictures of a data set were cut; None where each is an image."""
    return None if rules.tile is None else Tiling.of(rules.tile, rules.stride)


def _conversion(
    shape: tuple[int, int, int],
    rules: Rules,
    resize: str | None,
    given: Range | None,
    tiles: bool,
) -> Conversion:
    height, width, channels = shape
    conversion = Conversion.by(rules)
    if given is not None:
        conversion = replace(conversion, pictures=given, integers=given, floats=given)
    if channels == CHANNELS[-1]:
        return replace(conversion, channels=channels, size=None)
    if tiles:  # pictures of any size, unless those of the data were brought to one
        return conversion if resize is None else replace(conversion, channels=channels)
    if resize is not None or conversion.size is not None:
        resize = conversion.resize if resize is None else resize
        size = (width, height) if channels in CHANNELS else None
        return replace(conversion, size=size, resize=resize, channels=channels)
    return conversion


def blocks(sources: Sequence[str], reading: Reading) -> Iterator[Images]:
    """Yield the images of files, folders and known data sets, some megabytes at a time.

    Raises:
        DataError: a source is missing or holds no images, or `reading` refuses some.
    """
    for source in sources:
        if source in COUNTS:
            yield from known_blocks(source, replace(reading, tiling=None))
        else:
            yield from image_blocks(source, reading=reading)


def count(sources: Sequence[str], reading: Reading) -> int:
    """Count the images in sources; the bad ones count too."""
    paths = [source for source in sources if source not in {*COUNTS, STANDARD_INPUT}]
    known = sum(COUNTS[source] for source in sources if source in COUNTS)
    return known + count_images(*paths, reading=reading)


def read(sources: Sequence[str], reading: Reading) -> Images:
    """Read all images of sources at once."""
    return joined(list(blocks(sources, reading)))


def in_shards(blocks: Iterator[Images], size: int) -> Iterator[Images]:
    """Yield the same images, `size` at a time, whatever the blocks; the last may be fewer."""
    waiting: Images | None = None
    for block in blocks:
        waiting = block if waiting is None else joined([waiting, block])
        whole = len(waiting.names) // size * size
        for start in range(0, whole, size):
            yield _cut(waiting, start, start + size)
        waiting = _cut(waiting, whole, None)
    if waiting is not None and len(waiting.names):
        yield waiting


def _cut(images: Images, start: int, stop: int | None) -> Images:
    pixels, digests, names, labels, splits, origins = images
    part = slice(start, stop)
    return Images(
        pixels[part], digests[part], names[part], labels[part], splits[part], origins[part]
    )
