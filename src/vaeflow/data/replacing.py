"""Putting another `data/` in the place of the present one: whole, and versioned, or not at all.

The new `data/` is made beside the present one, under `.dvc/tmp`, and takes its place by renaming;
then DVC versions it. What stood there before is kept until DVC is done: a command that is killed on
the way is undone by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vaeflow.errors import DataError, WorkspaceError
from vaeflow.files import write_json
from vaeflow.versioning import data_is_versioned, dvc
from vaeflow.workspace import Workspace

PLACED = "placed.json"  # what was put at data/: sizes by path


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
                dvc(workspace, "add", "--quiet", "data")
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
    """Undo a replacement that DVC did not come to version, now or in a command that was killed.

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
    """Bytes of every file, by its path."""
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
