"""Who trains in `benchmarks/train.py` and `benchmarks/gpu.py`, each a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDS = {
    "keras-io": "tensorflow",
    "jax-plain": "optax",
    "torch-eager": "torch",
    "torch-compile": "torch",
}


class ContestantError(RuntimeError):
    """A contestant has ended before it was told to."""


class Contestant:
    """A process that trains when told to; it makes itself ready from the start.

    Args:
        name: of the contestant.
        batch_size, precision: of its training.
        options: more of the command line of `contestants/__main__.py`.
        log: where its error output goes; without one, nowhere, unless VERBOSE is set.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        precision: str,
        *options: str,
        log: Path | None = None,
    ):
        self.name = name
        errors = None if os.environ.get("VERBOSE") else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, "-m", "contestants", name, str(batch_size), precision, *options],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a") if log else errors,
            text=True,
        )
        self.rates: list[float] = []

    def wait(self, seconds: float | None = None) -> None:
        """Return when it is ready, with its `device` and what else it says of itself known.

        Raises:
            ContestantError: it has ended, or is not in that time, and has been ended.
        """
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.process.kill()
            raise ContestantError(f"{self.name} was not ready in {seconds:.0f} s")
        self.said = self._hear()
        self.device = self.said.pop("device")

    def window(self, epochs: int) -> None:
        """Have it train, and note its rate."""
        self.rates.append(self.ask(f"window {epochs}")["images_per_second"])

    def ask(self, order: str) -> dict:
        """What it answers."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self._hear()

    def end(self) -> int:
        """Its peak memory in MB."""
        answer = self.ask("end")
        self.process.wait()
        return answer["peak_memory_mb"]

    def summary(self) -> dict[str, object]:
        """Its rates, and their median."""
        return {
            "images_per_second": round(statistics.median(self.rates)),
            "windows": [round(rate) for rate in self.rates],
        }

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ContestantError(f"{self.name} has ended; VERBOSE=1 or its log shows why")
        return json.loads(line)


def possible(names: Sequence[str]) -> list[str]:
    """Those of the names whose packages are installed."""
    return [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
