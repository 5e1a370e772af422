"""Real servers, and many clients at once."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from helpers import change_manifest

from vaeflow.common.workspace import Workspace
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect


class Server:
    """A running `vaeflow serve`."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log
        self.url = ""

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"running on (http://\S+)", self.log.read_text()):
                self.url = found[1]
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.url}/v2/health/ready").status_code == 200:
                        return
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    @property
    def grpc(self) -> str:
        """Where it answers over gRPC, if it was told to."""
        found = re.search(r"gRPC at port (\d+)", self.log.read_text())
        return f"127.0.0.1:{found[1]}"

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(
    model: object, folder: Path, *options: str, python: object = sys.executable, **environment: str
) -> Iterator[Server]:
    log = folder / "server.log"
    command = [str(python), "-m", "vaeflow", "serve", "--model", str(model), "--port", "0"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *options],
            stdout=stream,
            stderr=stream,
            cwd=folder,
            env={**os.environ, **environment},
        )
    try:
        server = Server(process, log)
        server.wait_until_ready()
        yield server
    finally:
        process.kill()
        process.wait()


def together(count: int, call) -> list:
    """Results of calls made at the same time, by index."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def work(index: int) -> None:
        barrier.wait()
        results[index] = call(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def sent(server: Server, path: str, count: int) -> list[http.client.HTTPConnection]:
    """Connections over each of which a request has been sent, and no answer been read."""
    connections = []
    for _ in range(count):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.request("POST", path)
        connections.append(connection)
    return connections


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy`."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def register_champion(place: Workspace, **changes: object) -> str:
    """Register the bundle, with other entries in its manifest, as champion, ungated; its number."""
    change_manifest(place.bundle, **changes)
    version = register(place)
    connect(place).set_registered_model_alias(version.name, "champion", version.number)
    return version.number
