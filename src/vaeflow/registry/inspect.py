"""List the registry's models, and trace one back to the code, data and parameters that made it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.bundle.manifest import bundle_sha256, read_verified
from vaeflow.common.versioning import run_dvc
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Parameters, load_parameters
from vaeflow.data.splits import SplitRule
from vaeflow.errors import RegistryError, VaeflowError, WorkspaceError
from vaeflow.registry.gate import BOUND
from vaeflow.registry.lock import SUFFIX
from vaeflow.registry.versions import BUNDLE_PATH, SCHEME, SHA256_TAG, Address
from vaeflow.tracking.lineage import SPLIT_TAG, UNKNOWN
from vaeflow.tracking.runs import (
    all_pages,
    connect,
    find_run,
    is_local,
    local_folder,
    registry_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


COLUMNS = ("version", "aliases", "bound", "data", "commit", "age", "verdict")
SHORT = 8
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def table(name: str | None) -> list[str]:
    """List every version of a model, or of all, the newest first.

    Args:
        name: of the model.

    Returns:
        Lines: the importance-weighted bound is in nats per test image; data and commit are the
        first digits of the MD5 in `data.dvc` and of the git commit (`+`: with changes to it).

    Raises:
        RegistryError: the registry cannot be reached, or has no such model.
    """
    client = connect()
    with registry_errors(client.tracking_uri):
        models = all_pages(client.search_registered_models, f"name = '{name}'" if name else None)
        models = [model for model in models if not model.name.endswith(SUFFIX)]
        if name and not models:
            raise RegistryError(
                f"{name}: no such model in {client.tracking_uri}. All: vaeflow models"
            )
        lines = []
        for model in models:
            aliases: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                aliases.setdefault(str(number), []).append(f"@{alias}")
            versions = all_pages(client.search_model_versions, f"name = '{model.name}'")
            versions = sorted(versions, key=lambda version: -int(version.version))
            rows = [_row(version, aliases.get(str(version.version), [])) for version in versions]
            lines += [model.name, *_align([COLUMNS, *rows]), ""]
    return lines[:-1] or ["no model is registered yet. Make one: vaeflow retrain"]


def age_of(version: ModelVersion) -> str:
    """Say how long ago a version was registered, in the largest unit that fits."""
    seconds = max(0, time.time() - version.creation_timestamp / 1000)
    unit, size = next(((u, s) for u, s in UNITS if seconds >= s), UNITS[-1])
    return f"{int(seconds // size)} {unit}"


def _row(version: ModelVersion, aliases: list[str]) -> tuple[str, ...]:
    tags = version.tags
    bound = f"{float(tags[BOUND]):.3f}" if BOUND in tags else "-"
    changed = "+" * (tags.get("git_dirty") == "true")
    return (
        str(version.version),
        " ".join(sorted(aliases)) or "-",
        bound,
        tags.get("data_md5", "-")[:SHORT],
        tags.get("git_commit", "-")[:SHORT] + changed,
        age_of(version),
        _verdict(tags),
    )


def _verdict(tags: dict[str, str]) -> str:
    checks = {k.removeprefix("gate."): v for k, v in tags.items() if k.startswith("gate.")}
    refused = [name for name, text in checks.items() if text.startswith("refused")]
    if "rolled_back" in tags:
        return "rolled back"
    if refused:
        return f"refused: {', '.join(refused)}"
    return "passed" if checks else "-"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


class Link(NamedTuple):
    """One thing that a model came from: what, which, and whether it is there."""

    what: str
    which: str
    state: str


def trace(source: str) -> list[Link]:
    """Walk from a registered version, or a bundle's folder, to what it was made of.

    Args:
        source: an address in the registry, or a folder.

    Raises:
        BundleError: the folder is no bundle, or damaged.
        RegistryError: the registry cannot be reached, or has no such version.
    """
    workspace = _workspace()
    if source.startswith(SCHEME):
        client = connect(workspace)
        version = Address.parse(source).resolve(client)
        tags, run_id = version.tags, str(version.run_id)
        links = [
            Link("version", f"{SCHEME}{version.name}/{version.version}", "registered"),
            Link("bundle", tags.get(SHA256_TAG, UNKNOWN), _artifacts_state(client, version)),
        ]
    else:
        manifest = read_verified(Path(source))
        tags, run_id = manifest.lineage, manifest.run_id
        links = [Link("bundle", bundle_sha256(Path(source)), "verified")]
    return [
        *links,
        Link("run", run_id, _run_state(workspace, run_id)),
        Link("parameters", *_parameters(workspace, tags)),
        Link("split", *_split(workspace, tags)),
        Link("data", *_data(workspace, tags)),
        Link("commit", *_commit(workspace, tags)),
    ]


def _workspace() -> Workspace | None:
    try:
        return Workspace.find()
    except WorkspaceError:
        return None


def _artifacts_state(client: MlflowClient, version: ModelVersion) -> str:
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    folder = f"{version.source}/{BUNDLE_PATH}"
    if is_local(folder):
        return "there" if local_folder(folder).is_dir() else f"GONE from {folder}"
    try:
        there = list_artifacts(artifact_uri=folder, tracking_uri=client.tracking_uri)
    except (MlflowException, OSError):
        there = []
    return "there" if there else f"GONE from {folder}"


def _run_state(workspace: Workspace | None, run_id: str) -> str:
    try:
        run = find_run(workspace, run_id)
    except VaeflowError as error:
        return f"cannot be looked up: {error}"
    if run is None:
        return "GONE from this tracking store"
    with registry_errors(run.client.tracking_uri):
        return f"there, {run.client.get_run(run_id).info.status}"


def _parameters(workspace: Workspace | None, tags: dict[str, str]) -> tuple[str, str]:
    digest = tags.get("parameters_sha256", UNKNOWN)
    return digest, _compared(workspace, lambda parameters: parameters.sha256() == digest)


def _split(workspace: Workspace | None, tags: dict[str, str]) -> tuple[str, str]:
    rule = tags.get(SPLIT_TAG, UNKNOWN)
    return rule, _compared(workspace, lambda now: _without_given(rule) == SplitRule.of(now.prepare))


def _without_given(text: str) -> SplitRule | None:
    try:
        return SplitRule.parse(text)._replace(given=())
    except ValueError:
        return None


def _compared(workspace: Workspace | None, is_same: Callable[[Parameters], bool]) -> str:
    if workspace is None:
        return "no workspace here to compare with"
    try:
        same = is_same(load_parameters(workspace.parameters))
    except VaeflowError as error:
        return f"cannot be compared: {error}"
    return "as in params.yaml now" if same else "other than in params.yaml now"


def _data(workspace: Workspace | None, tags: dict[str, str]) -> tuple[str, str]:
    """Look for every file in a folder's list: the digest is that of the list."""
    digest = tags.get("data_md5", UNKNOWN)
    if workspace is None or digest == UNKNOWN:
        return digest, "no workspace here to look in" if workspace is None else UNKNOWN
    cache = Path(run_dvc(workspace, "cache", "dir").strip()) / "files" / "md5"
    listed = cache / digest[:2] / digest[2:]
    if not listed.is_file():
        return digest, "not in DVC's cache here; `dvc pull` of its commit may fetch it"
    names = json.loads(listed.read_text()) if digest.endswith(".dir") else []
    lost = [f["relpath"] for f in names if not (cache / f["md5"][:2] / f["md5"][2:]).is_file()]
    if lost:
        return digest, f"{len(lost)} of {len(names)} files GONE from DVC's cache here"
    return digest, f"there, in DVC's cache ({len(names)} files)"


def _commit(workspace: Workspace | None, tags: dict[str, str]) -> tuple[str, str]:
    commit = tags.get("git_commit", UNKNOWN)
    if workspace is None or commit == UNKNOWN:
        return commit, "no workspace here to look in" if workspace is None else UNKNOWN
    looked_up = subprocess.run(
        ["git", "-C", workspace.root, "cat-file", "-e", f"{commit}^{{commit}}"],
        capture_output=True,
    )
    state = "GONE from this repository" if looked_up.returncode else "there"
    changed = tags.get("git_dirty") == "true"
    return commit, state + ", but files had been changed since" * changed
