"""What drift is measured against: latent means and scores of images never trained on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaeflow.bundle.manifest import Manifest, read_file
from vaeflow.errors import BundleError

REFERENCE = "reference.npz"


class Reference(NamedTuple):
    """A sample of the validation images, as they come: posterior means and anomaly scores."""

    means: np.ndarray  # float32, (images, latent_dim)
    scores: np.ndarray  # nats, float32 (images,)


def write_reference(path: Path, means: np.ndarray, scores: np.ndarray) -> None:
    """Write a reference; see `Reference`."""
    np.savez(path, means=means.astype(np.float32), scores=scores.astype(np.float32))


def read_reference(folder: Path, manifest: Manifest) -> Reference:
    """The reference of a bundle whose manifest was verified.

    Raises:
        BundleError: the bundle was exported without one, or it is damaged.
    """
    if REFERENCE not in manifest.files:
        raise BundleError(
            f"{folder}: this bundle has no {REFERENCE}, which drift is measured against. Export it "
            "again: dvc repro --single-item --force evaluate export"
        )
    content = io.BytesIO(read_file(folder, manifest, REFERENCE))
    try:
        with np.load(content, allow_pickle=False) as arrays:
            reference = Reference(arrays["means"], arrays["scores"])
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise BundleError(f"{folder / REFERENCE}: not a readable reference ({error}).") from None
    if reference.means.shape != (len(reference.scores), manifest.latent_dim):
        raise BundleError(
            f"{folder / REFERENCE}: latent means of shape {reference.means.shape}; expected "
            f"({len(reference.scores)}, {manifest.latent_dim})."
        )
    return reference
