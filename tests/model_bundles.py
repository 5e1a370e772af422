"""Bundles of models that were made for a test, without a workspace around them."""

from pathlib import Path

import keras

from vaeflow.bundle.export import describe_model, export_onnx
from vaeflow.bundle.manifest import Manifest, describe_files, write_manifest
from vaeflow.config.model import VAEConfig
from vaeflow.model.vae import VAE


def make_model(image_shape: tuple[int, int, int], latent_dim: int = 2, **options: str) -> VAE:
    """Make a small untrained model, the same each time; a learned prior is not N(0, I)."""
    keras.utils.set_random_seed(0)
    sizes = {"filters": (4,), "hidden_units": 8}
    vae = VAE(VAEConfig(image_shape, latent_dim, **sizes, **options))
    for variable in vae.prior.trainable_variables:
        variable.assign(0.2 * keras.random.normal(variable.shape))
    return vae


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
