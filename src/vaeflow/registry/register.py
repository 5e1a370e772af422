"""Bundles in the MLflow model registry, and which one is the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vaeflow.bundle.manifest import MANIFEST, Manifest, bundle_sha256, read_verified
from vaeflow.training.tracking import Run, clear_errors, connect, find_run, start_run
from vaeflow.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
BOUND = "importance_weighted_bound"
SHA256_TAG = "bundle_sha256"
JUDGED_TAG = "judged"
# What decides what the bound is of, and was always so before versions carried these tags.
MEASURE = {"likelihood": "bernoulli", "binarize": "none"}
ARTIFACTS = "bundle"


class Registered(NamedTuple):
    """A version, the alias it holds, and why."""

    name: str
    version: str
    alias: str | None
    reason: str

    @property
    def uri(self) -> str:
        """The address that always means this version."""
        return f"models:/{self.name}/{self.version}"

    def __str__(self) -> str:
        held = f"is @{self.alias}" if self.alias else "holds no alias"
        return f"{self.uri} {held}: {self.reason}"


def register(workspace: Workspace) -> Registered:
    """Register `outputs/bundle` as a version, and make it champion if it is better.

    A bundle that is registered already keeps its version, so the call may be repeated.

    Raises:
        BundleError: the bundle is not what its manifest says.
        RegistryError: the registry cannot be reached, or refuses.
    """
    workspace.require(workspace.bundle / MANIFEST, "Make it: dvc repro")
    manifest = read_verified(workspace.bundle)
    client = connect(workspace)
    with clear_errors(client.tracking_uri):
        version = _find_or_create_version(client, workspace, manifest)
        alias, reason = _set_alias(client, manifest.name, version)
    return Registered(manifest.name, version, alias, reason)


def _find_or_create_version(client: MlflowClient, workspace: Workspace, manifest: Manifest) -> str:
    digest = bundle_sha256(workspace.bundle)
    _ensure_model(client, manifest.name)
    for known in client.search_model_versions(f"name = '{manifest.name}'"):
        if known.tags.get(SHA256_TAG) == digest:
            return str(known.version)

    run = find_run(workspace, manifest.run_id) or _replacement_run(workspace, manifest)
    # A folder a bundle: a run whose evaluation or export was made again has several.
    folder = f"{ARTIFACTS}/{digest[:12]}"
    client.log_artifacts(run.run_id, str(workspace.bundle), folder)
    artifacts = client.get_run(run.run_id).info.artifact_uri
    tags = {SHA256_TAG: digest, **manifest.lineage}
    tags |= {name: str(value) for name, value in manifest.metrics.items()}
    tags |= {name: getattr(manifest, name) for name in MEASURE}
    created = client.create_model_version(
        manifest.name, f"{artifacts}/{folder}", run_id=run.run_id, tags=tags
    )
    return str(created.version)  # some stores answer with a number


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _replacement_run(workspace: Workspace, manifest: Manifest) -> Run:
    """A run to hold the bundle of a model that was trained against another tracking store."""
    tags = {**manifest.lineage, "trained_in_run": manifest.run_id}
    with start_run(workspace, "restored-from-cache", {}, tags) as run:
        run.log_metrics({f"test_{name}": value for name, value in manifest.metrics.items()})
    return run


def _set_alias(client: MlflowClient, name: str, version: str) -> tuple[str | None, str]:
    """Compare with the champion by the bound on the test split; returns alias and reason.

    A version is judged once: where people moved the alias since, it stays as they put it.
    """
    if client.get_model_version(name, version).tags.get(JUDGED_TAG):
        held = [a for a in (CHAMPION, CHALLENGER) if _version_of(client, name, a) == version]
        return next(iter(held), None), "it was registered before"

    bound = _bound(client, name, version)
    champion = _version_of(client, name, CHAMPION)
    if champion == version:  # an earlier call was cut short before it noted its verdict
        better, reason = True, "it was made champion"
    elif champion is None:
        better, reason = True, f"there was no champion; its bound is {bound:.3f} nats"
    elif (ours := _measure(client, name, version)) != (theirs := _measure(client, name, champion)):
        better = False
        reason = f"its bound, of {ours}, does not compare with version {champion}'s, of {theirs}"
    else:
        to_beat = _bound(client, name, champion)
        better = bound > to_beat
        verdict = "better" if better else "not better"
        reason = f"{bound:.3f} nats is {verdict} than version {champion}'s {to_beat:.3f}"
    alias = CHAMPION if better else CHALLENGER
    client.set_registered_model_alias(name, alias, version)
    client.set_model_version_tag(name, version, JUDGED_TAG, reason)
    return alias, reason


def _version_of(client: MlflowClient, name: str, alias: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def _measure(client: MlflowClient, name: str, version: str) -> str:
    """What a version's bound is of, in words: only bounds of the same can be compared."""
    tags = {**MEASURE, **client.get_model_version(name, version).tags}
    # Static or dynamic, the test images are drawn alike.
    images = "images as they are" if tags["binarize"] == "none" else "binarised images"
    return f"{images} under likelihood {tags['likelihood']}"


def _bound(client: MlflowClient, name: str, version: str) -> float:
    return float(client.get_model_version(name, version).tags.get(BOUND, "-inf"))
