"""The images that a model is asked about, as it takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vaeflow.data.io.conversion import MODES, Conversion
from vaeflow.data.io.sources import (
    COUNTS,
    Images,
    Reading,
    count_images,
    image_blocks,
    joined,
    known_blocks,
    refuse,
)
from vaeflow.errors import BadImageError


def reading_for(
    shape: tuple[int, int, int],
    resize: str | None = None,
    key: str | None = None,
    on_bad: Callable[[BadImageError], object] = refuse,
) -> Reading:
    """Return how sources are read for a model.

    Args:
        shape: what it takes, `(height, width, channels)`.
        resize: how other sizes and colours are brought to that: `crop`, `fit` or `exact` (see
            `Conversion`); None refuses them.
        key: which array of an `.npz`.
        on_bad: called with each file or row that cannot be used.
    """
    height, width, channels = shape
    conversion = Conversion()
    if resize is not None:
        conversion = Conversion((width, height), resize, channels if channels in MODES else None)
    return Reading(
        conversion=conversion,
        key=key,
        shape=shape,
        shape_of="the model's",
        remedy="--resize crop|fit|exact",
        on_bad=on_bad,
    )


def blocks(sources: Sequence[str], reading: Reading) -> Iterator[Images]:
    """Yield the images of files, folders and known data sets, some megabytes at a time.

    Raises:
        DataError: a source is missing or holds no images, or `reading` refuses some.
    """
    for source in sources:
        if source in COUNTS:
            yield from known_blocks(source, reading)
        else:
            yield from image_blocks(source, reading=reading)


def count(sources: Sequence[str], reading: Reading) -> int:
    """Count the images in sources; the bad ones count too."""
    paths = [source for source in sources if source not in COUNTS]
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
    pixels, digests, names, labels = images
    part = slice(start, stop)
    return Images(pixels[part], digests[part], names[part], labels[part])
