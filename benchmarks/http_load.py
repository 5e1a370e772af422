"""Send one request again and again over many connections, in a process that does nothing else.

    python benchmarks/http_load.py http://127.0.0.1:8000/sample --clients 32 --seconds 10
    python benchmarks/http_load.py http://127.0.0.1:8000/sample --rate 3000 --seconds 10

With `--clients` each sends its next request when the last is answered (a closed loop). With
`--rate` requests a second are due whatever becomes of them (an open loop): each goes out on a free
connection or on a new one, and its time counts from when it was due. Prints JSON: answers by
status, and times of those with status 200 in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

MOST_CONNECTIONS = 800
LAST_SECONDS = 30  # for the answers that are still to come when the time is over


class Load:
    """What is sent where, and what came back."""

    def __init__(self, url: str, body: bytes, headers: list[str]):
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", *headers]
        lines += [f"Content-Length: {len(body)}", "", ""]
        self.request = "\r\n".join(lines).encode() + body
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.end = math.inf  # a connection that is free by then sends again, in a closed loop
        self.free: list[Connection] | None = None  # those that wait for work, in an open loop
        self.open = 0

    async def closed_loop(self, clients: int, seconds: float) -> None:
        """Each client on a connection of its own."""
        self.end = time.perf_counter() + seconds
        for _ in range(clients):
            await self.connect(time.perf_counter())
        await asyncio.sleep(self.end - time.perf_counter())
        await self._carry_out()

    async def open_loop(self, rate: float, seconds: float) -> None:
        """Requests at even times; those that find no connection are counted as `unsent`."""
        self.free, sent, start = [], 0, time.perf_counter()
        connecting = set()
        while (now := time.perf_counter()) < start + seconds:
            while sent < (now - start) * rate:
                due = start + sent / rate
                if self.free:
                    self.free.pop().send(due)
                elif self.open < MOST_CONNECTIONS:
                    connecting.add(task := asyncio.create_task(self.connect(due)))
                    task.add_done_callback(connecting.discard)
                else:
                    self.statuses["unsent"] += 1
                sent += 1
            await asyncio.sleep(0.001)
        await self._carry_out()

    async def connect(self, due: float) -> None:
        """Send on a new connection."""
        self.open += 1
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self.open -= 1
            self.statuses["broken"] += 1
        else:
            made.send(due)

    def answered(self, connection: Connection, status: str, seconds: float) -> None:
        """Count an answer; its connection is free."""
        self.statuses[status] += 1
        if status == "200":
            self.seconds.append(seconds)
        if self.free is not None:
            self.free.append(connection)
        elif (now := time.perf_counter()) < self.end:
            connection.send(now)
        else:
            connection.close()

    def lost(self, connection: Connection, answered: bool) -> None:
        """Count a connection that is closed."""
        self.open -= 1
        if self.free and connection in self.free:
            self.free.remove(connection)
        self.statuses["broken"] += not answered

    async def _carry_out(self) -> None:
        """Wait for the last answers."""
        end = time.perf_counter() + LAST_SECONDS
        while self.open > len(self.free or ()) and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.statuses["unanswered"] = self.open - len(self.free or ())


class Connection(asyncio.Protocol):
    """One request at a time. As little of HTTP as the server's answers need."""

    def __init__(self, load: Load):
        self._load = load
        self._data, self._due, self._waits = b"", 0.0, False

    def connection_made(self, transport) -> None:
        """Keep the transport."""
        self._transport = transport
        self.close = transport.close

    def send(self, due: float) -> None:
        """Send the request."""
        self._due, self._data, self._waits = due, b"", True
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        """Take the answer to pieces when it is whole."""
        self._data = self._data + data if self._data else data
        head = self._data.find(b"\r\n\r\n")
        if head < 0:
            return
        start = self._data.index(b"content-length: ") + 16
        length = int(self._data[start : self._data.index(b"\r", start)])
        if len(self._data) >= head + 4 + length:
            self._waits = False
            seconds = time.perf_counter() - self._due
            self._load.answered(self, self._data[9:12].decode(), seconds)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer that is still waited for will not come."""
        self._load.lost(self, answered=not self._waits)


def main() -> None:
    """Send, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, help="a file with the request's body")
    parser.add_argument("--header", action="append", default=[], help='"Name: value"')
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rate", type=float, help="requests a second, in an open loop")
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()

    load = Load(options.url, options.body.read_bytes() if options.body else b"", options.header)
    if options.rate:
        asyncio.run(load.open_loop(options.rate, options.seconds))
    else:
        asyncio.run(load.closed_loop(options.clients, options.seconds))
    print(json.dumps(_report(load, options.seconds)))


def _report(load: Load, seconds: float) -> dict[str, object]:
    times = sorted(load.seconds) or [math.nan]
    return {
        "statuses": {status: count for status, count in load.statuses.items() if count},
        "accepted_per_second": round(len(load.seconds) / seconds, 1),
        "p50_ms": round(1000 * times[len(times) // 2], 3),
        "p99_ms": round(1000 * times[len(times) * 99 // 100], 3),
    }


if __name__ == "__main__":
    main()
