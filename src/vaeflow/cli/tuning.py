"""The command that searches for better parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vaeflow.cli.options import find_workspace
from vaeflow.errors import TrainingError

commands = typer.Typer()


@commands.command(rich_help_panel="Retraining")
def tune(
    space: Annotated[
        Path, typer.Option(help="A YAML file: keys of train, each with choices or a range.")
    ],
    trials: Annotated[int, typer.Option(min=1, help="How many, with those made before.")] = 40,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at once; else as many as cores and memory allow."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the sweep; else the space's file name.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Address of a database that several machines share, as postgresql://..."),
    ] = None,
) -> None:
    """Search for parameters with a better validation ELBO, and write the best as a preset."""
    workspace, parameters = find_workspace()
    from vaeflow.common.versioning import require_repository
    from vaeflow.orchestration.dvc import make_prepared
    from vaeflow.tuning.sweep import tune

    def say(line: str) -> None:
        print(line, flush=True)

    require_repository(workspace)
    make_prepared(workspace, say)
    best = tune(workspace, parameters, space, name or space.stem, trials, workers, storage, say)
    if best is None or best.values is None:
        raise TrainingError("no trial was trained to its end; nothing was written as a preset.")
    preset = f"presets/{name or space.stem}.yaml"
    print(
        f"the best is trial {best.number}: validation ELBO {best.values[0]:.3f} nats; {preset}\n"
        f"take it over: python -m vaeflow.config.edit {preset}, and: vaeflow retrain"
    )
