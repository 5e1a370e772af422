"""From a model's address in the registry to a verified folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.bundle.manifest import bundle_sha256, read_verified
from vaeflow.errors import BundleError, RegistryError
from vaeflow.files import atomic_directory, cache_folder
from vaeflow.registry.register import SHA256_TAG
from vaeflow.training.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SHA256 = re.compile(r"^[0-9a-f]{64}$")
URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))$")


class Pulled(NamedTuple):
    """A verified bundle on this machine, and the version of the registry that it is."""

    folder: Path
    version: str


def pull(uri: str) -> Path:
    """Fetch a registered bundle into the local cache; see `pull_version`.

    Returns:
        The bundle's folder.
    """
    return pull_version(uri).folder


def pull_version(uri: str) -> Pulled:
    """Fetch a registered bundle into the local cache, unless it is there already.

    The cache is keyed by content, so two versions never mix; it lies in `VAEFLOW_CACHE`, by default
    `~/.cache/vaeflow`. What was downloaded is kept only when it has the SHA-256 that was recorded
    when the version was registered; what was damaged since is downloaded again.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Returns:
        The bundle's folder, and which version it is now.

    Raises:
        RegistryError: the registry cannot be reached, or has no such model.
        BundleError: what was downloaded is not what was registered.
    """
    address = _parse(uri)
    from filelock import FileLock

    client = connect()
    version = _resolve(client, uri, *address)
    digest = version.tags.get(SHA256_TAG, "")
    if not SHA256.match(digest):
        raise RegistryError(f"{uri}: version {version.version} was not registered by vaeflow.")
    target = cache_folder() / "bundles" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not _holds(target, digest):
            with atomic_directory(target) as staging:
                folder = _download(client, version, staging)
                read_verified(folder)
                if bundle_sha256(folder) != digest:
                    raise BundleError(
                        f"{uri}: the downloaded bundle is not the one that was registered as "
                        f"version {version.version} (its manifest's SHA-256 differs). "
                        "Register the model again."
                    )
                for path in folder.iterdir():
                    path.rename(staging / path.name)
                folder.rmdir()
    return Pulled(target, str(version.version))


def _holds(folder: Path, digest: str) -> bool:
    """Whether a folder of the cache is the undamaged bundle of that digest."""
    try:
        read_verified(folder)
    except BundleError:
        return False
    return bundle_sha256(folder) == digest


def _parse(uri: str) -> tuple[str, str | None, str | None]:
    """Name, alias and version of an address; one of the last two is None."""
    if not (match := URI.match(uri)):
        raise RegistryError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    return match["name"], match["alias"], match["version"]


def _resolve(
    client: MlflowClient, uri: str, name: str, alias: str | None, version: str | None
) -> ModelVersion:
    """The registered version an address stands for now."""
    from mlflow.exceptions import MlflowException

    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise RegistryError(
            f"{uri}: {error.message} (registry {client.tracking_uri}). "
            "Make a champion with `vaeflow retrain`, or set MLFLOW_TRACKING_URI."
        ) from None


def _download(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Copy the version's files below an empty folder; returns where exactly."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        fetched = download_artifacts(
            artifact_uri=version.source, dst_path=str(folder), tracking_uri=client.tracking_uri
        )
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"models:/{version.name}/{version.version}: its files cannot be fetched from "
            f"{version.source} ({error})."
        ) from None
    return Path(fetched)
