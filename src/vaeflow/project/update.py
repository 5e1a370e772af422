"""Bringing a project's files to a newer template, keeping what people changed.

Three versions of each file are compared: as it was made, as it is, and as it is made now. Where
only one side changed it, that one is taken; where both did, git merges them line by line.
"""

from __future__ import annotations

import difflib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vaeflow.common.code import package_version
from vaeflow.common.files import atomic_file
from vaeflow.common.workspace import Workspace
from vaeflow.errors import WorkspaceError
from vaeflow.project.start import git
from vaeflow.project.template import (
    WHEELS,
    Answers,
    Origin,
    read_record,
    render,
    write_record,
)

KEPT, NEW, UPDATED, MERGED, CONFLICT, REMOVED = (
    "kept",
    "new",
    "updated",
    "merged",
    "conflict",
    "removed",
)


class Change(NamedTuple):
    """What becomes of a file.

    Attributes:
        path: of the file, in the project.
        kind: `new`, `updated` (nobody had changed it), `merged`, `conflict` (both changed the same
            lines, and both are in it now, marked), `removed`, or `kept`.
        before: its content; None where there is none.
        after: what it becomes; None for none.
        remark: for people.
    """

    path: str
    kind: str
    before: bytes | None
    after: bytes | None
    remark: str = ""

    def line(self) -> str:
        """Say it in a line."""
        return f"{self.kind:<10} {self.path}{f': {self.remark}' if self.remark else ''}"

    def diff(self) -> Iterator[str]:
        """Show it as a patch, line by line."""
        return difflib.unified_diff(
            _lines(self.before),
            _lines(self.after),
            f"a/{self.path}" if self.before is not None else "/dev/null",
            f"b/{self.path}" if self.after is not None else "/dev/null",
            lineterm="",
        )


def _lines(content: bytes | None) -> list[str]:
    return (content or b"").decode("utf-8", "replace").splitlines()


class Update(NamedTuple):
    """An update of a project, found but not yet made."""

    project: Path
    before: Answers
    after: Answers
    origin: Origin
    originals: dict[str, bytes]
    changes: list[Change]

    def apply(self) -> None:
        """Make the changes; git can show them and take them back.

        Raises:
            WorkspaceError: files that would change have changes that are not committed.
        """
        changed = [change for change in self.changes if change.kind != KEPT]
        paths = [change.path for change in changed if change.before is not None]
        if paths and (open_changes := git(self.project, "status", "--porcelain", "--", *paths)):
            raise WorkspaceError(
                "what would be updated has changes that are not committed, and could not be told "
                f"from the update then; commit them first:\n{open_changes}"
            )
        for change in changed:
            place = self.project / change.path
            if change.after is None:
                place.unlink()
                continue
            with atomic_file(place) as fresh:
                fresh.write_bytes(change.after)
        self.origin.put_wheel(self.project)
        if self.before.wheel and self.before.wheel != self.after.wheel:
            (self.project / WHEELS / self.before.wheel).unlink(missing_ok=True)
        write_record(self.project, self.after, self.originals)


def find_update(origin: Origin) -> Update:
    """Compare the project that the working folder lies in with the template of this version.

    Args:
        origin: where the project gets this package from now.

    Raises:
        WorkspaceError: there is no project here, or it was not made by `vaeflow init`.
    """
    project = Workspace.find().root
    before, originals = read_record(project)
    after = before.model_copy(
        update={
            "version": package_version(),
            "package": origin.requirement,
            "wheel": origin.wheel.name if origin.wheel else None,
        }
    )
    fresh = render(after)
    changes = [
        change
        for path in sorted({*originals, *fresh})
        if (change := _compare(project, path, originals.get(path), fresh.get(path), after.version))
    ]
    return Update(project, before, after, origin, fresh, changes)


def _compare(
    project: Path, path: str, original: bytes | None, fresh: bytes | None, version: str
) -> Change | None:
    """Find out what becomes of one file; None where nothing has to."""
    place = project / path
    present = place.read_bytes() if place.is_file() else None
    if fresh in (original, present):
        return None
    if fresh is None:
        if present is None:
            return None
        if present == original:
            return Change(path, REMOVED, present, None)
        return Change(path, KEPT, present, present, "no longer made, but you changed it")
    if original is None:
        if present is None:
            return Change(path, NEW, None, fresh)
        return Change(path, KEPT, present, present, "yours; a file of this name is made now")
    if present is None:
        return Change(path, KEPT, None, None, "you removed it")
    if present == original:
        return Change(path, UPDATED, present, fresh)
    merged, conflicts = _merge(present, original, fresh, version)
    if conflicts:
        return Change(path, CONFLICT, present, merged, f"{conflicts} marked with <<<<<<<")
    return Change(path, MERGED, present, merged, "your changes are kept")


def _merge(present: bytes, original: bytes, fresh: bytes, version: str) -> tuple[bytes, int]:
    """Merge two changes of a file; return it, and in how many places they contradict."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("present", "original", "fresh")]
        for path, content in zip(paths, (present, original, fresh), strict=True):
            path.write_bytes(content)
        labels = ["-L", "yours", "-L", "as it was made", "-L", f"vaeflow {version}"]
        done = subprocess.run(
            ["git", "merge-file", "--stdout", *labels, *map(str, paths)], capture_output=True
        )
    if not 0 <= done.returncode < 128:
        raise WorkspaceError(f"git cannot merge it: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout, done.returncode
