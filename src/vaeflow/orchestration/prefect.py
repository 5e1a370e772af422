"""Prefect's server, and what flows and schedules need of Prefect.

A flow uses the server that the user names, or one of our own for as long as it is needed. Prefect
starts a temporary server by itself and gives it 20 seconds. An empty home (the tables are made in
some 140 steps), a cold disk or busy cores need more; so ours is waited for as long as its process
lives.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import IO, Any

from vaeflow.common.processes import process_group
from vaeflow.common.workspace import Workspace
from vaeflow.errors import ConfigError, VaeflowError, hide_secrets

USUAL_PORT = 4200
START_SECONDS = 600
SECONDS_BEFORE_WORD = 2.0
WAITING = "waiting for Prefect's server to start (a first start makes its database)"
FLOW = "pipelines/retrain.py:retrain"
OF_A_NEWER = "Can't locate revision"  # what Alembic says of a database
# A flow that is stopped gives its stage ten seconds, so Prefect's runner, stopped together with it,
# needs more. It hangs when it is stopped during a run, and is then killed.
RUNNER_GRACE_SECONDS = 20


def without_traceback(function: Callable[..., Any]) -> Callable[..., Any]:
    """End a run that a user's mistake stopped as failed, with that message; bugs are raised."""
    from prefect.states import Failed

    # Prefect would look for the names in them here, where the wrapper is.
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except VaeflowError as error:
            return Failed(message=str(error), data=error)

    return guarded


def result_of(state: Any) -> Any:
    """Return the value of a task that was called for its state, or raise what stopped it.

    The flow's own state then has the sentence. A task that ends with a failed state of its own
    would otherwise return as if it had a value, and Prefect would only count the failed states.
    """
    return state.result()


@dataclass(frozen=True)
class Server:
    """A server to be used.

    Attributes:
        api: its API's address.
        process: the server, where it is our own.
        log: what our own one says.
    """

    api: str
    process: subprocess.Popen[Any] | None = None
    log: IO[str] | None = None

    @property
    def page(self) -> str:
        """The address of its web page."""
        return self.api.removesuffix("/api")

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until it answers.

        Args:
            say: called with a line when that takes more than a moment.

        Raises:
            VaeflowError: its process ended, or it did not answer within ten minutes.
        """
        if self.process is None:
            return
        begin = time.monotonic()
        said = False
        while not self._answers():
            waited = time.monotonic() - begin
            if self.process.poll() is not None:
                raise self._failure(f"ended with status {self.process.returncode}")
            if waited > START_SECONDS:
                raise self._failure(f"did not answer within {START_SECONDS // 60} minutes")
            if waited > SECONDS_BEFORE_WORD and not said:
                said = True
                say(WAITING)
            time.sleep(0.1)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run flows of this process with this server; send it all they have logged at the end."""
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.api}):
            try:
                yield
            finally:
                for worker in (EventsWorker, APILogWorker):
                    worker.drain_all(timeout=10)

    def _answers(self) -> bool:
        # Another process's server may answer at this port, while ours is still to find it taken.
        if self.process is None or not _listens(self.process, int(self.page.rpartition(":")[2])):
            return False
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=5):
                return True
        except OSError:
            return False

    def _failure(self, what: str) -> VaeflowError:
        assert self.log is not None
        self.log.seek(0)
        text = self.log.read()
        if OF_A_NEWER in text:
            return VaeflowError(
                f"Prefect {version('prefect')} cannot read its database in PREFECT_HOME (usually "
                "~/.prefect), which a newer Prefect has made. Install that one, or give this one a "
                "folder of its own: export PREFECT_HOME=FOLDER"
            )
        said = "\n".join(f"  {line}" for line in text.splitlines()[-6:])
        return VaeflowError(
            f"Prefect's server {what}. Its last words:\n{said}\n"
            "It keeps its database in PREFECT_HOME (usually ~/.prefect), which must be a folder "
            "that can be written; or name a running server in PREFECT_API_URL."
        )


@contextmanager
def prefect_server(*, lasting: bool = False) -> Iterator[Server]:
    """Provide a server for the block: the one in `PREFECT_API_URL`, or one that starts now.

    The block goes on at once, to do other things meanwhile; `Server.wait` waits.

    Args:
        lasting: whether it is to start runs at their times, show its page, and have the usual port
            if that is free; otherwise it serves this block alone.

    Raises:
        ConfigError: nobody answers at `PREFECT_API_URL`.
    """
    from prefect.settings import PREFECT_API_URL

    if api := PREFECT_API_URL.value():
        _require_answer(api)
        yield Server(api)
        return
    _bypass_proxy()
    port = _free_port(USUAL_PORT if lasting else 0)
    api = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "vaeflow.common.processes", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [] if lasting else ["--no-scheduler", "--no-late-runs", "--no-ui"]
    # The page would ask for runs at the usual port.
    environment = {**os.environ, "PREFECT_UI_API_URL": api}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        process_group(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        yield Server(api, process, log)


def _bypass_proxy() -> None:
    """Keep what this process and its children say to this machine from a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        others = os.environ.get(name)
        os.environ[name] = f"{others},127.0.0.1" if others else "127.0.0.1"


def _require_answer(api: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    # Whoever answers, even with a refusal, is there; Prefect says the rest.
    if problem is not None:
        raise ConfigError(
            f"PREFECT_API_URL is {api}, and no Prefect server answers there "
            f"({problem}). Start it (prefect server start), or forget the address to have a server "
            "started for you: unset PREFECT_API_URL, or, where a profile of Prefect's has it, "
            "prefect config unset PREFECT_API_URL."
        )


def _free_port(wanted: int) -> int:
    """Return the port wanted, or any other when that one is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            # As the server does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise VaeflowError("no free port on 127.0.0.1 for Prefect's server.")


def _listens(process: subprocess.Popen[Any], port: int) -> bool:
    """Return whether a process or one that it started listens at a port."""
    import psutil

    try:
        leader = psutil.Process(process.pid)
        for member in (leader, *leader.children(recursive=True)):
            for connection in member.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    except psutil.Error:
        pass  # one of them has just ended
    return False


def serve(workspace: Workspace, cron: str) -> None:
    """Run the retraining flow at the times of a cron expression, until the process is stopped.

    Args:
        workspace: whose flow is run, one run at a time.
        cron: five fields, in UTC.

    Raises:
        ConfigError: the expression is not valid.
    """
    from prefect.schedules import Cron

    try:
        Cron(cron)
    except ValueError as error:
        raise ConfigError(
            f"--cron {cron!r} is no cron expression of five fields ({error}). "
            'For every night at three: "0 3 * * *".'
        ) from None
    command = [sys.executable, "-m", "prefect", "flow", "serve", FLOW]
    command += ["--name", "scheduled", "--cron", cron, "--limit", "1"]
    with prefect_server(lasting=True) as server:
        server.wait(print)
        print(hide_secrets(f"Prefect's server and web page: {server.page}"), flush=True)
        with process_group(
            command,
            cwd=workspace.root,
            env={**os.environ, "PREFECT_API_URL": server.api},
            grace=RUNNER_GRACE_SECONDS,
            end=signal.SIGINT,  # at SIGTERM, Prefect's runner forgets to wait for its own end
        ) as process:
            status = process.wait()
    raise VaeflowError(f"`prefect flow serve` ended with status {status}.")
