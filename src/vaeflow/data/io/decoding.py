"""Decode image files, several at a time: each page of a file is an image.

Pillow decodes. What it is known to read wrong is refused here.
"""

from __future__ import annotations

import io
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vaeflow.common.processes import cores
from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import BYTES_PER_BLOCK
from vaeflow.data.io.conversion import Conversion, check_shape, constant_error, is_constant
from vaeflow.data.io.rules import UNIT, Range, for_type, outside, to_bytes
from vaeflow.data.splits import as_digests, pixel_digest
from vaeflow.errors import BadImageError

# JPEG stands for MPO too, several of them in one file: the first is taken.
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM"]
# As an ISO media file names the format of its pictures, after "ftyp".
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}
)
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "F"})
ORIENTATION = 0x0112  # Exif 2.32, section 4.6.4: 1 is upright
QUARTER_TURNS = frozenset({5, 6, 7, 8})
# Where Pillow keeps what may hold one: EXIF proper, EXIF as old PNG files have it, XMP.
ORIENTED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
# TIFF 6.0: what kind of page; bits; white is 0; planes of colour apart; signed or floating point.
SUBFILE, BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 254, 258, 262, 284, 339
UNSIGNED, FLOATING = 1, 3
TRANSPARENT = "with transparency"  # worth saying of an image
LARGEST_READ_AT_ONCE = 64 << 20  # a TIFF of many pages may be larger than the memory
FILES_PER_TASK = 64
AHEAD = 8  # tasks a thread that may wait for the reader, who writes and is held up now and then
# Pillow decodes outside Python's lock. Below this height times width what it does inside counts
# for more, and a second thread only gets in the way.
PIXELS_WORTH_A_THREAD = 48 * 48

NOTHING = np.empty((0, 0, 0, 0), np.uint8)

# Called with a name and the shape its pixels will have; refuses it with a BadImageError.
CheckShape = Callable[[str, tuple[int, int, int]], None]


class Picture(NamedTuple):
    """One image file, on disk or in memory.

    Attributes:
        name: in the index and in errors.
        content: its bytes; None: `path` is on disk.
        path: where it lies; the same as the name, unless that cannot be written as text.
        label, split: where they are known.
    """

    name: str
    content: bytes | None = None
    path: str | None = None
    label: str | None = None
    split: str | None = None


class Page(NamedTuple):
    """One image of a file: its pixels, or what is wrong with it."""

    name: str
    number: int
    image: np.ndarray | BadImageError
    last: bool
    seen: tuple[str, ...]  # what is worth saying of it


def decode(
    picture: Picture, conversion: Conversion, limits: Limits, check: CheckShape
) -> np.ndarray:
    """Read the first image of one file; a photograph is turned upright as its EXIF data say.

    Args:
        picture: the file.
        conversion: what is made of it.
        limits: what its header may declare.
        check: may refuse the shape its pixels will have.

    Returns:
        uint8, `(height, width, channels)`.

    Raises:
        BadImageError: it is unreadable, beyond the limits, or refused by `check`.
    """
    page = next(decode_pages(picture, conversion, limits, check, every=False))
    if isinstance(page.image, BadImageError):
        raise page.image
    return page.image


def decode_pages(
    picture: Picture,
    conversion: Conversion,
    limits: Limits,
    check: CheckShape,
    every: bool = True,
    start: int = 0,
) -> Iterator[Page]:
    """Read the images of one file, from page `start` on; see `decode`.

    Args:
        picture, conversion, limits, check: as `decode`.
        every: whether all pages are images, or the first alone.
        start: pages before it are left out.

    Raises:
        BadImageError: the file is unreadable.
    """
    if limits.max_pixels > (Image.MAX_IMAGE_PIXELS or limits.max_pixels):
        Image.MAX_IMAGE_PIXELS = limits.max_pixels  # the user has said so
    try:
        opened = _open(picture)
        pages = _pages(opened)
    except Exception as error:
        raise _fault(picture.name, error) from None
    with opened:
        several = every and len(pages) > 1
        last = len(pages) - 1 if every else 0
        for number in range(start, last + 1):
            name = f"{picture.name}#{number}" if several else picture.name
            image: np.ndarray | BadImageError
            seen: tuple[str, ...] = ()
            try:
                if pages[number] != opened.tell():
                    opened.seek(pages[number])
                image, seen = _decode_page(opened, name, conversion, limits, check)
            except Exception as error:
                image = _fault(name, error)
            if len(pages) > 1:
                seen += ("one of several pages" if every else "the first of several pages",)
            yield Page(name, number, image, number == last, seen)


def _fault(name: str, error: Exception) -> BadImageError:
    """Describe whatever a damaged file makes of Pillow's decoders."""
    if isinstance(error, BadImageError):
        return error
    if isinstance(error, UnidentifiedImageError):
        return BadImageError(name, "not a readable image (of no known format).")
    return BadImageError(name, f"not a readable image ({error}).")


def _open(picture: Picture) -> Image.Image:
    source: Any = picture.path or picture.name
    content = picture.content
    if content is None:
        with open(source, "rb", buffering=0) as file:  # noqa: PTH123 - a path costs more
            # At once: decoders read a few kilobytes at a time, and hand Python's lock over.
            if os.fstat(file.fileno()).st_size <= LARGEST_READ_AT_ONCE:
                content = file.read()
    source = source if content is None else io.BytesIO(content)
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        if content is None or content[4:8] != b"ftyp" or content[8:12] not in HEIF_BRANDS:
            raise
    try:
        import pillow_heif
    except ImportError:
        raise BadImageError(
            picture.name, "HEIC, for which there is an extra: pip install 'vaeflow[formats]'."
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(source, formats=["HEIF"])


def _pages(opened: Image.Image) -> Sequence[int]:
    """Return the numbers of a file's images, without the previews that a TIFF may hold."""
    count = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if opened.format != "TIFF" or count == 1:
        return range(count)
    pages = []
    for number in range(count):
        opened.seek(number)
        if not _tag(opened, SUBFILE, 0) & 1:
            pages.append(number)
    opened.seek(0)
    return pages or [0]


def _decode_page(
    opened: Image.Image, name: str, conversion: Conversion, limits: Limits, check: CheckShape
) -> tuple[np.ndarray, tuple[str, ...]]:
    # From the header, before anything is decoded.
    if opened.mode not in EIGHT_BIT_MODES | DEEP_MODES:
        raise ValueError(f"pixel mode {opened.mode}; expected grey or colour")
    check_shape((1, *opened.size[::-1], 1), name, limits)
    if opened.format == "TIFF":
        _check_tiff(opened, conversion)
    orientation = _orientation(opened)
    upright = opened.size[::-1] if orientation in QUARTER_TURNS else opened.size
    # The frames of a GIF come grey or in colour by what has changed in them.
    mode = "RGB" if opened.format == "GIF" else opened.mode
    check(name, conversion.shape_of(*upright, mode))
    if conversion.size:
        # JPEG decodes at an eighth to a half for less; twice what is asked for is left.
        edge = 2 * max(conversion.size)
        opened.draft(opened.mode, (edge, edge))
    if orientation != 1:
        ImageOps.exif_transpose(opened, in_place=True)
    seen = []
    picture = opened.convert("RGBA") if opened.format == "GIF" else opened
    if picture.mode in DEEP_MODES or conversion.pictures is not None:
        seen += ["of more than 8 bits a pixel"] if picture.mode in DEEP_MODES else []
        picture = _in_bytes(picture, name, conversion)
    if picture.has_transparency_data:
        seen.append(TRANSPARENT)
    return conversion.of_picture(picture), tuple(seen)


def _in_bytes(picture: Image.Image, name: str, conversion: Conversion) -> Image.Image:
    """Bring the values of a picture to 0..255: by its bits, or by the range that was laid down."""
    if picture.mode not in DEEP_MODES | {"L", "LA", "RGB", "RGBA"}:
        return picture  # a palette's numbers are no brightness
    if picture.mode in DEEP_MODES and picture.has_transparency_data:
        raise ValueError("16 bits with a transparent value; save it with 8 bits")
    values = np.asarray(picture)
    of = conversion.pictures or _declared_range(picture)
    of = for_type(of, values.dtype)
    alpha = picture.mode in {"LA", "RGBA"}
    colours = values[..., :-1] if alpha else values
    for fault in outside(colours[np.newaxis], of).values():
        raise BadImageError(name, f"{fault}.")
    pixels = to_bytes(colours, of)
    if alpha:
        pixels = np.concatenate([pixels, values[..., -1:]], axis=-1)
    return Image.fromarray(pixels)


def _declared_range(picture: Image.Image) -> Range:
    if picture.mode == "F":
        return UNIT
    # Pillow brings the 16 bits of PGM to their full range; PNG has no other.
    bits = _tag(picture, BITS, 16) if picture.format == "TIFF" else 16
    return Range(0, 2**bits - 1)


def _tag(picture: Image.Image, tag: int, default: int) -> int:
    """Return the first value of a TIFF's tag."""
    value = picture.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return int(value[0]) if isinstance(value, tuple) else int(value)


def _check_tiff(picture: Image.Image, conversion: Conversion) -> None:
    """Refuse what Pillow (seen with 13.0) reads wrong, and what has no range of its own."""
    bits, kind = _tag(picture, BITS, 1), _tag(picture, SAMPLE_FORMAT, UNSIGNED)
    if _tag(picture, PLANAR, 1) == 2 and bits > 8:
        raise ValueError(f"planes of colour of {bits} bits apart; save it with 8 bits a channel")
    if kind not in {UNSIGNED, FLOATING} and bits <= 8:
        raise ValueError("signed numbers of 8 bits; save it unsigned")
    if _tag(picture, PHOTOMETRIC, 1) == 0 and bits > 8:
        raise ValueError(f"0 stands for white in {bits} bits; save it with 0 for black")
    if kind == UNSIGNED and bits > 16:
        raise ValueError(f"integers of {bits} bits; save it with 16, or as .npy")
    if kind not in {UNSIGNED, FLOATING} and conversion.pictures is None:
        raise ValueError("signed numbers; say which are black and white: --range -1024..3071")


def _orientation(picture: Image.Image) -> int:
    """Read how the camera was held, only where the file may say: it costs as much as opening it."""
    if picture.format == "TIFF":
        turned = picture.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
        if turned and picture.tile[0].codec_name == "raw":  # type: ignore[attr-defined]
            # Pillow (seen with 13.0) reads its rows with the width that it has when upright.
            raise ValueError("an uncompressed TIFF that lies on its side; save it again upright")
        picture.load()  # which turns it
        return 1
    if picture.format == "PNG":
        picture.load()  # it may say so after its pixels
    if ORIENTED.isdisjoint(picture.info):
        return 1
    return picture.getexif().get(ORIENTATION, 1)


class Decoded(NamedTuple):
    """What became of some files: the images in the sound ones, and the faults of the others."""

    pixels: np.ndarray  # uint8, (count, height, width, channels)
    digests: np.ndarray  # of the pixels, uint8 (count, 32)
    pictures: list[Picture]  # of each image, by the name of its page
    faults: list[BadImageError]
    seen: Counter[str]  # how many images were what
    rest: Sequence[Picture]  # files that were not come to
    page: int  # of the first of those


class Pool(Protocol):
    """Decodes files, several tasks at a time.

    Attributes:
        tasks: how many are given to it before the first is waited for.
        is_here: whether it decodes on this machine, and opens the files itself.
    """

    tasks: int
    is_here: bool

    def start(self, decoder: Decoder, files: Sequence[Picture]) -> Callable[[], Decoded]:
        """Begin with some files; what is returned waits for their images, see `Decoder.some`."""

    def close(self) -> None:
        """Let go of what has not begun."""


@dataclass(frozen=True)
class Decoder:
    """Decodes files to images of one shape.

    Attributes:
        conversion, limits, check: as of `decode`. Once one file was sound, `check` must refuse
            those that come to another shape.
        allow_constant: whether an image may be of one colour.
        every_page: whether all pages of a file are images, or the first alone.
        of_any_shape: images need not be of one shape, and come one by one.
    """

    conversion: Conversion
    limits: Limits
    check: CheckShape
    allow_constant: bool = True
    every_page: bool = True
    of_any_shape: bool = False

    def run(
        self, pictures: Iterable[Picture], pool: Pool | None = None
    ) -> Generator[Decoded, None, None]:
        """Decode files in their order.

        Args:
            pictures: the files.
            pool: what decodes them; by default all cores here, where that is worth it.
        """
        # The first sound image fixes the shape of all, and says whether threads are worth it: it
        # has to be found before several are read at once.
        remaining = iter(pictures)
        for picture in remaining:
            first = self.some([picture], most=0)
            yield first
            if first.pictures:
                yield from self._whole(first)
                at_once = max(1, min(FILES_PER_TASK, BYTES_PER_BLOCK // first.pixels.nbytes))
                at_once = 1 if self.of_any_shape else at_once
                if pool is not None and not pool.is_here:
                    remaining = map(_with_content, remaining)
                tasks = _batched(remaining, at_once)
                if pool is not None:
                    some = self._by(pool, tasks)
                elif _pixels_in_file(picture) >= PIXELS_WORTH_A_THREAD:
                    some = self._on_all_cores(tasks)
                else:
                    some = map(self.some, tasks)
                for decoded in some:
                    yield decoded
                    yield from self._whole(decoded)

    def _on_all_cores(self, tasks: Iterator[list[Picture]]) -> Iterator[Decoded]:
        with closing(Threads()) as threads:
            yield from self._by(threads, tasks)

    def _by(self, pool: Pool, tasks: Iterator[list[Picture]]) -> Iterator[Decoded]:
        """Map tasks by a pool, a bounded number of them ahead of the reader."""
        starting = (pool.start(self, task) for task in tasks)
        running = deque(itertools.islice(starting, pool.tasks))
        while running:
            yield running.popleft()()
            running.extend(itertools.islice(starting, 1))

    def _whole(self, decoded: Decoded) -> Iterator[Decoded]:
        """Go on with a file of so many pages that they were not read at once."""
        while decoded.rest:
            decoded = self.some(decoded.rest, decoded.page)
            yield decoded

    def some(self, task: Sequence[Picture], page: int = 0, most: int = BYTES_PER_BLOCK) -> Decoded:
        """Decode files, of one with many pages no more than some megabytes beyond `most`."""
        images: list[np.ndarray] = []
        digests: list[bytes] = []
        sound: list[Picture] = []
        faults: list[BadImageError] = []
        seen: Counter[str] = Counter()
        how = (self.conversion, self.limits, self.check, self.every_page)
        room = 0 if self.of_any_shape else most
        for position, picture in enumerate(task):
            try:
                for found in decode_pages(picture, *how, page):
                    if isinstance(found.image, BadImageError):
                        faults.append(found.image)
                    elif not self.allow_constant and is_constant(found.image):
                        transparent = TRANSPARENT in found.seen
                        faults.append(constant_error(found.name, found.image, transparent))
                    else:
                        images.append(found.image)
                        # Taken here, the image is still in the processor's cache.
                        digests.append(pixel_digest(found.image))
                        sound.append(picture._replace(name=found.name))
                        seen.update(found.seen)
                        room -= found.image.nbytes
                    if room < 0 and not found.last:
                        rest, page = task[position:], found.number + 1
                        digest = as_digests(digests)
                        return Decoded(np.stack(images), digest, sound, faults, seen, rest, page)
            except BadImageError as error:
                faults.append(error)
            page = 0
        pixels = np.stack(images) if images else NOTHING
        return Decoded(pixels, as_digests(digests), sound, faults, seen, (), 0)


def _batched(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    """Yield lists of at most `size` files, and of some megabytes where they are in memory."""
    batch: list[Picture] = []
    held = 0
    for picture in pictures:
        batch.append(picture)
        held += len(picture.content or b"")
        if len(batch) == size or held >= BYTES_PER_BLOCK:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Threads:
    """A thread a core."""

    is_here = True

    def __init__(self) -> None:
        self.tasks = AHEAD * cores()
        self._pool = ThreadPoolExecutor(cores())

    def start(self, decoder: Decoder, files: Sequence[Picture]) -> Callable[[], Decoded]:
        """See `Pool`."""
        return self._pool.submit(decoder.some, files).result

    def close(self) -> None:
        """See `Pool`; the reader may have had enough."""
        self._pool.shutdown(cancel_futures=True)


def _with_content(picture: Picture) -> Picture:
    """Read a file for who cannot open it; one that cannot be read, or is large, stays as it is."""
    if picture.content is not None:
        return picture
    path = Path(picture.path or picture.name)
    try:
        if path.stat().st_size <= LARGEST_READ_AT_ONCE:
            return picture._replace(content=path.read_bytes())
    except (OSError, ValueError):  # it is opened again where its fault is said
        pass
    return picture


def _pixels_in_file(picture: Picture) -> int:
    """Read height times width from the header of a file that was sound a moment ago."""
    with _open(picture) as opened:
        return opened.width * opened.height
