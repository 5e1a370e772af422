"""Taking over a new version of a followed model, without an answer lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.errors import BundleError, VaeflowError
from vaeflow.serving.served import Served, open_folder, pull
from vaeflow.serving.service import Service

log = logging.getLogger("uvicorn.error")

# Waits until it is time, and gives the folder and version that the followed address stands for.
Look = Callable[[], Awaitable[tuple[Path, str]]]


async def look_at_registry(service: Service) -> tuple[Path, str]:
    """Ask the registry, when it is time again."""
    await asyncio.sleep(service.settings.follow)
    return await asyncio.to_thread(pull, service.settings.model)


async def follow(service: Service, look: Look, tell: Callable[[Served], None]) -> None:
    """Look for another version again and again, until cancelled.

    It is verified and warmed beside the old one, which goes on when anything is wrong.

    Args:
        service: whose model it is.
        look: see `Look`.
        tell: called with each version that was taken.
    """
    refused = ""
    while True:
        try:
            fresh = await asyncio.to_thread(_newer, *await look(), service)
        except VaeflowError as error:
            if str(error) != refused:  # once, not at every look
                log.warning("version %s goes on: %s", service.served.version, error)
                service.metrics.refused_model()
            refused = str(error)
            continue
        refused = ""
        if fresh is not None:
            log.info("version %s replaces %s", fresh.version, service.served.version)
            service.replace(fresh)
            tell(fresh)


def _newer(folder: Path, version: str, service: Service) -> Served | None:
    """The version that was looked up, if it is another."""
    present = service.served
    if version == present.version and bundle_sha256(folder) == present.sha256:
        return None
    fresh = open_folder(folder, version, service.settings.threads)
    for what in ("name", "image_shape", "latent_dim"):
        old, new = (_property(served, what) for served in (present, fresh))
        if old != new:
            raise BundleError(
                f"version {version} has {what} {new}, and clients count on {old}. "
                "Serve it from a server of its own."
            )
    return fresh


def _property(served: Served, what: str) -> object:
    return served.name if what == "name" else getattr(served.bundle, what)
