"""Serve in one process: become ready, answer, follow new versions, and end well on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.errors import BundleError, ServingError, VaeflowError
from vaeflow.registry.model import Model, locate_apart
from vaeflow.registry.versions import Located
from vaeflow.serving.app import create_app
from vaeflow.serving.service import Service, open_model
from vaeflow.serving.settings import Settings

log = logging.getLogger("uvicorn.error")
# Waits until it is time, and gives the folder and version that the followed address stands for.
Poll = Callable[[], Awaitable[Located]]
# From a connection that waits to be accepted to its first request counted it takes five.
TURNS = 10


class Connection(HttpToolsProtocol):
    """Uvicorn's, but for how it writes.

    Uvicorn hands an answer's head and its body to the system one after the other, and each call
    costs more than all of its own work on a small answer.
    """

    def connection_made(  # type: ignore[override]  # of TCP: a transport that writes
        self, transport: asyncio.Transport
    ) -> None:
        """Write through `_Gathered`."""
        super().connection_made(cast("asyncio.Transport", _Gathered(transport, self.loop)))


class _Gathered:
    """A transport that passes on at once what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()


async def poll_registry(service: Service) -> Located:
    """Ask the registry, when it is time again."""
    await asyncio.sleep(service.settings.follow)
    return await asyncio.to_thread(locate_apart, service.settings.model)


async def follow(service: Service, poll: Poll, notify: Callable[[Model], None]) -> None:
    """Poll for another version again and again, until cancelled.

    It is verified and warmed beside the old one, which goes on when anything is wrong.

    Args:
        service: whose model it is.
        look: see `Look`.
        tell: called with each version that was taken.
    """
    refused = ""
    while True:
        try:
            fresh = await asyncio.to_thread(_newer, await poll(), service)
        except VaeflowError as error:
            if str(error) != refused:  # once, not at every look
                log.warning("version %s goes on: %s", service.model.version, error)
                service.metrics.refused_model()
            refused = str(error)
            continue
        refused = ""
        if fresh is not None:
            log.info("version %s replaces %s", fresh.version, service.model.version)
            service.replace(fresh)
            notify(fresh)


def _newer(located: Located, service: Service) -> Model | None:
    """Load the version that was found, if it is another."""
    present = service.model
    if located.version == present.version and bundle_sha256(located.folder) == present.sha256:
        return None
    fresh = open_model(located, service.settings)
    for what in ("name", "image_shape", "latent_dim"):
        old, new = (_property(model, what) for model in (present, fresh))
        if old != new:
            raise BundleError(
                f"version {located.version} has {what} {new}, and clients count on {old}. "
                "Serve it from a server of its own."
            )
    return fresh


def _property(model: Model, what: str) -> object:
    return model.name if what == "name" else getattr(model.bundle, what)


class _Server(uvicorn.Server):
    """Uvicorn's server, which first answers what was accepted and then closes."""

    def __init__(
        self, config: uvicorn.Config, service: Service, notify: Callable[[Model], None]
    ) -> None:
        super().__init__(config)
        self._service, self._notify = service, notify

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log what is served where; where any free port would do, it is known only now."""
        assert sockets  # `serve` gives the one it listens at
        await super().startup(sockets)
        model = self._service.model
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        log.info("%s version %s running on http://%s:%d", model.name, model.version, host, port)
        self._notify(model)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop being ready. A second signal ends the wait."""
        if not self._service.ready:
            self.should_exit = True
        self._service.ready = False

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        service = self._service
        if not service.ready:
            # What had reached the machine by now is looked at first: accepted before the server
            # drains, and refused with an answer, rather than cut off, before it ends.
            for _ in range(TURNS):
                await asyncio.sleep(0)
            self.should_exit |= service.draining and not service.in_flight
            service.draining = True
        return await super().on_tick(counter)


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bind a socket.

    Args:
        host: a name or an address.
        port: 0 for any free one.
        shared: other sockets of this user may be bound to the same; the system spreads connections
            over those that listen.

    Raises:
        ServingError: the address is not to be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named as TCP, or asyncio leaves Nagle's delay on: 40 ms for each small answer.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ServingError(f"{host}:{port} cannot be listened on: {error}.") from None
    return bound


def run(settings: Settings, bound: socket.socket) -> None:
    """Serve in this process on a bound socket until SIGTERM or SIGINT.

    Raises:
        BundleError, RegistryError: see `vaeflow.registry.model`.
    """
    model = open_model(locate_apart(settings.model), settings)
    service = Service(model, settings)
    poll = partial(poll_registry, service) if settings.follow else None
    serve(service, bound, poll)


def serve(
    service: Service,
    bound: socket.socket,
    poll: Poll | None,
    notify: Callable[[Model], None] = lambda model: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        service: the model and its limits.
        bound: the socket.
        look: for new versions; see `vaeflow.serving.server`.
        tell: called with the model when the server listens, and with each that replaces it.
    """
    config = uvicorn.Config(
        create_app(service),
        access_log=False,
        http=Connection,
        proxy_headers=False,  # nothing here asks who the client is
        log_level="info",
        # What is accepted is answered or refused within two deadlines: its body's, and its own.
        timeout_graceful_shutdown=int(2 * service.settings.deadline) + 1,
    )
    # What is there now stays: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    asyncio.run(_serve(_Server(config, service, notify), service, bound, poll, notify))


async def _serve(
    server: _Server,
    service: Service,
    bound: socket.socket,
    poll: Poll | None,
    notify: Callable[[Model], None],
) -> None:
    follower = asyncio.create_task(follow(service, poll, notify)) if poll else None
    try:
        await server.serve(sockets=[bound])
    finally:
        if follower is not None:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
        service.close()
