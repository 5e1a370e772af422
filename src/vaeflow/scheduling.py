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

FLOW = "pipelines/retrain.py:retrain"
PREFECT_PORT = 4200
SERVER_SECONDS = 120
# A flow that is stopped gives its stage ten seconds, so Prefect's runner, stopped together with it,
# needs more. It hangs when it is stopped during a run, and is then killed.
RUNNER_GRACE_SECONDS = 20


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
    with (
        _server() as api,
        process_group(
            command,
            cwd=workspace.root,
            env={**os.environ, "PREFECT_API_URL": api},
            grace=RUNNER_GRACE_SECONDS,
        ) as process,
    ):
        status = process.wait()
    raise VaeflowError(f"`prefect flow serve` ended with status {status}.")


@contextmanager
def _server() -> Iterator[str]:
    """The API of the server in use, or of one of our own: a temporary one fires no schedules."""
    from prefect.settings import PREFECT_API_URL

    if api := PREFECT_API_URL.value():
        yield api
        return
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # The page would ask for runs at the usual port.
    environment = {**os.environ, "PREFECT_UI_API_URL": f"{address}/api"}
    with process_group(command, env=environment, **quiet) as process:
        _wait_until_healthy(f"{address}/api", process)
        print(f"Prefect's server and web page: {address}", flush=True)
        yield f"{address}/api"


def _free_port() -> int:
    """Prefect's usual port, or any other when that one is taken."""
    for port in (PREFECT_PORT, 0):
        with socket.socket() as probe:
            # As the server does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
