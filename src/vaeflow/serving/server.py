"""Serve in one process: become ready, answer, follow new versions, and end well on SIGTERM."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from math import ceil
from types import FrameType
from typing import cast

import uvicorn
import uvloop

from vaeflow.bundle.manifest import bundle_sha256
from vaeflow.errors import ServingError, VaeflowError
from vaeflow.registry.model import Model, locate_apart, locate_beside
from vaeflow.registry.versions import Located
from vaeflow.serving.app import create_app
from vaeflow.serving.connections import IDLE_SECONDS, Connection, Connections
from vaeflow.serving.service import Service, open_model
from vaeflow.serving.settings import Settings
from vaeflow.serving.trial import try_model

log = logging.getLogger("uvicorn.error")
# Waits until it is time, and gives the folder and version that the followed address stands for.
Poll = Callable[[], Awaitable[Located]]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
SWITCH_SECONDS = 0.0005
SO_ATTACH_FILTER = 26  # as asm-generic/socket.h numbers it
SETTLE_SECONDS = 0.1  # for those to be accepted who are connected already
# Of the loop meanwhile: on a busy machine the time may be over before the loop has looked even
# once. From a connection that waits to be accepted to its first request counted it takes five.
TURNS = 20
MOST_SETTLES = 10
PAUSE_SECONDS = 0.5  # after a refusal: what cannot be asked at all is not asked without end


async def poll_registry(service: Service) -> Located:
    """Ask the registry, when it is time again."""
    await asyncio.sleep(service.settings.follow)
    return await locate_beside(service.settings.model)


async def follow(service: Service, poll: Poll, notify: Callable[[Model], None]) -> None:
    """Poll for another version again and again, until cancelled.

    It is tried in a process of its own, then loaded and warmed beside the old one, which goes on
    when anything is wrong, whatever that is: the next version may be sound.

    Args:
        service: whose model it is.
        poll: see `Poll`.
        notify: called with each version that was taken.
    """
    refused = ""
    while True:
        try:
            fresh = await _newer(await poll(), service)
            if fresh is not None:
                log.info("version %s replaces %s", fresh.version, service.model.version)
                service.replace(fresh)
                notify(fresh)
            refused = ""
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if reason != refused:  # once, not at every look
                expected = isinstance(error, VaeflowError)
                log.warning(
                    "version %s goes on: %s", service.model.version, reason, exc_info=not expected
                )
                service.metrics.refused_model()
            refused = reason
            await asyncio.sleep(PAUSE_SECONDS)


async def _newer(located: Located, service: Service) -> Model | None:
    """Try and load the version that was found, if it is another."""
    present = service.model
    if located.version == present.version and present.sha256 == (
        located.sha256 or bundle_sha256(located.folder)
    ):
        return None
    await try_model(located, present, service.settings)
    return await asyncio.to_thread(open_model, located, service.settings)


class _Server(uvicorn.Server):
    """Uvicorn's server, which first answers what was accepted and then closes."""

    def __init__(
        self, config: uvicorn.Config, service: Service, notify: Callable[[Model], None]
    ) -> None:
        super().__init__(config)
        self.service, self.notify = service, notify

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log what is served where; where any free port would do, it is known only now."""
        assert sockets  # `serve` gives the one it listens at
        await super().startup(sockets)
        model = self.service.model
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        log.info("%s version %s running on http://%s:%d", model.name, model.version, host, port)
        self.notify(model)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop being ready. A second signal ends the wait."""
        if not self.service.ready:
            self.should_exit = True
        else:
            _end_within(self.service.settings.ends_within + 1)
        self.service.ready = False

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        service = self.service
        if not service.ready:
            # What had reached the machine by now is looked at first: accepted before the server
            # drains, and refused with an answer, rather than cut off, before it ends.
            await _settle(service)
            self.should_exit |= service.draining and not service.in_flight
            service.draining = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer who is at the door already, and close it."""
        for listening in sockets or []:
            _let_nobody_in(listening)
        await _settle(self.service)
        await super().shutdown(sockets)


async def _settle(service: Service) -> None:
    """Have the loop accept who is connected already, and read what they sent.

    Over when nothing has come for a while; under a load that does not end, after some such whiles.
    """
    for _ in range(MOST_SETTLES):
        before = service.received
        for _ in range(TURNS):
            await asyncio.sleep(SETTLE_SECONDS / TURNS)
        if service.received == before:
            return


def _let_nobody_in(listening: socket.socket) -> None:
    """Have the system drop packets that ask for a new connection, where it is Linux.

    Who connects between the last look and the end of a listening socket is cut off. Dropped, a
    client tries again a second later, at a port that is closed, or at another server's.
    """
    if not sys.platform.startswith("linux"):
        return
    # One instruction of the socket filter's language: return 0, how much of a packet to keep.
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    with suppress(OSError):
        listening.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program))
        )


def _end_within(seconds: float) -> None:
    """End this process then, whatever it does: a model may never end, nor a registry answer."""

    def end() -> None:
        log.error("not ended within %d seconds: what is left is cut off", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


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
    connections = Connections(service.settings)
    config = uvicorn.Config(
        create_app(service),
        access_log=False,
        http=cast("type[asyncio.Protocol]", partial(Connection, connections)),
        ws="none",
        proxy_headers=False,  # the limits of one address are those of whoever connects
        log_level="info",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=ceil(service.settings.ends_within),
    )
    # Long texts are read in a thread: what the loop has to do meanwhile waits no longer than this.
    sys.setswitchinterval(SWITCH_SECONDS)
    _keep_freed_memory()
    # What is there now stays: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    uvloop.run(_serve(_Server(config, service, notify), connections, bound, poll))


def _keep_freed_memory() -> None:
    """Have the C library keep a few megabytes that were freed, where it is glibc.

    It gives every buffer of more than 128 KiB back to the system at once, and each page of the next
    is then made anew: most of the time that a body of a megabyte takes.
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 4 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 16 << 20)


async def _serve(
    server: _Server, connections: Connections, bound: socket.socket, poll: Poll | None
) -> None:
    service = server.service
    port = service.settings.grpc
    tasks = [asyncio.create_task(connections.watch())]
    if poll:
        tasks.append(asyncio.create_task(follow(service, poll, server.notify)))
    try:
        async with AsyncExitStack() as stack:
            if port is not None:
                host = bound.getsockname()[0]
                from vaeflow.serving.grpc import answering

                address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                port = await stack.enter_async_context(answering(service, address))
                log.info("gRPC at port %d", port)
            await server.serve(sockets=[bound])
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        service.close()
