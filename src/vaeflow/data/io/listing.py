"""List what there is to read in a source, and what its folders say of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vaeflow.data.io import archives, tables
from vaeflow.data.io.arrays import (
    CIFAR_NAME,
    SPLIT_OF,
    WORD,
    as_text,
    cifar_split,
)
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.rows import is_array, labels_path
from vaeflow.data.splits import OTHERS_BY_CONTENT
from vaeflow.errors import BadImageError, DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
    | {".heic", ".heif", ".pgm", ".ppm", ".pbm", ".pnm"}
)
EXPECTED = (
    "image files (PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, PGM/PPM, HEIC), .npy, .npz, IDX, HDF5, "
    ".mat, CIFAR's .bin, .zip, .tar, .parquet, .csv of pixels, or a .txt with a path a line"
)
STANDARD_INPUT = "-"
LIST_SUFFIX = ".txt"
LONGEST_LIST = 1 << 30  # bytes
PICKLED_BATCH = re.compile(r"(data_batch_\d+|test_batch)|.*\.(pkl|pickle)", re.IGNORECASE)
CONVERT_PICKLE = (
    "a pickle, which can run code, is never opened. Where you trust it, convert it: python -c "
    "\"import pickle, numpy as n; d = pickle.load(open('{0}', 'rb'), encoding='latin1'); "
    "n.savez('{0}.npz', images=d['data'].reshape(-1, 3, 32, 32), labels=d['labels'])\""
)
HIDDEN = re.compile(r"\.[^.]|__MACOSX$")  # what systems and editors keep beside a person's files


@dataclass
class Contents:
    """What there is to read in a source, each kind in the order of the paths."""

    root: Path
    arrays: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # a path object is four times as large
    from_list: bool = False

    def __bool__(self) -> bool:
        return bool(self.arrays or self.archives or self.tables or self.pictures)


def list_source(source: Path | str, reading: Reading) -> Contents:
    """List what there is to read in a source.

    Raises:
        DataError: it is missing, of an unknown kind, or holds no images.
    """
    path = Path(source)
    if source == STANDARD_INPUT:
        contents = _listed_paths(sys.stdin.buffer.read(LONGEST_LIST), Path(), reading)
        missing = "no images in the list on standard input"
    elif not path.exists():
        raise DataError(f"{as_text(str(path))} does not exist.")
    elif path.is_dir():
        contents = Contents(path)
        _list_folder(path, path.resolve(), reading, contents)
        missing = "no images in this folder"
    elif path.suffix.lower() == LIST_SUFFIX:
        contents = _listed_paths(path.read_bytes(), path.parent, reading)
        missing = "no images in this list"
    else:
        contents, missing = list_file(path, path.is_file(), reading)
    set_labels_apart(contents)
    if not contents:
        raise DataError(f"{as_text(str(source))}: {missing}; expected {EXPECTED}.")
    return contents


def list_file(path: Path, is_file: bool, reading: Reading) -> tuple[Contents, str]:
    """List a source that is one file; return what to say where it is none that can be read.

    Raises:
        BadImageError: it is a pickle.
    """
    contents = Contents(path.parent)
    if PICKLED_BATCH.fullmatch(path.name):
        raise BadImageError(path, CONVERT_PICKLE.format(path))
    if tables.is_table(path):
        contents.tables.append(path)
    else:
        sort_in(str(path), is_file, reading, contents)
    unknown = (
        'unknown kind of file (if Pillow reads it: python -c "from PIL import Image; '
        f"Image.open('{path}').save('{path.stem}.png')\")"
    )
    return contents, unknown


def set_labels_apart(contents: Contents) -> None:
    """Take the arrays out that hold the labels of others."""
    labels = {labels_path(path) for path in contents.arrays}
    contents.arrays = [path for path in contents.arrays if path not in labels]


def _listed_paths(content: bytes, folder: Path, reading: Reading) -> Contents:
    """Read a list of paths, one a line, from the folder it lies in."""
    contents = Contents(folder, from_list=True)
    for line in content.splitlines():
        if line.strip():
            path = folder / os.fsdecode(line)
            if b"://" in line and not path.exists():
                fault = (
                    "a URL, and a list here names files here. Give the URLs themselves as sources, "
                    "or the URL of a list that lies beside the files."
                )
                reading.on_bad(BadImageError(as_text(os.fsdecode(line)), fault))
            elif not path.exists():
                reading.on_bad(BadImageError(as_text(str(path)), "does not exist."))
            else:
                sort_in(str(path), path.is_file(), reading, contents)
    return contents


def _list_folder(folder: Path, root: Path, reading: Reading, contents: Contents) -> None:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        reading.on_bad(BadImageError(as_text(str(folder)), f"cannot be read ({error.strerror})."))
        return
    for entry in found:
        if HIDDEN.match(entry.name):
            reading.on_other(as_text(entry.path))
        elif entry.is_symlink() and not (
            reading.follow_links or _leads_inside(Path(entry.path), root)
        ):
            fault = "a link that leads out of the folder."
            reading.on_bad(BadImageError(as_text(entry.path), fault))
        elif entry.is_dir(follow_symlinks=False):
            _list_folder(Path(entry.path), root, reading, contents)
        else:
            sort_in(entry.path, entry.is_file(), reading, contents)


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # it leads in a circle
        return False


def sort_in(name: str, is_file: bool, reading: Reading, contents: Contents) -> None:
    """Put a file to those of its kind, or say that it is left alone, or cannot be used."""
    if is_picture(name) and is_file:  # soon decided: there may be a million
        contents.pictures.append(name)
        return
    path = Path(name)
    known = is_picture(name) or is_array(path) or archives.is_archive(path)
    if PICKLED_BATCH.fullmatch(path.name) and not path.suffix:
        reading.on_bad(BadImageError(as_text(name), CONVERT_PICKLE.format(path)))
    elif not known:
        reading.on_other(as_text(name))
    elif not is_file:  # a pipe, say, would never answer
        reading.on_bad(BadImageError(as_text(name), "not a file."))
    else:
        (contents.arrays if is_array(path) else contents.archives).append(path)


def is_picture(name: str) -> bool:
    """Return whether a name is that of an image file."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


class Folders:
    """What the folders of a source say of what lies in them."""

    def __init__(self, contents: Contents, reading: Reading) -> None:
        self._root = contents.root
        self._from_list = contents.from_list
        self._reading = reading
        files: list[Path | str] = [*contents.arrays, *contents.archives, *contents.pictures]
        paths = map(Path, files)
        self._present: set[str] = set()
        # The publisher's, by the names of files.
        self.published = {cifar_split(p) for p in contents.arrays if CIFAR_NAME.fullmatch(p.name)}
        if reading.splits == "folders":
            self._present = {s for path in paths if (s := _first_split(self._below(path)))}

    def _below(self, path: Path) -> PurePosixPath:
        if self._from_list and not path.is_relative_to(self._root):
            return PurePosixPath(path)
        return PurePosixPath(path.relative_to(self._root))

    def of(self, path: Path | str, name: str) -> tuple[str | None, str | None]:
        """Return label and split of a file; see `of_parts`."""
        if not (self._reading.label_folders or self._reading.splits == "folders"):
            return None, None
        return self.of_parts(self._below(Path(path)), name, self._present)

    def of_parts(
        self, path: PurePosixPath, name: str, present: set[str]
    ) -> tuple[str | None, str | None]:
        """Return label and split of what lies at a path below the source.

        Args:
            path: from the source on.
            name: for errors.
            present: splits that there are: those that are not come out of train.

        Raises:
            BadImageError: it does not lie in such folders.
        """
        parts, split = list(path.parts[:-1]), None
        if self._reading.splits == "folders":
            split = _first_split(path)
            if split is None:
                raise BadImageError(name, "lies in no folder train/, val/ or test/.")
            parts = parts[1:]
            split = or_others(split, present)
        if not self._reading.label_folders:
            return None, split
        if not parts:
            raise BadImageError(name, "lies in no subfolder that would be its label.")
        return (parts[-1] if self._from_list else parts[0]), split


def _first_split(path: PurePosixPath) -> str | None:
    """Return the split that the first part of a path names, as in train/ or test-00000.parquet."""
    word = WORD.match(path.parts[0]) if path.parts else None
    return SPLIT_OF.get(word[0].lower()) if word else None


def or_others(split: str, present: Iterable[str]) -> str | None:
    """Return what a given split comes to where some splits are not given: train provides them."""
    missing = {"validation", "test"} - set(present)
    if split != "train" or not missing:
        return split
    return OTHERS_BY_CONTENT[missing.pop()] if len(missing) == 1 else None


def archive_folders(path: Path, reading: Reading) -> tuple[str, set[str]]:
    """Return the folder that all images of an archive lie in, and the splits there are."""
    if not (reading.label_folders or reading.splits == "folders"):
        return "", set()
    firsts: set[str] = set()
    seconds: set[str | None] = set()
    splits: set[str] = set()
    shallow = False
    for member in archives.members(path, reading.limits):
        parts = PurePosixPath(member.name).parts
        if not member.fault and is_picture(member.name) and parts[0] != "__MACOSX":
            firsts.add(parts[0])
            shallow |= len(parts) < 3
            for place, found in ((parts, splits), (parts[1:], seconds)):
                if split := _first_split(PurePosixPath(*place)):
                    found.add(split)
    if len(firsts) == 1 and not shallow and not splits:
        return firsts.pop(), {split for split in seconds if split}
    return "", splits
