"""Hold every connection to bounds: how many there are, how large a head is, how long one waits.

Uvicorn parses HTTP and answers; it bounds none of this. Granian, measured beside it, has a time-out
for heads and none for clients that do not read, nor a share for each address; so the bounds are
kept here, in one place, by one look at all connections twice a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import httptools
import pydantic_core
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vaeflow.serving.settings import Settings

HEAD_BYTES = 32 << 10  # of a request's line and headers
HEAD_SECONDS = 10  # from its first byte, or from the connection on, to its last
IDLE_SECONDS = 60  # between two requests
# A client has so long to take what is sent, and a second more for every so many bytes of it.
WRITE_SECONDS, WRITE_RATE = 10, 64 << 10
PIPELINED = 16  # requests sent before the first of them is answered
LEAVE_SECONDS = 1  # for a request under way on an open connection when the server ends
LOOK_SECONDS = 0.5
SPARE_FILES = 64  # open files that are not connections

NEW, IDLE, HEAD, WORK = "new", "idle", "head", "work"


class Connections:
    """All connections of a server.

    Args:
        settings: how many there may be, in all and of one address.
    """

    def __init__(self, settings: Settings) -> None:
        # A file descriptor each: what the system does not give cannot be accepted.
        self._most = min(settings.connections, _most_files() - SPARE_FILES)
        self._most_of_address = settings.connections_of_address or self._most
        self._open: dict[Connection, None] = {}  # in the order in which they came
        self._of_address: Counter[str] = Counter()

    def admit(self, connection: Connection) -> bool:
        """Return whether one more is let in, in the place of an idle one if there must be one."""
        address = connection.address
        full = len(self._open) >= self._most and self._close_idle("")
        full |= self._of_address[address] >= self._most_of_address and self._close_idle(address)
        self._open[connection] = None
        self._of_address[address] += 1
        return not full

    def forget(self, connection: Connection) -> None:
        """Count a connection no more."""
        if connection in self._open:
            del self._open[connection]
            self._of_address[connection.address] -= 1
            self._of_address += Counter()  # drops the addresses of which there are none

    def _close_idle(self, address: str) -> bool:
        """Close the connection that was idle longest, of an address if one is given.

        Returns:
            Whether there is none.
        """
        idle = [
            connection
            for connection in self._open
            if connection.waiting and connection.address == (address or connection.address)
        ]
        if idle:
            longest = min(idle, key=lambda connection: connection.since)
            longest.transport.abort()
            self.forget(longest)
        return not idle

    async def watch(self) -> None:
        """Look at all connections again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for connection in list(self._open):
                connection.look()


class Connection(HttpToolsProtocol):
    """One client's connection; see `Connections`.

    Attributes:
        address: of the client, without its port.
        since: the loop's time when it began to wait for what it waits for.
    """

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all = connections
        self._state = NEW
        # Bytes of a head that is not whole, those of its headers, and since when it comes.
        self._head, self._head_kept, self._head_since = 0, 0, 0.0
        self._written: tuple[float, float] | None = None  # since when a client must take how much
        # When to leave, since when it closes, and since when it is refused: all 0 before.
        self._leaves = self._closed = self._ended = 0.0
        self.address = ""
        self.since = self.loop.time()

    @property
    def waiting(self) -> bool:
        """Whether nothing of a request has come since the last was answered."""
        return self._state in (NEW, IDLE)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, or refuse it where there are too many."""
        super().connection_made(cast("asyncio.Transport", _Quiet(transport)))
        self.address = self.client[0] if self.client else ""
        if not self._all.admit(self):
            self._end(503, "too many connections; try again later.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        self._all.forget(self)
        super().connection_lost(exc)

    # === What arrives ===

    def data_received(self, data: bytes) -> None:
        """Parse what has come, within the bounds of a head."""
        if self._deaf:
            return  # what a client still sends that was refused
        if self.waiting:
            self._become(HEAD)
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
            except httptools.HttpParserError:
                self._end(400, "this is no HTTP/1.1.")
                return
        if self._head_since:  # that of the next request may come while one is answered
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._end(431, f"the headers may have {HEAD_BYTES} bytes at most.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, while they are within the bound."""
        self._head_kept += len(name) + len(value)
        if self._head_kept <= HEAD_BYTES:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._head = self._head_kept = 0
        self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Start to answer a request whose head is whole."""
        self._head_since = 0.0
        if self._deaf or self.parser.should_upgrade():
            return
        if self._head_kept + len(self.url) > HEAD_BYTES or len(self.pipeline) >= PIPELINED:
            self._end(431, f"the headers may have {HEAD_BYTES} bytes at most.")
            return
        self._become(WORK)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of a body, unless its request was refused."""
        if not self._deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Hand on the end of a body, unless its request was refused."""
        if not self._deaf and not self.parser.should_upgrade():
            super().on_message_complete()

    @property
    def _deaf(self) -> bool:
        return bool(self.transport.is_closing() or self._ended)

    def _head_without_offer(self) -> bytes:
        """Write a request's head anew, without the offer of another protocol that it makes.

        Java's client makes one with every first request. It is not taken, and the parser, which
        takes what follows for that protocol, begins again.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                kept = [word for word in value.split(b",") if b"upgrade" not in word.lower()]
                value = b",".join(kept)
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_response_complete(self) -> None:
        """Wait for another request, or take up the next of those that are there."""
        if not self.pipeline:
            self._become(IDLE)
        super().on_response_complete()

    # === What is sent ===

    def pause_writing(self) -> None:
        """Begin to count the time in which the client must take what is sent."""
        super().pause_writing()
        unsent = self.transport.get_write_buffer_size()
        self._written = self.loop.time(), WRITE_SECONDS + unsent / WRITE_RATE

    def resume_writing(self) -> None:
        """Stop to count it."""
        super().resume_writing()
        self._written = None

    def _end(self, status: int, message: str) -> None:
        """Refuse what is no request, and close when the client has had time to read why."""
        if self._state == WORK:  # in the middle of an answer there is no place for another
            self.transport.abort()
            return
        body = pydantic_core.to_json({"error": message})
        head = b"content-type: application/json\r\nconnection: close\r\n"
        length = b"content-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + length + body)
        self.transport.write_eof()
        self._ended = self.loop.time()

    # === Time ===

    def look(self) -> None:
        """Close the connection where what it waits for has taken too long."""
        now = self.loop.time()
        waited = now - self.since
        if self._written is not None and now - self._written[0] > self._written[1]:
            self.transport.abort()
        elif self.transport.is_closing():
            self._closed = self._closed or now
            if now - self._closed > WRITE_SECONDS and self._written is None:
                self.transport.abort()
        elif self._ended:
            if now - self._ended > LEAVE_SECONDS:
                self.transport.close()
        elif (self._state == HEAD and waited > HEAD_SECONDS) or (
            0 < self._head_since < now - HEAD_SECONDS
        ):
            self._end(408, f"the headers were not whole within {HEAD_SECONDS} seconds.")
        elif (self._state == NEW and waited > HEAD_SECONDS) or (
            self.waiting and 0 < self._leaves < now
        ):
            self.transport.close()

    def shutdown(self) -> None:
        """Close once a request is answered that is here, or may be under way."""
        if self._state == WORK:
            self.cycle.keep_alive = False
        else:
            self._leaves = self.loop.time() + LEAVE_SECONDS

    def _become(self, state: str) -> None:
        self._state, self.since = state, self.loop.time()


class _Quiet:
    """A transport that drops what is written after its end; uvloop's raises an error."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._ended and not self._transport.is_closing():
            self._transport.write(data)

    def write_eof(self) -> None:
        if not self._ended and not self._transport.is_closing():
            self._transport.write_eof()
        self._ended = True


def _most_files() -> int:
    """Allow this process as many open files as the system lets it; return how many."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return soft if soft != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
