"""Pull a registered model: from its address to a verified folder on this machine.

`python -m vaeflow.registry.pull ADDRESS` pulls in a process of its own, and prints where it lies.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vaeflow.bundle.manifest import MANIFEST, bundle_sha256, read_verified
from vaeflow.common.files import atomic_directory, atomic_file, cache_folder, sha256_of, write_json
from vaeflow.common.workspace import Workspace
from vaeflow.errors import BundleError, RegistryError, VaeflowError
from vaeflow.registry.versions import BUNDLE_PATH, SHA256_TAG, Address, Located, UnreachableError
from vaeflow.tracking.runs import connect, is_local, local_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


SHA256 = re.compile(r"^[0-9a-f]{64}$")


def pull(uri: str, offline_ok: bool = False, workspace: Workspace | None = None) -> Path:
    """Fetch a registered bundle into the local cache; see `pull_version`.

    Returns:
        The bundle's folder.
    """
    return pull_version(uri, offline_ok, workspace).folder


def pull_to(uri: str, target: Path, offline_ok: bool = False) -> Located:
    """Fetch a registered bundle into a folder, which becomes it whole or not at all.

    Raises:
        BundleError: the folder holds something else than a bundle.
    """
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} is there and is no bundle. Name a folder that is to be made.")
    pulled = pull_version(uri, offline_ok)
    with atomic_directory(target) as folder:
        shutil.copytree(pulled.folder, folder, dirs_exist_ok=True)
        read_verified(folder)
    return pulled._replace(folder=target)


def pull_version(uri: str, offline_ok: bool = False, workspace: Workspace | None = None) -> Located:
    """Fetch a registered bundle into the local cache, unless it is there already.

    The cache is keyed by content, so two versions never mix; it lies in `VAEFLOW_CACHE`, by default
    `~/.cache/vaeflow`. What was downloaded is kept only when it has the SHA-256 that was recorded
    when the version was registered; what was damaged since is downloaded again.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        offline_ok: where the registry cannot be reached, take what the address stood for when it
            was pulled last; a warning says so.
        workspace: whose registry, where none is named in the environment; by default that which
            the working directory is in.

    Returns:
        The bundle's folder, and which version it is now.

    Raises:
        RegistryError: the registry cannot be reached, or has no such model.
        BundleError: what was downloaded is not what was registered.
    """
    address = Address.parse(uri)
    client = connect(workspace)
    note = _note(client, uri)
    try:
        version = address.resolve(client)
    except UnreachableError as error:
        if not offline_ok:
            raise
        return _last_pulled(note, error)
    digest = version.tags.get(SHA256_TAG, "")
    if not SHA256.match(digest):
        raise RegistryError(f"{uri}: version {version.version} was not registered by vaeflow.")
    folder = _fetch(client, version, digest)
    with atomic_file(note) as fresh:
        write_json(fresh, {"uri": uri, "version": str(version.version), "sha256": digest})
    return Located(folder, str(version.version), digest)


def _fetch(client: MlflowClient, version: ModelVersion, digest: str) -> Path:
    """Return the bundle's folder in the cache, downloaded and verified if it is not there."""
    from filelock import FileLock

    target = _cached(digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not _holds(target, digest):
            with atomic_directory(target) as staging:
                folder = _download(client, version, staging)
                read_verified(folder)
                if bundle_sha256(folder) != digest:
                    raise BundleError(
                        f"models:/{version.name}/{version.version}: the downloaded bundle is not "
                        "the one that was registered (its manifest's SHA-256 differs). "
                        "Register the model again."
                    )
                for path in folder.iterdir():
                    path.rename(staging / path.name)
                folder.rmdir()
    return target


def _cached(digest: str) -> Path:
    return cache_folder() / "bundles" / digest


def _note(client: MlflowClient, uri: str) -> Path:
    """Return the file that notes what an address of this registry meant when it was pulled last."""
    key = sha256_of(f"{client.tracking_uri} {uri}".encode())
    return cache_folder() / "addresses" / f"{key}.json"


def _last_pulled(note: Path, error: UnreachableError) -> Located:
    """Return what was pulled last under an address, verified again.

    Raises:
        UnreachableError: nothing was, or it was damaged since.
    """
    try:
        noted = json.loads(note.read_text())
        folder = _cached(noted["sha256"])
    except (OSError, ValueError, KeyError):
        raise error from None
    if not _holds(folder, noted["sha256"]):
        raise error
    warnings.warn(
        f"{error} Version {noted['version']}, pulled earlier, is taken instead.", stacklevel=2
    )
    return Located(folder, noted["version"], noted["sha256"])


def _holds(folder: Path, digest: str) -> bool:
    """Return whether a folder of the cache is the undamaged bundle of that digest."""
    try:
        read_verified(folder)
    except BundleError:
        return False
    return bundle_sha256(folder) == digest


def _download(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Copy the version's files below an empty folder; return where exactly."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        source = str(version.source)
        if is_local(source):
            return shutil.copytree(local_folder(source) / BUNDLE_PATH, folder / BUNDLE_PATH)
        fetched = download_artifacts(
            artifact_uri=f"{version.source}/{BUNDLE_PATH}",
            dst_path=str(folder),
            tracking_uri=client.tracking_uri,
        )
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"models:/{version.name}/{version.version}: its files cannot be fetched from "
            f"{version.source} ({error})."
        ) from None
    return Path(fetched)


def main(address: str) -> None:
    """Print the folder and the version as JSON; what goes wrong is one line and status 1."""
    try:
        pulled = pull_version(address)
    except VaeflowError as error:
        sys.exit(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        sys.exit(f"this needs the package {error.name}: pip install 'vaeflow[pipeline]'")
    print(json.dumps({**pulled._asdict(), "folder": str(pulled.folder)}))


if __name__ == "__main__":
    main(sys.argv[1])
