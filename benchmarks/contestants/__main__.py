"""One contestant: makes itself ready, then trains as long as it is told to on standard input.

    python -m contestants NAME BATCH_SIZE PRECISION [--network conv] [--images 4096] [--cold]

Lines in: `window EPOCHS`, `until NATS FILE.npz`, `end`. Each is answered by a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time

import numpy as np

from contestants.networks import NETWORKS, SHAPE

MODULES = {
    "vaeflow": "contestants.keras_models",
    "keras-io": "contestants.keras_models",
    "jax-plain": "contestants.jax_models",
    "torch-eager": "contestants.torch_models",
    "torch-compile": "contestants.torch_models",
    "matrix products": "contestants.matrix_products",
}


def main() -> None:
    """Answer until told to end."""
    arguments = parse()
    start = time.perf_counter()
    make = importlib.import_module(MODULES[arguments.name]).make
    contestant = make(
        arguments.name, arguments.batch_size, arguments.precision, NETWORKS[arguments.network]
    )
    shape = (arguments.images, *SHAPE)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if not arguments.cold:
        contestant.train(images, 1)  # compiled, and warm
    own = getattr(contestant, "remarks", {})
    tell({"device": contestant.device, "ready": round(time.perf_counter() - start, 1), **own})
    for line in sys.stdin:
        order, *others = line.split()
        if order == "window":
            start = time.perf_counter()
            contestant.train(images, int(others[0]))
            seconds = time.perf_counter() - start
            tell({"images_per_second": contestant.images(images, int(others[0])) / seconds})
        elif order == "until":
            tell(until(contestant, float(others[0]), np.load(others[1])))
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            tell({"peak_memory_mb": round(contestant.device_memory_mb() or peak)})
            return


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="contestants")
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("precision", choices=("float32", "mixed_bfloat16"))
    parser.add_argument("--network", choices=NETWORKS, default="conv")
    parser.add_argument("--images", type=int, default=4096, help="of an epoch of a window")
    parser.add_argument("--cold", action="store_true", help="nothing is compiled before")
    return parser.parse_args()


def until(contestant, nats: float, data) -> dict[str, float]:
    """Train, an eighth of an epoch at a time, until the test images' -ELBO is as low.

    The seconds are those of training alone. What settings a contestant has of its own for this are
    in the answer.
    """
    train, test = data["train"], data["test"]
    generator = np.random.default_rng(0)
    own = contestant.reset_for_bound()
    seconds, reached, seen = 0.0, float("inf"), 0
    while reached > nats and seconds < 900:
        part = train[generator.choice(len(train), len(train) // 8, replace=False)]
        start = time.perf_counter()
        contestant.train(part, 1)
        seconds += time.perf_counter() - start
        seen += len(part)
        reached = -contestant.elbo(test)
    found = {"seconds": round(seconds, 1), "minus_elbo": round(reached, 2), "images": seen}
    return {**found, **own}


def tell(answer: dict) -> None:
    """A line of JSON."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
