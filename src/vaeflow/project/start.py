"""Making a project: its files, the images if there are any, and a first commit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from vaeflow.common.code import package_version
from vaeflow.common.files import atomic_file
from vaeflow.config.schema import Export
from vaeflow.errors import VaeflowError, WorkspaceError
from vaeflow.project.template import (
    ORIGINALS,
    RECORD,
    WHEELS,
    Answers,
    Origin,
    render,
    write_record,
)

MESSAGE = "A project made by vaeflow init"


class Made(NamedTuple):
    """A project that was made.

    Attributes:
        folder: where.
        files: how many.
        commit: the one that has them, shortened.
        without_ci: whether the files for GitHub and GitLab were left out.
    """

    folder: Path
    files: int
    commit: str
    without_ci: bool


def make_project(folder: Path, origin: Origin, add: Callable[[], None] | None = None) -> Made:
    """Make a project in a folder, which need not exist, and commit it.

    Nothing that is there is overwritten, and nothing is written where something stands in the way.

    Args:
        folder: absolute; its name is the model's.
        origin: where the project gets this package from.
        add: adds the images, once the rest is there.

    Raises:
        WorkspaceError: the name is no model's, files of these names are there, the folder lies in
            a DVC project, or git is missing or cannot commit.
        VaeflowError: of `add`; the project is there then, and committed, without images.
    """
    try:
        Export(name=folder.name)
    except ValidationError:
        raise WorkspaceError(
            f"{folder.name!r} cannot name a model: letters, digits, and - _ . after the first."
        ) from None
    top = _require_git(folder)
    _require_no_other_project(folder)
    answers = Answers(
        model=folder.name,
        version=package_version(),
        package=origin.requirement,
        wheel=origin.wheel.name if origin.wheel else None,
        ci=top in (None, folder.resolve()),
    )
    files = render(answers)
    written = [*files, str(RECORD), str(ORIGINALS)]
    if answers.wheel:
        written.append(f"{WHEELS}/{answers.wheel}")
    with_images = [*written, "data.dvc"] if add else written
    _require_free(folder, with_images)
    if top:
        _require_not_ignored(top, folder, with_images)

    _write(folder, files, origin, answers)
    if top is None:
        git(folder, "init", "--quiet", "--initial-branch=main")
    try:
        if add:
            add()
    except VaeflowError as error:
        _commit(folder, written)
        raise type(error)(
            f"{error}\n{folder} is made, but has no images yet; there: vaeflow data add SOURCE"
        ) from None
    return Made(folder, len(written), _commit(folder, with_images), not answers.ci)


def _write(folder: Path, files: dict[str, bytes], origin: Origin, answers: Answers) -> None:
    try:
        for path, content in files.items():
            with atomic_file(folder / path) as fresh:
                fresh.write_bytes(content)
        origin.put_wheel(folder)
        write_record(folder, answers, files)
    except OSError as error:
        raise WorkspaceError(f"{folder} cannot be written: {error}.") from None


def _require_git(folder: Path) -> Path | None:
    """Return the root of the repository that a folder lies in, None for no repository.

    Raises:
        WorkspaceError: there is no git, or it does not know who commits.
    """
    if not shutil.which("git"):
        raise WorkspaceError("there is no git here, and a project needs it: apt install git")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise WorkspaceError(f"{there} is a file, and no folder can be made there.")
    if _git(there, "var", "GIT_COMMITTER_IDENT").returncode:
        raise WorkspaceError(
            "git does not know who you are, and a project begins with a commit: git config "
            '--global user.name "Your Name" && git config --global user.email you@example.com'
        )
    found = _git(there, "rev-parse", "--show-toplevel")
    return Path(found.stdout.strip()) if found.returncode == 0 else None


def _require_no_other_project(folder: Path) -> None:
    if (folder / RECORD).exists():
        raise WorkspaceError(
            f"{folder} is a project already. Bring it what a newer vaeflow has changed: "
            "vaeflow init --update"
        )
    for place in (folder, *folder.parents):
        if (place / ".dvc").is_dir():
            raise WorkspaceError(
                f"{folder} lies in the DVC project {place}, which would take its stages for its "
                "own. Choose a folder outside of it."
            )


def _require_free(folder: Path, paths: Iterable[str]) -> None:
    """Refuse where files of these names, or what cannot be a folder of them, are there."""
    taken = sorted({str(first) for path in paths if (first := _first_taken(folder, path))})
    if taken:
        raise WorkspaceError(
            f"{folder} has files of the same names, and nothing is overwritten: {', '.join(taken)}."
            " Move them away, or choose another folder."
        )


def _require_not_ignored(top: Path, folder: Path, paths: Iterable[str]) -> None:
    """Refuse where the repository that the folder lies in would not keep the files."""
    ignored = _git(top, "check-ignore", "--", *(str(folder / path) for path in paths)).stdout
    if ignored:
        names = ", ".join(str(Path(line).relative_to(folder)) for line in ignored.splitlines())
        raise WorkspaceError(
            f"the repository {top} ignores what a project has to keep: {names}. Change its "
            ".gitignore, or choose another folder."
        )


def _first_taken(folder: Path, path: str) -> Path | None:
    place = folder / path
    if place.exists() or place.is_symlink():
        return Path(path)
    for parent in Path(path).parents:
        if (folder / parent).exists() and not (folder / parent).is_dir():
            return parent
    return None


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, and return what it printed.

    Raises:
        WorkspaceError: it failed.
    """
    done = _git(folder, *arguments)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise WorkspaceError(f"`git {arguments[0]}` failed in {folder}:\n{said}")
    return done.stdout.strip()


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def _commit(folder: Path, paths: list[str]) -> str:
    """Commit these files and no others, whatever else is staged; return the commit, shortened.

    Raises:
        WorkspaceError: git does not take them.
    """
    try:
        git(folder, "add", "--", *paths)
        git(folder, "commit", "--quiet", "--message", MESSAGE, "--", *paths)
    except WorkspaceError as error:
        raise WorkspaceError(
            f"{error}\n{folder} is made, but not committed; there: git commit"
        ) from None
    return git(folder, "rev-parse", "--short", "HEAD")
