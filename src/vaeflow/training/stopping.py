"""Ending a training that was told to end, between two steps."""

from __future__ import annotations

import signal
import threading

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


class Signals:
    """Inside the block, signals that would end the process are noted instead.

    An exception raised at once, wherever the signal finds the process, can be lost inside
    TensorFlow, and the training would go on. A signal that is ignored (nohup) stays ignored; only
    the main thread may take signals over, in any other nothing changes.

    Attributes:
        received: the number of the last that came, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number, frame):
        self.received = number
