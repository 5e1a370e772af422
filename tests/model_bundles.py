"""Bundles of models that were made for a test, without a workspace around them."""

from pathlib import Path

from vaeflow.bundle.export import describe_model, export_onnx
from vaeflow.bundle.manifest import Manifest, describe_files, write_manifest
from vaeflow.model.vae import VAE


def write_bundle(folder: Path, vae: VAE) -> Path:
    """Write the ONNX files of a model and their manifest into a folder, and return it."""
    export_onnx(folder, vae)
    manifest = Manifest(
        **describe_model(vae.config),
        name="any",
        run_id="none",
        lineage={},
        metrics={},
        export_differences={},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder
