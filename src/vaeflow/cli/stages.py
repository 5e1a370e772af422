"""The stages of dvc.yaml: it runs these commands."""

from __future__ import annotations

import typer

from vaeflow.cli.options import find_workspace

commands = typer.Typer()
PANEL = "Stages (run by DVC; see dvc.yaml)"


@commands.command(rich_help_panel=PANEL)
def prepare() -> None:
    """Check the images in data/ and split them."""
    workspace, parameters = find_workspace()
    from vaeflow.data.prepare import prepare

    images, duplicates = prepare(workspace, parameters.prepare)
    print("prepared " + ", ".join(f"{count} {split}" for split, count in images.items()))
    if duplicates:
        print(f"{duplicates} are exact copies of other images; copies share a split")


@commands.command(rich_help_panel=PANEL)
def train() -> None:
    """Train the VAE, tracked in MLflow."""
    workspace, parameters = find_workspace()
    from vaeflow.training.train import train

    train(workspace, parameters)


@commands.command(rich_help_panel=PANEL)
def evaluate() -> None:
    """Compute bounds and figures on the test split."""
    workspace, parameters = find_workspace()
    from vaeflow.evaluation.evaluate import evaluate

    metrics = evaluate(workspace, parameters.evaluate)
    print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))


@commands.command(rich_help_panel=PANEL)
def export() -> None:
    """Write the serving bundle, compared with the Keras model."""
    workspace, parameters = find_workspace()
    from vaeflow.bundle.export import export

    manifest = export(workspace, parameters.export)
    worst = max(manifest.export_differences.values())
    print(f"{workspace.bundle}: {len(manifest.files)} files, largest difference {worst:.2g}")
