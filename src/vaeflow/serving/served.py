"""The model that answers: loaded, warmed, and with the names that its answers carry."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.bundle.runtime import Bundle
from vaeflow.errors import BundleError, RegistryError

REGISTRY = "models:/"
PULL_SECONDS = 600


@dataclass(frozen=True)
class Served:
    """A bundle that is ready to answer.

    Attributes:
        bundle: verified and warm.
        version: of the registry; for a folder, the first twelve digits of the bundle's SHA-256.
        sha256: of the bundle.
    """

    bundle: Bundle
    version: str
    sha256: str

    @property
    def name(self) -> str:
        """The model's name, as in its manifest."""
        return self.bundle.manifest.name

    @property
    def data_md5(self) -> str:
        """Of the images it was trained on, as DVC has it."""
        return self.bundle.manifest.lineage.get("data_md5", "unknown")

    @cached_property
    def headers(self) -> dict[str, str]:
        """What every answer of this model carries."""
        return {"X-Model-Name": self.name, "X-Model-Version": self.version}

    @cached_property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The same as ASGI has them."""
        return [(k.lower().encode(), v.encode("latin-1")) for k, v in self.headers.items()]


def load(model: str) -> Served:
    """Load and warm a bundle's folder, or a model of the registry.

    Raises:
        BundleError: it is damaged, or gives numbers that are not finite.
        RegistryError: the registry cannot be reached or has no such model.
    """
    if model.startswith(REGISTRY):
        return open_folder(*pull(model))
    return open_folder(Path(model))


def open_folder(folder: Path, version: str | None = None, threads: int = 1) -> Served:
    """Verify, load and warm a bundle's folder."""
    bundle = Bundle(folder, threads)
    _warm(bundle)
    sha256 = bundle_sha256(folder)
    return Served(bundle, version or sha256[:12], sha256)


def pull(address: str) -> tuple[Path, str]:
    """Fetch a registered model in another process, so that MLflow never loads into this one.

    Returns:
        The bundle's folder, and its version in the registry.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vaeflow.serving.pulling", address],
            capture_output=True,
            text=True,
            timeout=PULL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RegistryError(f"{address}: not fetched within {PULL_SECONDS} seconds.") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RegistryError(f"{address}: {last[0]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Path(answer["folder"]), answer["version"]


def _warm(bundle: Bundle) -> None:
    """The first run of a session allocates what later ones use again."""
    images = np.zeros((1, *bundle.image_shape), np.uint8)
    answers = (bundle.reconstruct(images), bundle.score(images))
    if not all(np.isfinite(values).all() for values in answers):
        raise BundleError(f"{bundle.manifest.name}: its answers are not finite. Train it again.")
