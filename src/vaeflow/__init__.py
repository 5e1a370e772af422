"""Convolutional variational autoencoders as a reproducible pipeline.

`vaeflow.load` gives a trained model for inference; importing this package imports nothing heavy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaeflow.bundle.runtime import Bundle

# TensorFlow takes its fast kernels by itself only on some CPUs; on one with AVX2 alone, training
# was 1.6 to 1.9 times as fast with them. It reads this when it is imported, and not again.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__all__ = ["load"]


def load(model: str | Path, *, offline_ok: bool = False) -> Bundle:
    """Load a model for inference.

    Args:
        model: the folder of a bundle, or a model of the MLflow registry as
            `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        offline_ok: where the registry cannot be reached, take the copy pulled last under that
            address, with a warning.

    Returns:
        An object with `encode`, `decode`, `reconstruct`, `sample` and `score` on numpy arrays. For
        a folder neither TensorFlow nor MLflow is imported.

    Raises:
        BundleError: the bundle is missing, changed or damaged.
        RegistryError: the registry cannot be reached or has no such model.

    Examples:
        >>> model = vaeflow.load("models:/digits-vae@champion")
        >>> model.score(images)  # images: uint8, (count, 8, 8, 1)
    """
    from vaeflow.bundle.runtime import Bundle
    from vaeflow.registry.model import locate

    return Bundle(locate(model, offline_ok=offline_ok).folder)


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: that takes longer than this whole import."""
    if name == "__version__":
        from vaeflow.common.code import package_version

        return package_version()
    raise AttributeError(f"module 'vaeflow' has no attribute {name!r}")
