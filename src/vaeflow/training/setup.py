"""What a training begins with, made as the settings say: images, model and optimizer."""

from __future__ import annotations

import math
import os
from pathlib import Path

import keras

from vaeflow.config.schema import Train
from vaeflow.data.images import Binarized, Images, StoredImages, binarized
from vaeflow.data.splits import load_split
from vaeflow.errors import ConfigError
from vaeflow.model.device import count_devices
from vaeflow.model.likelihoods import likelihood_warning
from vaeflow.model.steps.optimizer import Adam
from vaeflow.model.vae import VAE

SPLITS = ("train", "validation")


def load_images(prepared: Path, settings: Train) -> tuple[Images, Images]:
    """Load training and validation images, uint8 and binarised where the settings ask for it.

    Warns where the likelihood does not fit them.
    """
    images: Images
    validation: Images
    images, validation = (StoredImages(load_split(prepared, name)) for name in SPLITS)
    if settings.binarize == "static":
        images = Binarized(images, settings.seed)
    validation = binarized(validation, settings.binarize, settings.seed)
    # The validation images stand for all: they are few, and what the model will be judged on.
    if reason := likelihood_warning(settings.likelihood, validation):
        print(f"warning: {reason}", flush=True)
    return images, validation


def make_optimizer(settings: Train, steps: int) -> keras.optimizers.Optimizer:
    """Make Adam, with the learning rate and the weight average that the settings ask for.

    Args:
        settings: see `params.yaml`.
        steps: of the whole training.
    """
    rate = settings.learning_rate
    if settings.learning_rate_schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    average = settings.weight_average
    return Adam(rate, use_ema=average > 0, ema_momentum=average)


def check_devices(settings: Train) -> None:
    """Refuse batches that the devices at hand cannot share evenly.

    Raises:
        ConfigError: `batch_size` is no multiple of their number.
    """
    devices, size = count_devices(), settings.batch_size
    if size % devices:
        raise ConfigError(
            f"train.batch_size is {size}, which {devices} devices cannot share evenly. Set it to "
            f"{size + -size % devices}, or let fewer be seen (CUDA_VISIBLE_DEVICES)."
        )


def check_memory(vae: VAE, settings: Train) -> None:
    """Refuse more draws at once than this machine's memory can hold.

    Every value of the decoder is kept for every draw until the gradient has been found, and the
    gradient is as large again.

    Raises:
        ConfigError: they would take more than all of it.
    """
    outputs = (layer.output.shape[1:] for layer in vae.decoder.layers)
    bytes_a_draw = 2 * 4 * sum(map(math.prod, outputs))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = memory // bytes_a_draw
    batch_size = settings.batch_size
    for key in ("samples", "finish_samples") if settings.finish_epochs else ("samples",):
        draws = getattr(settings, key) * batch_size
        if draws > fitting:
            raise ConfigError(
                f"train.{key} is {getattr(settings, key)} and train.batch_size {batch_size}: the "
                f"decoder would work on {draws} draws at once, and no more than {fitting} fit into "
                f"this machine's memory. Set train.{key} to {max(1, fitting // batch_size)} or "
                "less, or train.batch_size lower."
            )
