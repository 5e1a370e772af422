"""Commands that run the flow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import typer

from vaeflow.common.workspace import Workspace
from vaeflow.errors import VaeflowError

commands = typer.Typer()
PANEL = "Retraining"


@commands.command(rich_help_panel=PANEL)
def retrain(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, for this run alone; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the registered model, instead of export.name.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run every stage even if nothing changed.")
    ] = False,
    pull: Annotated[
        bool, typer.Option("--pull", help="Fetch data and outputs from the DVC remote first.")
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Send data and outputs to the DVC remote at the end.")
    ] = False,
    busy: Annotated[
        Literal["wait", "cancel"], typer.Option(help="What to do while another flow works here.")
    ] = "wait",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show all that otherwise goes into a log file.")
    ] = False,
) -> None:
    """Bring every stage up to date, register the bundle, and promote it if it is better."""
    from vaeflow.config.edit import parse
    from vaeflow.orchestration import console
    from vaeflow.orchestration.dvc import fetch
    from vaeflow.orchestration.prefect import prefect_server
    from vaeflow.registry.register import preload

    workspace = Workspace.find()
    overrides = {**parse(settings or []), **({"export.name": name} if name else {})}
    _check(workspace, overrides)
    with console.open_console(workspace.logs, "retrain", verbose) as shown:
        if shown.log:
            shown.say(f"all details: {shown.log.relative_to(workspace.root)}")
        with prefect_server() as server, ThreadPoolExecutor(1) as beside:
            # All of this takes about as long as the server.
            ready = beside.submit(preload, workspace)
            if pull:
                fetch(workspace, busy == "wait", shown.say)
            from prefect.exceptions import CancelledRun
            from prefect.flows import load_flow_from_entrypoint

            run: Any = load_flow_from_entrypoint(f"{workspace.flow}:retrain")
            ready.result()
            server.wait(shown.say)
            with server.in_use():
                try:
                    run(str(workspace.root), None, overrides, force, push, busy)
                except CancelledRun as cancelled:
                    raise VaeflowError(str(cancelled)) from None
                except (SystemExit, KeyboardInterrupt):
                    if any(workspace.checkpoints.glob("*/*.checkpoint")):
                        shown.say("stopped; the same command goes on from the last checkpoint")
                    raise


@commands.command(rich_help_panel=PANEL)
def schedule(
    cron: Annotated[str, typer.Option(help='When to retrain, in UTC, e.g. "0 3 * * *".')],
) -> None:
    """Retrain on a schedule, until stopped."""
    from vaeflow.orchestration.prefect import serve

    workspace = Workspace.find()
    _check(workspace, {})
    serve(workspace, cron)


def _check(workspace: Workspace, overrides: dict[str, Any]) -> None:
    """Find the mistakes that the flow would find too, but after it has a server."""
    from vaeflow.common.versioning import require_repository
    from vaeflow.config.edit import check
    from vaeflow.model.device import keras_backend

    check(workspace, overrides)
    require_repository(workspace)
    keras_backend()
    # The flow is the workspace's own, for its users to change.
    workspace.require(workspace.flow, "Restore it: git checkout pipelines")
