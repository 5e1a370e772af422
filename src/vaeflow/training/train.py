"""The `train` stage: fit the VAE, track the run, keep the weights."""

from __future__ import annotations

import csv
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path

import keras

from vaeflow.config import Parameters, Train
from vaeflow.data.batches import batches
from vaeflow.data.prepare import image_shape, load_split
from vaeflow.device import choose_jit, layers_in, use_gpu_if_any
from vaeflow.errors import ConfigError, TrainingError
from vaeflow.files import atomic_directory, write_json
from vaeflow.lineage import collect_lineage
from vaeflow.model.binarize import Binarized, binarized
from vaeflow.model.likelihoods import why_it_does_not_fit
from vaeflow.model.vae import VAE
from vaeflow.training.patience import KeepBest
from vaeflow.training.stopping import StopBetweenSteps
from vaeflow.training.tracking import Run, start_run
from vaeflow.workspace import Workspace


def train(workspace: Workspace, parameters: Parameters) -> Mapping[str, float]:
    """Train on `outputs/prepared` and write `outputs/model`.

    Writes `model.keras`, `history.csv` (one row an epoch, nats per image) and `run.json` (the
    MLflow run's id and the lineage), so that a model from DVC's cache still leads to its run.

    Returns:
        The last epoch's metrics.
    """
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    print(f"training on {use_gpu_if_any()}", flush=True)

    lineage = collect_lineage(workspace, parameters)
    with (
        atomic_directory(workspace.model) as folder,
        # MLflow makes up a name outside `dvc exp run`.
        start_run(workspace, os.environ.get("DVC_EXP_NAME"), parameters.flat(), lineage) as run,
    ):
        report = EpochReport(run, parameters.train.epochs)
        limit = parameters.train.skipped_steps_limit
        vae = fit(prepared, parameters, [report, StopWhenSkipping(limit, workspace.stopped)])
        vae.save(folder / "model.keras")
        write_history(folder / "history.csv", report.rows)
        write_json(folder / "run.json", {"run_id": run.run_id, "lineage": lineage})
        run.log_file(folder / "history.csv")
    return report.rows[-1]


def fit(prepared: Path, parameters: Parameters, callbacks=()) -> VAE:
    """A VAE trained on the prepared images; the same seed gives the same weights.

    Raises:
        ConfigError: the parameters ask for more memory than there is.
    """
    settings = parameters.train
    keras.utils.set_random_seed(settings.seed)
    images, validation = load_images(prepared, settings)
    steps_per_epoch = math.ceil(len(images) / settings.batch_size)
    with layers_in(settings.precision):
        vae = make_vae(image_shape(prepared), settings, steps_per_epoch)
    check_memory(vae, settings)
    optimizer = make_optimizer(settings, settings.epochs * steps_per_epoch)
    vae.compile(optimizer=optimizer, jit_compile=choose_jit(settings.jit))
    if settings.weight_average:
        # Validates with the averaged weights, which are what is kept in the end.
        callbacks = [keras.callbacks.SwapEMAWeights(), *callbacks]
    if settings.patience:
        callbacks = [KeepBest(settings.patience), *callbacks]
    run = functools.partial(
        vae.fit,
        batches(images, settings.batch_size, shuffle_seed=settings.seed),
        validation_data=batches(validation, settings.batch_size),
        callbacks=[StopBetweenSteps(), *callbacks],
        shuffle=False,  # the batches are shuffled already
        verbose=0,
    )
    first = settings.epochs - settings.finish_epochs
    if first:
        run(epochs=first)
    if settings.finish_epochs:
        vae.tighten(settings.finish_samples)
        run(initial_epoch=first, epochs=settings.epochs)
    return vae


def load_images(prepared: Path, settings: Train):
    """Training and validation images, uint8 and binarised where the settings ask for it.

    Warns where the likelihood does not fit them.
    """
    images = load_split(prepared, "train")
    if settings.binarize == "static":
        images = Binarized(images, settings.seed)
    validation = binarized(load_split(prepared, "validation"), settings.binarize, settings.seed)
    # The validation images stand for all: they are few, and what the model will be judged on.
    if reason := why_it_does_not_fit(settings.likelihood, validation):
        print(f"warning: {reason}", flush=True)
    return images, validation


def make_vae(image_shape: tuple[int, int, int], settings: Train, steps_per_epoch: int) -> VAE:
    """The model that the settings describe, untrained."""
    return VAE(
        image_shape=image_shape,
        latent_dim=settings.latent_dim,
        network=settings.network,
        filters=settings.filters,
        depth=settings.depth,
        hidden_units=settings.hidden_units,
        likelihood=settings.likelihood,
        binarize=settings.binarize,
        objective=settings.objective,
        samples=settings.samples,
        beta=settings.beta,
        kl_warmup_steps=settings.kl_warmup_epochs * steps_per_epoch,
        free_bits=settings.free_bits,
        gradient_limit=settings.gradient_limit,
        seed=settings.seed,
    )


def make_optimizer(settings: Train, steps: int) -> keras.optimizers.Optimizer:
    """Adam, with the learning rate and the weight average that the settings ask for.

    Args:
        settings: see `params.yaml`.
        steps: of the whole training.
    """
    rate = settings.learning_rate
    if settings.learning_rate_schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    average = settings.weight_average
    return keras.optimizers.Adam(rate, use_ema=average > 0, ema_momentum=average)


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


class EpochReport(keras.callbacks.Callback):
    """After each epoch: a line on the terminal, a row kept, a point on each MLflow curve."""

    def __init__(self, run: Run, epochs: int):
        super().__init__()
        self.run = run
        self.epochs = epochs
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, epoch, logs=None):
        """Called by Keras with the epoch's mean metrics; `val_` marks the validation split."""
        number = epoch + 1
        metrics = {name.replace("val_", "validation_"): value for name, value in logs.items()}
        self.rows.append({"epoch": number, **metrics})
        self.run.log_metrics(metrics, step=number)
        print(
            f"epoch {number}/{self.epochs}  elbo {metrics['elbo']:.3f}  "
            f"validation {metrics['validation_elbo']:.3f} nats"
            + (f"  skipped {metrics['skipped_steps']:.0f} steps" * bool(metrics["skipped_steps"])),
            flush=True,
        )


class StopWhenSkipping(keras.callbacks.Callback):
    """End a training that makes no more steps, and keep the weights as they were before.

    Args:
        limit: how many steps left out in a row are too many; so is an epoch of nothing else.
        keep: where the weights go. A step left out changes none, so they are the last good ones.
    """

    def __init__(self, limit: int, keep: Path):
        super().__init__()
        self.limit = limit
        self.keep = keep
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch, for the message."""
        self.epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        """Count."""
        skipped = int(self.model.skipped_in_a_row)
        if skipped >= min(self.limit, self.params["steps"]):
            self.keep.parent.mkdir(parents=True, exist_ok=True)
            self.model.save(self.keep)
            raise TrainingError(
                f"epoch {self.epoch}: {skipped} steps in a row had a gradient that is not finite "
                f"or above train.gradient_limit. The weights as they were before are kept in "
                f"{self.keep}. Lower train.learning_rate, or warm the KL term up "
                "(train.kl_warmup_epochs)."
            )


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """One row an epoch, with a header: what `dvc plots` draws."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
