"""The `train` stage: fit the VAE, track the run, keep the weights."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vaeflow.common.files import atomic_directory, atomic_file, write_json
from vaeflow.common.workspace import Workspace
from vaeflow.config.auto import (
    SHAPE_KEY,
    describe,
    kept_values,
    plain,
    read_facts,
    resolve,
    small_data_warning,
)
from vaeflow.config.schema import Parameters
from vaeflow.data.splits import image_shape, load_split
from vaeflow.errors import TrainingError
from vaeflow.model.device import use_gpu_if_any
from vaeflow.model.hosts import Hosts
from vaeflow.tracking.lineage import collect_lineage
from vaeflow.tracking.runs import champion_parameters, run_tags, start_run
from vaeflow.training.callbacks import StopWhenSkipping
from vaeflow.training.checkpoint import Checkpoints, training_key
from vaeflow.training.history import EpochReport, kept_row, write_history
from vaeflow.training.loop import Row, fit


def train(
    workspace: Workspace, parameters: Parameters, hosts: Hosts | None = None
) -> Mapping[str, float]:
    """Train on `outputs/prepared` and write `outputs/model`.

    Writes `model.keras`, `history.csv` (one row an epoch, nats per image) and `run.json` (the
    MLflow run's id, the lineage and what `auto` stood for), so that a model from DVC's cache still
    leads to its run. A training of the same parameters and images that was killed is gone on with,
    in the same run.

    Args:
        workspace: whose images.
        parameters: of the training; of several processes the leader's count.
        hosts: the processes that train together. Only the leader writes.

    Returns:
        The metrics of the epoch whose weights are kept, and `epochs`, how many were made.

    Raises:
        TrainingError: it cannot go on, or the same training runs already.
        ConfigError: other hosts have other images or another program.
    """
    hosts = hosts or Hosts()
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    print(f"training on {use_gpu_if_any()}", flush=True)
    if hosts.leads:
        lineage = collect_lineage(workspace, parameters)
        parameters, chosen = choose_parameters(workspace, prepared, parameters)
    text = hosts.from_leader(parameters.model_dump_json().encode())
    parameters = Parameters.model_validate_json(text)
    key = training_key(prepared, parameters.train)
    hosts.check_same("images or another vaeflow", key)
    if hosts.leads:
        kept = workspace.checkpoints / key
        with lock_training(kept):
            rows = _train(workspace, prepared, parameters, chosen, lineage, kept, hosts)
            shutil.rmtree(kept)
    else:
        rows = []
        stop = _stop(workspace, prepared, parameters, hosts)
        keep: dict[str, Any] = {"resumed": rows.extend, "report": rows.append}
        fit(prepared, parameters, callbacks=[stop], hosts=hosts, **keep)
    return {**kept_row(rows, parameters.train), "epochs": len(rows)}


def _stop(
    workspace: Workspace, prepared: Path, parameters: Parameters, hosts: Hosts
) -> StopWhenSkipping:
    """Make what ends a training that makes no more steps."""
    settings = parameters.train
    steps_per_epoch = math.ceil(len(load_split(prepared, "train")) / settings.batch_size)
    keep = workspace.stopped if hosts.leads else None
    return StopWhenSkipping(settings.skipped_steps_limit, steps_per_epoch, keep)


def _train(
    workspace: Workspace,
    prepared: Path,
    parameters: Parameters,
    chosen: Mapping[str, Any],
    lineage: Mapping[str, str],
    kept: Path,
    hosts: Hosts,
) -> list[Row]:
    """Train in an MLflow run and write the outputs; return the history."""
    run_file = kept / "run"
    with (
        atomic_directory(workspace.model) as folder,
        start_run(
            workspace,
            os.environ.get("DVC_EXP_NAME") or run_name(parameters, lineage["data_md5"]),
            {**parameters.flat(), SHAPE_KEY: str(list(image_shape(prepared)))},
            {**lineage, **run_tags()},
            again=run_file.read_text() if run_file.exists() else None,
        ) as run,
    ):
        with atomic_file(run_file) as fresh:
            fresh.write_text(run.run_id)
        report = EpochReport(run, parameters.train.epochs)
        vae = fit(
            prepared,
            parameters,
            checkpoints=Checkpoints(kept),
            resumed=report.resumed,
            report=report.epoch,
            callbacks=[_stop(workspace, prepared, parameters, hosts)],
            hosts=hosts,
        )
        hosts.leave()  # the others need not wait for what follows
        vae.save(folder / "model.keras")
        write_history(folder / "history.csv", report.rows)
        about = {"run_id": run.run_id, "lineage": lineage, "chosen": chosen}
        write_json(folder / "run.json", about)
        report.close(folder / "history.csv")
    return report.rows


def choose_parameters(
    workspace: Workspace, prepared: Path, parameters: Parameters
) -> tuple[Parameters, Mapping[str, Any]]:
    """Replace every `auto`, print what it stands for, and return what was chosen.

    A champion's values are kept, unless `train.auto` is `data` or its images had another shape: the
    gate could not compare models of other likelihoods, and one odd image would shut it for ever.
    """
    facts = read_facts(prepared)
    kept = None
    if parameters.train.auto == "champion":
        champion = champion_parameters(workspace, parameters.export.name)
        kept = kept_values(parameters.train, facts, champion)
    settings, chosen = resolve(parameters.train, facts, kept)
    if chosen:
        listed = ", ".join(f"{key} {plain(value)}" for key, value in chosen.items())
        why = "the champion's" if kept else f"chosen for {describe(facts)}"
        print(f"auto is {listed}; {why}", flush=True)
    if reason := small_data_warning(facts):
        print(f"warning: {reason}", flush=True)
    return parameters.model_copy(update={"train": settings}), chosen


def run_name(parameters: Parameters, data: str) -> str:
    """Return what a run is called: model, data and when it began."""
    return f"{parameters.export.name} {data[:8]} {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextmanager
def lock_training(folder: Path) -> Iterator[None]:
    """Keep other processes from training with the checkpoints in a folder.

    Raises:
        TrainingError: one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise TrainingError(
            f"{lock.lock_file}: another process is making this very training, perhaps one that "
            "was left behind. Wait for it, or end it, and run this again."
        ) from None
