"""Serving the retraining flow on a schedule, from one long-running process."""

from __future__ import annotations

from vaeflow.errors import ConfigError
from vaeflow.workspace import Workspace


def serve(flow, workspace: Workspace, cron: str) -> None:
    """Run the flow at the times of a cron expression, until the process is stopped.

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
    flow.serve(
        name=f"{flow.name}-scheduled", schedule=when, parameters={"workspace": str(workspace.root)}
    )
