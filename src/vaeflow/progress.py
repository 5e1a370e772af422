"""How far a long computation has come."""

from __future__ import annotations

import sys
import time

WIDTH = 24
SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar that is redrawn on a terminal; elsewhere a line now and then, for a log.

    Args:
        label: what is being done.
        total: how much there is of it, in whatever `advance` counts.

    Example:
        >>> with Progress("bounds", 1000) as progress:
        ...     progress.advance(10)
    """

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.done = 0
        self.live = sys.stdout.isatty()
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            print("\r\033[K", end="", flush=True)

    def advance(self, amount: int) -> None:
        """Count, and show it when the last time is long enough ago."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else SECONDS_BETWEEN_LINES):
            return
        self.shown = now
        share = self.done / self.total
        left = (now - self.start) * (1 - share) / share
        text = f"{self.label} {share:4.0%}, {left // 60:.0f}:{left % 60:02.0f} left"
        if self.live:
            filled = round(share * WIDTH)
            print(f"\r\033[K[{'#' * filled:<{WIDTH}}] {text}", end="", flush=True)
        else:
            print(text, flush=True)
