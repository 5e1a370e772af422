"""The server process: it becomes ready, answers, and on SIGTERM finishes what it accepted."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from contextlib import suppress

import uvicorn

from vaeflow.errors import ServingError
from vaeflow.serving.app import create_app
from vaeflow.serving.connections import Connection
from vaeflow.serving.follow import follow
from vaeflow.serving.served import load
from vaeflow.serving.service import Service
from vaeflow.serving.settings import Settings

log = logging.getLogger("uvicorn.error")


class _Server(uvicorn.Server):
    """Uvicorn's server, which first answers what was accepted and then closes."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket]) -> None:
        """Say what is served where; where any free port would do, it is known only now."""
        await super().startup(sockets)
        served = self._service.served
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        log.info("%s version %s running on http://%s:%d", served.name, served.version, host, port)

    def handle_exit(self, sig, frame) -> None:
        """Drain. A second signal ends the wait."""
        if self._service.draining:
            self.should_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._service.draining and not self._service.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ServingError: the address is not to be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named as TCP, or asyncio leaves Nagle's delay on: 40 ms for each small answer.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ServingError(f"{host}:{port} cannot be listened on: {error}.") from None
    bound.set_inheritable(True)
    return bound


def run(settings: Settings, bound: socket.socket) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT.

    Raises:
        BundleError, RegistryError: see `vaeflow.serving.served.load`.
    """
    service = Service(load(settings.model), settings)
    config = uvicorn.Config(
        create_app(service),
        access_log=False,
        http=Connection,
        proxy_headers=False,  # nothing here asks who the client is
        log_level="info",
        # What is accepted is answered or refused within two deadlines: its body's, and its own.
        timeout_graceful_shutdown=int(2 * settings.deadline) + 1,
    )
    # What is there now stays: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    asyncio.run(_serve(_Server(config, service), service, bound))


async def _serve(server: _Server, service: Service, bound: socket.socket) -> None:
    follower = asyncio.create_task(follow(service)) if service.settings.follow else None
    try:
        await server.serve(sockets=[bound])
    finally:
        if follower is not None:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
        service.close()
