"""How likely test images are under models that were trained with the same budget.

    python benchmarks/mnist_likelihood.py NAME [NAME ...] [--data FOLDER] [--epochs E]
        [--minutes M] [--samples 5000] [--images 10000] [--share 8] [--seed 0]
        [--evaluate-only] [--results FILE] [--work FOLDER]

Names:

- `vaeflow`, `vaeflow-flow`: `presets/mnist.yaml`, whose prior is N(0, I), and
  `presets/mnist-flow.yaml`, whose prior is learned; `vaeflow-residual`:
  `presets/mnist-residual.yaml`, for a GPU. Trained for the preset's epochs, or `--epochs`;
- `vaeflow-flow-fixed`: as `vaeflow-flow`, but the training images, too, are drawn black and white
  only once, so that a long training learns them by heart: 20 epochs;
- `keras-io-vae`, `pytorch-examples-vae`: the VAEs of keras.io's and PyTorch's examples, see
  `benchmarks/peers.py`. Trained for 30 minutes of wall-clock time, or `--minutes`, the making of
  the graph included: they are small, and epochs of theirs are short;
- `colour`: crops of 32x32 from the two photographs that scikit-learn ships, in bits per dimension,
  beside PNG and lossless WebP of the same test crops, for 20 minutes. Training crops come from the
  left of each photograph and test crops from the right, so that they share no pixel.

All but the last are trained on MNIST's 60,000 training images, drawn black and white anew in every
step where nothing else is said, and judged by the importance-weighted bound of its 10,000 test
images, drawn once.

Where 5,000 draws of 10,000 images take hours, `--share 8` makes an eighth of the draws, and
estimates the bound that all of them would give, without bias (`estimate_bound`): entries have it as
`estimated_nll`, beside `nll`, which is that of all draws, on as many images as it is known of.

A learning rate that falls has fallen to nothing at the end: of the epochs, or of the minutes,
however fast the machine. Settings with `finish_epochs` spend the last third of the minutes as they
spend those.

Results go into `benchmarks/results/mnist_likelihood.json`, those of other names stay. The trained
model and what has been evaluated so far are kept in `benchmarks/work/NAME`, until the same name has
been trained again. What was killed goes on where it was: a training of epochs when it is started
again, an evaluation with `--evaluate-only`.
"""

import vaeflow  # noqa: F401 - before Keras: chooses TensorFlow's kernels

# isort: split
import argparse
import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import peers
import tensorflow as tf
from crops import bits_of_files, photograph_crops
from kept_bounds import kept_bounds
from machine import machine, matrix_gflops
from mnist import mnist
from pythae_peers import merge

from vaeflow.common.files import atomic_directory, atomic_file, write_json
from vaeflow.config.schema import Train, load_parameters
from vaeflow.data.batches import Batches
from vaeflow.data.images import Binarized
from vaeflow.evaluation.bounds import estimate_bound
from vaeflow.model.device import (
    choose_jit,
    layers_in,
    share_cores,
    use_full_precision,
    use_gpu_if_any,
)
from vaeflow.model.likelihoods import DISCRETE
from vaeflow.model.vae import VAE, load_vae
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.loop import Training, make_compiled
from vaeflow.training.setup import make_optimizer

REPOSITORY = Path(__file__).parents[1]
PRESETS = REPOSITORY / "presets"
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
RESULTS = REPOSITORY / "benchmarks" / "results" / "mnist_likelihood.json"
WORK = REPOSITORY / "benchmarks" / "work"
WATCHED = 1_000  # training images, binarised once, whose bound is shown after each epoch
DRAWN_ONCE_SEED = 1  # of training images that are drawn once
FINISH_SHARE = 1 / 3  # of the minutes, where the settings have `finish_epochs`
COLOUR = Train(
    latent_dim=128,
    filters=(32, 64, 128),
    hidden_units=512,
    depth=1,
    likelihood="mixture_logistic",
    levels=256,
    binarize="none",
    prior="flow",
    kl_warmup_epochs=1,
    batch_size=64,
    learning_rate=0.001,
    learning_rate_schedule="cosine",
    weight_average=0.999,
)


class Entry(NamedTuple):
    """What is trained under a name.

    Attributes:
        settings: of the training, and of the model unless `model` is a peer's.
        model: from the images' shape, the settings and the steps of an epoch to an untrained VAE.
        images: `(data folder, "train" or "test")` to uint8 images.
        minutes: of training; None where the settings' epochs are the budget.
    """

    settings: Train
    model: Callable[[tuple[int, ...], Train, int], VAE]
    images: Callable[[Path, str], np.ndarray]
    minutes: float | None = None


def main() -> None:
    """Train all that are named, then evaluate them, then print."""
    arguments = parse()
    entries = make_entries()
    device = use_gpu_if_any()
    if not arguments.evaluate_only:
        for name in arguments.names:
            entry = entries[name]
            train = train_minutes if entry.minutes else train_epochs
            train(name, entry, arguments, device)
    use_full_precision()
    for name in arguments.names:
        result = evaluate(name, entries[name], arguments)
        merge(arguments.results, result)
        print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    """The command line."""
    names = list(make_entries())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's IDX files")
    parser.add_argument("--epochs", type=int, help="of training, instead of the preset's")
    parser.add_argument("--minutes", type=float, help="of training, where they are the budget")
    parser.add_argument("--samples", type=int, default=5_000, help="importance samples an image")
    parser.add_argument("--images", type=int, default=10_000, help="test images, the first ones")
    parser.add_argument("--share", type=int, help="estimate: make one in so many draws")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the evaluation")
    parser.add_argument("--evaluate-only", action="store_true", help="the model trained before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are merged")
    parser.add_argument("--work", type=Path, default=WORK, help="where models are kept")
    return parser.parse_args()


def _own(image_shape: tuple[int, int, int], settings: Train, steps_per_epoch: int) -> VAE:
    return VAE(settings.model(image_shape, steps_per_epoch))


def _drawn_once(folder: Path, split: str) -> np.ndarray:
    images = mnist(folder, split)
    return Binarized(images, DRAWN_ONCE_SEED)[:] if split == "train" else images


def make_entries() -> dict[str, Entry]:
    """All that can be named."""
    presets = {
        name: load_parameters(PRESETS / file).train
        for name, file in (
            ("vaeflow", "mnist.yaml"),
            ("vaeflow-flow", "mnist-flow.yaml"),
            ("vaeflow-residual", "mnist-residual.yaml"),
        )
    }
    fixed = shortened(presets["vaeflow-flow"].model_copy(update={"binarize": "none"}), 20)
    return {
        **{name: Entry(settings, _own, mnist) for name, settings in presets.items()},
        "vaeflow-flow-fixed": Entry(fixed, _own, _drawn_once),
        "keras-io-vae": Entry(peers.SETTINGS, peers.KerasIoVAE.of, mnist, minutes=30),
        "pytorch-examples-vae": Entry(
            peers.SETTINGS, peers.PyTorchExamplesVAE.of, mnist, minutes=30
        ),
        "colour": Entry(COLOUR, _own, lambda _, split: photograph_crops(split), minutes=20),
    }


# === Training ===


class WithinTime(keras.callbacks.Callback):
    """Ends the training when its time is over, the learning rate having followed a cosine to 0.

    Args:
        seconds: the time.
        settings: the learning rate to begin with, and whether it falls.

    Attributes:
        until: the share of the time after which `fit` ends.
    """

    def __init__(self, seconds: float, settings: Train):
        super().__init__()
        self.seconds = seconds
        self.settings = settings
        self.start = time.perf_counter()
        self.until = 1.0
        self.steps = 0

    @property
    def share(self) -> float:
        """How much of the time is used up."""
        return (time.perf_counter() - self.start) / self.seconds

    def on_train_begin(self, logs=None):
        """Start the clock, unless it runs already."""
        if self.steps == 0:
            self.start = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        """Set the learning rate."""
        if self.settings.learning_rate_schedule == "cosine":
            cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.share))
            self.model.optimizer.learning_rate = self.settings.learning_rate * cosine

    def on_train_batch_end(self, batch, logs=None):
        """Stop in time."""
        self.steps += 1
        self.model.stop_training = self.share >= self.until

    def on_epoch_end(self, epoch, logs=None):
        """Tell how it goes."""
        print(f"epoch {epoch + 1}, {self.share:.0%}: elbo {logs['elbo']:.2f} nats", flush=True)


def train_epochs(name: str, entry: Entry, arguments: argparse.Namespace, device: str) -> None:
    """Train a model for its settings' epochs as `vaeflow train` does, and keep it."""
    settings = entry.settings.model_copy(update={"seed": arguments.seed})
    if arguments.epochs:
        settings = shortened(settings, arguments.epochs)
    images = entry.images(arguments.data, "train")
    keras.utils.set_random_seed(settings.seed)
    parts = share_cores(settings.batch_size, choose_jit(settings.jit))
    vae = make_compiled(images.shape[1:], len(images), settings)
    vae.parts = parts
    checkpoints = Checkpoints(arguments.work / f"{name}-unfinished")
    # Seconds of the epochs that are behind it, in whichever process.
    clock = checkpoints.folder / "seconds.json"
    last = time.perf_counter()

    def report(row):
        nonlocal last
        spent = json.loads(clock.read_text()) if clock.exists() else {}
        now = time.perf_counter()
        spent[str(row["epoch"])], last = round(now - last, 2), now
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(clock) as fresh:
            write_json(fresh, spent)
        print(
            f"epoch {row['epoch']} of {settings.epochs}: elbo {row['elbo']:.2f} nats, of some "
            f"images {row['validation_elbo']:.2f}, {sum(spent.values()) / 60:.1f} minutes",
            flush=True,
        )

    watched = Binarized(images[:WATCHED], settings.seed)[:]
    training = Training(vae, settings, images, watched, checkpoints, report, ())
    going_on = training.resume()
    print(f"training {name} on {device}{' from its checkpoint' * going_on}", flush=True)
    with training.signals, training.progress_bar():
        training.run()
    seconds = sum(json.loads(clock.read_text()).values())
    record = {
        "train_seconds": round(seconds, 1),
        "epochs": settings.epochs,
        "train_images_per_second": round(settings.epochs * len(images) / seconds),
        "minutes": round(seconds / 60, 1),
    }
    keep(name, vae, settings, record, arguments, device)
    shutil.rmtree(checkpoints.folder)


def shortened(settings: Train, epochs: int) -> Train:
    """The settings with fewer epochs, the first and last ones of another kind in proportion."""
    share = epochs / settings.epochs
    fewer = {
        key: round(share * getattr(settings, key)) for key in ("kl_warmup_epochs", "finish_epochs")
    }
    return settings.model_copy(update={"epochs": epochs, **fewer})


def train_minutes(name: str, entry: Entry, arguments: argparse.Namespace, device: str) -> None:
    """Train a model for some minutes and keep it."""
    print(f"training {name} on {device}", flush=True)
    minutes = arguments.minutes or entry.minutes
    settings = entry.settings.model_copy(update={"seed": arguments.seed})
    images = entry.images(arguments.data, "train")
    keras.utils.set_random_seed(settings.seed)
    with layers_in(settings.precision):
        vae = entry.model(images.shape[1:], settings, math.ceil(len(images) / settings.batch_size))
    # The rate is the callback's to set; the schedule would need to know the number of steps.
    constant = settings.model_copy(update={"learning_rate_schedule": "constant"})
    vae.compile(optimizer=make_optimizer(constant, steps=1), jit_compile=choose_jit(settings.jit))
    clock = WithinTime(60 * minutes, settings)
    fit = functools.partial(
        vae.fit,
        Batches(images, settings.batch_size, shuffle_seed=settings.seed).feed(),
        epochs=1_000_000,
        callbacks=[clock],
        shuffle=False,  # the batches are shuffled already
        verbose=0,
    )
    if settings.finish_epochs:
        clock.until = 1 - FINISH_SHARE
        fit()
        vae.switch_to_importance_weighted(settings.finish_samples)
        clock.until = 1.0
    fit()
    seconds = time.perf_counter() - clock.start
    seen = clock.steps * settings.batch_size
    record = {
        "train_seconds": round(seconds, 1),
        "epochs": round(seen / len(images), 2),
        "train_images_per_second": round(seen / seconds),
        "minutes": minutes,
    }
    keep(name, vae, settings, record, arguments, device)


def keep(
    name: str,
    vae: VAE,
    settings: Train,
    record: dict[str, object],
    arguments: argparse.Namespace,
    device: str,
) -> None:
    """Write a trained model, and how it was made."""
    record |= {
        "parameters": vae.count_params(),
        "seed": settings.seed,
        **machine(device),
        "matrix_gflops": matrix_gflops(),
        "tensorflow": tf.__version__,
        "settings": settings.model_dump(
            mode="json", exclude_unset=True, exclude={"epochs", "seed"}
        ),
    }
    with atomic_directory(arguments.work / name) as folder:
        vae.save(folder / "model.keras")
        write_json(folder / "training.json", record)


# === Evaluation ===


def evaluate(name: str, entry: Entry, arguments: argparse.Namespace) -> dict[str, object]:
    """The entry of the results file for a model that was trained before."""
    path = arguments.work / name / "training.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: train {name} first, without --evaluate-only.")
    training = json.loads(path.read_text())
    images = entry.images(arguments.data, "test")[: arguments.images]
    print(f"evaluating {name}", flush=True)
    folder = arguments.work / name
    vae = load_vae(folder / "model.keras")
    if arguments.share:
        found = estimated(vae, images, arguments)
        return {
            "name": name,
            **found,
            "estimated_command": command(name, training, arguments),
            **training,
        }
    bounds = kept_bounds(vae, folder, images, arguments.samples, arguments.seed)
    nats = bounds["importance_weighted_bound"]
    return {
        "name": name,
        "nll": round(-float(nats.mean()), 4),
        "standard_error": round(float(nats.std(ddof=1) / math.sqrt(len(nats))), 4),
        "elbo": round(float(bounds["elbo"].mean()), 4),
        "kl": round(float(bounds["kl"].mean()), 4),
        **(bits(nats, images) if entry.settings.likelihood in DISCRETE else {}),
        "importance_samples": arguments.samples,
        "images": len(images),
        "command": command(name, training, arguments),
        **training,
    }


def estimated(vae: VAE, images: np.ndarray, arguments: argparse.Namespace) -> dict[str, object]:
    """What the bound of all draws is about, from a share of them."""
    found = estimate_bound(vae, images, arguments.samples, arguments.seed, arguments.share)
    return {
        "estimated_nll": round(-found.mean, 4),
        "estimated_standard_error": round(found.standard_error, 4),
        "estimated_images": len(images),
        "estimated_draws": found.draws,
    }


def bits(nats: np.ndarray, images: np.ndarray) -> dict[str, object]:
    """Bits per dimension of the model, and of files that hold the same images without loss."""
    dimensions = math.prod(images.shape[1:]) * math.log(2)
    own = {"bits_per_dimension": round(-float(nats.mean()) / dimensions, 4)}
    return own | bits_of_files(images, "png") | bits_of_files(images, "webp")


def command(name: str, training: dict, arguments: argparse.Namespace) -> str:
    """What to run for the same again."""
    budget = "minutes" if make_entries()[name].minutes else "epochs"
    return (
        f"python benchmarks/mnist_likelihood.py {name} --{budget} {training[budget]:g} "
        f"--samples {arguments.samples} --images {arguments.images} --seed {arguments.seed}"
        + (f" --share {arguments.share}" if arguments.share else "")
    )


if __name__ == "__main__":
    main()
