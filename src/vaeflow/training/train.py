"""The `train` stage: fit the VAE, track the run, keep the weights."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vaeflow.config import Parameters
from vaeflow.device import use_gpu_if_any
from vaeflow.errors import TrainingError
from vaeflow.files import atomic_directory, atomic_file, write_json
from vaeflow.lineage import collect_lineage
from vaeflow.training.checkpoint import Checkpoints, training_key
from vaeflow.training.epochs import Row
from vaeflow.training.fit import fit
from vaeflow.training.skipping import StopWhenSkipping
from vaeflow.training.tracking import Run, start_run
from vaeflow.workspace import Workspace


def train(workspace: Workspace, parameters: Parameters) -> Mapping[str, float]:
    """Train on `outputs/prepared` and write `outputs/model`.

    Writes `model.keras`, `history.csv` (one row an epoch, nats per image) and `run.json` (the
    MLflow run's id and the lineage), so that a model from DVC's cache still leads to its run. A
    training of the same parameters and images that was killed is gone on with, in the same run.

    Returns:
        The last epoch's metrics.

    Raises:
        TrainingError: it cannot go on, or the same training runs already.
    """
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    print(f"training on {use_gpu_if_any()}", flush=True)

    lineage = collect_lineage(workspace, parameters)
    kept = workspace.checkpoints / training_key(prepared, parameters.train)
    with alone_in(kept):
        rows = _train(workspace, prepared, parameters, lineage, kept)
        shutil.rmtree(kept)
    return rows[-1]


def _train(workspace, prepared, parameters, lineage, kept: Path) -> list[Row]:
    """Train in an MLflow run and write the outputs; returns the history."""
    run_file = kept / "run"
    with (
        atomic_directory(workspace.model) as folder,
        start_run(
            workspace,
            os.environ.get("DVC_EXP_NAME"),  # MLflow makes up a name outside `dvc exp run`
            parameters.flat(),
            lineage,
            again=run_file.read_text() if run_file.exists() else None,
        ) as run,
    ):
        with atomic_file(run_file) as fresh:
            fresh.write_text(run.run_id)
        report = EpochReport(run, parameters.train.epochs)
        limit = parameters.train.skipped_steps_limit
        vae = fit(
            prepared,
            parameters,
            checkpoints=Checkpoints(kept),
            resumed=report.resumed,
            report=report.epoch,
            callbacks=[StopWhenSkipping(limit, workspace.stopped)],
        )
        vae.save(folder / "model.keras")
        write_history(folder / "history.csv", report.rows)
        write_json(folder / "run.json", {"run_id": run.run_id, "lineage": lineage})
        run.log_file(folder / "history.csv")
    return report.rows


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process trains with the checkpoints in a folder.

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


class EpochReport:
    """After each epoch: a line on the terminal, a row kept, a point on each MLflow curve."""

    def __init__(self, run: Run, epochs: int):
        self.run = run
        self.epochs = epochs
        self.rows: list[Row] = []

    def resumed(self, rows: list[Row]) -> None:
        """Take over the rows of the epochs that were made before."""
        print(f"going on after epoch {len(rows)}, from a checkpoint", flush=True)
        known = self.run.steps_of("validation_elbo")
        for row in rows:
            self.rows.append(row)
            if row["epoch"] not in known:
                self._log(row)

    def epoch(self, row: Row) -> None:
        """Tell of an epoch; `validation_` marks the validation split."""
        self.rows.append(row)
        self._log(row)
        print(
            f"epoch {row['epoch']}/{self.epochs}  elbo {row['elbo']:.3f}  "
            f"validation {row['validation_elbo']:.3f} nats"
            + (f"  skipped {row['skipped_steps']:.0f} steps" * bool(row["skipped_steps"])),
            flush=True,
        )

    def _log(self, row: Row) -> None:
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        self.run.log_metrics(metrics, step=row["epoch"])


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """One row an epoch, with a header: what `dvc plots` draws."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
