"""The model that answers: loaded, warmed, and with the names that its answers carry."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vaeflow import collector
from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.bundle.runtime import Bundle
from vaeflow.errors import BundleError, RegistryError
from vaeflow.registry.versions import SCHEME

PULL_SECONDS = 600


@dataclass(frozen=True)
class Served:
    """A bundle that is ready to answer.

    Attributes:
        bundle: verified and warm.
        folder: where it lies.
        version: of the registry; for a folder, the first twelve digits of the bundle's SHA-256.
        sha256: of the bundle.
    """

    bundle: Bundle
    folder: Path
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


def locate(model: str) -> tuple[Path, str | None]:
    """Where the bundle lies, and its version where it is one of the registry.

    Args:
        model: a bundle's folder, or the address of a model in the registry, which is fetched.

    Raises:
        RegistryError: the registry cannot be reached or has no such model.
    """
    return pull(model) if model.startswith(SCHEME) else (Path(model), None)


def open_folder(folder: Path, version: str | None, threads: int) -> Served:
    """Verify, load and warm a bundle's folder.

    Args:
        folder: the bundle.
        version: its version in the registry, where it is of one.
        threads: of one run.

    Raises:
        BundleError: it is damaged, or gives numbers that are not finite.
    """
    bundle = Bundle(folder, threads)
    _warm(bundle)
    sha256 = bundle_sha256(folder)
    return Served(bundle, folder, version or sha256[:12], sha256)


def pull(address: str) -> tuple[Path, str]:
    """Fetch a registered model in another process, so that MLflow never loads into this one.

    Returns:
        The bundle's folder, and its version in the registry.
    """
    try:
        done = subprocess.run(
            collector.command("vaeflow.serving.pulling", address),
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
