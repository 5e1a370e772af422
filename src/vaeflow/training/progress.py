"""How far a training has come, as far as its variables do not say it themselves."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass
class TrainingProgress:
    """Counters, and the rows of the history so far.

    Attributes:
        phase: 0, or 1 in the finish.
        epoch: finished epochs.
        batch: batches made in the epoch at hand.
        means: metrics over its training batches, once all are made.
        rows: one per finished epoch, metrics by name.
        best_loss, best_epoch: of the validation in this phase; epochs count from 1.
        lowered_epoch: after which the learning rate was lowered last.
    """

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    means: dict[str, float] | None = None
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_loss: float = float("inf")
    best_epoch: int = 0
    lowered_epoch: int = 0

    def finish_epoch(self, row: dict[str, float]) -> bool:
        """Count an epoch; returns whether its validation was the best so far. NaN never is."""
        self.epoch, self.batch, self.means = self.epoch + 1, 0, None
        self.rows.append(row)
        better = row["validation_loss"] < self.best_loss
        if better:
            self.best_loss, self.best_epoch = row["validation_loss"], self.epoch
        return better

    def finish_phase(self, epoch: int) -> None:
        """Go on at an epoch with another objective, whose losses are others."""
        self.phase, self.epoch = self.phase + 1, epoch
        self.best_loss, self.best_epoch = float("inf"), epoch

    @property
    def epochs_without_progress(self) -> int:
        """Epochs since the best."""
        return self.epoch - self.best_epoch

    def to_json(self) -> str:
        """All of it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainingProgress:
        """What `to_json` has written."""
        return cls(**json.loads(text))
