"""What a training tells of its epochs: on the terminal, in `history.csv`, and to MLflow."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Train
from vaeflow.errors import RegistryError
from vaeflow.tracking.runs import Run

if TYPE_CHECKING:
    from vaeflow.training.loop import Row


HISTORY = "history.csv"
RETRY_SECONDS = 60
EPOCH_LINE = re.compile(r"epoch (\d+)/(\d+)  elbo \S+  validation (\S+) nats")


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
        print(epoch_line(row, self.epochs), flush=True)
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


class Reached(NamedTuple):
    """What a line of an epoch says: which one, of how many, and the validation ELBO in nats."""

    epoch: int
    epochs: int
    validation_elbo: float


def epoch_line(row: Row, epochs: int) -> str:
    """Return the line that reports an epoch."""
    return (
        f"epoch {row['epoch']}/{epochs}  elbo {row['elbo']:.3f}  "
        f"validation {row['validation_elbo']:.3f} nats"
        + (f"  skipped {row['skipped_steps']:.0f} steps" * bool(row["skipped_steps"]))
    )


def read_epoch_line(line: str) -> Reached | None:
    """Read what `epoch_line` wrote; None if the line is another one."""
    found = EPOCH_LINE.match(line)
    return Reached(int(found[1]), int(found[2]), float(found[3])) if found else None


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


def kept_row(rows: Sequence[Row], settings: Train) -> Row:
    """Return the row of the epoch whose weights are kept: see `Training.keep_best`."""
    if not settings.patience or settings.finish_epochs:
        return rows[-1]
    return min(rows, key=lambda row: row["validation_loss"])


def complete(workspace: Workspace, run: Run) -> None:
    """Add to a run what training and evaluation could not, as when its server was gone."""
    if run.is_finished():
        return
    log_rows(run, read_history(workspace.model / HISTORY))
    run.log_file(workspace.model / HISTORY)
    run.log_evaluation(workspace.evaluation)
    run.finish()
