"""Bundles to measure: a preset's network without training, which no speed depends on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

PRESETS = Path(__file__).parents[1] / "presets"
IMAGE = (28, 28, 1)


def untrained(preset: str, folder: Path) -> Path:
    """Write the bundle of the network that a preset has, for images of 28x28.

    TensorFlow is loaded for it: call it in a process that measures nothing else.
    """
    from vaeflow.bundle.export import compare_exports, export_onnx, export_saved_model
    from vaeflow.bundle.manifest import ImageSpec, Manifest, describe_files, write_manifest
    from vaeflow.config.auto import DataFacts, resolve
    from vaeflow.config.schema import load_parameters
    from vaeflow.model.device import use_cpu
    from vaeflow.model.vae import VAE

    use_cpu()
    # What `auto` means for black and white images.
    facts = DataFacts(IMAGE, images=60_000, levels=2)
    train, _ = resolve(load_parameters(PRESETS / f"{preset}.yaml").train, facts)
    vae = VAE(train.model(IMAGE, steps_per_epoch=1))
    images = np.random.default_rng(0).random((8, *IMAGE), dtype=np.float32)
    folder.mkdir(parents=True)
    export_onnx(folder, vae)
    export_saved_model(folder / "saved_model" / "1", vae)
    vae.save(folder / "model.keras")
    height, width, channels = IMAGE
    manifest = Manifest(
        name=f"{preset}-untrained",
        image=ImageSpec(height=height, width=width, channels=channels),
        latent_dim=vae.config.latent_dim,
        likelihood=vae.config.likelihood,
        levels=vae.config.levels,
        prior=vae.config.prior,
        run_id="none",
        lineage={"data_md5": "none"},
        metrics={},
        score_quantiles={"0": 0.0, "1": 1000.0},
        export_differences=compare_exports(folder, vae, images),
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder


if __name__ == "__main__":
    untrained(sys.argv[1], Path(sys.argv[2]))
