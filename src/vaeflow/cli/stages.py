"""The stages of dvc.yaml: it runs these commands. The last line of each sums it up."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vaeflow.cli.options import HostNames, HostsTimeout, Process, find_workspace
from vaeflow.errors import ConfigError

commands = typer.Typer()
PANEL = "Stages (run by DVC; see dvc.yaml)"


@commands.command(rich_help_panel=PANEL)
def prepare() -> None:
    """Check the images in data/ and split them."""
    workspace, parameters = find_workspace()
    from vaeflow.data.prepare import prepare

    images, duplicates = prepare(workspace, parameters.prepare)
    if duplicates:
        print(f"{duplicates} are exact copies of other images; copies share a split")
    print("prepared " + ", ".join(f"{count} {split}" for split, count in images.items() if count))


@commands.command(rich_help_panel=PANEL)
def train(
    hosts: HostNames = None, process: Process = None, hosts_timeout: HostsTimeout = 300
) -> None:
    """Train the VAE, tracked in MLflow."""
    workspace, parameters = find_workspace()
    _import_keras()
    from vaeflow.model.hosts import joined
    from vaeflow.training.train import train

    with joined(hosts, process, hosts_timeout) as together:
        kept = train(workspace, parameters, together)
    of = "" if kept["epoch"] == kept["epochs"] else f" in epoch {kept['epoch']:.0f}, which is kept"
    print(f"{kept['epochs']} epochs, validation ELBO {kept['validation_elbo']:.3f} nats{of}")


@commands.command(rich_help_panel=PANEL)
def evaluate(
    hosts: HostNames = None, process: Process = None, hosts_timeout: HostsTimeout = 300
) -> None:
    """Compute bounds and figures on the test split."""
    workspace, parameters = find_workspace()
    _import_keras()
    from vaeflow.evaluation.evaluate import evaluate
    from vaeflow.model.hosts import joined

    with joined(hosts, process, hosts_timeout) as together:
        metrics = evaluate(workspace, parameters.evaluate, together)
    if not together.leads:
        return
    print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))
    bound = "importance_weighted_bound"
    print(
        f"bound {metrics[bound]:.3f} ± {metrics[f'{bound}_standard_error']:.3f} nats on "
        f"{metrics['images']:.0f} test images, {metrics['active_units']:.0f} active dimensions"
    )


@commands.command(rich_help_panel=PANEL)
def export() -> None:
    """Write the serving bundle, compared with the Keras model."""
    workspace, parameters = find_workspace()
    # Whatever it was trained on: a SavedModel is TensorFlow's, and Keras writes ONNX through it.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    _import_keras()
    from vaeflow.bundle.export import export

    manifest = export(workspace, parameters.export)
    worst = max(manifest.export_differences.values())
    where = workspace.bundle.relative_to(workspace.root)
    print(f"{where}: {len(manifest.files)} files, largest difference to Keras {worst:.2g}")


@commands.command(rich_help_panel=PANEL)
def launch(
    command: Annotated[str, typer.Argument(help="train or evaluate.")] = "train",
    processes: Annotated[int, typer.Option(min=1, help="How many, on this machine.")] = 2,
) -> None:
    """Make a stage in several processes of this machine, each on its share of the cores."""
    if command not in ("train", "evaluate"):
        raise ConfigError(f"{command!r}: several processes train or evaluate.")
    from vaeflow.orchestration.launch import launch

    sys.exit(launch(command, processes))


def _import_keras() -> None:
    """Import Keras without what it, or TensorFlow, imports only for uses that no stage has.

    These take two of the four seconds. Whoever needs one of them later can import it.
    """
    from vaeflow.model.device import keras_backend

    unused = {"sklearn", "matplotlib", "pandas"} - sys.modules.keys()
    if keras_backend() != "jax":
        unused |= {"jax"} - sys.modules.keys()
    for name in unused:
        sys.modules[name] = None  # type: ignore[assignment]  # to import one is an ImportError
    try:
        import keras  # noqa: F401
    finally:
        for name in unused:
            del sys.modules[name]
