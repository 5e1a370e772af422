"""Taking over a new version of a followed model, without an answer lost."""

from __future__ import annotations

import asyncio
import logging

from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.errors import BundleError, VaeflowError
from vaeflow.serving.served import Served, open_folder, pull
from vaeflow.serving.service import Service

log = logging.getLogger("uvicorn.error")


async def follow(service: Service) -> None:
    """Look for another version again and again, until cancelled.

    It is pulled, verified and warmed beside the old one, which goes on when anything is wrong.
    """
    refused = ""
    while True:
        await asyncio.sleep(service.settings.follow)
        try:
            fresh = await asyncio.to_thread(_newer, service.settings.model, service.served)
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


def _newer(model: str, present: Served) -> Served | None:
    """The version that the address stands for now, if it is another."""
    folder, version = pull(model)
    if version == present.version and bundle_sha256(folder) == present.sha256:
        return None
    fresh = open_folder(folder, version)
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
