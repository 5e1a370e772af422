"""Find a model by its address, the one place where addresses are resolved, and load it.

An address is the folder of a bundle, or a model of the MLflow registry: `models:/NAME@ALIAS` or
`models:/NAME/VERSION`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from vaeflow.bundle.manifest import MANIFEST, bundle_sha256
from vaeflow.bundle.runtime import Bundle
from vaeflow.common.processes import python_command, run_to_end
from vaeflow.common.workspace import Workspace
from vaeflow.errors import BundleError, RegistryError
from vaeflow.registry.versions import SCHEME, Located

PULL_SECONDS = 600


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded bundle, and which version of which model it is.

    Attributes:
        bundle: verified.
        folder: where it lies.
        version: of the registry; for a folder, the first twelve digits of the bundle's SHA-256.
        sha256: of the bundle.
    """

    bundle: Bundle
    folder: Path
    version: str
    sha256: str

    @classmethod
    def load(cls, located: Located, threads: int) -> Model:
        """Verify and load a bundle.

        Args:
            located: from `locate`.
            threads: that one run of the model may use.

        Raises:
            BundleError: it is missing, changed or damaged.
        """
        sha256 = bundle_sha256(located.folder) if (located.folder / MANIFEST).is_file() else ""
        # The manifest vouches for the files, and the registry for the manifest.
        if located.sha256 not in (None, sha256):
            raise BundleError(
                f"{located.folder}: not the bundle that was expected (its manifest's SHA-256 "
                "differs). Remove the folder; it is fetched again."
            )
        bundle = Bundle(located.folder, threads)
        return cls(bundle, located.folder, located.version or sha256[:12], sha256)

    @property
    def name(self) -> str:
        """The model's name, as in its manifest."""
        return self.bundle.manifest.name

    @property
    def data_md5(self) -> str:
        """The MD5 of the images it was trained on, as DVC has it."""
        return self.bundle.manifest.lineage.get("data_md5", "unknown")

    @property
    def description(self) -> dict[str, str]:
        """What is written beside its results."""
        return {
            "model_name": self.name,
            "model_version": self.version,
            "bundle_sha256": self.sha256,
            "data_md5": self.data_md5,
        }

    @cached_property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of every answer of this model."""
        # A header is ASCII: a name in other letters goes as a URL has it.
        return {"X-Model-Name": quote(self.name, safe=" "), "X-Model-Version": self.version}

    @cached_property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The same headers as ASGI has them."""
        return [(k.lower().encode(), v.encode()) for k, v in self.headers.items()]


def locate(
    model: str | Path, *, offline_ok: bool = False, workspace: Workspace | None = None
) -> Located:
    """Resolve an address to a folder; a registered model is pulled, unless it was before.

    Args:
        model: the address.
        offline_ok: where the registry cannot be reached, take the copy pulled last under that
            address, with a warning.
        workspace: whose registry, where none is named in the environment.

    Raises:
        RegistryError: the registry cannot be reached or has no such model.
        BundleError: what was downloaded is not what was registered.
    """
    if not str(model).startswith(SCHEME):
        return Located(Path(model), None)
    from vaeflow.registry.pull import pull_version

    return pull_version(str(model), offline_ok, workspace)


def locate_apart(model: str) -> Located:
    """Resolve an address in another process, so that MLflow never loads into this one.

    Raises:
        RegistryError: see `locate`.
    """
    return asyncio.run(locate_beside(model))


async def locate_beside(model: str) -> Located:
    """Resolve an address as `locate_apart`; cancelled, it ends the other process too."""
    if not model.startswith(SCHEME):
        return Located(Path(model), None)
    try:
        ended = await run_to_end(python_command("vaeflow.registry.pull", model), PULL_SECONDS)
    except TimeoutError:
        raise RegistryError(f"{model}: not fetched within {PULL_SECONDS} seconds.") from None
    if ended.status:
        raise RegistryError(f"{model}: {ended.complaint or 'no reason given'}")
    answer = json.loads(ended.output.splitlines()[-1])
    return Located(Path(answer["folder"]), answer["version"], answer["sha256"])
