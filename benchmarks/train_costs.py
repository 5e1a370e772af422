"""What a training costs beside its steps.

    python benchmarks/train_costs.py

- peak memory of training on random images of 28x28, and on ten times as many;
- the share of a training of a minute or more that its checkpoints take;
- the time around the epochs of `vaeflow train` on the sample images, in fresh clones: from its
  start to its end, less so many epochs of median length. Imports, compilation, tracking, writing.

Writes `benchmarks/results/train_costs.json`: a list of entries with `name`, what was measured, its
`aim`, and the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "train_costs.json"
IMAGES = 60_000
# Of a small network: what it needs itself would hide what the images need.
SMALL = {"filters": [4, 8], "hidden_units": 16, "latent_dim": 4, "batch_size": 512, "epochs": 1}
# Of `presets/mnist.yaml`: its checkpoints are as large as such a training's are.
LARGE = {"filters": [32, 64], "hidden_units": 512, "latent_dim": 40, "batch_size": 128, "epochs": 5}
FIT = """
import json, sys, tempfile, time
from pathlib import Path
import vaeflow
from vaeflow.config.schema import Parameters
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.loop import Training
from vaeflow.training.loop import fit

saves, save = [], Training.save

def timed(training):
    start = time.perf_counter()
    save(training)
    saves.append(time.perf_counter() - start)

Training.save = timed
prepared = Path(sys.argv[1])
parameters = Parameters.model_validate({"train": json.loads(sys.argv[2])})
start = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    fit(prepared, parameters, checkpoints=Checkpoints(Path(folder)))
seconds = time.perf_counter() - start
# VmHWM: what getrusage calls the maximum begins at the parent's.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps({"peak_memory_mb": round(peak / 1024), "seconds": seconds, "saves": saves}))
"""


def prepared(folder: Path, count: int) -> Path:
    """Random images, as `prepare` leaves them."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, share in (("train", count), ("validation", count // 10)):
        array = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", np.uint8, (share, 28, 28, 1)
        )
        for start in range(0, share, 10_000):
            array[start : start + 10_000] = generator.integers(
                0, 256, array[start : start + 10_000].shape, dtype=np.uint8
            )
        array.flush()
    (folder / "dataset.json").write_text(json.dumps({"image_shape": [28, 28, 1]}))
    return folder


def fit(folder: Path, settings: dict) -> dict:
    """What a training in a process of its own says of itself."""
    command = [sys.executable, "-c", FIT, folder, json.dumps(settings)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(small: Path, large: Path) -> list[dict]:
    """Peak memory, and by how much more images raise it."""
    peaks = [fit(folder, SMALL)["peak_memory_mb"] for folder in (small, large)]
    counts = (IMAGES, 10 * IMAGES)
    entries = [
        {"name": f"training on {count:,} images of 28x28", "peak_memory_mb": peak}
        for count, peak in zip(counts, peaks, strict=True)
    ]
    more = peaks[1] / peaks[0] - 1
    ratio = {"name": "more memory for ten times the images", "share": round(more, 3)}
    return [*entries, {**ratio, "aim": "at most 0.1"}]


def checkpoints(folder: Path) -> dict:
    """Share of the time of a training, by default settings, of the preset's network."""
    answer = fit(folder, LARGE)
    return {
        "name": "checkpoints of a training of a minute or more",
        "seconds": round(answer["seconds"], 1),
        "saves": [round(seconds, 3) for seconds in answer["saves"]],
        "share": round(sum(answer["saves"]) / answer["seconds"], 4),
        "aim": "at most 0.02",
    }


def around(scratch: Path) -> dict:
    """Seconds of `vaeflow train` on the sample images that are not epochs: of three, the median."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    ready = "dvc pull data.dvc && vaeflow prepare"
    runs = []
    for number in range(3):
        clone = scratch / f"clone{number}"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        subprocess.run(
            ready, shell=True, cwd=clone, env=environment, check=True, capture_output=True
        )
        runs.append(_train(clone, environment))
    return {
        "name": "around the epochs of vaeflow train, sample images",
        "command": f"{ready} && vaeflow train",
        "seconds": statistics.median(run["around"] for run in runs),
        "runs": runs,
        "aim": "at most 12",
    }


def _train(clone: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of a whole training, of its median epoch, and of what is no epoch."""
    ends, start = [], time.perf_counter()
    with subprocess.Popen(
        ["vaeflow", "train"], cwd=clone, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch "):
                ends.append(time.perf_counter())
    whole = time.perf_counter() - start
    if process.returncode:
        raise SystemExit("vaeflow train failed")
    epoch = float(statistics.median(np.diff(ends)))
    around = whole - len(ends) * epoch
    found = {"around": around, "whole": whole, "epochs": len(ends), "epoch": epoch}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure, print, write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        small = prepared(scratch / "small", IMAGES)
        entries = [around(scratch), checkpoints(small)]
        entries += memory(small, prepared(scratch / "large", 10 * IMAGES))
    entries = [{**entry, **machine()} for entry in entries]
    RESULTS.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for entry in entries:
        print({key: value for key, value in entry.items() if key not in machine()})


if __name__ == "__main__":
    main()
