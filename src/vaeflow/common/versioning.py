"""DVC as this project uses it: its commands, and whether `data/` is what `data.dvc` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vaeflow.common import processes
from vaeflow.common.workspace import Workspace
from vaeflow.errors import DataError, StageError, WorkspaceError


def dvc_command(*arguments: str) -> list[str]:
    """Return the command line of this environment's DVC."""
    return processes.python_command("dvc", *arguments)


def dvc_environment() -> dict[str, str]:
    """Return the environment for DVC: stages call `vaeflow` by name, which must be this one."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([here, os.environ.get("PATH", "")])}


def run_dvc(workspace: Workspace, *arguments: str) -> str:
    """Run a DVC command to its end and return what it printed.

    Raises:
        StageError: it failed; the message holds what it said.
    """
    done = subprocess.run(
        # Another DVC may be at work here, perhaps one that its caller left behind.
        dvc_command("--wait-for-lock", *arguments),
        cwd=workspace.root,
        env=dvc_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        command = " ".join(("dvc", *arguments))
        raise StageError(f"`{command}` failed in {workspace.root}:\n{done.stderr.strip()}")
    return done.stdout


def require_repository(workspace: Workspace) -> None:
    """Refuse a folder that DVC does not know.

    Raises:
        WorkspaceError: DVC was never set up there, or needs a git repository that is not there.
    """
    from configparser import ConfigParser

    if not (workspace.root / ".dvc").is_dir():
        raise WorkspaceError(f"{workspace.root} has no .dvc folder. Make it: git init && dvc init")
    config = ConfigParser(strict=False)
    for name in ("config", "config.local"):
        config.read(workspace.root / ".dvc" / name, encoding="utf-8")
    without_git = config.getboolean("core", "no_scm", fallback=False)
    inside = any((folder / ".git").exists() for folder in (workspace.root, *workspace.root.parents))
    if not inside and not without_git:
        raise WorkspaceError(
            f"{workspace.root} is in no git repository, and DVC needs one. Make it: git init; or "
            "do without (no commit is then recorded with a model): dvc config core.no_scm true"
        )


def require_data(workspace: Workspace) -> None:
    """Refuse to go on without images.

    Raises:
        DataError: `data/` is missing.
    """
    if workspace.data.exists():
        return
    if not workspace.data_pointer.is_file():
        raise DataError("there are no images yet. Add yours: vaeflow data add FOLDER")
    raise DataError("data/ is missing. Fetch the versioned images: dvc pull")


def data_is_versioned(workspace: Workspace) -> bool:
    """Return whether `data/` is exactly the version in `data.dvc`, and DVC's cache keeps it."""
    if not workspace.data.exists() or not workspace.data_pointer.is_file():
        return False
    return json.loads(run_dvc(workspace, "status", "--json", "data.dvc")) == {}


def is_import(workspace: Workspace) -> bool:
    """Return whether `data.dvc` follows a source elsewhere (`dvc import`, `dvc import-url`)."""
    return bool(_pointer(workspace).get("deps"))


def data_md5(workspace: Workspace) -> str | None:
    """Return the digest that stands for the data in `data.dvc`, or None without such a file.

    Raises:
        WorkspaceError: the file is damaged.
    """
    return _pointer(workspace).get("outs", [{}])[0].get("md5")


def _pointer(workspace: Workspace) -> dict[str, Any]:
    """Read `data.dvc`; return nothing where there is no such file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not workspace.data_pointer.is_file():
        return {}
    try:
        content = YAML(typ="safe", pure=True).load(workspace.data_pointer)
        content["outs"][0].get("md5")
    except (YAMLError, TypeError, KeyError, IndexError, AttributeError, UnicodeDecodeError):
        raise WorkspaceError(
            f"{workspace.data_pointer} is no DVC file (a merge that was not finished?). Choose one "
            "version of it: git checkout --ours data.dvc, or --theirs."
        ) from None
    return content
