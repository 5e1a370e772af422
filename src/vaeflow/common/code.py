"""Which part of this package makes an output: DVC watches it, and kept work carries its digest.

A change of the model's code makes a training out of date, and a checkpoint of the code before is
not gone on with; a change of the server does not.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

from vaeflow.common.files import sha256_of
from vaeflow.common.workspace import Workspace
from vaeflow.errors import WorkspaceError

# Files and folders of the package. `dvc.yaml` has those of the stages among their `deps`.
PREPARE = ("config/schema.py", "data")
TRAIN = ("config/auto.py", "config/model.py", "config/schema.py", "data", "model", "training")
EVALUATE = ("bundle", "config/model.py", "config/schema.py", "data", "evaluation", "model")
EXPORT = ("bundle", "config/model.py", "config/schema.py", "data", "model")
REPORT = ("bundle", "data", "model/likelihoods.py", "report")
SCORE = ("bundle", "data", "model/likelihoods.py", "scoring")

PACKAGE = Path(__file__).parents[1]
# Where the deps of `dvc.yaml` look for the package.
IN_WORKSPACE = Path("src") / "vaeflow"
# Networks of the user's own, which DVC watches too.
OWN_NETWORKS = Path("src") / "networks"


@cache
def digest(parts: tuple[str, ...], package: Path = PACKAGE) -> str:
    """Return one digest of the source in some parts of the package."""
    files = []
    for part in parts:
        path = package / part
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    contents = (f"{path.relative_to(package)}\n".encode() + path.read_bytes() for path in files)
    return sha256_of(b"\0".join(contents))


def link(workspace: Workspace) -> None:
    """Let DVC find the package in a workspace whose stages watch it, and which has no source of it.

    `src/vaeflow` becomes a link to where the package is installed, so that another version of it
    makes outputs out of date. `src/networks`, which is watched too, is made if it is missing.
    (A project of `vaeflow init` watches its `requirements.txt` instead, and needs no link.)
    """
    own = workspace.root / OWN_NETWORKS
    if not own.exists():
        own.mkdir(parents=True)
        (own / "__init__.py").touch()
    place = workspace.root / IN_WORKSPACE
    stages = (workspace.root / "dvc.yaml").read_text(encoding="utf-8", errors="replace")
    if place.exists() or str(IN_WORKSPACE) not in stages:
        return
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)  # a link to an environment that is gone
    place.symlink_to(PACKAGE)


def own_networks() -> Path | None:
    """Return the folder of the networks of one's own; None outside of a workspace."""
    try:
        return Workspace.find().root / OWN_NETWORKS
    except WorkspaceError:
        return None


def package_version() -> str:
    """Return the version of this package, `unknown` where its code was copied, not installed."""
    try:
        return metadata.version("vaeflow")
    except metadata.PackageNotFoundError:
        return "unknown"
