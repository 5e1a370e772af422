"""Read images from wherever they lie: files, folders, URLs, archives, tables, lists of paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from vaeflow.data.io import archives, tables
from vaeflow.data.io.arrays import (
    BYTES_PER_BLOCK,
    ArrayFile,
    as_text,
)
from vaeflow.data.io.conversion import (
    check_shape,
    check_type,
)
from vaeflow.data.io.decoding import Decoded, Decoder, Picture
from vaeflow.data.io.listing import (
    CONVERT_PICKLE,
    HIDDEN,
    PICKLED_BATCH,
    Contents,
    Folders,
    archive_folders,
    is_picture,
    list_source,
    or_others,
)
from vaeflow.data.io.reading import Images, Reading, joined, varied
from vaeflow.data.io.remote import Remote, is_url, local
from vaeflow.data.io.rows import Row, Rows, is_part, open_arrays
from vaeflow.data.io.rules import (
    BYTE,
    CHANNELS,
    Arrangement,
    Range,
    RangeFinder,
    Shape,
    arrange,
    find_layout,
    outside,
    to_bytes,
)
from vaeflow.data.io.tiles import Place, Tiling
from vaeflow.data.splits import pixel_digests
from vaeflow.errors import BadImageError, DataError


def read_images(*sources: Path | str, reading: Reading | None = None) -> Images:
    """Read images of one shape from files and folders, all at once; see `image_blocks`."""
    return joined(list(image_blocks(*sources, reading=reading)))


def image_blocks(*sources: Path | str, reading: Reading | None = None) -> Iterator[Images]:
    """Read images of one shape from files and folders, some megabytes at a time.

    Args:
        sources: each an array, an image file, an archive or table of them, a CSV file of pixels, a
            text file with a path a line (`-`: standard input), or a folder, which is read with its
            subfolders: arrays first, then archives, then image files. Or the URL of any of these.
        reading: how; by default the first bad file ends it.

    Raises:
        DataError: a source is missing, unreadable, empty, or of another shape than the first.
    """
    reading = reading or Reading()
    same = _SameShape(reading)
    for source in map(local, sources):
        if is_url(source):
            yield from _remote_blocks(str(source), reading, same)
        else:
            yield from _source_blocks(list_source(source, reading), reading, same)


def _source_blocks(
    contents: Contents, reading: Reading, same: _SameShape, remote: Remote | None = None
) -> Iterator[Images]:
    """Read the contents of a source, which are here, or are fetched when their turn has come."""
    facts = Folders(contents, reading)
    yield from _merged(_cut(_array_blocks(contents.arrays, reading, same, facts), reading))
    for path in contents.tables:
        with remote.file(path) if remote else nullcontext():
            yield from _merged(_cut(_table_blocks(path, reading, same), reading))
    for path in contents.archives:
        pictures = _packed(path, reading, facts, remote)
        yield from _merged(_cut(_picture_blocks(pictures, reading, same), reading))
    pictures = _on_disk(contents.pictures, reading, facts)
    if remote:
        pictures = remote.read(pictures, reading)
    yield from _merged(_cut(_picture_blocks(pictures, reading, same), reading))


def _remote_blocks(url: str, reading: Reading, same: _SameShape) -> Iterator[Images]:
    """Read a source on an object store or a web server, and name all by its URL."""
    with Remote(url) as remote, remote.clear_names():
        reading = _named_by(remote, reading)
        contents = remote.contents(reading)
        remote.fetch_arrays(contents, reading)
        for images in _source_blocks(contents, reading, same, remote):
            yield images._replace(names=[remote.named(name) for name in images.names])
        same.first = remote.named(same.first)


def _named_by(remote: Remote, reading: Reading) -> Reading:
    def on_bad(error: BadImageError) -> None:
        reading.on_bad(BadImageError(remote.named(error.name), remote.named(error.reason)))

    return replace(
        reading, on_bad=on_bad, on_other=lambda name: reading.on_other(remote.named(name))
    )


def reach(*sources: Path | str) -> None:
    """Refuse URLs that cannot be read, before anything slow is begun.

    Raises:
        DataError: one names nothing, or cannot be reached or may not be read.
    """
    for source in map(local, sources):
        if is_url(source):
            Remote(str(source))


def count_images(*sources: Path | str, reading: Reading | None = None) -> int:
    """Count images by names and headers; the bad ones among them count too.

    Returns:
        How many there are at the least: what a tar archive, a CSV file, or an array or archive at a
        URL holds is known when it was read.

    Raises:
        DataError: a source is missing, of an unknown kind, or holds no images.
    """
    quiet = replace(reading or Reading(), on_bad=lambda _: None, on_other=lambda _: None)
    count = 0
    for source in map(local, sources):
        if is_url(source):  # only names: nothing is fetched twice
            with Remote(str(source)) as remote, remote.clear_names():
                count += len(remote.contents(quiet).pictures)
            continue
        contents = list_source(source, quiet)
        count += len(contents.pictures)
        for _, paths in groupby(contents.arrays, lambda path: path.parent):
            common = _Common(list(paths), quiet)
            count += sum(common.count(path) for path in common.paths)
        for path in contents.archives:
            with suppress(BadImageError):
                count += archives.count_pictures(path, is_picture)
    return count


class _SameShape:
    """Holds all images to one shape: the one given, else that of the first sound one.

    Pictures that are cut into tiles may have any size; it is their tiles that are held to it.
    """

    def __init__(self, reading: Reading):
        self.first: str = reading.shape_of
        self.shape = reading.shape
        self._remedy = reading.remedy
        self._tiling = reading.tiling

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a file of another `(height, width, channels)` than the first, naming both."""
        if self._tiling is not None:
            shape = self._tiling.shape_of(name, shape)
        if self.shape not in {None, shape}:
            raise BadImageError(
                name,
                f"images of two shapes (height, width, channels): this is {shape}, "
                f"{self.first} is {self.shape}. Bring all to one: {self._remedy}",
            )

    def fix(self, name: str, shape: tuple[int, ...]) -> None:
        """Remember the shape of a file that was read well, if it is the first."""
        if self._tiling is not None:
            shape = self._tiling.shape_of(name, shape)
        if self.shape is None:
            self.first, self.shape = name, shape


# === Arrays ===


def _open(path: Path, reading: Reading) -> AbstractContextManager[list[ArrayFile]]:
    return open_arrays(path, reading.key, reading.limits, reading.label_key)


class _Common:
    """What the arrays of one folder have in common: whether each is one image, and their ranges.

    Args:
        paths: of the folder's arrays.
        reading: how they are read.
    """

    def __init__(self, paths: list[Path], reading: Reading) -> None:
        self.paths = paths
        self._reading = reading
        self._finders: dict[np.dtype, RangeFinder] = {}
        shapes = [s for s in map(self._shape, paths) if s] if len(paths) > 1 else []
        self._among_equals = len(shapes) > 1 and (
            len(set(shapes)) == 1
            or (len({shape[0] for shape in shapes}) == 1 and {len(s) for s in shapes} == {3})
        )
        if self._among_equals:
            for path in paths:
                self._look(path)

    def _shape(self, path: Path) -> Shape | None:
        if is_part(path):
            return None
        with suppress(DataError), _open(path, self._reading) as arrays:
            return arrays[0].shape if len(arrays) == 1 else None
        return None

    def _look(self, path: Path) -> None:
        """Find the range of one-image arrays in all of them: one may be black by chance."""
        with suppress(DataError), _open(path, self._reading) as arrays:
            for array in arrays:
                if self._reading.conversion.range_of_array(array.dtype) is not None:
                    continue
                if array.dtype.kind in "biuf" and self.arrangement(array).one_image:
                    finder = self._finders.setdefault(array.dtype, RangeFinder(array.dtype))
                    if not finder.sure:
                        finder.add(array.whole()[np.newaxis])

    def count(self, path: Path) -> int:
        """Return how many images a file has by its header; 0 where it cannot be read."""
        with suppress(DataError), _open(path, self._reading) as arrays:
            return sum(self.arrangement(array).shape[0] for array in arrays)
        return 0

    def arrangement(self, array: ArrayFile) -> Arrangement:
        """Name the axes of an array.

        Raises:
            BadImageError: they cannot be known.
        """
        reading, shape = self._reading, array.shape
        if is_part(array.path):
            layout: str | None = "NHWC"
        elif array.layout is not None:
            layout = array.layout
        elif len(shape) == 2 and reading.row_shape is not None:
            return rows_of_numbers(array.name, shape, reading)
        elif reading.layout is not None and len(shape) == len(reading.layout):
            layout = reading.layout
        else:
            like = None if reading.conversion.size else reading.shape
            usual = reading.usual_layout and arrange(shape, reading.usual_layout)
            if usual and like in {None, usual.shape[1:]}:
                return usual
            layout = find_layout(shape, self._among_equals, like)
        arrangement = None if layout is None else arrange(shape, layout)
        if arrangement is None:
            raise BadImageError(
                array.name,
                f"an array of shape {shape}, of which it is not known which axis is which. Name "
                "them: --layout, such as NHWC (images, height, width, channels), NCHW, HWCN, NHW, "
                "HWN, CHW or HW; for images that are rows of numbers, --pixels HEIGHTxWIDTH.",
            )
        return arrangement

    def range(self, array: ArrayFile, arrangement: Arrangement) -> Range:
        """Return which numbers of an array are black and white.

        Reads it where they have to be found out, and where damage would show late: it must not
        leave half of it.

        Raises:
            BadImageError: it cannot be known, or the array is damaged.
        """
        if is_part(array.path):
            return BYTE
        laid_down = self._reading.conversion.range_of_array(array.dtype)
        finder = RangeFinder(array.dtype)
        if laid_down is None and arrangement.one_image and array.dtype in self._finders:
            finder = self._finders[array.dtype]
        elif array.packed or laid_down is None:
            for block in _blocks(array, arrangement):
                if laid_down is None:
                    finder.add(block)
                if finder.sure and not array.packed:
                    break
        try:
            return laid_down or finder.find()
        except DataError as error:
            raise BadImageError(array.name, str(error)) from None


def rows_of_numbers(name: str, shape: Shape, reading: Reading) -> Arrangement:
    """Return the arrangement of images that are rows of numbers, `(count, pixels)`.

    Raises:
        BadImageError: it is not known how a row becomes an image.
    """
    count, pixels = shape
    height = width = round(pixels**0.5)
    channels = 1
    if reading.row_shape is not None:
        height, width, channels = reading.row_shape
    if height * width * channels != pixels:
        raise BadImageError(
            name,
            f"rows of {pixels} numbers, of which it is not known what images they are. Say so: "
            "--pixels HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS, and --layout NCHW where all of a "
            "channel comes before the next; --layout HW where the whole array is one image.",
        )
    layout = reading.layout if reading.layout and len(reading.layout) == 4 else "NHWC"
    return Arrangement(layout, (count, height, width, channels))


def unfold(block: np.ndarray, arrangement: Arrangement) -> np.ndarray:
    """Bring a block of an array to `(count, height, width, channels)`."""
    if block.ndim == 2 and not arrangement.one_image:
        _, height, width, channels = arrangement.shape
        sizes = {"N": len(block), "H": height, "W": width, "C": channels}
        block = block.reshape([sizes[axis] for axis in arrangement.layout])
    return arrangement.to_nhwc(block)


def _blocks(array: ArrayFile, arrangement: Arrangement) -> Iterator[np.ndarray]:
    if arrangement.one_image:
        yield unfold(array.whole(), arrangement)
        return
    axis = 0 if len(array.shape) == 2 else arrangement.layout.index("N")
    for block in array.blocks(axis):
        yield unfold(block, arrangement)


def _array_blocks(
    paths: list[Path], reading: Reading, same: _SameShape, facts: Folders
) -> Iterator[Images]:
    for _, group in groupby(paths, lambda path: path.parent):
        common = _Common(list(group), reading)
        for path in common.paths:
            sound = False
            try:
                ranges = _checked(path, reading, same, common)
                facts.of(path, str(path))
                sound = True
                yield from _file_blocks(path, reading, same, common, ranges, facts)
            except BadImageError as error:
                if sound:
                    raise
                reading.on_bad(error)


def _checked(path: Path, reading: Reading, same: _SameShape, common: _Common) -> list[Range]:
    """Check the headers of a file's arrays, and return their ranges."""
    ranges = []
    with _open(path, reading) as arrays:
        for array in arrays:
            check_type(array.dtype, array.name)
            arrangement = common.arrangement(array)
            shape = check_shape(arrangement.shape, array.name, reading.limits)
            same.check(array.name, _shape_of_array(path, shape, reading))
            with Rows(array, None if arrangement.one_image else shape[0]):
                pass  # labels that do not fit
            ranges.append(common.range(array, arrangement))
    return ranges


def _shape_of_array(path: Path, shape: Shape, reading: Reading) -> Shape:
    height, width, channels = shape[1:]
    if is_part(path) and channels == CHANNELS[-1]:  # they were kept as they are
        return (height, width, channels)
    return reading.conversion.shape_of_array(path, (height, width, channels))


def _file_blocks(
    path: Path,
    reading: Reading,
    same: _SameShape,
    common: _Common,
    ranges: Sequence[Range],
    facts: Folders,
) -> Iterator[Images]:
    label, split = facts.of(path, str(path))
    ours = is_part(path)
    with _open(path, reading) as arrays:
        present = {array.split for array in arrays if array.split} | facts.published
        for array, of in zip(arrays, ranges, strict=True):
            given = split
            if given is None and array.split and reading.splits == "published":
                given = or_others(array.split, present)
            arrangement = common.arrangement(array)
            if array.unread_labels is not None:
                note = f"without labels, for {array.unread_labels} has several an image"
                reading.seen.notes[note] += arrangement.shape[0]
            # What `add` wrote is taken as it is.
            raw = ours and arrangement.shape[3] == CHANNELS[-1]
            with Rows(array, None if arrangement.one_image else arrangement.shape[0]) as rows:
                for block in _blocks(array, arrangement):
                    row = rows.take(len(block))
                    if label is not None:
                        row = row._replace(labels=[label] * len(block))
                    if given is not None:
                        row = row._replace(splits=[given] * len(block))
                    images = _sound_rows(block, row, of, reading, raw)
                    if len(images.pixels):
                        same.fix(array.name, images.pixels.shape[1:])
                        if not ours:
                            reading.seen.add(arrangement, array.dtype, of, len(images.pixels))
                        yield images


def _sound_rows(
    block: np.ndarray, row: Row, of: Range, reading: Reading, raw: bool = False
) -> Images:
    """Convert the rows whose values are those of images."""
    names, labels, splits, origins = row
    if faults := outside(block, of):
        for index, fault in faults.items():
            reading.on_bad(BadImageError(names[index], f"{fault}."))
        kept = [index for index in range(len(block)) if index not in faults]
        block = block[kept]
        names = [names[index] for index in kept]
        labels = [labels[index] for index in kept]
        splits = [splits[index] for index in kept]
    pixels = to_bytes(block, of)
    pixels = pixels if raw else reading.conversion.of_array(pixels)
    pixels = np.ascontiguousarray(pixels)
    digests = pixel_digests(pixels)
    if origins is not None:  # in a picture, a tile of one colour is as good as another
        return Images(pixels, digests, names, labels, splits, origins)
    return varied(Images(pixels, digests, names, labels, splits, digests), reading)


def _table_blocks(path: Path, reading: Reading, same: _SameShape) -> Iterator[Images]:
    """Read a CSV file of pixels, twice where its range has to be found out."""
    of = _range_of_table(path, reading)
    first = 0
    for block in tables.table_blocks(path, reading.label_key):
        arrangement = rows_of_numbers(str(path), block.pixels.shape, reading)
        shape = check_shape(arrangement.shape, str(path), reading.limits)
        same.check(str(path), _shape_of_array(path, shape, reading))
        names = [f"{as_text(str(path))}#{first + row}" for row in range(len(block.pixels))]
        first += len(names)
        rows = Row(names, block.labels, [None] * len(names))
        images = _sound_rows(unfold(block.pixels, arrangement), rows, of, reading)
        if len(images.pixels):
            same.fix(str(path), images.pixels.shape[1:])
            reading.seen.add(arrangement, np.dtype(np.int64), of, len(images.pixels))
            yield images


def _range_of_table(path: Path, reading: Reading) -> Range:
    if laid_down := reading.conversion.integers or reading.conversion.floats:
        return laid_down
    integers, floats = RangeFinder(np.dtype(np.int64)), RangeFinder(np.dtype(np.float64))
    whole = True
    for block in tables.table_blocks(path, reading.label_key):
        whole = whole and bool((block.pixels == np.rint(block.pixels)).all())
        integers.add(block.pixels)
        floats.add(block.pixels)
    try:
        return (integers if whole else floats).find()
    except DataError as error:
        raise BadImageError(path, str(error)) from None


# === Image files ===


def _on_disk(paths: Sequence[str], reading: Reading, facts: Folders) -> Iterator[Picture]:
    for text in paths:
        name = as_text(text)
        try:
            label, split = facts.of(text, name)
        except BadImageError as error:
            reading.on_bad(error)
        else:
            yield Picture(name, None, text, label, split)


def _packed(
    path: Path, reading: Reading, facts: Folders, remote: Remote | None = None
) -> Iterator[Picture]:
    """Yield the image files of an archive or a table; a damaged one to where it is whole."""
    try:
        with remote.file(path) if remote else nullcontext():
            yield from _members(path, reading, facts)
    except BadImageError as error:
        reading.on_bad(error)


def _members(path: Path, reading: Reading, facts: Folders) -> Iterator[Picture]:
    label, split = None, None
    if path.suffix.lower() == ".parquet":
        label, split = facts.of(path, str(path))
        keys = (reading.key, reading.label_key)
        for picture in archives.table_pictures(path, *keys, reading.limits, reading.on_bad):
            yield picture._replace(label=picture.label or label, split=split)
        return
    prefix = f"{as_text(str(path))}/"
    root, present = archive_folders(path, reading)
    for member in archives.members(path, reading.limits):
        parts = member.name.split("/")
        name = prefix + as_text(member.name)
        if any(HIDDEN.match(part) for part in parts):
            reading.on_other(name)
        elif member.fault:
            reading.on_bad(BadImageError(name, member.fault))
        elif not is_picture(parts[-1]):
            if PICKLED_BATCH.fullmatch(parts[-1]):
                reading.on_bad(BadImageError(name, CONVERT_PICKLE.format(parts[-1])))
            else:
                reading.on_other(name)
        else:
            try:
                if reading.label_folders or reading.splits == "folders":
                    below = PurePosixPath(member.name).relative_to(root)
                    label, split = facts.of_parts(below, name, present)
                content = _read_member(member, name)
            except BadImageError as error:
                reading.on_bad(error)
            else:
                yield Picture(name, content, None, label, split)


def _read_member(member: archives.Member, name: str) -> bytes:
    try:
        return member.read()
    except BadImageError:
        raise
    except Exception as error:  # whatever a damaged archive makes of the parsers
        raise BadImageError(name, f"damaged in its archive ({error}).") from None


def _picture_blocks(
    pictures: Iterator[Picture], reading: Reading, same: _SameShape
) -> Iterator[Images]:
    decoder = Decoder(
        reading.conversion,
        reading.limits,
        same.check,
        reading.allow_constant,
        reading.every_page,
        of_any_shape=reading.tiling is not None,
    )
    # Closed with the loop: files that were read ahead are then dropped.
    with closing(decoder.run(pictures, reading.pool)) as decoding:
        for decoded in decoding:
            for fault in decoded.faults:
                reading.on_bad(fault)
            reading.seen.pictures.update(decoded.seen)
            if decoded.pictures:
                same.fix(decoded.pictures[0].name, decoded.pixels.shape[1:])
                yield _images_of(decoded)


def _images_of(decoded: Decoded) -> Images:
    pictures = decoded.pictures
    return Images(
        decoded.pixels,
        decoded.digests,
        [picture.name for picture in pictures],
        [picture.label for picture in pictures],
        [picture.split for picture in pictures],
        decoded.digests,
    )


# === Blocks ===


def _cut(blocks: Iterator[Images], reading: Reading) -> Iterator[Images]:
    """Cut pictures into tiles, where these are asked for, and count the pictures."""
    if reading.tiling is None:
        yield from blocks
        return
    for block in blocks:
        reading.seen.notes[f"pictures cut into {reading.tiling}"] += len(block.pixels)
        for row in range(len(block.pixels)):
            yield from _rows_of_tiles(block, row, reading.tiling)


def _rows_of_tiles(pictures: Images, number: int, tiling: Tiling) -> Iterator[Images]:
    """Yield the tiles of one of the pictures, a row of tiles at a time."""
    picture, name = pictures.pixels[number], pictures.names[number]
    lefts = tiling.starts(picture.shape[1])
    count = len(lefts)
    for top in tiling.starts(picture.shape[0]):
        tiles = tiling.row(picture, top)
        yield Images(
            tiles,
            pixel_digests(tiles),
            [str(Place(name, top, left)) for left in lefts],
            [pictures.labels[number]] * count,
            [pictures.splits[number]] * count,
            np.repeat(pictures.origins[number : number + 1], count, axis=0),
        )


def _merged(blocks: Iterator[Images]) -> Iterator[Images]:
    """Join small blocks to some of a few megabytes."""
    parts: list[Images] = []
    held = 0
    for block in blocks:
        # Not beyond a block's size: joining copies.
        if parts and held + block.pixels.nbytes > BYTES_PER_BLOCK:
            yield joined(parts)
            parts, held = [], 0
        parts.append(block)
        held += block.pixels.nbytes
    if parts:
        yield joined(parts)
