"""Several server processes on one port, and the one that keeps them.

Each worker has a socket of its own, bound to the same port: the system spreads connections over
them, and one that is killed takes no other's with it. The keeper serves nothing. It starts the
workers, replaces those that end, looks for new versions on behalf of all, and drains all.

They speak in lines of JSON: a worker's input is its orders, then each new version; its output is
the model that it serves now. When the input ends, the keeper has died, and the worker drains.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vaeflow.errors import ServingError, VaeflowError
from vaeflow.registry.model import Model, locate_beside
from vaeflow.registry.versions import Located
from vaeflow.serving import server
from vaeflow.serving.metrics import SHARED, forget
from vaeflow.serving.service import Service, open_model
from vaeflow.serving.settings import Settings

log = logging.getLogger("vaeflow.workers")

SHORT_LIFE = 5  # seconds; what ends sooner is not started again at once


def run(settings: Settings, host: str, port: int) -> None:
    """Serve with as many workers as the settings say, until SIGTERM or SIGINT.

    Raises:
        ServingError: the address is not to be had, or this system cannot share it.
        BundleError, RegistryError: see `vaeflow.registry.model`.
    """
    if settings.workers == 1:
        server.run(settings, server.listen(host, port))
        return
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ServingError("this system cannot share a port; serve with --workers 1.")
    server.listen(host, port).close()  # or a port that another server shares would be taken too
    logging.basicConfig(format="%(levelname)s:     %(message)s", level=logging.INFO)
    # Bound for as long as there are workers, and never listening: the port stays theirs.
    with server.listen(host, port, shared=True) as held, tempfile.TemporaryDirectory() as metrics:
        keeper = _Keeper(settings, (host, held.getsockname()[1]), Path(metrics))
        sys.exit(asyncio.run(keeper.run()))


class _Keeper:
    def __init__(self, settings: Settings, address: tuple[str, int], metrics: Path):
        self._settings, self._address, self._metrics = settings, address, metrics
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._ending = asyncio.Event()
        self._first = asyncio.Event()  # a worker serves

    async def run(self) -> int:
        """Keep the workers until a signal; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        self._model = self._told = await locate_beside(self._settings.model)

        # The first shows whether the model can be served at all.
        tasks = [asyncio.create_task(self._keep(0))]
        await self._until_first(tasks[0])
        if self._first.is_set():
            tasks += [asyncio.create_task(self._keep(n)) for n in range(1, self._settings.workers)]
        follower = asyncio.create_task(self._follow())
        statuses = await asyncio.gather(*tasks)
        follower.cancel()
        return max(statuses)

    async def _until_first(self, task: asyncio.Task[Any]) -> None:
        first = asyncio.create_task(self._first.wait())
        await asyncio.wait({first, task}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()

    def _end(self) -> None:
        """Drain all; a second time, end the wait."""
        self._ending.set()
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.terminate()

    async def _keep(self, index: int) -> int:
        """Start a worker, and another when it ends before it is told to; return its last status."""
        while not self._ending.is_set():
            started = time.monotonic()
            process = self._processes[index] = await self._start()
            status = await self._watch(process)
            forget(process.pid, self._metrics)
            if self._ending.is_set():
                return 0 if status == -signal.SIGTERM else abs(status)
            if not self._first.is_set():
                return status  # it has said why
            log.warning("worker %d ended (%d); another takes its place", process.pid, status)
            if time.monotonic() - started < SHORT_LIFE:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), 1)
        return 0

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vaeflow.serving.workers"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, SHARED: str(self._metrics)},
            start_new_session=True,  # a terminal's Ctrl-C reaches the keeper, which tells them
        )
        orders = {"settings": asdict(self._settings), "address": self._address}
        self._say(process, {**orders, "model": _as_json(self._model)})
        return process

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        """Note which model a worker says that it serves, until it ends."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            said = json.loads(line)
            self._model = _from_json(said)
            self._first.set()
        return await process.wait()

    def _say(self, process: asyncio.subprocess.Process, content: dict[str, Any]) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it has just ended: `_keep` sees to that
            process.stdin.write(json.dumps(content).encode() + b"\n")

    async def _follow(self) -> None:
        """Poll for new versions, and send them to the workers, which take or refuse them."""
        refused = ""
        while self._settings.follow:
            await asyncio.sleep(self._settings.follow)
            try:
                found = await locate_beside(self._settings.model)
            except Exception as error:  # whatever it is, the next look may find one
                if str(error) != refused:  # once, not at every look
                    log.warning("no new version: %s", error)
                refused = str(error)
                continue
            refused = ""
            if found != self._told:
                self._told = found
                for process in self._processes.values():
                    self._say(process, _as_json(found))


def main() -> None:
    """Run one worker: its orders are the first line of its input."""
    # Byte by byte: what follows the line is the event loop's to read.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as pipe:
        orders = json.loads(pipe.readline())
    settings = Settings(**orders["settings"])
    try:
        bound = server.listen(*orders["address"], shared=True)
        model = open_model(_from_json(orders["model"]), settings)
        server.serve(Service(model, settings), bound, _listener(), _notify)
    except VaeflowError as error:
        print(f"vaeflow: {error}", file=sys.stderr)
        sys.exit(2)


def _listener() -> server.Poll:
    """Read versions from the input; when it ends, this worker does too."""
    reader: asyncio.StreamReader | None = None

    async def poll() -> Located:
        nonlocal reader
        if reader is None:
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        if not (line := await reader.readline()):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        return _from_json(json.loads(line))

    return poll


def _notify(model: Model) -> None:
    print(json.dumps(_as_json(Located(model.folder, model.version, model.sha256))), flush=True)


def _as_json(located: Located) -> dict[str, str | None]:
    return {**located._asdict(), "folder": str(located.folder)}


def _from_json(content: dict[str, Any]) -> Located:
    return Located(Path(content["folder"]), content["version"], content["sha256"])


if __name__ == "__main__":
    main()
