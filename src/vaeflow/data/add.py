"""Add images from outside as a new version of `data/`: whole, or not at all.

`data/` is a folder of parts. Each addition is one part, `data/NAME/`, with

- `images.npy`: uint8 `(count, height, width, channels)`;
- `index.csv`: a row an image, its `source`, its `label` (empty where it has none), where it is not
  the contents of all that decide, its `split`, and where it is a tile, the digest of its `picture`;
- `rules.json`: how the files were read, where that was not as image files mostly are;
- `rejected.csv`: `path` and `reason` of what could not be used, when there was any.

The new `data/` is made beside the present one, under `.dvc/tmp`, and takes its place by renaming;
then DVC versions it. What stood there before is kept until DVC is done: a command that is killed on
the way is undone by the next one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from vaeflow.common.files import atomic_file, write_json
from vaeflow.common.versioning import data_is_versioned, data_md5, run_dvc
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.io.arrays import ArrayWriter, as_text
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.decoding import Pool
from vaeflow.data.io.engines import open_pool
from vaeflow.data.io.known import NAMES, known_blocks
from vaeflow.data.io.listing import STANDARD_INPUT
from vaeflow.data.io.reading import Images, Reading, select
from vaeflow.data.io.remote import Remote, is_url, local
from vaeflow.data.io.rows import COLUMNS, IMAGES, INDEX, WITH_PICTURE, WITH_SPLIT
from vaeflow.data.io.rules import Rules
from vaeflow.data.io.sources import image_blocks, reach
from vaeflow.data.io.tiles import Tiling
from vaeflow.data.similar import Fingerprints, Joined, join_splits
from vaeflow.data.splits import ANOMALY, digest_keys
from vaeflow.data.survey import RULES, Report, Survey, data_blocks, reading_of
from vaeflow.errors import BadImageError, DataError, WorkspaceError

REJECTED = "rejected.csv"
PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PLACED = "placed.json"  # what was put at data/: sizes by path
CHOICES = {
    "labels": ("files", "folders"),
    "splits": ("published", "content", "folders"),
    "pages": ("all", "first"),
}


@dataclass(frozen=True)
class Addition:
    """What to add, and how.

    Attributes:
        source: what `image_blocks` reads, by a path or a URL, or a name of `NAMES`.
        name: of the part; by default, that of the source.
        conversion: what is made of each image.
        key: which array of several in a file, or which column.
        label_key: which array or column has the labels.
        layout: which axis of an array is which; see `vaeflow.data.io.rules`.
        row_shape: `(height, width, channels)` of images that are rows of numbers.
        pages: `all`, or `first`: what of a file with several is an image.
        tiling: how pictures are cut into the images; None: each is one.
        labels: `files` (as they come with arrays) or `folders`: the first folder below the source
            is the label of what lies in it.
        splits: `content`, `folders` (train, val, test: the first folder below the source), or
            `published`: by content, but for known sets and arrays that are named by their split.
        max_pixels: of one image; None: as `params.yaml` has it.
        copies: where the files of a known set lie already; by default they are downloaded.
        verify: whether those must be the published ones.
        append: keep what is in `data/`.
        drop_duplicates: leave out exact copies of earlier images.
        skip_bad: go on without what cannot be used; otherwise the first such file ends it.
        anomalies: these are known not to be as they should be: they are never trained on, are in
            no split, and what is in `data/` is kept.
    """

    source: str
    name: str | None = None
    conversion: Conversion = field(default_factory=Conversion)
    key: str | None = None
    label_key: str | None = None
    layout: str | None = None
    row_shape: tuple[int, int, int] | None = None
    pages: str = "all"
    tiling: Tiling | None = None
    labels: str = "files"
    splits: str = "published"
    max_pixels: int | None = None
    copies: Path | None = None
    verify: bool = True
    append: bool = False
    drop_duplicates: bool = False
    skip_bad: bool = False
    anomalies: bool = False
    engine: str = "local"
    address: str | None = None

    @property
    def keeps(self) -> bool:
        """Whether what is in `data/` stays."""
        return self.append or self.anomalies


@dataclass(frozen=True)
class Added:
    """What an addition came to.

    Attributes:
        part: the folder below `data/`.
        count: images in it.
        dropped: exact copies left out.
        report: on all of `data/` now; rejected and ignored are those of the source.
        understood: how the files were read.
        near: what its near-duplicates came to.
        before, after: the MD5 in `data.dvc`; `before` is None where there was none.
    """

    part: Path
    count: int
    dropped: int
    report: Report
    understood: list[str]
    near: Joined
    before: str | None
    after: str | None

    def lines(self) -> list[str]:
        """Report what a person wants to know of it, a fact a line."""
        lines = [f"data/{self.part.name}: {self.count:,} images added", *self.understood]
        if self.dropped:
            lines.append(f"exact copies left out: {self.dropped:,}")
        first, *rest = self.report.lines()
        lines += [f"data/ holds {first}", *rest]
        lines += self._near_duplicates()
        if self.report.rejected:
            lines.append(f"all rejected ones, with reasons: data/{self.part.name}/{REJECTED}")
        if self.before == self.after:
            return [*lines, f"data.dvc: unchanged, {self.after}"]
        return [*lines, f"data.dvc: {self.before or 'new'} -> {self.after} (git diff data.dvc)"]

    def _near_duplicates(self) -> list[str]:
        near = self.near
        if not (near.images or near.splits or near.straddling):
            return []
        facts = [f"near-duplicates of earlier images: {near.images:,}"]
        joined = len(near.splits) - near.left_out
        facts += [f"put into the split of those: {joined:,}"] if joined else []
        if near.left_out:
            facts.append(f"left out, for those are in two splits: {near.left_out:,}")
        if near.straddling:
            facts.append(f"kept in another split, as published: {near.straddling:,}")
        return ["; ".join(facts) + " (vaeflow data show --near-duplicates)"]


def add(workspace: Workspace, parameters: Prepare, addition: Addition) -> Added:
    """Add a source to `data/`, or replace `data/` by it, and version it with DVC.

    Raises:
        DataError: the source cannot be used, or `data/` holds images that are not versioned yet.
            `data/` and `data.dvc` are then as before.
    """
    _check_options(addition)
    reach(addition.source)
    if addition.max_pixels is not None:
        parameters = parameters.model_copy(update={"max_pixels": addition.max_pixels})
    before = data_md5(workspace)
    pool = open_pool(addition.engine, addition.address)
    with nullcontext() if pool is None else closing(pool), replacing_data(workspace) as fresh:
        _refuse_unversioned(workspace, addition.append)
        survey = Survey(parameters)
        seen: set[bytes] = set()
        with closing(Fingerprints(fresh.with_name("cells"))) as fingerprints:
            if addition.keeps and workspace.data.exists():
                link_tree(workspace.data, fresh)
                for block in data_blocks(workspace, parameters):
                    keys = digest_keys(block.digests).tolist() if addition.drop_duplicates else ()
                    seen.update(keys)
                    fingerprints.add(block, survey.add(block))
            report = Report(survey)
            part = _part_folder(fresh, addition)
            held = survey.count
            written = write_part(part, addition, parameters, report, fingerprints, seen, pool)
        survey.check_splits()
    return Added(
        workspace.data / part.name,
        survey.count - held,
        written.dropped,
        report,
        written.understood,
        written.near,
        before,
        data_md5(workspace),
    )


def _check_options(addition: Addition) -> None:
    if not addition.source:
        raise DataError("the source is empty; for the folder you are in, give '.'")
    if addition.copies is not None and addition.source not in NAMES:
        raise DataError(f"--from is for the known sets: {', '.join(NAMES)}.")
    if addition.tiling is not None and addition.source in NAMES:
        raise DataError(
            f"--tile is for pictures of your own, and {addition.source} is a known set."
        )
    for option, expected in CHOICES.items():
        if (value := getattr(addition, option)) not in expected:
            raise DataError(f"{option} is {value!r}; expected {' or '.join(expected)}.")
    if addition.name is not None and not PART_NAME.fullmatch(addition.name):
        raise DataError(
            f"name is {addition.name!r}; expected letters, digits, '.', '_' and '-', the first of "
            "them a letter or digit."
        )


def _refuse_unversioned(workspace: Workspace, append: bool) -> None:
    """Refuse to lose images: what is in `data/` must be a version that can be had again."""
    holds_any = workspace.data.exists() and any(workspace.data.iterdir())
    if holds_any and not data_is_versioned(workspace):
        raise DataError(
            "data/ holds images that no version stands for. Version them (dvc add data), go back "
            "to the versioned ones (dvc checkout --force data.dvc), or move data/ away."
        )
    if append and not workspace.data.exists() and workspace.data_pointer.is_file():
        raise DataError("data/ is missing. Fetch the images to add to: dvc pull")


def _part_folder(data: Path, addition: Addition) -> Path:
    """Return the new part's folder; a name that was not chosen gives way to one that is there."""
    if addition.name is not None:
        if (data / addition.name).exists():
            raise DataError(f"data/{addition.name} is there already; choose another --name.")
        return data / addition.name
    name = Remote(addition.source).name if is_url(addition.source) else local(addition.source)
    name = Path(name).absolute().name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "images"
    number = 1
    while (data / (folder := name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return data / folder


class Written(NamedTuple):
    """What writing a part came to; see `Added`."""

    dropped: int
    understood: list[str]
    near: Joined


def write_part(
    folder: Path,
    addition: Addition,
    parameters: Prepare,
    report: Report,
    fingerprints: Fingerprints,
    seen: set[bytes],
    pool: Pool | None = None,
) -> Written:
    """Write images, index and rules of a part, block by block.

    Args:
        folder: of the part, which is made.
        addition: what to write.
        parameters: limits, and how images are split.
        report: is filled; its survey has the images before.
        fingerprints: of the images before; are added to.
        seen: digests of the images before, where copies are left out.
        pool: what decodes image files; None: the cores of this machine.
    """
    reading = _reading_for(addition, parameters, report, pool)
    folder.mkdir()
    blocks, prefix = _blocks_of(addition, reading)
    held, dropped = report.survey.count, 0
    with closing(_PartWriter(folder, prefix, addition.tiling is not None)) as writer:
        for block in blocks:
            if addition.drop_duplicates:
                kept = _first_seen(block, seen)
                dropped += len(block.pixels) - len(kept)
                block = select(block, kept)
            if addition.anomalies:
                block = block._replace(splits=[ANOMALY] * len(block.pixels))
            if len(block.pixels):
                writer.add(block)
                fingerprints.add(block, report.survey.add(block))
    if not writer.count:
        raise _nothing_left(addition, report, dropped)
    if not addition.anomalies:
        _refuse_zero_and_one(addition, reading, report.survey)
    _refuse_both(report.survey, fingerprints.splits, held, writer.names)
    # A published test set is that of other people's papers, too. Tiles stay with their picture,
    # however like those of others they are, as a clear sky is.
    near = Joined({}, 0, 0, 0)
    if addition.tiling is None:
        near = join_splits(fingerprints, held, writer.splits, addition.splits == "published")
    if near.splits or writer.given:
        writer.write_splits({row - held: split for row, split in near.splits.items()})
        report.survey.move(fingerprints.splits, near.splits)
    if (rules := reading.rules()) != Rules():
        with atomic_file(folder / RULES) as fresh:
            fresh.write_text(rules.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if report.rejected:
        _write_rejected(folder / REJECTED, report.rejected, prefix)
    return Written(dropped, reading.seen.lines(), near)


def _reading_for(
    addition: Addition, parameters: Prepare, report: Report, pool: Pool | None
) -> Reading:
    return reading_of(
        parameters,
        on_bad=report.rejected.append if addition.skip_bad else _stop,
        on_other=report.ignored.append,
        conversion=addition.conversion,
        shape=report.survey.image_shape,
        key=addition.key,
        label_key=addition.label_key,
        layout=addition.layout,
        row_shape=addition.row_shape,
        every_page=addition.pages == "all",
        tiling=addition.tiling,
        label_folders=addition.labels == "folders",
        splits=addition.splits,
        follow_links=False,
        pool=pool,
    )


def _refuse_zero_and_one(addition: Addition, reading: Reading, survey: Survey) -> None:
    """Refuse image files of zeros and ones: masks, of which nobody would see anything."""
    is_array = bool(reading.seen.layouts)
    if survey.largest == 1 and not is_array and addition.conversion.pictures is None:
        raise DataError(
            f"{addition.source}: every value is 0 or 1, as in masks. To make them black and white: "
            "--range 0..1. To keep them as they are, nearly black: --range 0..255."
        )


def _refuse_both(survey: Survey, splits: Sequence[str], held: int, names: Sequence[str]) -> None:
    """Refuse an anomaly that is among the other images too; `names` are of those after `held`."""
    if not survey.anomalies:
        return
    odd = np.asarray(splits) == ANOMALY
    keys = survey.origins
    both = np.isin(keys, np.intersect1d(keys[odd], keys[~odd]))
    if both[held:].any():
        found = [names[row] for row in np.flatnonzero(both[held:]).tolist()]
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        raise DataError(
            f"{found[0]}{more}: an image that is both among the anomalies and among the others. "
            "Nothing was changed. Leave it out of one of them."
        )


class _PartWriter:
    """`images.npy` and `index.csv` of one part, block by block.

    Args:
        folder: of the part.
        prefix: what names of images begin with, and sources in the index do not.
        tiles: whether the images are tiles of pictures.

    Attributes:
        count: images written so far.
        given: whether any came with its split.
        splits: those.
        names: of the images.
    """

    def __init__(self, folder: Path, prefix: str, tiles: bool):
        self.count = 0
        self.given = False
        self.splits: list[str | None] = []
        self.names: list[str] = []
        self._prefix = prefix
        self._tiles = tiles
        self._path = folder / IMAGES
        self._images: ArrayWriter | None = None
        self._index = (folder / INDEX).open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._index, lineterminator="\n")
        self._rows.writerow(WITH_PICTURE if tiles else COLUMNS)

    def add(self, block: Images) -> None:
        """Write one or more images."""
        self._images = self._images or ArrayWriter(self._path, block.pixels.shape[1:])
        self._images.write(block.pixels)
        self.names += block.names
        columns = [[name.removeprefix(self._prefix) for name in block.names], block.labels]
        if self._tiles:
            columns += [block.splits, [origin.tobytes().hex() for origin in block.origins]]
        self._rows.writerows(zip(*columns, strict=True))
        self.splits += block.splits
        self.given |= any(block.splits)
        self.count += len(block.pixels)

    def write_splits(self, changed: dict[int, str]) -> None:
        """Write the index again with the split of each image: as it came, or as it was changed."""
        if self._tiles:
            return  # they have it already, and keep it
        self._index.close()
        path = Path(self._index.name)
        with (
            path.open(newline="", encoding="utf-8") as old,
            atomic_file(path) as fresh,
            fresh.open("w", newline="", encoding="utf-8") as new,
        ):
            rows = csv.reader(old)
            next(rows)
            writer = csv.writer(new, lineterminator="\n")
            writer.writerow(WITH_SPLIT)
            for number, (row, split) in enumerate(zip(rows, self.splits, strict=True)):
                writer.writerow([*row, changed.get(number, split)])

    def close(self) -> None:
        """Finish both files."""
        self._index.close()
        if self._images:
            self._images.close()


def _stop(error: BadImageError) -> NoReturn:
    remedy = "Nothing was changed; with --skip-bad the rest is added."
    raise BadImageError(error.name, f"{error.reason} {remedy}")


def _blocks_of(addition: Addition, reading: Reading) -> tuple[Iterator[Images], str]:
    """Return the images of a source, and what their names begin with."""
    if addition.source in NAMES:
        blocks = known_blocks(addition.source, reading, addition.copies, addition.verify)
        return blocks, ""
    if addition.source == STANDARD_INPUT:
        return image_blocks(STANDARD_INPUT, reading=reading), ""
    if is_url(addition.source):
        prefix = f"{Remote(addition.source).shown}/"
        return image_blocks(addition.source, reading=reading), prefix
    source = Path(local(addition.source))
    if not source.exists():
        known = ", ".join(NAMES)
        raise DataError(f"{source} does not exist, and no known set has this name ({known}).")
    folder = source if source.is_dir() else source.parent
    prefix = "" if folder == Path() else f"{as_text(str(folder))}{os.sep}"
    return image_blocks(source, reading=reading), prefix


def _first_seen(images: Images, seen: set[bytes]) -> list[int]:
    """Return the rows whose digest is not in `seen`, and add their digests to it."""
    kept = []
    for row, key in enumerate(digest_keys(images.digests).tolist()):
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def _nothing_left(addition: Addition, report: Report, dropped: int) -> DataError:
    if dropped:
        return DataError(f"{addition.source}: all images in it are in data/ already.")
    reasons = "\n".join(report.lines()[1:])
    return DataError(f"{addition.source}: no images in it that can be used.\n{reasons}".strip())


def _write_rejected(path: Path, rejected: Iterable[BadImageError], prefix: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "reason"])
        rows.writerows((error.name.removeprefix(prefix), error.reason) for error in rejected)


@contextmanager
def replacing_data(workspace: Workspace) -> Iterator[Path]:
    """Yield an empty folder that becomes `data/`, and a version, when the block ends well."""
    from filelock import FileLock, Timeout

    folders = (folder / ".dvc" for folder in (workspace.root, *workspace.root.parents))
    dvc_folder = next((folder for folder in folders if folder.is_dir()), None)
    if dvc_folder is None:
        raise WorkspaceError(f"{workspace.root} is not under DVC. Make it so: git init; dvc init")
    if workspace.data.is_symlink():
        raise DataError("data/ is a link, which a folder would replace: put the folder here.")
    scratch = dvc_folder / "tmp" / "vaeflow-data"
    scratch.parent.mkdir(exist_ok=True)
    try:
        with FileLock(scratch.with_suffix(".lock"), timeout=0):
            _clean_up(workspace, scratch)
            try:
                fresh = scratch / "new"
                fresh.mkdir(parents=True)
                yield fresh
                _swap(workspace, scratch)
                run_dvc(workspace, "add", "--quiet", "data")
                # Deleting takes its time: half of what was there must not be taken for all of it.
                (scratch / "old").rename(scratch / "done")
            finally:
                _clean_up(workspace, scratch)
    except Timeout:
        raise DataError("another vaeflow command is changing data/; try again later.") from None
    except OSError as error:
        raise DataError(f"data/ cannot be written: {error}. It is as it was.") from None


def _swap(workspace: Workspace, scratch: Path) -> None:
    """Put `new` in the place of `data/`, which is kept as `old`; an empty `old` is none."""
    write_json(scratch / PLACED, _sizes(scratch / "new"))
    if workspace.data.exists():
        workspace.data.rename(scratch / "old")
    else:
        (scratch / "old").mkdir()
    (scratch / "new").rename(workspace.data)


def _clean_up(workspace: Workspace, scratch: Path) -> None:
    """Undo a replacement that DVC did not version, now or in a command that was killed.

    Raises:
        DataError: somebody has changed `data/` since.
    """
    old = scratch / "old"
    if old.exists() and not data_is_versioned(workspace):
        if workspace.data.exists():
            if _sizes(workspace.data) != json.loads((scratch / PLACED).read_text()):
                raise DataError(
                    "a command that was changing data/ was killed, and files in data/ were changed "
                    "since. Keep them (dvc add data) or go back to the versioned images "
                    "(dvc checkout --force data.dvc)."
                )
            # Renamed first: half a folder must never stand at data/.
            workspace.data.rename(scratch / "undone")
        if any(old.iterdir()):
            old.rename(workspace.data)
        print("data/ is as it was: a command that was changing it did not come to its end")
    shutil.rmtree(scratch, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file, by its path."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder by hard links where the file system has them."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
