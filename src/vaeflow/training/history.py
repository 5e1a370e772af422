"""What a training tells of its epochs: on the terminal, in `history.csv`, and to MLflow."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vaeflow.common.workspace import Workspace
from vaeflow.errors import RegistryError
from vaeflow.tracking.runs import Run

if TYPE_CHECKING:
    from vaeflow.training.loop import Row


HISTORY = "history.csv"
RETRY_SECONDS = 60


class EpochReport:
    """After each epoch: a line on the terminal, a row kept, a point on each MLflow curve.

    A tracking server that is gone does not stop a training: what it should have been told is told
    when it answers again, at the latest by `complete`.
    """

    def __init__(self, run: Run, epochs: int):
        self.run = run
        self.epochs = epochs
        self.rows: list[Row] = []
        self.told = 0  # how many of them
        self.next_try = 0.0

    def resumed(self, rows: list[Row]) -> None:
        """Take over the rows of the epochs that were made before."""
        print(f"going on after epoch {len(rows)}, from a checkpoint", flush=True)
        log_rows(self.run, rows)
        self.rows += rows
        self.told = len(rows)

    def epoch(self, row: Row) -> None:
        """Report an epoch; `validation_` marks the validation split."""
        self.rows.append(row)
        print(
            f"epoch {row['epoch']}/{self.epochs}  elbo {row['elbo']:.3f}  "
            f"validation {row['validation_elbo']:.3f} nats"
            + (f"  skipped {row['skipped_steps']:.0f} steps" * bool(row["skipped_steps"])),
            flush=True,
        )
        if time.monotonic() >= self.next_try:
            self._tell()

    def close(self, history: Path) -> None:
        """Report what is left after the last epoch, and upload the file of all of them."""
        if self.told < len(self.rows):
            self._tell()
        if self.told == len(self.rows):
            self.run.log_file(history)

    def _tell(self) -> None:
        try:
            for row in self.rows[self.told :]:
                _log(self.run, row)
                self.told += 1
        except RegistryError as error:
            if not self.next_try:
                print(f"the training goes on without {error}", flush=True)
            self.next_try = time.monotonic() + RETRY_SECONDS


def log_rows(run: Run, rows: list[Row]) -> None:
    """Add to a run the epochs that it does not have yet."""
    known = run.steps_of("validation_elbo")
    for row in rows:
        if row["epoch"] not in known:
            _log(run, row)


def _log(run: Run, row: Row) -> None:
    metrics = {name: value for name, value in row.items() if name != "epoch"}
    run.log_metrics(metrics, step=int(row["epoch"]))


def write_history(path: Path, rows: list[Row]) -> None:
    """Write a row an epoch, with a header: what `dvc plots` draws."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_history(path: Path) -> list[Row]:
    """Read the rows that `write_history` wrote, as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def complete(workspace: Workspace, run: Run) -> None:
    """Add to a run what training and evaluation could not, as when its server was gone."""
    if run.is_finished():
        return
    log_rows(run, read_history(workspace.model / HISTORY))
    run.log_file(workspace.model / HISTORY)
    run.log_evaluation(workspace.evaluation)
    run.finish()
