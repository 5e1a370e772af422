"""Crash-safe checkpoints: a training that was killed goes on as if it had not been.

A checkpoint is one file: the SHA-256 of the rest, then an `.npz` of arrays. It is written under
another name, flushed to the disk and renamed, and the last two are kept: whenever the kill comes,
one of them is whole.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np

from vaeflow import code
from vaeflow.config import Train
from vaeflow.errors import TrainingError
from vaeflow.files import sha256_of

KEPT = 2
DIGEST_BYTES = hashlib.sha256().digest_size
# Of no influence on the weights.
NOT_IN_KEY = {"checkpoint_minutes"}


def training_key(prepared: Path, settings: Train) -> str:
    """Digest of all that decides what the weights become: parameters, images and program.

    The images go in by `index.parquet`, which has the digest of each, and its split.
    """
    name = keras.backend.backend()
    program = {"code": code.digest(code.TRAIN), **{part: version(part) for part in ("keras", name)}}
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
        """Write one, whole or not at all, and delete all but the last.

        Raises:
            TrainingError: it cannot be written; those before it are as they were.
        """
        content = io.BytesIO()
        np.savez(content, **arrays)
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
        """The newest that is whole; a line tells of any that is not. None where there is none."""
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
    """The arrays of a file, or None when it is not what was written."""
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
    """Have the renaming itself survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
