"""What comes between steps: looking at them in time, and ending a training early.

It ends when a signal says so, or because its gradients cannot be used any more.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import keras

from vaeflow.errors import TrainingError
from vaeflow.model.steps import backend

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


class Callbacks(keras.callbacks.CallbackList):
    """Keras's list of callbacks, which hands on what steps return as it comes.

    Keras makes numbers of it first, and for that waits until the device has made the steps: then
    it has nothing to do until the next are sent. Here it is one execution of steps behind, no more:
    images that were sent ahead would fill its memory, and a signal would have to wait.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback], model: keras.Model) -> None:
        super().__init__(callbacks, add_history=True, model=model)
        self.before: Any = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Call each; wait for the steps before these."""
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs)
        if self.before is not None:
            float(self.before["loss"])
        self.before = logs


class StopWhenSkipping(keras.callbacks.Callback):
    """End a training that makes no more steps, and keep the weights as they were before.

    Args:
        limit: how many steps left out in a row are too many.
        steps_per_epoch: so is an epoch of nothing else.
        keep: where the weights go. A step left out changes none, so they are the last good ones.
            None in a process that another one leads, which writes them.
    """

    def __init__(self, limit: int, steps_per_epoch: int, keep: Path | None) -> None:
        super().__init__()
        # An epoch that is gone on with has fewer steps left, which say less.
        self.limit = min(limit, steps_per_epoch)
        self.keep = keep
        self.epoch = 0
        self.latest: Any = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch, for the message; its count of steps left out begins anew."""
        self.epoch, self.seen, self.latest = epoch + 1, 0, None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Judge the steps before these: a device that works on these need not be waited for."""
        before, self.latest = self.latest, logs
        self._judge(before)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Judge the last steps."""
        self._judge(self.latest)

    def _judge(self, logs: Any) -> None:
        """Count the steps left out since; end the training if they are too many in a row."""
        if logs is None or logs["skipped_steps"] == self.seen:
            return
        self.seen = logs["skipped_steps"]
        backend().synchronise(self.model)
        skipped = int(self.model.skipped_in_a_row)
        if skipped >= self.limit:
            if self.keep:
                self.keep.parent.mkdir(parents=True, exist_ok=True)
                self.model.save(self.keep)
            raise TrainingError(
                f"epoch {self.epoch}: {skipped} steps in a row had a gradient that is not finite "
                f"or above train.gradient_limit. The weights as they were before are kept in "
                f"{self.keep or 'the leader'}. Lower train.learning_rate, or warm the KL term up "
                "(train.kl_warmup_epochs)."
            )


class Signals:
    """Inside the block, signals that would end the process are noted instead.

    An exception raised at once, wherever the signal finds the process, can be lost inside
    TensorFlow, and the training would go on. A signal that is ignored (nohup) stays ignored; only
    the main thread may take signals over, in any other nothing changes.

    Attributes:
        received: the number of the last that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
