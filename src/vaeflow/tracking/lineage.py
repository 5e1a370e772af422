"""What made a model: code, data and parameters."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

from vaeflow.common.versioning import data_md5
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Parameters
from vaeflow.data.splits import SplitRule, given_splits

PACKAGES = ("vaeflow", "tensorflow", "keras", "numpy", "mlflow", "dvc", "prefect")
# In a model's tags by digests of their own; the first runs of new images and parameters, and those
# with parameters of their own, come before a commit of these.
RECORDED = (":!dvc.lock", ":!params.yaml", ":!data.dvc")
UNKNOWN = "unknown"
# By which rule images were split: see `vaeflow.data.splits.SplitRule`.
SPLIT_TAG = "split"


def collect_lineage(workspace: Workspace, parameters: Parameters) -> dict[str, str]:
    """Collect tags that lead back from a model to what it was made of.

    Returns:
        `git_commit`, `git_dirty` (`true` when a tracked file differs from the commit, other than
        those that are recorded by digests of their own: `params.yaml`, `data.dvc`, `dvc.lock`),
        `data_md5` (of `data.dvc`), `parameters_sha256`, `split` (by which rule; see
        `vaeflow.data.splits`), and `version_PACKAGE` for each package that matters. What cannot be
        known is `unknown`.
    """
    commit = _git(workspace, "rev-parse", "HEAD")
    changes = _git(workspace, "status", "--porcelain", "-uno", "--", ".", *RECORDED)
    return {
        "git_commit": commit or UNKNOWN,
        "git_dirty": UNKNOWN if changes is None else str(bool(changes)).lower(),
        "data_md5": data_md5(workspace) or UNKNOWN,
        "parameters_sha256": parameters.sha256(),
        SPLIT_TAG: str(SplitRule.of(parameters.prepare, given_splits(workspace.prepared).values())),
        **{f"version_{name}": _version(name) for name in PACKAGES},
    }


def stage_hashes(workspace: Workspace) -> dict[str, str]:
    """Read what DVC's lock records of each stage's output: `dvc_STAGE`, its digest."""
    from ruamel.yaml import YAML

    path = workspace.root / "dvc.lock"
    if not path.is_file():
        return {}
    stages = YAML(typ="safe", pure=True).load(path).get("stages", {})
    return {
        f"dvc_{name}": output["md5"]
        for name, stage in stages.items()
        for output in stage.get("outs", [])[:1]
    }


def _git(workspace: Workspace, *arguments: str) -> str | None:
    """Return the output of a git command, or None where there is no git, repository or commit."""
    try:
        done = subprocess.run(
            ["git", "-C", workspace.code, *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN
