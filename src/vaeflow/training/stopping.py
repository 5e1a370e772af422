"""Ending a training that was told to end."""

from __future__ import annotations

import signal
import sys
import threading

import keras

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


class StopBetweenSteps(keras.callbacks.Callback):
    """Let a signal end the training after the step at hand, with exit status 128 + its number.

    An exception raised at once, wherever the signal finds the process, can be lost inside
    TensorFlow, and the training would go on. A signal that is ignored (nohup) stays ignored.
    """

    def __init__(self):
        super().__init__()
        self.received: int | None = None
        self.previous: dict[int, object] = {}

    def on_train_begin(self, logs=None):
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, batch, logs=None):
        """Leave, if told to."""
        if self.received is not None:
            self.on_train_end()
            sys.exit(128 + self.received)

    def on_test_batch_end(self, batch, logs=None):
        """Leave during validation too."""
        self.on_train_batch_end(batch)

    def on_train_end(self, logs=None):
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _note(self, number, frame):
        self.received = number
