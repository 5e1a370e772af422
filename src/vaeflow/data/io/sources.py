"""Read images from wherever they lie: arrays, image files, folders of them, known data sets.

A known data set has a name; it is fetched from its publisher and compared with fixed digests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from vaeflow.common.files import cache_folder, sha256_of
from vaeflow.config.schema import Limits
from vaeflow.data.io.arrays import BYTES_PER_BLOCK, Rows, is_array, labels_path, open_array
from vaeflow.data.io.conversion import (
    Conversion,
    as_bytes,
    check_declared,
    constant,
    constant_error,
    out_of_range,
)
from vaeflow.data.io.decoding import decode_all
from vaeflow.data.splits import pixel_digests
from vaeflow.errors import BadImageError, DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
DIGITS = "digits"


class Images(NamedTuple):
    """Images of one shape, with a digest, a name and perhaps a label for each."""

    pixels: np.ndarray  # uint8, (count, height, width, channels)
    digests: np.ndarray  # SHA-256 of each image's pixels, uint8 (count, 32)
    names: Sequence[str]  # "path" for an image file, "path#index" for a row of an array
    labels: Sequence[str | None]


def refuse(error: BadImageError) -> NoReturn:
    """Raise the error of a bad file: nothing more is read."""
    raise error


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        conversion: what is made of each image.
        limits: of what headers may declare.
        key: which array of an `.npz`; may be left out when it holds one.
        shape: `(height, width, channels)` that all must have; by default, that of the first.
        shape_of: what has that shape, in errors.
        remedy: for an image of another shape, in errors.
        label_folders: whether the first folder below a source is the label of what lies in it.
        follow_links: whether links may lead out of the folder that is read.
        allow_constant: whether an image may be of one colour; nothing is learnt from one.
        on_bad: called with each file or row that cannot be used; unless it raises, the rest is
            read.
        on_other: called with each file of a folder that is no image, and is left alone.
    """

    conversion: Conversion = field(default_factory=Conversion)
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    shape: tuple[int, ...] | None = None
    shape_of: str = "what is there"
    remedy: str = "vaeflow data add SOURCE --size WIDTHxHEIGHT --channels 1|3"
    label_folders: bool = False
    follow_links: bool = True
    allow_constant: bool = True
    on_bad: Callable[[BadImageError], object] = refuse
    on_other: Callable[[Path], object] = lambda path: None


@dataclass
class Contents:
    """What there is to read in a source, each kind in the order of the paths."""

    arrays: list[Path] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # a path object is four times as large


def read_images(*sources: Path | str, reading: Reading | None = None) -> Images:
    """Read images of one shape from files and folders, all at once; see `image_blocks`."""
    return joined(list(image_blocks(*sources, reading=reading)))


def image_blocks(*sources: Path | str, reading: Reading | None = None) -> Iterator[Images]:
    """Read images of one shape from files and folders, some megabytes at a time.

    Args:
        sources: each an array (`.npy`; `.npz`; IDX, plain or gzipped), an image file, or a folder,
            which is read with its subfolders: arrays first, then image files.
        reading: how; by default the first bad file ends it.

    Raises:
        DataError: a source is missing, unreadable, empty, or of another shape than the first.
    """
    reading = reading or Reading()
    same = _SameShape(reading)
    for source in map(Path, sources):
        contents = _list(source, reading)
        for path in contents.arrays:
            yield from _array_blocks(source, path, reading, same)
        yield from _picture_blocks(source, contents.pictures, reading, same)


def count_images(*sources: Path | str, reading: Reading | None = None) -> int:
    """Count images by names and headers; the bad ones among them count too.

    Raises:
        DataError: a source is missing, of an unknown kind, or holds no images.
    """
    quiet = replace(reading or Reading(), on_bad=lambda _: None, on_other=lambda _: None)
    count = 0
    for source in map(Path, sources):
        contents = _list(source, quiet)
        count += len(contents.pictures)
        for path in contents.arrays:
            with suppress(BadImageError), open_array(path, quiet.key, quiet.limits) as array:
                count += array.shape[0]
    return count


def varied(images: Images, reading: Reading) -> Images:
    """Select the images that are not of one colour, unless those are allowed."""
    rows = set() if reading.allow_constant else set(constant(images.pixels).tolist())
    for row in sorted(rows):
        reading.on_bad(constant_error(images.names[row], images.pixels[row]))
    if not rows:
        return images
    return select(images, [row for row in range(len(images.pixels)) if row not in rows])


def _list(source: Path, reading: Reading) -> Contents:
    """List what there is to read in a source.

    Raises:
        DataError: it is missing, of an unknown kind, or holds no images.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    contents = Contents()
    if source.is_dir():
        _list_folder(source, source.resolve(), reading, contents)
        missing = "no images in this folder"
    elif not _is_text(source.name):
        raise _nameless(source)
    else:
        _sort_in(source, source.is_file(), reading, contents)
        missing = "unknown kind of file"
    if not contents.arrays and not contents.pictures:
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{source}: {missing}; expected .npy, .npz, IDX, or {expected}.")
    labels = {labels_path(path) for path in contents.arrays}
    contents.arrays = [path for path in contents.arrays if path not in labels]
    return contents


def _list_folder(folder: Path, root: Path, reading: Reading, contents: Contents) -> None:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        reading.on_bad(BadImageError(folder, f"cannot be read ({error.strerror})."))
        return
    for entry in found:
        path = Path(entry.path)
        if entry.name.startswith("."):  # what systems and editors keep beside a person's files
            reading.on_other(path)
        elif not _is_text(entry.name):
            reading.on_bad(_nameless(path))
        elif entry.is_symlink() and not (reading.follow_links or _leads_inside(path, root)):
            reading.on_bad(BadImageError(path, "a link that leads out of the folder."))
        elif entry.is_dir(follow_symlinks=False):
            _list_folder(path, root, reading, contents)
        else:
            _sort_in(path, entry.is_file(), reading, contents)


def _is_text(name: str) -> bool:
    """Return whether a file's name can be written into an index: Linux allows almost any bytes."""
    try:
        return min(name.encode()) >= 32
    except UnicodeEncodeError:
        return False


def _nameless(path: Path) -> BadImageError:
    return BadImageError(
        ascii(str(path)), "its name is not UTF-8, or holds control characters; rename it."
    )


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # it leads in a circle
        return False


def _sort_in(path: Path, is_file: bool, reading: Reading, contents: Contents) -> None:
    if not (is_picture(path) or is_array(path)):
        reading.on_other(path)
    elif not is_file:  # a pipe, say, would never answer
        reading.on_bad(BadImageError(path, "not a file."))
    elif is_picture(path):
        contents.pictures.append(str(path))
    else:
        contents.arrays.append(path)


def is_picture(path: Path) -> bool:
    """Return whether a name is that of an image file."""
    return path.suffix.lower() in IMAGE_SUFFIXES


class _SameShape:
    """Holds all images to one shape: the one given, else that of the first sound one."""

    def __init__(self, reading: Reading):
        self.first: Path | str = reading.shape_of
        self.shape = reading.shape
        self._remedy = reading.remedy

    def check(self, path: Path, shape: tuple[int, ...]) -> None:
        """Refuse a file of another `(height, width, channels)` than the first, naming both."""
        if self.shape not in {None, shape}:
            raise BadImageError(
                path,
                f"images of two shapes (height, width, channels): this is {shape}, "
                f"{self.first} is {self.shape}. Bring all to one: {self._remedy}",
            )

    def fix(self, path: Path, shape: tuple[int, ...]) -> None:
        """Remember the shape of a file that was read well, if it is the first."""
        if self.shape is None:
            self.first, self.shape = path, shape


def _array_blocks(source: Path, path: Path, reading: Reading, same: _SameShape) -> Iterator[Images]:
    sound = False
    try:
        _check_to_the_end(path, reading)
        with open_array(path, reading.key, reading.limits) as array:
            shape = check_declared(array.shape, array.dtype, str(path), reading.limits)
            same.check(path, reading.conversion.shape_of_array(path, shape[1:]))
            label = _folder_label(source, path, reading)
            with Rows(path, shape[0]) as rows:
                sound = True
                for block in array.blocks():
                    names, labels = rows.take(len(block))
                    labels = labels if label is None else [label] * len(block)
                    block = block.reshape(-1, *shape[1:])
                    images = _sound_rows(block, names, labels, reading)
                    if len(images.pixels):
                        same.fix(path, images.pixels.shape[1:])
                        yield images
    except BadImageError as error:
        if sound:
            raise
        reading.on_bad(error)


def _check_to_the_end(path: Path, reading: Reading) -> None:
    """Read a compressed array once in vain: damage shows late, and must not leave half of it.

    A plain one whose size is right is whole.
    """
    with open_array(path, reading.key, reading.limits) as array:
        check_declared(array.shape, array.dtype, str(path), reading.limits)
        for _ in array.blocks() if array.packed else ():
            pass


def _sound_rows(
    block: np.ndarray, names: Sequence[str], labels: Sequence[str | None], reading: Reading
) -> Images:
    """Convert the rows whose values are those of images."""
    if faults := out_of_range(block):
        for row, fault in faults.items():
            reading.on_bad(BadImageError(names[row], f"{fault}."))
        kept = [row for row in range(len(block)) if row not in faults]
        block = block[kept]
        names, labels = [names[row] for row in kept], [labels[row] for row in kept]
    pixels = reading.conversion.of_array(as_bytes(block))
    return varied(Images(pixels, pixel_digests(pixels), names, labels), reading)


def select(images: Images, rows: Sequence[int]) -> Images:
    """Select some of the images, by their indices."""
    return Images(
        images.pixels[rows],
        images.digests[rows],
        [images.names[row] for row in rows],
        [images.labels[row] for row in rows],
    )


def _picture_blocks(
    source: Path, paths: Sequence[str], reading: Reading, same: _SameShape
) -> Iterator[Images]:
    def labelled() -> Iterator[Path]:
        for path in map(Path, paths):
            try:
                _folder_label(source, path, reading)
            except BadImageError as error:
                reading.on_bad(error)
            else:
                yield path

    parts: list[Images] = []
    # Closed with the loop: files that were read ahead are then dropped.
    with closing(
        decode_all(
            labelled(),
            reading.conversion,
            reading.limits,
            same.check,
            reading.allow_constant,
        )
    ) as decoding:
        for decoded in decoding:
            for fault in decoded.faults:
                reading.on_bad(fault)
            if not decoded.paths:
                continue
            same.fix(decoded.paths[0], decoded.pixels.shape[1:])
            names = [str(path) for path in decoded.paths]
            labels = [_folder_label(source, path, reading) for path in decoded.paths]
            parts.append(Images(decoded.pixels, decoded.digests, names, labels))
            # Not if the next part would go beyond a block's size: joining copies.
            if sum(part.pixels.nbytes for part in (*parts, parts[-1])) > BYTES_PER_BLOCK:
                yield joined(parts)
                parts = []
    if parts:
        yield joined(parts)


def _folder_label(source: Path, path: Path, reading: Reading) -> str | None:
    if not reading.label_folders:
        return None
    folders = path.relative_to(source).parts[:-1]
    if not folders:
        raise BadImageError(path, "lies in no subfolder that would be its label.")
    return folders[0]


def joined(parts: Sequence[Images]) -> Images:
    """Join images of one shape, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.digests for part in parts]),
        [name for part in parts for name in part.names],
        [label for part in parts for label in part.labels],
    )


@dataclass(frozen=True)
class IdxSet:
    """A data set published as gzipped IDX files of images and labels.

    Attributes:
        address: the folder they are published in.
        sha256: digest by file name.
    """

    address: str
    sha256: dict[str, str]


def _set(address: str, *digests: str) -> IdxSet:
    return IdxSet(address, dict(zip(FILES, digests, strict=True)))


IDX_SETS = {
    # LeCun, Bottou, Bengio and Haffner 1998, whose page no longer serves the files; the Common
    # Visual Data Foundation does.
    "mnist": _set(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    # Xiao, Rasul and Vollgraf 2017
    "fashion-mnist": _set(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    # Clanuwat et al. 2018
    "kmnist": _set(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
}
COUNTS = {DIGITS: 1_797, **dict.fromkeys(IDX_SETS, 70_000)}
NAMES = tuple(COUNTS)


def known_blocks(
    name: str, reading: Reading, folder: Path | None = None, verify: bool = True
) -> Iterator[Images]:
    """Yield the images of a known data set, each named by its file and row.

    Args:
        name: one of `NAMES`.
        reading: how they are read.
        folder: where the files lie already; by default they are downloaded, once, into the cache.
        verify: whether a file that is not the published one, by its SHA-256, is refused.

    Raises:
        DataError: the files cannot be had, or are not the published ones.
    """
    if name == DIGITS:
        yield varied(_digits(reading), reading)
        return
    known = IDX_SETS[name]
    folder = _download(name, known) if folder is None else folder
    for file, expected in known.sha256.items():
        _check(folder / file, expected, verify)
    images = [folder / file for file in known.sha256 if "images" in file]
    for block in image_blocks(*images, reading=reading):
        yield block._replace(names=[Path(row).name for row in block.names])


def _digits(reading: Reading) -> Images:
    """Load the 1,797 digits of 8x8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998).

    The grey levels 0..16 become 0..255 by rounding, so each can be told from the others.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    names = [f"digits#{row}" for row in range(len(pixels))]
    pixels = reading.conversion.of_array(pixels)
    return Images(pixels, pixel_digests(pixels), names, digits.target.astype(str).tolist())


def _download(name: str, known: IdxSet) -> Path:
    import pooch
    from requests.exceptions import RequestException

    folder = cache_folder() / "datasets" / name
    try:
        for file, digest in known.sha256.items():
            pooch.retrieve(known.address + file, f"sha256:{digest}", file, folder)
    except (RequestException, OSError) as error:
        files = "\n".join(f"  {known.address}{file}" for file in known.sha256)
        raise DataError(
            f"{name} cannot be downloaded ({type(error).__name__}). Fetch these files where there "
            f"is a network, put them into one folder, and name it:\n{files}\n"
            f"  vaeflow data add {name} --from FOLDER"
        ) from None
    except ValueError as error:  # pooch's word for another digest
        raise DataError(f"{name}: a download is not the published file: {error}") from None
    return folder


def _check(path: Path, expected: str, verify: bool) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; expected {', '.join(FILES)} beside each other.")
    found = sha256_of(path.read_bytes())
    if found == expected:
        return
    message = f"{path} is not the published file: its SHA-256 is {found}, expected {expected}."
    if verify:
        raise DataError(f"{message} Fetch it again; or, if you trust it, give --unverified.")
    print(f"note: {message}")
