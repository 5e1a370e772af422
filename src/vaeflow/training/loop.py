"""Train a model on prepared images: epochs, validation, checkpoints, and going on from one."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vaeflow.common.progress import Progress
from vaeflow.config.auto import open_keys, read_facts, resolve
from vaeflow.config.schema import Parameters, Train
from vaeflow.data.batches import Batches
from vaeflow.data.images import Images
from vaeflow.data.splits import image_shape
from vaeflow.errors import TrainingError
from vaeflow.model.device import (
    all_devices,
    choose_batches_at_once,
    choose_jit,
    choose_steps_per_execution,
    count_devices,
    has_replicas,
    keep_on_device,
    layers_in,
    share_cores,
)
from vaeflow.model.hosts import Hosts
from vaeflow.model.steps import backend
from vaeflow.model.vae import VAE
from vaeflow.training.callbacks import Callbacks, Signals
from vaeflow.training.checkpoint import Checkpoints, TrainingProgress
from vaeflow.training.setup import (
    check_devices,
    check_memory,
    load_images,
    make_optimizer,
)

Row = Mapping[str, float]
PLATEAU_FACTOR = 0.5


def fit(
    prepared: Path,
    parameters: Parameters,
    *,
    checkpoints: Checkpoints | None = None,
    resumed: Callable[[list[Row]], None] = lambda rows: None,
    report: Callable[[Row], None] = lambda row: None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    hosts: Hosts | None = None,
) -> VAE:
    """Train a VAE on the prepared images; the same seed gives the same weights.

    Args:
        checkpoints: where the training goes on from, and is kept as it goes.
        resumed: called with the rows of the epochs that a checkpoint had behind it.
        report: called after each epoch with its row: `epoch`, and metrics per image in nats, those
            of the validation with `validation_` before their names.
        callbacks: Keras's, for each epoch's steps.
        hosts: the processes that train together, each with its part of every batch; the leader's
            checkpoint is gone on with.

    Raises:
        ConfigError: the parameters ask for more memory than there is, or do not go together.
        TrainingError: a checkpoint cannot be written.
        SystemExit: a signal ended it, with 128 + its number; where there are checkpoints, one of
            the last step has been written.
    """
    settings = parameters.train
    if open_keys(settings):
        settings, _ = resolve(settings, read_facts(prepared))
    parts = share_cores(settings.batch_size, choose_jit(settings.jit))
    check_devices(settings)
    keras.utils.set_random_seed(settings.seed)
    images, validation = load_images(prepared, settings)
    with all_devices():
        vae = make_compiled(image_shape(prepared), len(images), settings)
        vae.parts = parts
        training = Training(
            vae, settings, images, validation, checkpoints, report, callbacks, hosts
        )
        if training.resume():
            resumed(list(training.progress.rows))
        with training.signals, training.progress_bar(), memory_errors(settings):
            training.run()
    return vae


def make_compiled(shape: tuple[int, int, int], images: int, settings: Train) -> VAE:
    """Make the model that the settings describe, untrained, with all that training needs."""
    steps_per_epoch = math.ceil(images / settings.batch_size)
    with layers_in(settings.precision):
        vae = VAE(settings.model(shape, steps_per_epoch))
    check_memory(vae, settings)
    optimizer = make_optimizer(settings, settings.epochs * steps_per_epoch)
    jit = choose_jit(settings.jit)
    vae.jit_replicas = jit and has_replicas()
    vae.compile(
        optimizer=optimizer,
        jit_compile=jit and not vae.jit_replicas,
        steps_per_execution=choose_steps_per_execution(),
    )
    optimizer.build(vae.trainable_variables)
    return vae


@contextmanager
def memory_errors(settings: Train) -> Iterator[None]:
    """Turn what is raised when memory runs out into a clear error.

    Raises:
        TrainingError: it has.
    """
    try:
        yield
    except Exception as error:
        # TensorFlow's ResourceExhaustedError, or JAX's error of that status.
        exhausted = (
            "RESOURCE_EXHAUSTED" in str(error) or "ResourceExhausted" in type(error).__name__
        )
        if not (exhausted or isinstance(error, MemoryError)):
            raise
        raise TrainingError(
            f"memory ran out in a step. Set train.batch_size, now {settings.batch_size}, or "
            f"train.samples, now {settings.samples}, lower."
        ) from None


class Training:
    """A model, its data, and how far it has come with them.

    Args:
        vae: compiled, its optimizer built.
        settings: of the training.
        images, validation: uint8, `(count, height, width, channels)`.
        checkpoints: where it is kept, if anywhere.
        report: called with the row of each epoch.
        callbacks: Keras's.
        hosts: the processes that train together; by default this one alone.
    """

    def __init__(
        self,
        vae: VAE,
        settings: Train,
        images: Images,
        validation: Images,
        checkpoints: Checkpoints | None,
        report: Callable[[Row], None],
        callbacks: Sequence[keras.callbacks.Callback],
        hosts: Hosts | None = None,
    ) -> None:
        self.vae = vae
        self.settings = settings
        self.hosts = hosts = hosts or Hosts()
        share: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "multiple_of": count_devices(),
            "part": (hosts.process, hosts.count),
            "at_once": choose_batches_at_once(),
        }
        vae.kept_images = images = keep_on_device(images)
        self.batches = Batches(images, shuffle_seed=settings.seed, **share)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.validation = Batches(validation, **share)
        self.checkpoints = checkpoints
        self.saved_at = time.monotonic()
        self.report = report
        self.callbacks = [BetweenSteps(self), *callbacks]
        self.signals = Signals()
        self.progress = TrainingProgress()
        # What training goes on from, while the model has the averaged weights.
        self.raw: list[Any] | None = None
        # What was validated best, where that is what will be kept: see `snapshot`.
        self.best: dict[str, list[Any]] | None = None
        # Of the epoch that a checkpoint was written in.
        self.metrics: list[np.ndarray] = []
        self.bar = Progress("", 1)

    # === Epochs ===

    def run(self) -> None:
        """Train the epochs that are left; then the model has the weights to keep."""
        progress, epochs = self.progress, self.settings.epochs
        ends = [epochs]
        if self.settings.finish_epochs:
            ends.insert(0, epochs - self.settings.finish_epochs)
        for end in ends[progress.phase :]:
            if progress.phase == 1:
                self.vae.switch_to_importance_weighted(self.settings.finish_samples)
            while progress.epoch < end and not self.out_of_patience():
                self.make_epoch()
            self.keep_best()
            progress.finish_phase(end)

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show a bar of all epochs on a terminal during the block."""
        total = self.settings.epochs * len(self.batches.images)
        with Progress("", total, done=self.images_done(), unit="images", lines=False) as self.bar:
            yield

    def images_done(self) -> int:
        """Count images seen in training so far."""
        progress, count = self.progress, len(self.batches.images)
        return progress.epoch * count + min(progress.batch * self.settings.batch_size, count)

    def make_epoch(self) -> None:
        """Train, validate, report and keep one epoch, or what is left of it."""
        progress = self.progress
        if progress.batch < self.steps_per_epoch:
            self.train()
        # Keras has put the averaged weights, where there are such, into the model.
        validation = self.vae.evaluate(
            self.validation.feed(), callbacks=self.callbacks, return_dict=True, verbose=0
        )
        validation = {f"validation_{name}": value for name, value in validation.items()}
        row = {"epoch": progress.epoch + 1, **(progress.means or {}), **validation}
        if progress.finish_epoch(row) and self.settings.patience:
            self.best = self.snapshot()
        self.lower_learning_rate_if_due()
        self.bar.wipe()
        self.report(row)
        if self.leave_if_told(now=True):
            self.save()

    def train(self) -> None:
        """Train the steps of the present epoch that are left."""
        progress = self.progress
        if self.raw is not None:
            _put(self.vae.trainable_variables, self.raw)
            self.unshare()
            self.raw = None
        self.vae.fit(
            self.batches.at(progress.epoch, progress.batch).feed(),
            initial_epoch=progress.epoch,
            epochs=progress.epoch + 1,
            callbacks=Callbacks(self.callbacks, self.vae),
            shuffle=False,  # the batches are shuffled already
            verbose=0,
        )
        self.unshare()

    def unshare(self) -> None:
        """Give the weights memory of their own.

        Under JAX they share that of what is put into them: Keras puts their averages, of which a
        validation then gives the memory away, and a snapshot still has what training goes on from.
        """
        if self.raw is not None:
            _put(self.vae.trainable_variables, backend().copies(self.vae.trainable_variables))

    def out_of_patience(self) -> bool:
        """Return whether too many epochs were no better."""
        return 0 < self.settings.patience <= self.progress.epochs_without_progress

    def snapshot(self) -> dict[str, list[Any]]:
        """Copy what a validation has just judged, and what a training goes on from after it."""
        return {
            "best_weights": backend().copies(self.vae.trainable_variables),
            "best_raw": self.raw or [],
            "best_optimizer": backend().copies(self.vae.optimizer.variables),
        }

    def keep_best(self) -> None:
        """Restore what was validated best, if that is to be kept.

        With the weights go the optimizer's moments, averages and learning rate: a finish would
        otherwise make its first steps in a direction found elsewhere.
        """
        progress = self.progress
        if self.best is None:
            return
        if progress.epochs_without_progress:
            _put(self.vae.trainable_variables, self.best["best_weights"])
            _put(self.vae.optimizer.variables, self.best["best_optimizer"])
            self.raw = self.best["best_raw"] or None
            print(
                f"epoch {progress.epoch} was the last; the weights of epoch {progress.best_epoch}, "
                "the best in validation, are kept",
                flush=True,
            )
        self.best = None

    def lower_learning_rate_if_due(self) -> None:
        """Halve the learning rate, if it has brought nothing for long enough."""
        settings, progress = self.settings, self.progress
        if settings.learning_rate_schedule != "plateau":
            return
        since = progress.epoch - max(progress.best_epoch, progress.lowered_epoch)
        if since >= settings.plateau_epochs:
            progress.lowered_epoch = progress.epoch
            optimizer = self.vae.optimizer
            optimizer.learning_rate = PLATEAU_FACTOR * float(optimizer.learning_rate)

    # === Checkpoints ===

    def due(self) -> bool:
        """Return whether the last checkpoint is old enough for another."""
        if self.checkpoints is None:
            return False
        return time.monotonic() - self.saved_at >= 60 * self.settings.checkpoint_minutes

    def save(self) -> None:
        """Write a checkpoint, where they are kept."""
        if self.checkpoints is None:
            return
        backend().synchronise(self.vae)
        variables = {name: backend().copies(group) for name, group in self.variables().items()}
        if self.raw is not None:
            variables["weights"] = self.raw
        variables |= self.best or {}
        arrays = {
            f"{name}/{index}": np.asarray(array)
            for name, group in variables.items()
            for index, array in enumerate(group)
        }
        self.checkpoints.save({"progress": np.array(self.progress.to_json()), **arrays})
        self.saved_at = time.monotonic()

    def leave_if_told(self, *, now: bool = False) -> bool:
        """Save a checkpoint and exit, if a signal said so; return whether one is due otherwise.

        Args:
            now: ask the other processes in any case.
        """
        received, due = self.hosts.agree(self.signals.received or 0, self.due(), now=now)
        if received:
            self.save()
            if self.checkpoints:
                print(
                    f"told to stop ({signal.Signals(received).name}) in epoch "
                    f"{self.progress.epoch + 1}: the last step is kept in "
                    f"{self.checkpoints.folder}, and the same training goes on from there",
                    flush=True,
                )
            sys.exit(128 + received)
        return due

    def resume(self) -> bool:
        """Restore the newest checkpoint; return whether there is one."""
        arrays = self.checkpoints.load() if self.checkpoints else None
        arrays = self.hosts.arrays_from_leader(arrays)
        if arrays is None:
            return False
        self.progress = TrainingProgress.from_json(str(arrays.pop("progress")))
        groups: dict[str, list[np.ndarray]] = {}
        for name, array in arrays.items():  # in the order that they were written in
            groups.setdefault(name.split("/")[0], []).append(array)
        if "best_weights" in groups:
            names = ("best_weights", "best_raw", "best_optimizer")
            self.best = {name: groups.get(name, []) for name in names}
        for name, variables in self.variables().items():
            _put(variables, groups.get(name, []))
        self.metrics = groups["metrics"]
        if self.progress.batch in (0, self.steps_per_epoch):
            self.raw = groups["weights"]
            self.vae.optimizer.finalize_variable_values(self.vae.trainable_variables)
            self.unshare()
        return True

    def variables(self) -> dict[str, list[keras.Variable]]:
        """Return all that steps change."""
        vae = self.vae
        return {
            "weights": vae.trainable_variables,
            "counters": vae.non_trainable_variables,
            "optimizer": vae.optimizer.variables,
            "metrics": vae.metrics_variables,
        }


class BetweenSteps(keras.callbacks.Callback):
    """Update progress, checkpoint and handle signals after each step."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training = training

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore the means of an epoch that was begun; Keras has just reset them."""
        if self.training.progress.batch:
            _put(self.model.metrics_variables, self.training.metrics)

    def on_train_batch_end(self, item: int, logs: Any = None) -> None:
        """Note the steps made since; exit, if told to."""
        training = self.training
        # Of the last steps made together some may be missing, and Keras counts them.
        items = min(item + 1, len(training.batches))
        training.progress.batch = training.batches.steps_done(items)
        if training.progress.batch == training.steps_per_epoch:
            backend().synchronise(self.model)
            means = self.model.get_metrics_result().items()
            training.progress.means = {name: float(mean) for name, mean in means}
        bar = training.bar
        bar.label = f"epoch {training.progress.epoch + 1}/{training.settings.epochs}"
        bar.advance(training.images_done() - bar.done, lambda: f"elbo {float(logs['elbo']):.2f}")
        due = training.leave_if_told()
        if due and training.settings.checkpoint_minutes:
            training.save()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Exit, if told to."""
        self.training.leave_if_told()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep the weights, before Keras puts their averages in their place."""
        if self.model.optimizer.use_ema:
            self.training.raw = backend().copies(self.model.trainable_variables)


def _put(variables: Iterable[Any], values: Iterable[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
