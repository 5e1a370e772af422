"""Ending a training that gets no better, with the weights that were best."""

from __future__ import annotations

import keras


class KeepBest(keras.callbacks.Callback):
    """Judge each epoch by the validation loss; in the end, put back the weights of the best.

    It must come before `keras.callbacks.SwapEMAWeights`, if that is there: then it sees the weights
    that were validated, which are the averaged ones.

    Args:
        patience: after so many epochs in a row that were no better, the training ends.
    """

    def __init__(self, patience: int):
        super().__init__()
        self.patience = patience
        self._forget()

    def _forget(self):
        self.best_loss = float("inf")
        self.best_epoch = 0
        self.weights: list | None = None
        self.epoch = 0

    def on_train_begin(self, logs=None):
        """Begin anew: another `fit` may have another objective."""
        self._forget()

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self.epoch = epoch + 1

    def on_test_end(self, logs=None):
        """Keep the weights, if they are better than before. NaN never is."""
        if logs["loss"] < self.best_loss:
            self.best_loss, self.best_epoch = logs["loss"], self.epoch
            self.weights = [variable.numpy() for variable in self.model.trainable_variables]

    def on_epoch_end(self, epoch, logs=None):
        """End the training, if it has been no better for long enough."""
        if self.epoch - self.best_epoch >= self.patience:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        """Put the best weights back."""
        if self.weights is None or self.best_epoch == self.epoch:
            return
        for variable, best in zip(self.model.trainable_variables, self.weights, strict=True):
            variable.assign(best)
        print(
            f"epoch {self.epoch} was the last; the weights of epoch {self.best_epoch}, the best in "
            "validation, are kept",
            flush=True,
        )
