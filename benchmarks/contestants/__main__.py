"""One contestant: makes itself ready, then trains as long as it is told to on standard input.

    python -m contestants NAME BATCH_SIZE PRECISION

Lines in: `window EPOCHS`, `until NATS FILE.npz`, `end`. Each is answered by a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time

import numpy as np

WINDOW_IMAGES = 4096
MODULES = {
    "vaeflow": "contestants.keras_models",
    "keras-io": "contestants.keras_models",
    "torch-eager": "contestants.torch_models",
    "torch-compile": "contestants.torch_models",
    "matrix products": "contestants.matrix_products",
}


def main() -> None:
    """Answer until told to end."""
    name, batch_size, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    make = importlib.import_module(MODULES[name]).make
    contestant = make(name, batch_size, precision)
    images = np.random.default_rng(0).integers(0, 256, (WINDOW_IMAGES, 28, 28, 1), dtype=np.uint8)
    contestant.train(images, 1)  # compiled, and warm
    tell({"device": contestant.device})
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "window":
            start = time.perf_counter()
            contestant.train(images, int(arguments[0]))
            seconds = time.perf_counter() - start
            tell({"images_per_second": contestant.images(images, int(arguments[0])) / seconds})
        elif order == "until":
            tell(until(contestant, float(arguments[0]), np.load(arguments[1])))
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            tell({"peak_memory_mb": round(contestant.device_memory_mb() or peak)})
            return


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
