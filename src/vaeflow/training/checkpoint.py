"""Keep a training in files, so that after a kill it goes on as if there had been none.

A checkpoint is one file: the SHA-256 of the rest, then an `.npz` of arrays. It is written under
another name, flushed to the disk and renamed, and the last two are kept: whenever the kill comes,
one of them is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vaeflow.common import code
from vaeflow.common.files import sha256_of
from vaeflow.config.schema import Train
from vaeflow.errors import TrainingError

KEPT = 2
DIGEST_BYTES = hashlib.sha256().digest_size
# Of no influence on the weights.
NOT_IN_KEY = {"checkpoint_minutes"}


def training_key(prepared: Path, settings: Train) -> str:
    """Return a digest of all that decides what the weights become: parameters, images, program.

    The images go in by `index.parquet`, which has the digest of each, and its split.
    """
    name = keras.backend.backend()
    own = code.own_networks() if ":" in settings.network else None
    written = {"networks": code.digest((".",), own)} if own else {}
    program = {
        "code": code.digest(code.TRAIN),
        **written,
        **{part: version(part) for part in ("keras", name)},
    }
    about = {"train": settings.model_dump(mode="json", exclude=NOT_IN_KEY), "program": program}
    images = (prepared / "index.parquet").read_bytes()
    return sha256_of(json.dumps(about, sort_keys=True).encode() + images)[:16]


class Checkpoints:
    """The checkpoints of one training, in a folder of their own.

    Args:
        folder: made when the first is written; each is `NUMBER.checkpoint`, counted upwards.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a checkpoint, whole or not at all, and delete all but the last two.

        Raises:
            TrainingError: it cannot be written; those before it are as they were.
        """
        content = io.BytesIO()
        np.savez(content, **dict[str, Any](arrays))
        payload = content.getbuffer()
        present = self._present()
        number = 1 + (int(present[-1].stem) if present else 0)
        path = self.folder / f"{number:08d}.checkpoint"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            _flush_names(self.folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            remedy = "Free some, and" if error.errno == errno.ENOSPC else "Mend that, and"
            raise TrainingError(
                f"{path}: {error.strerror}. {remedy} run the training again: it goes on from the "
                "checkpoint before, which is whole."
            ) from None
        for old in [*present, path][:-KEPT]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, np.ndarray] | None:
        """Load the newest that is whole, and print a line of any that is not; None without any."""
        for path in reversed(self._present()):
            arrays = _read(path)
            if arrays is not None:
                return arrays
            print(f"{path}: damaged; the checkpoint before it is taken, if any", flush=True)
            path.unlink()
        return None

    def _present(self) -> list[Path]:
        return sorted(self.folder.glob("*.checkpoint"))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of a file; None when it is not what was written."""
    content = path.read_bytes()
    digest, payload = content[:DIGEST_BYTES], memoryview(content)[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, zipfile.BadZipFile):  # not by this program
        return None


def _flush_names(folder: Path) -> None:
    """Sync a folder, so that a renaming in it survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        """Count an epoch; return whether its validation was the best so far. NaN never is."""
        self.epoch, self.batch, self.means = self.epoch + 1, 0, None
        self.rows.append(row)
        better = row["validation_loss"] < self.best_loss
        if better:
            self.best_loss, self.best_epoch = row["validation_loss"], self.epoch
        return better

    def finish_phase(self, epoch: int) -> None:
        """Begin a phase with another objective, whose losses are others."""
        self.phase, self.epoch = self.phase + 1, epoch
        self.best_loss, self.best_epoch = float("inf"), epoch

    @property
    def epochs_without_progress(self) -> int:
        """Epochs since the best."""
        return self.epoch - self.best_epoch

    def to_json(self) -> str:
        """Write all of it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainingProgress:
        """Read what `to_json` has written."""
        return cls(**json.loads(text))
