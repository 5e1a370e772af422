"""Bundles of models that were made for a test, without a workspace around them."""

from pathlib import Path

from vaeflow.bundle.export import export_onnx
from vaeflow.bundle.manifest import ImageSpec, Manifest, describe_files, write_manifest
from vaeflow.model.vae import VAE


def write_bundle(folder: Path, vae: VAE) -> Path:
    """Write the ONNX files of a model and their manifest into a folder, and return it."""
    export_onnx(folder, vae)
    config = vae.config
    height, width, channels = config.image_shape
    manifest = Manifest(
        name="any",
        image=ImageSpec(height=height, width=width, channels=channels),
        latent_dim=config.latent_dim,
        likelihood=config.likelihood,
        levels=config.levels,
        mixtures=config.mixtures,
        binarize=config.binarize,
        prior=config.prior,
        run_id="none",
        lineage={},
        metrics={},
        export_differences={},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder
