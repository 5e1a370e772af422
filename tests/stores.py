"""Stores that are no folders here: a real web server, and fsspec's store in memory."""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import fsspec


class WebServer(http.server.ThreadingHTTPServer):
    """A server of a folder.

    Attributes:
        asked: how often for a path, by method and path.
        fault: called with the path of a request; a status that is to be answered, or None.
        cuts: called with the path; whether half of the content is all that comes.
        url: of the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.asked: Counter[tuple[str, str]] = Counter()
        self.fault: Callable[[str], int | None] = lambda path: None
        self.cuts: Callable[[str], bool] = lambda path: False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def gets(self, ending: str = "") -> Counter[str]:
        """Count the requests for contents, by path."""
        found = {p: n for (method, p), n in self.asked.items() if method == "GET"}
        return Counter({path: n for path, n in found.items() if path.endswith(ending)})


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: WebServer

    def send_head(self):
        self.server.asked[self.command, self.path] += 1
        if status := self.server.fault(self.path):
            self.send_error(status)
            return None
        return super().send_head()

    def copyfile(self, source, outputfile):
        content = source.read()
        whole = not self.server.cuts(self.path)
        outputfile.write(content if whole else content[: len(content) // 2])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """Serve a folder at a free port until the block ends."""
    with WebServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def stored(kind: str, folder: Path) -> Iterator[str]:
    """Have a copy of a folder in a store; yields its URL, which ends with the folder's name."""
    if kind == "http":
        with web_server(folder.parent) as server:
            yield f"{server.url}/{quote(folder.name)}"
        return
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            place = f"/{folder.name}/{path.relative_to(folder)}"
            system.makedirs(str(Path(place).parent), exist_ok=True)
            system.pipe_file(place, path.read_bytes())
    try:
        yield f"memory://{folder.name}"
    finally:
        system.rm(f"/{folder.name}", recursive=True)
