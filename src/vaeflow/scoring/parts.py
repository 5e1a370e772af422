"""What a batch run has computed so far, so that a killed one need not compute it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vaeflow.errors import VaeflowError
from vaeflow.files import atomic_file


class Parts:
    """A folder of arrays, each named by what it was computed from.

    A part is found only by the same model, options and pixels: there is no state beside the names
    that could be out of date, and a run whose source has changed finds what is left of it.

    Args:
        folder: that holds them.
        key: what the numbers depend on apart from the pixels.
    """

    def __init__(self, folder: Path, key: dict[str, object]):
        self.folder = folder
        self._key = json.dumps(key, sort_keys=True).encode()

    def name(self, digests: np.ndarray) -> str:
        """What the part of some images is called.

        Args:
            digests: SHA-256 of each image's pixels, uint8 `(count, 32)`.
        """
        return hashlib.sha256(self._key + digests.tobytes()).hexdigest()[:32] + ".npy"

    def find(self, name: str, shape: tuple[int, int]) -> np.ndarray | None:
        """The numbers kept under a name, float32; None where there are none, or a damaged file."""
        try:
            numbers = np.load(self.folder / name, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return numbers if numbers.shape == shape and numbers.dtype == np.float32 else None

    def keep(self, name: str, numbers: np.ndarray) -> None:
        """Write a part: whole or not at all, even when the power fails."""
        with atomic_file(self.folder / name) as fresh, fresh.open("wb") as file:
            np.save(file, numbers)


@contextmanager
def parts_beside(out: Path, key: dict[str, object]) -> Iterator[Parts]:
    """The parts of an output; they are removed when the block ends well, and kept otherwise.

    Raises:
        VaeflowError: another process is making the same output, or it cannot be written.
    """
    import fcntl

    folder = out.with_name(f".{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VaeflowError(
                f"{out}: another process is writing it now. Wait for it, or choose another --out."
            ) from None
        yield Parts(folder, key)
        shutil.rmtree(folder)
