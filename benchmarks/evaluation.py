"""How fast the importance-weighted bound is computed, and its estimate from fewer draws.

    python benchmarks/evaluation.py [--model FILE --data FOLDER] [--images 1000] [--repeats 8]

takes the network of `presets/mnist.yaml`, untrained (its weights do not change its speed), and
times, in turns, the bound of 8 images of 28x28 from 5,000 samples each, and its decoder on as many
latents made ready beforehand, compiled, in batches of the same size.

With a trained model (`model.keras`) and MNIST's files it also computes the mean bound of the first
test images from 5,000 draws each, and several times its estimate from a quarter of the draws: how
far these are from it, in the mean and one by one, and how long both take.

Writes `benchmarks/results/evaluation.json`: a list of entries with `name`, what was found, and the
machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from machine import machine
from mnist import mnist

from vaeflow.config.schema import load_parameters
from vaeflow.evaluation.bounds import compute_bounds, draws_at_once, estimate_bound
from vaeflow.model.vae import VAE, load_vae

REPOSITORY = Path(__file__).parents[1]
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
RESULTS = REPOSITORY / "benchmarks" / "results" / "evaluation.json"
IMAGES, SAMPLES, RUNS = 8, 5_000, 5


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a trained model.keras")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's IDX files")
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    entries = rates()
    if arguments.model:
        entries.append(estimates(arguments))
    RESULTS.write_text(json.dumps([{**entry, **machine()} for entry in entries], indent=2) + "\n")
    for entry in entries:
        print(" ".join(f"{value!s:<42}" for value in list(entry.values())))


def estimates(arguments: argparse.Namespace) -> dict[str, object]:
    """How far the estimate is from the mean bound, and how long it takes."""
    vae = load_vae(arguments.model)
    images = mnist(arguments.data, "test")[: arguments.images]
    start = time.perf_counter()
    whole = compute_bounds(vae, images, SAMPLES, seed=0).importance_weighted_bound.mean()
    whole_seconds = time.perf_counter() - start
    means, seconds = [], []
    for seed in range(1, 1 + arguments.repeats):
        start = time.perf_counter()
        means.append(estimate_bound(vae, images, SAMPLES, seed).mean)
        seconds.append(time.perf_counter() - start)
        print(f"{means[-1]:.3f} nats beside {whole:.3f}, in {seconds[-1]:.0f} s", flush=True)
    differences = np.array(means) - whole
    return {
        "name": "estimate from a quarter of the draws",
        "bound": round(float(whole), 4),
        "bias": round(float(differences.mean()), 4),
        "bias_standard_error": round(float(differences.std(ddof=1) / np.sqrt(len(differences))), 4),
        "differences": [round(float(difference), 4) for difference in differences],
        "images": len(images),
        "samples": SAMPLES,
        "seconds": round(statistics.median(seconds), 1),
        "bound_seconds": round(whole_seconds, 1),
        "share_of_the_time": round(statistics.median(seconds) / whole_seconds, 3),
    }


def rates() -> list[dict[str, object]]:
    """Draws per second of the bound and of the decoder alone."""
    settings = load_parameters(REPOSITORY / "presets" / "mnist.yaml").train
    vae = VAE(settings.model((28, 28, 1), steps_per_epoch=1))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 2, (IMAGES, 28, 28, 1), dtype=np.uint8) * 255
    at_once = draws_at_once(vae) // IMAGES * IMAGES
    latents = tf.constant(
        generator.standard_normal((at_once, vae.config.latent_dim), dtype=np.float32)
    )
    decoder = tf.function(lambda t: vae.decoder(t))

    def decode() -> int:
        batches = IMAGES * SAMPLES // at_once
        for _ in range(batches):
            decoder(latents)["logits"].numpy()
        return batches * at_once

    def bound() -> int:
        compute_bounds(vae, images, SAMPLES, seed=0)
        return IMAGES * SAMPLES

    tasks = {"importance-weighted bound, 5,000 samples": bound, "decoder alone": decode}
    rates = {name: [] for name in tasks}
    decoder(latents)
    for _ in range(RUNS):
        for name, task in tasks.items():
            start = time.perf_counter()
            draws = task()
            rates[name].append(draws / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    entries = [
        {"name": name, "draws_per_second": round(rate), "runs": RUNS}
        for name, rate in medians.items()
    ]
    first, second = medians.values()
    entries.append({"name": "bound / decoder", "ratio": round(first / second, 3)})
    return entries


if __name__ == "__main__":
    main()
