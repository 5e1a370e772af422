"""Serving the retraining flow on a schedule, from one long-running process."""

from __future__ import annotations

import os
import signal
import sys

from vaeflow import prefect_server
from vaeflow.errors import ConfigError, VaeflowError, without_secrets
from vaeflow.processes import process_group
from vaeflow.workspace import Workspace

FLOW = "pipelines/retrain.py:retrain"
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
    with prefect_server.at_hand(lasting=True) as server:
        server.wait(print)
        print(without_secrets(f"Prefect's server and web page: {server.page}"), flush=True)
        with process_group(
            command,
            cwd=workspace.root,
            env={**os.environ, "PREFECT_API_URL": server.api},
            grace=RUNNER_GRACE_SECONDS,
            end=signal.SIGINT,  # at SIGTERM, Prefect's runner forgets to wait for its own end
        ) as process:
            status = process.wait()
    raise VaeflowError(f"`prefect flow serve` ended with status {status}.")
