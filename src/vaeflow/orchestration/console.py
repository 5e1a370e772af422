"""What a person sees of a run: a line a stage, a bar, what matters; the rest goes into a log file.

The flow says the same things to Prefect's log, whoever started it. Where no console is open, as in
a scheduled run, that log is all there is.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vaeflow.common.progress import BAR, RELAYED

KEPT_LOGS = 20
SECONDS_BETWEEN_LINES = 5.0

# What a stage prints that is shown while it is at work.
SHOWN = ("warning: ", "auto is ")

_open: Console | None = None


class Console:
    """Standard output, with at most one line on it that is still changing.

    Args:
        log: the file with all that is logged meanwhile; None where that is shown too.
    """

    def __init__(self, log: Path | None):
        self.log = log
        self.live = log is not None and sys.stdout.isatty()
        self._shown = 0.0
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._write(f"{self._clear()}{text}\n")

    def show(self, text: str) -> None:
        """Print how far something is: on a terminal in place, elsewhere every few seconds."""
        with self._lock:
            if self.live:
                # A longer line would wrap, and only its end could be taken back.
                width = shutil.get_terminal_size().columns - 1
                self._write(f"{self._clear()}{text[:width]}")
            elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
                self._shown = time.monotonic()
                self._write(f"{text}\n")

    def wipe(self) -> None:
        """Erase what is still changing."""
        with self._lock:
            self._write(self._clear())

    def _clear(self) -> str:
        return "\r\033[K" if self.live else ""

    def _write(self, text: str) -> None:
        # `print` would go to Prefect's log, inside a flow.
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def open_console(folder: Path, command: str, verbose: bool) -> Iterator[Console]:
    """Open the console: standard output has what is said, a new file all that is logged.

    Libraries, and what they start, write their logs to standard error, each in its own way: so it
    is standard error itself that goes into the file.

    Args:
        folder: of the log files; the newest twenty are kept.
        command: begins the file's name.
        verbose: whether standard error stays where it is, and there is no file.
    """
    global _open
    log = None if verbose else _new_log(folder, command)
    sys.stderr.flush()
    before = os.dup(2)
    if log:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        os.environ[RELAYED] = "1"
    console = Console(log)
    _open = console if log else None  # with everything shown, nothing is shown twice
    try:
        yield console
    finally:
        console.wipe()
        _open = None
        os.environ.pop(RELAYED, None)
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def say(text: str, log: Callable[[str], None]) -> None:
    """Print a line to whoever watches, and log it."""
    log(text)
    if _open:
        _open.say(text)


class Stage:
    """A stage at work, as the console shows it."""

    def __init__(self, name: str):
        self.name = name
        self._begin = time.monotonic()
        self._last = ""

    def heard(self, line: str) -> bool:
        """Show a line of the stage's output if it matters; return whether to log it.

        Returns:
            Whether it is a line for a log, and not only a bar.
        """
        if line.startswith(BAR):
            if _open:
                _open.show(_row(self.name, line.removeprefix(BAR)))
            return False
        self._last = line.strip() or self._last
        if line.startswith(SHOWN) and _open:
            _open.say(_row(self.name, line))
        return True

    def summary(self) -> str:
        """Return the last line that the stage printed, with the time that it took."""
        text = self._last or "nothing new: taken from DVC's cache"
        return f"{text} ({_duration(time.monotonic() - self._begin)})"


@contextmanager
def stage(name: str, log: Callable[[str], None]) -> Iterator[Stage]:
    """Print that a stage begins and, unless it fails, what it came to and how long it took."""
    at_work = Stage(name)
    log(f"{name} begins")
    if _open:
        (_open.show if _open.live else _open.say)(_row(name, "begins"))
    yield at_work
    say(_row(name, at_work.summary()), log)


def _new_log(folder: Path, command: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob(f"{command}-*.log"))[: 1 - KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return folder / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"


def _row(name: str, text: str) -> str:
    return f"{name:<10} {text}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f}:{seconds % 60:02.0f} min"
