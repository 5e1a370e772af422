"""A training, from the prepared images and the parameters to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import keras

from vaeflow.config import Parameters, Train
from vaeflow.data.prepare import image_shape
from vaeflow.device import (
    all_devices,
    choose_jit,
    choose_steps_per_execution,
    layers_in,
    share_cores,
)
from vaeflow.errors import TrainingError
from vaeflow.model.vae import VAE
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.epochs import Row, Training
from vaeflow.training.setup import (
    check_devices,
    check_memory,
    load_images,
    make_optimizer,
    make_vae,
)


def fit(
    prepared: Path,
    parameters: Parameters,
    *,
    checkpoints: Checkpoints | None = None,
    resumed: Callable[[list[Row]], None] = lambda rows: None,
    report: Callable[[Row], None] = lambda row: None,
    callbacks=(),
) -> VAE:
    """A VAE trained on the prepared images; the same seed gives the same weights.

    Args:
        checkpoints: where the training goes on from, and is kept as it goes.
        resumed: called with the rows of the epochs that a checkpoint had behind it.
        report: called after each epoch with its row: `epoch`, and metrics per image in nats, those
            of the validation with `validation_` before their names.
        callbacks: Keras's, for each epoch's steps.

    Raises:
        ConfigError: the parameters ask for more memory than there is.
        TrainingError: a checkpoint cannot be written.
        SystemExit: a signal ended it, with 128 + its number; where there are checkpoints, one of
            the last step has been written.
    """
    settings = parameters.train
    parts = share_cores(settings.batch_size, choose_jit(settings.jit))
    check_devices(settings)
    keras.utils.set_random_seed(settings.seed)
    images, validation = load_images(prepared, settings)
    with all_devices():
        vae = make_compiled(image_shape(prepared), len(images), settings)
        vae.parts = parts
        training = Training(vae, settings, images, validation, checkpoints, report, callbacks)
        if training.resume():
            resumed(training.progress.rows)
        with training.signals, training.progress_bar(), clear_memory_errors(settings):
            training.run()
    return vae


def make_compiled(shape: tuple[int, int, int], images: int, settings: Train) -> VAE:
    """The model that the settings describe, untrained, with all that training needs."""
    steps_per_epoch = math.ceil(images / settings.batch_size)
    with layers_in(settings.precision):
        vae = make_vae(shape, settings, steps_per_epoch)
    check_memory(vae, settings)
    optimizer = make_optimizer(settings, settings.epochs * steps_per_epoch)
    vae.compile(
        optimizer=optimizer,
        jit_compile=choose_jit(settings.jit),
        steps_per_execution=choose_steps_per_execution(),
    )
    optimizer.build(vae.trainable_variables)
    return vae


@contextmanager
def clear_memory_errors(settings: Train) -> Iterator[None]:
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
