"""Hostile clients, one kind after another, and an honest one beside them: `make attack`.

The attackers come from another address, 127.0.0.2. While each goes on, honest requests are all
answered, health is answered fast, nothing but documented refusals comes out, and memory stays
within its bound; afterwards the server ends in time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from serving_helpers import Server, npy, serving

pytestmark = [pytest.mark.slow, pytest.mark.attack]

ATTACKER = "127.0.0.2"
SECONDS = 8
MEMORY = 400 << 20  # bytes, of the server at its defaults
HEALTH = 0.05  # seconds, at 99 %
ANSWERS = {200, 400, 408, 413, 415, 422, 429, 431, 503, 504}
J, NPY = {"Content-Type": "application/json"}, {"Content-Type": "application/x-npy"}

# === Attackers: each goes on until it is told to stop, and returns the statuses that it saw ===

Attack = Callable[[Server, threading.Event], set[int]]


def connect(server: Server) -> socket.socket:
    host = urlsplit(server.url)
    return socket.create_connection((host.hostname, host.port), 10, source_address=(ATTACKER, 0))


def opened(server: Server, count: int, sent: bytes) -> list[socket.socket]:
    """Connections over each of which something was sent, as many as are let in."""
    connections = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            connections.append(connect(server))
            connections[-1].sendall(sent)
    return connections


def post(server: Server, path: str, body: bytes, headers: dict[str, str]) -> int:
    host = urlsplit(server.url)
    connection = http.client.HTTPConnection(
        host.hostname, host.port, timeout=60, source_address=(ATTACKER, 0)
    )
    with contextlib.closing(connection):
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status


def keeping(sent: bytes, drip: bytes = b"") -> Attack:
    """Open connections that never come to an end, again and again."""

    def attack(server: Server, stop: threading.Event) -> set[int]:
        while not stop.is_set():
            connections = opened(server, 300, sent)
            for _ in range(20):
                if stop.wait(0.2):
                    break
                for connection in connections if drip else ():
                    with contextlib.suppress(OSError):
                        connection.send(drip)
            for connection in connections:
                connection.close()
        return set()

    return attack


def posting(path: str, body: bytes, headers: dict[str, str], clients: int = 4) -> Attack:
    """Post the same, from several clients, again and again."""

    def attack(server: Server, stop: threading.Event) -> set[int]:
        seen: set[int] = set()

        def client() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    seen.add(post(server, path, body, headers))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seen

    return attack


def endless_header(server: Server, stop: threading.Event) -> set[int]:
    while not stop.is_set():
        with contextlib.suppress(OSError), connect(server) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nX: ")
            for _ in range(100):
                connection.sendall(b"a" * (1 << 20))
    return set()


def no_reader(server: Server, stop: threading.Event) -> set[int]:
    """Ask for large answers, several at once, and take none of them."""
    request = b"POST /sample?count=1024 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    connections = []
    for _ in range(200):
        with contextlib.suppress(OSError):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.bind((ATTACKER, 0))
            connection.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
            connection.sendall(request * 8)
            connections.append(connection)
    stop.wait()
    for connection in connections:
        connection.close()
    return set()


def silent_grpc(server: Server, stop: threading.Event) -> set[int]:
    """Connect to the port of gRPC, and say nothing, or what is no HTTP/2."""
    host, _, port = server.grpc.partition(":")
    while not stop.is_set():
        connections = []
        for index in range(200):
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, int(port)), 10)
                connections.append(connection)
                connection.sendall(b"\x00" * 1000 * (index % 2))
        stop.wait(3)
        for connection in connections:
            connection.close()
    return set()


def cancelled_grpc(server: Server, stop: threading.Event) -> set[int]:
    """Ask for much over gRPC, and go away."""
    import tritonclient.grpc as triton

    images = np.zeros((1024, 8, 8, 1), np.float32)
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    wanted = [triton.InferRequestedOutput("reconstruction")]
    while not stop.is_set():
        client = triton.InferenceServerClient(server.grpc)
        calls = [
            client.async_infer("digits-vae", [tensor], lambda result, error: None, outputs=wanted)
            for _ in range(50)
        ]
        stop.wait(0.1)
        for call in calls:
            call.cancel()
        client.close()
    return set()


def full_bodies(server: Server, stop: threading.Event) -> set[int]:
    """Send all but the last byte of many bodies."""
    length = 16 << 20
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connections = opened(server, 40, head + b"Content-Length: %d\r\n\r\n" % length)

    def send(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(SECONDS)
            connection.sendall(b" " * (length - 1))

    threads = [threading.Thread(target=send, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    stop.wait()
    for connection in connections:
        connection.close()
    for thread in threads:
        thread.join()
    return set()


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width: int, height: int, more: bytes = b"") -> bytes:
    """A grey picture, all black, of which one byte in a thousand is needed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height), 9))
    return b"\x89PNG\r\n\x1a\n" + head + more + rows + chunk(b"IEND", b"")


def npy_of_shape(shape: str) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


COMMENTS = chunk(b"tEXt", b"a\x00b") * 1_000_000
TENSOR = b'{"inputs":[{"name":"latents","shape":[1,8],"datatype":"FP32","data":[%s0]}]}'
INFER = "/v2/models/digits-vae/infer"
FEW = json.dumps({"images": np.zeros((128, 8, 8, 1)).tolist()}).encode()

ATTACKS: dict[str, Attack] = {
    "silent connections": keeping(b""),
    "heads that never end": keeping(b"POST /score HTTP/1.1\r\nHost: localhost\r\nX: ", b"a"),
    "bodies that never end": keeping(
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{", b" "
    ),
    "an endless header": endless_header,
    "answers that nobody takes": no_reader,
    "many full bodies": full_bodies,
    "silence at the port of gRPC": silent_grpc,
    "gRPC calls that are cancelled": cancelled_grpc,
    "long strings": posting(
        "/score", json.dumps({"images": [""] * 16000 + ["a" * 16000]}).encode(), J
    ),
    "many numbers": posting("/score", b'{"images":[' + b"0," * 8_000_000 + b"0]}", J),
    "many brackets": posting("/score", b'{"images":[%s[]]}' % (b"[[]]," * 3_000_000), J),
    "many strings": posting("/score", b'{"images":[%s""]}' % (b'"",' * 5_000_000), J),
    "one long text": posting("/score", b'{"a":"%s"}' % bytes(16_000_000), J),
    "many numbers in a tensor": posting(INFER, TENSOR % (b"0," * 8_000_000), J),
    "a large picture": posting("/encode", png(8191, 8191), {"Content-Type": "image/png"}),
    "a picture of comments": posting("/encode", png(8, 8, COMMENTS), {"Content-Type": "image/png"}),
    "a shape of many digits": posting(
        "/decode", npy_of_shape(f"({'9' * 4000}, {'9' * 4000})"), NPY
    ),
    "an empty shape": posting("/decode", npy_of_shape(f"(0, {2**62}, {2**62})"), NPY),
    "offers of other protocols": posting(
        "/sample", b"", {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x"}
    ),
    "as much as is allowed": posting("/score?samples=128", FEW, J, clients=16),
    "large answers": posting("/sample?count=1024", b"", {}, clients=16),
}

# === What is seen beside them ===


def memory(server: Server) -> int:
    """The most that the server has had, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


class Beside:
    """An honest client, and one that asks for health, until the block ends."""

    def __init__(self, server: Server):
        self._server = server
        self._stop = threading.Event()
        self.honest: list[int] = []
        self.health: list[float] = []

    def _ask(self) -> None:
        image = npy(np.zeros((1, 8, 8, 1), np.uint8))
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._stop.wait(0.01):
                self.honest.append(client.post("/encode", content=image, headers=NPY).status_code)

    def _look(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._stop.wait(0.01):
                start = time.perf_counter()
                assert client.get("/v2/health/live").status_code == 200
                self.health.append(time.perf_counter() - start)

    def __enter__(self) -> Beside:
        self._threads = [threading.Thread(target=work) for work in (self._ask, self._look)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def server(finished, tmp_path_factory) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))  # the attackers', too
    folder = tmp_path_factory.mktemp("server")
    with serving(finished / "outputs" / "bundle", folder, "--grpc-port", "0") as running:
        yield running
        assert running.stop() == 0
        log = running.log.read_text()
        assert "Traceback" not in log
        assert len(log) < 10_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_honest_clients_are_answered_beside(server, kind, capsys):
    stop, seen = threading.Event(), set[int]()
    attack = threading.Thread(target=lambda: seen.update(ATTACKS[kind](server, stop)))
    attack.start()
    time.sleep(0.5)
    with Beside(server) as beside:
        time.sleep(SECONDS)
    stop.set()
    attack.join()
    health = float(np.quantile(beside.health, 0.99))
    with capsys.disabled():
        print(
            f"\n{kind}: health {1000 * health:.1f} ms at 99 %, {len(beside.honest)} honest "
            f"requests, memory {memory(server) >> 20} MiB, {sorted(seen)}"
        )
    assert set(beside.honest) == {200}
    assert seen <= ANSWERS
    assert health <= HEALTH
    assert memory(server) <= MEMORY


@pytest.mark.parametrize("kind", ["answers that nobody takes", "bodies that never end"])
def test_it_ends_in_time(finished, tmp_path, kind):
    with serving(finished / "outputs" / "bundle", tmp_path) as server:
        stop = threading.Event()
        attack = threading.Thread(target=ATTACKS[kind], args=(server, stop))
        attack.start()
        time.sleep(3)
        start = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        try:
            server.process.wait(35)
            assert time.monotonic() - start < 32
        finally:
            stop.set()
            attack.join()
