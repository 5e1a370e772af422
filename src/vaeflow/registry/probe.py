"""`python -m vaeflow.registry.probe ADDRESS`: whether a registered model is fit to answer.

In a process of its own and with an empty cache, as on the machine of somebody who has never seen
the model: it is downloaded, verified, loaded, warmed and asked everything that it can be asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from vaeflow import collector
from vaeflow.errors import VaeflowError

SECONDS = 600
IMAGES = 16


def probe(address: str, registry: str) -> str | None:
    """Run the probe in a fresh process.

    Args:
        address: `models:/NAME/VERSION`.
        registry: the registry's own address.

    Returns:
        None when the model is fit to answer, else what is wrong with it.
    """
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vaeflow.registry.probe", address],
                env={**os.environ, "VAEFLOW_CACHE": cache, "MLFLOW_TRACKING_URI": registry},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"it did not answer within {SECONDS} seconds"
    if not done.returncode:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def main(address: str) -> None:
    """Ask the model everything; what is wrong is one line and status 1."""
    import numpy as np

    import vaeflow

    began = time.monotonic()
    try:
        model = vaeflow.load(address)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (IMAGES, *model.image_shape), dtype=np.uint8)
        answers = {
            "encode": np.stack(model.encode(images)),
            "reconstruct": model.reconstruct(images),
            "sample": model.sample(IMAGES, seed=0),
            "score": model.score(images),
        }
    except VaeflowError as error:
        sys.exit(" ".join(str(error).split()))
    for name, values in answers.items():
        if not np.isfinite(values).all():
            sys.exit(f"`{name}` gives numbers that are not finite")
    for name in ("reconstruct", "sample"):
        if answers[name].min() < 0 or answers[name].max() > 1:
            sys.exit(f"`{name}` gives pixels outside of [0, 1]")
    print(f"it answers, {time.monotonic() - began:.1f} s after the first request for its files")


if __name__ == "__main__":
    with collector.seldom():
        main(sys.argv[1])
