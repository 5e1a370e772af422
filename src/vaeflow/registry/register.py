"""Register a bundle in the MLflow registry, as one version, however often it is asked for.

The version is a standard MLflow model: the bundle's files, and what MLflow needs to run them.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaeflow.bundle.manifest import (
    MANIFEST,
    OF_ALARMS,
    Manifest,
    bundle_sha256,
    read_verified,
)
from vaeflow.common.code import PACKAGE
from vaeflow.common.workspace import Workspace
from vaeflow.registry.versions import SHA256_TAG, Version, create_model, ignore_missing
from vaeflow.tracking.lineage import stage_hashes
from vaeflow.tracking.runs import (
    Run,
    all_pages,
    connect,
    find_run,
    registry_errors,
    start_run,
)
from vaeflow.training.history import complete

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What `vaeflow.bundle` imports; the package itself comes along as code.
REQUIREMENTS = ("numpy", "onnxruntime", "pydantic")


def register(workspace: Workspace) -> Version:
    """Register `outputs/bundle`, or find the version that it is already.

    The key is the bundle's SHA-256. The call may be repeated, cut short and made by several
    processes at once: one version is left.

    Raises:
        BundleError: the bundle is not what its manifest says.
        RegistryError: the registry cannot be reached, or refuses.
    """
    workspace.require(workspace.bundle / MANIFEST, "Make it: dvc repro")
    manifest = read_verified(workspace.bundle)
    digest = bundle_sha256(workspace.bundle)
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        create_model(client, manifest.name)
        if known := _only_version(client, manifest.name, digest):
            return known
        _create_version(client, workspace, manifest, digest)
        created = _only_version(client, manifest.name, digest)
    assert created is not None
    return created


def preload(workspace: Workspace) -> None:
    """Import and connect what `register` needs: seconds that may pass beside something else."""
    connect(workspace)
    import mlflow.pyfunc  # noqa: F401


def find_registered(workspace: Workspace) -> Version | None:
    """Find the version that `outputs/bundle` is, if it is registered; a damaged bundle is none."""
    if not (workspace.bundle / MANIFEST).is_file():
        return None
    name = read_verified(workspace.bundle).name
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        found = _versions(client, name, bundle_sha256(workspace.bundle))
    return found[0] if found else None


def _only_version(client: MlflowClient, name: str, digest: str) -> Version | None:
    """Return the first version of a bundle; delete later ones, of processes that came second."""
    found = _versions(client, name, digest)
    for version in found[1:]:
        with ignore_missing():  # each process that finds a second version deletes it
            client.delete_model_version(name, version.number)
    return found[0] if found else None


def _versions(client: MlflowClient, name: str, digest: str) -> list[Version]:
    found = all_pages(
        client.search_model_versions, f"name = '{name}' and tags.{SHA256_TAG} = '{digest}'"
    )
    return [Version(name, str(n)) for n in sorted(int(version.version) for version in found)]


def _create_version(
    client: MlflowClient, workspace: Workspace, manifest: Manifest, digest: str
) -> None:
    """Upload the bundle to its run, and make a version of it with all its tags in one request."""
    if run := find_run(workspace, manifest.run_id):
        complete(workspace, run)
    else:
        run = _replacement_run(workspace, manifest)
    # A folder a bundle: a run whose evaluation or export was made again has several.
    folder = f"bundle/{digest[:12]}"
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_mlflow_model(model, workspace.bundle, manifest)
        source = run.log_folder(model, folder)
    tags = {
        SHA256_TAG: digest,
        **manifest.lineage,
        **stage_hashes(workspace),
        **{name: str(value) for name, value in manifest.metrics.items()},
    }
    client.create_model_version(manifest.name, source, run_id=run.run_id, tags=tags)


def _replacement_run(workspace: Workspace, manifest: Manifest) -> Run:
    """Create a run to hold the bundle of a model trained against another tracking store."""
    tags = {**manifest.lineage, "trained_in_run": manifest.run_id}
    with start_run(workspace, "restored-from-cache", {}, tags) as run:
        run.log_metrics({f"test_{name}": value for name, value in manifest.metrics.items()})
    return run


def write_mlflow_model(folder: Path, bundle: Path, manifest: Manifest) -> None:
    """Write the MLflow model of a bundle into a folder that does not exist yet.

    It has a tensor signature, an input example and pinned requirements, and holds code instead of
    a pickled object. The package comes along, so that `mlflow models serve` and `build-docker`
    need no index that knows it.
    """
    import mlflow.pyfunc
    import numpy as np

    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"bundle": str(bundle)},
        code_paths=[str(PACKAGE)],
        signature=_signature(manifest),
        input_example=(np.zeros((1, *manifest.image.shape), np.float32), {"output": "score"}),
        pip_requirements=[
            f"{name}=={metadata.version(name)}" for name in ("mlflow", *REQUIREMENTS)
        ],
    )


def _signature(manifest: Manifest) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    number = np.dtype(np.float32)
    names = ["score", "percentile"]
    if manifest.anomaly:
        names += OF_ALARMS
    return ModelSignature(
        inputs=Schema([TensorSpec(number, (-1, *manifest.image.shape))]),
        outputs=Schema([TensorSpec(number, (-1,), name) for name in names]),
        params=ParamSchema([ParamSpec("output", "string", "score")]),
    )
