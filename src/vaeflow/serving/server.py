"""The server process: it becomes ready, answers, and on SIGTERM finishes what it accepted."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import uvicorn

from vaeflow.errors import ServingError
from vaeflow.serving.app import create_app
from vaeflow.serving.connections import Connection
from vaeflow.serving.follow import Look, follow, look_at_registry
from vaeflow.serving.served import Served, locate, open_folder
from vaeflow.serving.service import Service
from vaeflow.serving.settings import Settings

log = logging.getLogger("uvicorn.error")

# From a connection that waits to be accepted to its first request counted it takes five.
TURNS = 10


class _Server(uvicorn.Server):
    """Uvicorn's server, which first answers what was accepted and then closes."""

    def __init__(self, config: uvicorn.Config, service: Service, tell: Callable[[Served], None]):
        super().__init__(config)
        self._service, self._tell = service, tell

    async def startup(self, sockets: list[socket.socket]) -> None:
        """Say what is served where; where any free port would do, it is known only now."""
        await super().startup(sockets)
        served = self._service.served
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        log.info("%s version %s running on http://%s:%d", served.name, served.version, host, port)
        self._tell(served)

    def handle_exit(self, sig, frame) -> None:
        """Be ready no more. A second signal ends the wait."""
        if not self._service.ready:
            self.should_exit = True
        self._service.ready = False

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
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
    """A bound socket.

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
        BundleError, RegistryError: see `vaeflow.serving.served`.
    """
    served = open_folder(*locate(settings.model), settings.threads)
    service = Service(served, settings)
    look = partial(look_at_registry, service) if settings.follow else None
    serve(service, bound, look)


def serve(
    service: Service,
    bound: socket.socket,
    look: Look | None,
    tell: Callable[[Served], None] = lambda served: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        service: the model and its limits.
        bound: the socket.
        look: for new versions; see `vaeflow.serving.follow`.
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
    asyncio.run(_serve(_Server(config, service, tell), service, bound, look, tell))


async def _serve(server: _Server, service: Service, bound: socket.socket, look, tell) -> None:
    follower = asyncio.create_task(follow(service, look, tell)) if look else None
    try:
        await server.serve(sockets=[bound])
    finally:
        if follower is not None:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
        service.close()
