"""How fast the importance-weighted bound is computed, beside the decoder alone.

    python benchmarks/evaluation.py

takes the network of `presets/mnist.yaml`, untrained (its weights do not change its speed), and
times, in turns, the bound of 8 images of 28x28 from 5,000 samples each, and its decoder on as many
latents made ready beforehand, compiled, in batches of the same size. Writes
`benchmarks/results/evaluation.json`: a list of entries with `name`, `draws_per_second` (the median
of the runs), and the machine; the last entry is the ratio of the two.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from machine import machine

from vaeflow.config.schema import load_parameters
from vaeflow.evaluation.bounds import compute_bounds, draws_at_once
from vaeflow.model.vae import VAE

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "evaluation.json"
IMAGES, SAMPLES, RUNS = 8, 5_000, 5


def main() -> None:
    """Measure, print, write the JSON."""
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
    RESULTS.write_text(json.dumps([{**entry, **machine()} for entry in entries], indent=2) + "\n")
    for entry in entries:
        print(" ".join(f"{value!s:<42}" for value in list(entry.values())[:2]))


if __name__ == "__main__":
    main()
