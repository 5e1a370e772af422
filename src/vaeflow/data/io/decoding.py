"""Decoding image files, several at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vaeflow.common.processes import cores
from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import BYTES_PER_BLOCK
from vaeflow.data.io.conversion import Conversion, check_declared, constant, constant_error
from vaeflow.data.splits import as_digests, pixel_digest
from vaeflow.errors import BadImageError

# JPEG stands for MPO too, several of them in one file: the first is taken.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"})
ORIENTATION = 0x0112  # Exif 2.32, section 4.6.4: 1 is upright
QUARTER_TURNS = frozenset({5, 6, 7, 8})
# Where Pillow keeps what may hold one: EXIF proper, EXIF as old PNG files have it, XMP.
ORIENTED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
FILES_PER_TASK = 64
AHEAD = 8  # tasks a thread that may wait for the reader, who writes and is held up now and then
# Pillow decodes outside Python's lock. Below this height times width what it does inside counts
# for more, and a second thread only gets in the way.
PIXELS_WORTH_A_THREAD = 48 * 48

NOTHING = np.empty((0, 0, 0, 0), np.uint8)

# Called with a file and the shape its pixels will have; refuses it with a BadImageError.
CheckShape = Callable[[Path, tuple[int, int, int]], None]


def decode(
    path: Path,
    conversion: Conversion,
    limits: Limits,
    check: CheckShape,
    stream: BinaryIO | None = None,
) -> np.ndarray:
    """Read one image file; a photograph is turned upright as its EXIF data say.

    Args:
        path: of the file; only its name in errors where there is a `stream`.
        conversion: what is made of it.
        limits: what its header may declare.
        check: may refuse the shape its pixels will have.
        stream: its bytes, where they are not in a file.

    Returns:
        uint8, `(height, width, channels)`.

    Raises:
        BadImageError: it is unreadable, beyond the limits, or refused by `check`.
    """
    try:
        with Image.open(stream or path, formats=FORMATS) as picture:
            # From the header, before anything is decoded.
            if picture.mode not in EIGHT_BIT_MODES:
                raise ValueError(f"pixel mode {picture.mode}; expected 8-bit grey or colour")
            check_declared((1, *picture.size[::-1]), np.dtype(np.uint8), str(path), limits)
            orientation = _orientation(picture)
            upright = picture.size[::-1] if orientation in QUARTER_TURNS else picture.size
            check(path, conversion.shape_of(*upright, picture.mode))
            if conversion.size:
                # JPEG decodes at an eighth to a half for less; twice what is asked for is left.
                edge = 2 * max(conversion.size)
                picture.draft(picture.mode, (edge, edge))
            if orientation != 1:
                ImageOps.exif_transpose(picture, in_place=True)
            return conversion.of_picture(picture)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(path, "not a readable image (of no known format).") from None
    except Exception as error:  # whatever a damaged file makes of Pillow's decoders
        raise BadImageError(path, f"not a readable image ({error}).") from None


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
    paths: list[Path]
    faults: list[BadImageError]


def decode_all(
    paths: Iterable[Path],
    conversion: Conversion,
    limits: Limits,
    check: CheckShape,
    allow_constant: bool = True,
) -> Generator[Decoded, None, None]:
    """Decode files in their order, on all cores where that is worth it; see `decode`.

    Images of one colour are faults unless `allow_constant`. Once one file was sound, `check` must
    refuse those that come to another shape.
    """

    def run(task: list[Path]) -> Decoded:
        pixels = NOTHING
        digests: list[bytes] = []
        sound: list[Path] = []
        faults: list[BadImageError] = []
        for path in task:
            try:
                image = decode(path, conversion, limits, check)
                if not allow_constant and len(constant(image[np.newaxis])):
                    raise constant_error(path, image)
            except BadImageError as error:
                faults.append(error)
                continue
            if not sound:
                pixels = np.empty((len(task), *image.shape), np.uint8)
            # Taken here, the image is still in the processor's cache.
            digests.append(pixel_digest(image))
            pixels[len(sound)] = image
            sound.append(path)
        return Decoded(pixels[: len(sound)], as_digests(digests), sound, faults)

    # The first sound file fixes the shape of all, and says whether threads are worth it: it has to
    # be found before several are read at once.
    remaining = iter(paths)
    for path in remaining:
        first = run([path])
        yield first
        if first.paths:
            at_once = max(1, min(FILES_PER_TASK, BYTES_PER_BLOCK // first.pixels.nbytes))
            tasks = _batched(remaining, at_once)
            worth_it = _pixels_in_file(path) >= PIXELS_WORTH_A_THREAD
            yield from _on_all_cores(run, tasks) if worth_it else map(run, tasks)


def _batched(paths: Iterator[Path], size: int) -> Iterator[list[Path]]:
    while batch := list(itertools.islice(paths, size)):
        yield batch


def _on_all_cores(
    run: Callable[..., Any], tasks: Iterator[list[Path]]
) -> Generator[Decoded, None, None]:
    """Map tasks on all cores, a bounded number of them ahead of the reader."""
    workers = cores()
    with ThreadPoolExecutor(workers) as pool:
        running = deque(pool.submit(run, task) for task in itertools.islice(tasks, AHEAD * workers))
        try:
            while running:
                yield running.popleft().result()
                running.extend(pool.submit(run, task) for task in itertools.islice(tasks, 1))
        finally:  # the reader may have had enough
            pool.shutdown(cancel_futures=True)


def _pixels_in_file(path: Path) -> int:
    """Read height times width from the header of a file that was sound a moment ago."""
    with Image.open(path) as picture:
        return picture.width * picture.height
