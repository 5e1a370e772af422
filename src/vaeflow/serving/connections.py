"""HTTP connections that send an answer in one piece."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """Uvicorn's, but for how it writes.

    Uvicorn hands an answer's head and its body to the system one after the other, and each call
    costs more than all of its own work on a small answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Write through `_Gathered`."""
        super().connection_made(_Gathered(transport, self.loop))


class _Gathered:
    """A transport that passes on at once what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str):
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
