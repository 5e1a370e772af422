"""Commands that run the flow."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from vaeflow.errors import VaeflowError
from vaeflow.workspace import Workspace

commands = typer.Typer()
PANEL = "Retraining"


@commands.command(rich_help_panel=PANEL)
def retrain(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, for this run alone; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the registered model, instead of export.name.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run every stage even if nothing changed.")
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Send data and outputs to the DVC remote at the end.")
    ] = False,
    busy: Annotated[
        Literal["wait", "cancel"], typer.Option(help="What to do while another flow works here.")
    ] = "wait",
) -> None:
    """Bring every stage up to date, register the bundle, and promote it if it is better."""
    from prefect.exceptions import CancelledRun
    from prefect.flows import load_flow_from_entrypoint

    from vaeflow.overrides import parse
    from vaeflow.pipeline import check_parameters

    workspace = Workspace.find()
    overrides = parse(settings or [])
    # The flow checks them too; here it takes no server to find a typing mistake.
    check_parameters(workspace)
    # The flow is the workspace's own, for its users to change.
    path = workspace.root / "pipelines" / "retrain.py"
    workspace.require(path, "Restore it: git checkout pipelines")
    run = load_flow_from_entrypoint(f"{path}:retrain")
    try:
        run(str(workspace.root), name, overrides, force, push, busy)
    except CancelledRun as cancelled:
        raise VaeflowError(str(cancelled)) from None


@commands.command(rich_help_panel=PANEL)
def schedule(
    cron: Annotated[str, typer.Option(help='When to retrain, in UTC, e.g. "0 3 * * *".')],
) -> None:
    """Retrain on a schedule, until stopped."""
    from vaeflow.scheduling import serve

    serve(Workspace.find(), cron)
