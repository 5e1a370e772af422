"""How fast batch scoring is beside onnxruntime alone, and in how much memory.

    python benchmarks/score.py

takes the network of `presets/mnist.yaml`, untrained (its weights do not change its speed), and
random images of 28x28, and measures, on the same cores:

- images per second of `vaeflow score` into Parquet with latents, reading, writing and keeping parts
  included; beside onnxruntime alone on what the score of an image takes, one encoding and 16
  decodings, in batches that are ready in memory, of the size that suits it best;
- the peak memory of scoring 10,000 images, and ten times as many.

Writes `benchmarks/results/score.json`: a list of entries with `name`, `images_per_second` (the
median of interleaved runs, imports left out) or `peak_memory_mb` (of a process of its own), and the
machine; entries of ratios have `ratio` and the `aim`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from machine import machine

from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.scoring.score import Batch, score

RESULTS = Path(__file__).parent / "results" / "score.json"
IMAGES, RUNS = 2_000, 3
FEW = 10_000  # in the smaller of the runs whose memory is measured
BARE_IMAGES = 1_024
BATCHES = (64, 256, 1024)


def make_bundle(folder: Path) -> Path:
    """In a process of its own, so that TensorFlow's threads are not here."""
    script = "import sys; from pathlib import Path; from bundles import untrained\n"
    script += "untrained('mnist', Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, folder]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True)
    return folder


def write_images(path: Path, count: int) -> Path:
    """Random ones."""
    generator = np.random.default_rng(0)
    np.save(path, generator.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8))
    return path


class Bare:
    """Onnxruntime's own sessions, as they are by default."""

    def __init__(self, bundle: Path):
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(bundle / name) for name in ("encoder.onnx", "decoder.onnx")
        )
        generator = np.random.default_rng(0)
        latent_dim = self.decoder.get_inputs()[0].shape[1]
        self.images = generator.random((max(BATCHES), 28, 28, 1), dtype=np.float32)
        self.latents = generator.standard_normal((max(BATCHES), latent_dim), dtype=np.float32)

    def run(self, batch: int) -> None:
        """What the scores of `BARE_IMAGES` images take."""
        for _ in range(BARE_IMAGES // batch):
            self.encoder.run(None, {"images": self.images[:batch]})
            for _ in range(SCORE_SAMPLES):
                self.decoder.run(None, {"latents": self.latents[:batch]})


def rates(bundle: Path, images: Path, scratch: Path) -> list[dict]:
    """Images per second, interleaved; the first round warms up."""
    bare = Bare(bundle)
    batch = Batch((str(images),), str(bundle), scratch / "scores.parquet", latents=True)
    tasks = {
        f"onnxruntime alone, batches of {size}": (lambda size=size: bare.run(size), BARE_IMAGES)
        for size in BATCHES
    }
    tasks["vaeflow score"] = lambda: score(batch), IMAGES
    found = {name: [] for name in tasks}
    for run in range(RUNS + 1):
        for name, (task, count) in tasks.items():
            start = time.perf_counter()
            task()
            if run:
                found[name].append(count / (time.perf_counter() - start))
    return [
        {"name": name, "images_per_second": round(statistics.median(values), 1), "runs": RUNS}
        for name, values in found.items()
    ]


def peak_memory(bundle: Path, scratch: Path, count: int) -> dict:
    """Peak resident memory of scoring, in a process of its own."""
    images = write_images(scratch / f"{count}.npy", count)
    # VmHWM: what getrusage calls the maximum begins at the parent's.
    script = (
        "import sys; from pathlib import Path; from vaeflow.scoring.score import Batch, score\n"
        "score(Batch((sys.argv[1],), sys.argv[2], Path(sys.argv[3]), latents=True))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, images, bundle, scratch / f"{count}.parquet"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes = round(int(done.stdout.split()[-1]) / 1024, 1)
    return {"name": f"vaeflow score, {count:,} images", "peak_memory_mb": megabytes}


def measure(scratch: Path) -> list[dict]:
    """All entries; those of ratios last."""
    bundle = make_bundle(scratch / "bundle")
    entries = rates(bundle, write_images(scratch / "images.npy", IMAGES), scratch)
    *bare, ours = (entry["images_per_second"] for entry in entries)
    memory = [peak_memory(bundle, scratch, count) for count in (FEW, 10 * FEW)]
    few, many = (entry["peak_memory_mb"] for entry in memory)
    ratios = [
        ("rate of vaeflow score / onnxruntime's best", ours / max(bare), "at least 0.8"),
        ("memory of ten times as many images / of few", many / few, "at most 1.1"),
    ]
    entries += memory
    entries += [{"name": n, "ratio": round(ratio, 3), "aim": aim} for n, ratio, aim in ratios]
    return [{**entry, **machine()} for entry in entries]


def main() -> None:
    """Measure, print a table, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        entries = measure(Path(scratch))
    for entry in entries:
        value = next(v for k, v in entry.items() if k != "name")
        print(f"{entry['name']:<46} {value:10.2f}  {entry.get('aim', '')}")
    RESULTS.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
