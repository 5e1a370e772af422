"""How fast vaeflow trains, beside others with the same network, batch size and precision.

    python benchmarks/train.py [--batch-sizes 128 512] [--precision float32] [--data MNIST]

Contestants, each in a process of its own, made ready and warm, then measured in turns:

- `vaeflow`, as `vaeflow train` makes and feeds its model;
- `keras-io`: keras.io's VAE example with this network, `fit` on numpy arrays (TensorFlow only);
- `torch-eager`, `torch-compile`: PyTorch, where it is installed (`pip install 'vaeflow[bench]'`);
- `matrix products`: the machine's limit, as many operations in large products of two matrices.

With `--data`, a folder with MNIST's four files, also how long each takes until the ELBO of the
test images, binarised once, is -100 nats (`--nats`). Writes `benchmarks/results/train.json` and
prints the ratios. Where only JAX is installed, `KERAS_BACKEND=jax` and the source folder on
`PYTHONPATH` are enough.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import machine
from mnist import mnist

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "train.json"
CONTESTANTS = ("vaeflow", "keras-io", "torch-eager", "torch-compile", "matrix products")


class Contestant:
    """A process that trains when told to."""

    def __init__(self, name: str, batch_size: int, precision: str):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "contestants", name, str(batch_size), precision],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
        )
        self.device = self._hear()["device"]

    def ask(self, order: str) -> dict:
        """What it answers."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self._hear()

    def end(self) -> int:
        """Its peak memory in MB."""
        answer = self.ask("end")
        self.process.wait()
        return answer["peak_memory_mb"]

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended; VERBOSE=1 shows why")
        return json.loads(line)


def main() -> None:
    """Measure, print, write the JSON."""
    arguments = parse()
    names = [name for name in CONTESTANTS if is_possible(name)]
    entries = []
    for batch_size in arguments.batch_sizes:
        entries += rates(names, batch_size, arguments)
        print_ratios(entries[-len(names) :])
    if arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mnist.npz"
            np.savez(path, **{split: mnist(arguments.data, split) for split in ("train", "test")})
            entries += times([name for name in names if name != "matrix products"], path, arguments)
    if not any(entry["device"].startswith("GPU") for entry in entries):
        entries.append(
            {"name": "vaeflow", "device": "GPU: none at hand", "images_per_second": None}
        )
    for entry in entries:
        entry.update(command=command(arguments), **machine(entry["device"]))
    arguments.out.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=11)
    parser.add_argument("--epochs", type=int, default=1, help="of 4,096 images, in each window")
    parser.add_argument("--nats", type=float, default=100.0, help="to train down to, with --data")
    parser.add_argument("--data", type=Path, help="folder with MNIST's four files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def is_possible(name: str) -> bool:
    """Whether what it needs is installed."""
    if name.startswith("torch"):
        return importlib.util.find_spec("torch") is not None
    return name != "keras-io" or importlib.util.find_spec("tensorflow") is not None


def rates(names, batch_size, arguments) -> list[dict]:
    """Images per second of each, in turns."""
    contestants = [Contestant(name, batch_size, arguments.precision) for name in names]
    seen = {name: [] for name in names}
    for _ in range(arguments.windows):
        for contestant in contestants:
            answer = contestant.ask(f"window {arguments.epochs}")
            seen[contestant.name].append(answer["images_per_second"])
    return [
        {
            "name": contestant.name,
            "precision": arguments.precision,
            "device": contestant.device,
            "batch_size": batch_size,
            "images_per_second": round(statistics.median(seen[contestant.name])),
            "windows": [round(rate) for rate in seen[contestant.name]],
            "peak_memory_mb": contestant.end(),
        }
        for contestant in contestants
    ]


def times(names, path, arguments) -> list[dict]:
    """Seconds of training until the bound is reached, one after the other."""
    entries = []
    for name in names:
        contestant = Contestant(name, 128, arguments.precision)
        answer = contestant.ask(f"until {arguments.nats} {path}")
        contestant.end()
        entry = {"name": name, "precision": arguments.precision, "device": contestant.device}
        entries.append({**entry, "batch_size": 128, "until_nats": arguments.nats, **answer})
        print(f"{name}: {answer['minus_elbo']} nats after {answer['seconds']} s", flush=True)
    return entries


def print_ratios(entries) -> None:
    """A table of the rates, each divided by vaeflow's."""
    ours = entries[0]["images_per_second"]
    print(f"batch {entries[0]['batch_size']}, {entries[0]['precision']}, {entries[0]['device']}")
    for entry in entries:
        rate = entry["images_per_second"]
        print(
            f"  {entry['name']:16} {rate:8} images/s   vaeflow/it {ours / rate:6.2f}"
            f"   {entry['peak_memory_mb']:6} MB",
            flush=True,
        )


def command(arguments) -> str:
    """How to make the same again."""
    sizes = " ".join(map(str, arguments.batch_sizes))
    data = f" --data MNIST --nats {arguments.nats:g}" if arguments.data else ""
    return (
        f"python benchmarks/train.py --batch-sizes {sizes} --precision {arguments.precision}"
        f" --windows {arguments.windows} --epochs {arguments.epochs}{data}"
    )


if __name__ == "__main__":
    main()
