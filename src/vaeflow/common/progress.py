"""How far a long computation has come."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable

WIDTH = 24
SECONDS_BETWEEN_LINES = 15.0
# Set for the stages of a run that is watched: their output goes through a pipe, and bars with it,
# each after a mark and before a carriage return.
RELAYED = "VAEFLOW_PROGRESS_RELAYED"
BAR = "\033[K"


class Progress:
    """A bar that is redrawn on a terminal; elsewhere a line now and then, for a log.

    Args:
        label: what is being done; may be set anew at any time.
        total: how much there is of it, in whatever `advance` counts.
        done: how much of it was done before.
        unit: what `advance` counts, where its rate is to be shown.
        lines: whether there are lines elsewhere.

    Examples:
        >>> with Progress("bounds", 1000) as progress:
        ...     progress.advance(10)
    """

    def __init__(
        self, label: str, total: int, *, done: int = 0, unit: str | None = None, lines: bool = True
    ) -> None:
        self.label = label
        self.total = total
        self.done = self.before = done
        self.unit = unit
        self.relayed = RELAYED in os.environ
        self.live = self.relayed or sys.stdout.isatty()
        self.seconds_between = 0.2 if self.live else SECONDS_BETWEEN_LINES if lines else math.inf
        self.shown = time.monotonic()
        self.start: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def wipe(self) -> None:
        """Clear the bar, for a line to be printed in its place; it comes again."""
        if self.live and not self.relayed:
            print(BAR, end="", flush=True)

    def advance(self, amount: int, note: Callable[[], str] = str) -> None:
        """Count, and update what is shown when the last update is long enough ago.

        Args:
            amount: done since the last time.
            note: gives what else to show; called only when something is shown.
        """
        self.done += amount
        now = time.monotonic()
        if self.start is None:
            # What came before, compiling perhaps, says nothing of how fast it goes on.
            self.start, self.before = now, self.done
        # Of nothing done, or of no time between two readings of the clock, there is no rate.
        if self.done == self.before or now == self.start:
            return
        if now - self.shown < self.seconds_between:
            return
        self.shown = now
        rate = (self.done - self.before) / (now - self.start)
        left = (self.total - self.done) / rate
        parts = [
            f"{self.label} {self.done / self.total:4.0%}",
            f"{left // 60:.0f}:{left % 60:02.0f} left",
            f"{rate:,.0f} {self.unit}/s" * bool(self.unit),
            note(),
        ]
        text = ", ".join(filter(None, parts))
        if self.live:
            filled = round(self.done / self.total * WIDTH)
            print(f"{BAR}[{'#' * filled:<{WIDTH}}] {text}", end="\r", flush=True)
        else:
            print(text, flush=True)
