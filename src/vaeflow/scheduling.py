"""Serving the retraining flow on a schedule, from one long-running process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from vaeflow.errors import ConfigError, VaeflowError
from vaeflow.processes import process_group
from vaeflow.workspace import Workspace

PREFECT_PORT = 4200
SERVER_SECONDS = 120


def serve(flow, workspace: Workspace, cron: str) -> None:
    """Run the flow at the times of a cron expression, until the process is stopped.

    Args:
        flow: the Prefect flow, loaded from a file of the workspace.
        workspace: given to the flow.
        cron: five fields, in the machine's time zone.

    Raises:
        ConfigError: the expression is not valid.
    """
    from prefect.schedules import Cron

    try:
        when = Cron(cron)
    except ValueError as error:
        raise ConfigError(
            f"--cron {cron!r} is no cron expression of five fields ({error}). "
            'For every night at three: "0 3 * * *".'
        ) from None
    # Prefect notes down where the flow is as a path from the working directory.
    os.chdir(workspace.root)
    with _server():
        flow.serve(
            name=f"{flow.name}-scheduled",
            schedule=when,
            parameters={"workspace": str(workspace.root)},
        )


@contextmanager
def _server() -> Iterator[None]:
    """The Prefect server in use, or one of our own: a temporary one starts no scheduled runs."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    address = f"http://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    command += ["--port", address.rsplit(":", 1)[1]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with process_group(command, **quiet) as process:
        _wait_until_healthy(f"{address}/api", process)
        print(f"Prefect's server and web page: {address}", flush=True)
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            yield


def _free_port() -> int:
    """Prefect's usual port, or any other when that one is taken."""
    for port in (PREFECT_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise VaeflowError("no free port on 127.0.0.1 for Prefect's server.")


def _wait_until_healthy(api: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise VaeflowError(
        "Prefect's server did not start. See why: prefect server start; "
        "or name a running one in PREFECT_API_URL."
    )
