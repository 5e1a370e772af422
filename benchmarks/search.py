"""Which sizes of the networks, and which training, bring most: short runs, the better ones longer.

    python benchmarks/search.py SET [SET ...] [--data FOLDER] [--rungs E ...] [--keep 4]
        [--jobs N] [--results FILE]

Sets, and what is searched:

- `mnist-binarized`: the preset `mnist`, and what might be better in it, the prior included;
- `digits`, `mnist`, `grey`, `colour`: what `auto` chooses for scikit-learn's digits, for MNIST's
  grey images, and for 10,000 crops of the photographs that scikit-learn ships, grey of 28x28 and
  colour of 64x64, beside half and twice as much of each parameter. Those are trained for the epochs
  that `auto` chooses that are best after a few epochs; of the digits, which take a minute, all.

Successive halving (Jamieson & Talwalkar 2016): every trial of a set is trained for the first number
of epochs; of a rung the best in `--keep` go on to the next, and what they are changes of. They are
trained anew for more epochs, since a learning rate that falls to nothing cannot be lengthened.
Judged by the importance-weighted bound of images that were not trained on: of MNIST the last 5,000
of its training images, never its test images. Trials that the results file has are not made again,
so a search that was killed goes on.

By default one trial has all the cores. With `--jobs 2` two are trained at once, each on its half of
them: on two cores that takes 0.7 of the time, and each trial longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
from machine import machine

from vaeflow.common.files import atomic_file, write_json
from vaeflow.config.auto import DataFacts, resolve
from vaeflow.config.schema import Train, load_parameters
from vaeflow.data.survey import PixelLevels

REPOSITORY = Path(__file__).parents[1]
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
RESULTS = REPOSITORY / "benchmarks" / "results" / "search.json"
WRITING = Lock()
SAMPLES, JUDGED, HELD_BACK = 100, 1_000, 5_000

# Epochs of each rung, None for as many as `auto` chooses.
RUNGS: dict[str, list[int | None]] = {
    "mnist-binarized": [4, 20, 60],
    "digits": [None],
    "mnist": [2, None],
    "grey": [15, None],
    "colour": [2, None],
}

# What is tried, by set: changes to its settings.
OF_AUTO: list[dict[str, Any]] = [
    {},
    {"likelihood": "discretized_logistic"},
    {"latent_dim": 0.5},  # of what auto chooses; so are the other numbers below
    {"latent_dim": 2},
    {"filters": 2},
    {"hidden_units": 2},
    {"batch_size": 0.5},
    {"depth": 2},
]
TRIALS: dict[str, list[dict[str, Any]]] = {
    "mnist-binarized": [
        {},
        {"depth": 2},
        {"filters": [64, 128]},
        {"hidden_units": 256},
        {"latent_dim": 20},
        {"network": "residual", "hidden_units": 256},
        {"learning_rate": 0.001},
        {"batch_size": 64},
        {"batch_size": 256, "learning_rate": 0.003},
        {"prior": "flow"},
        {"prior": "flow", "prior_couplings": 16},
        {"prior": "flow", "filters": [64, 128]},
    ],
    **dict.fromkeys(("digits", "mnist", "grey", "colour"), OF_AUTO),
}


def main() -> None:
    """Search each set that is named."""
    arguments = parse()
    if arguments.trial:
        print(json.dumps(run(arguments.sets[0], json.loads(arguments.trial), arguments)))
        return
    for name in arguments.sets:
        search(name, arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", choices=list(TRIALS), metavar="SET")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's IDX files")
    parser.add_argument("--rungs", type=int, nargs="+", help="epochs, instead of the set's")
    parser.add_argument("--keep", type=int, default=4, help="of so many trials one goes on")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--trial", help=argparse.SUPPRESS)  # changes and epochs, in a process
    return parser.parse_args()


def search(name: str, arguments: argparse.Namespace) -> None:
    """Make every rung of a set."""
    trials = TRIALS[name]
    for epochs in arguments.rungs or RUNGS[name]:
        if {} not in trials:  # those are compared with it
            trials = [{}, *trials]
        made = make_all(name, trials, epochs, arguments)
        made.sort(key=lambda trial: -trial["bound"])
        for trial in made:
            print(f"{name}, {trial['epochs']} epochs: {trial['bound']} {trial['changes']}")
        trials = [trial["changes"] for trial in made[: math.ceil(len(made) / arguments.keep)]]


def make_all(
    name: str, trials: list[dict[str, Any]], epochs: int | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Make the trials of a rung, as many at once as there are jobs, each on its own cores."""
    cores = sorted(os.sched_getaffinity(0))
    parts: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(arguments.jobs):
        parts.put(cores[job :: arguments.jobs] or cores)

    def keep_to_part() -> None:  # this thread, and the processes that it starts
        os.sched_setaffinity(0, parts.get())

    with ThreadPoolExecutor(arguments.jobs, initializer=keep_to_part) as pool:
        return list(pool.map(lambda changes: make(name, changes, epochs, arguments), trials))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the trials that were made."""
    return json.loads(path.read_text()) if path.exists() else []


def make(
    name: str, changes: Mapping[str, Any], epochs: int | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return a trial of the results file, made in a process of its own if it is not there."""
    key = {"set": name, "changes": changes, "rung": epochs}
    for trial in read(arguments.results):
        if all(trial[part] == value for part, value in key.items()):
            return trial
    command = [sys.executable, __file__, name, "--data", str(arguments.data)]
    command += ["--trial", json.dumps(key)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    trial = key | json.loads(output.splitlines()[-1])
    print(f"{trial['bound']:.2f} nats, {trial['train_seconds']} s: {changes}", flush=True)
    with WRITING, atomic_file(arguments.results) as fresh:
        write_json(fresh, [*read(arguments.results), trial])
    return trial


def load(name: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Images to train on, and others to judge by, uint8."""
    from crops import photograph_crops
    from mnist import mnist
    from sklearn.datasets import load_digits

    if name == "digits":
        pixels = np.round(load_digits().images[..., None] * (255 / 16)).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(pixels))
        return pixels[order[:1437]], pixels[order[1437:]]
    if name in ("grey", "colour"):
        size = {"edge": 28, "grey": True} if name == "grey" else {"edge": 64}
        return photograph_crops("train", count=10_000, **size), photograph_crops("test", **size)
    images = mnist(arguments.data, "train")
    return images[:-HELD_BACK], images[-HELD_BACK:]


def settings_of(name: str, trial: Mapping[str, Any], images: Any) -> Train:
    """The settings of a trial."""
    changes = dict(trial["changes"])
    if name == "mnist-binarized":
        settings = load_parameters(REPOSITORY / "presets" / "mnist.yaml").train
        short = {"finish_epochs": 0, "kl_warmup_epochs": max(1, trial["rung"] // 20)}
        return settings.with_values({**short, **changes, "epochs": trial["rung"]})
    levels = PixelLevels()
    levels.add(images)
    limits = {"epochs": trial["rung"]} if trial["rung"] else {}
    chosen, _ = resolve(Train(**limits), DataFacts(images.shape[1:], len(images), levels.count))
    for key in changes.keys() & {"latent_dim", "hidden_units", "batch_size"}:
        changes[key] = round(changes[key] * getattr(chosen, key))
    if "filters" in changes:
        changes["filters"] = [round(changes["filters"] * filters) for filters in chosen.filters]
    return chosen.with_values(changes)


def run(name: str, trial: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model and judge it."""
    import keras

    from vaeflow.data.images import Binarized
    from vaeflow.evaluation.bounds import compute_bounds
    from vaeflow.model.device import choose_jit, share_cores, use_gpu_if_any
    from vaeflow.training.loop import Training, make_compiled

    device = use_gpu_if_any()
    images, held_back = load(name, arguments)
    if name == "mnist-binarized":
        held_back = Binarized(held_back, 0)[:]
    settings = settings_of(name, trial, images)
    keras.utils.set_random_seed(settings.seed)
    parts = share_cores(settings.batch_size, choose_jit(settings.jit))
    vae = make_compiled(images.shape[1:], len(images), settings)
    vae.parts = parts
    rows: list[Mapping[str, float]] = []
    start = time.perf_counter()
    training = Training(vae, settings, images, held_back[:JUDGED], None, rows.append, ())
    with training.progress_bar():
        training.run()
    seconds = time.perf_counter() - start
    bounds = compute_bounds(vae, held_back[:JUDGED], SAMPLES, 0)
    return {
        "bound": round(float(bounds.importance_weighted_bound.mean()), 4),
        "elbo": round(float(bounds.elbo.mean()), 4),
        "train_elbo": round(rows[-1]["elbo"], 4),
        "importance_samples": SAMPLES,
        "images": len(bounds.elbo),
        "epochs": len(rows),
        "train_seconds": round(seconds),
        "parameters": vae.count_params(),
        "settings": {
            key: value
            for key, value in settings.model_dump(mode="json").items()
            if key in Train.auto_keys()
        },
        "command": f"python benchmarks/search.py {name}",
        **machine(device),
    }


if __name__ == "__main__":
    main()
