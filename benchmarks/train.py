"""How fast vaeflow trains, beside others with the same network, batch size and precision.

    python benchmarks/train.py [--batch-sizes 128 512] [--precision float32] [--data MNIST]

Contestants, each in a process of its own, made ready and warm, then measured in turns:

- `vaeflow`, as `vaeflow train` makes and feeds its model;
- `keras-io`: keras.io's VAE example with this network, `fit` on numpy arrays (TensorFlow only);
- `torch-eager`, `torch-compile`: PyTorch, where it is installed (`pip install 'vaeflow[bench]'`);
- `matrix products`: the machine's limit, as many operations in large products of two matrices.

With `--data`, a folder with MNIST's four files, also how long each takes until the ELBO of the
test images, binarised once, is -100 nats (`--nats`). Writes `benchmarks/results/train.json` and
prints the ratios. On a GPU take `benchmarks/gpu.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from contestants import Contestant, possible
from machine import machine
from mnist import mnist

RESULTS = Path(__file__).parent / "results" / "train.json"
CONTESTANTS = ("vaeflow", "keras-io", "torch-eager", "torch-compile", "matrix products")


def main() -> None:
    """Measure, print, write the JSON."""
    arguments = parse()
    names = possible(CONTESTANTS)
    entries = []
    for batch_size in arguments.batch_sizes:
        entries += rates(names, batch_size, arguments)
        print_ratios(entries[-len(names) :])
    if arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mnist.npz"
            np.savez(path, **{split: mnist(arguments.data, split) for split in ("train", "test")})
            entries += times([name for name in names if name != "matrix products"], path, arguments)
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


def rates(names, batch_size, arguments) -> list[dict]:
    """Images per second of each, in turns."""
    contestants = [Contestant(name, batch_size, arguments.precision) for name in names]
    for contestant in contestants:
        contestant.wait()
    for _ in range(arguments.windows):
        for contestant in contestants:
            contestant.window(arguments.epochs)
    return [
        {
            "name": contestant.name,
            "precision": arguments.precision,
            "device": contestant.device,
            "batch_size": batch_size,
            **contestant.summary(),
            "peak_memory_mb": contestant.end(),
        }
        for contestant in contestants
    ]


def times(names, path, arguments) -> list[dict]:
    """Seconds of training until the bound is reached, one after the other."""
    entries = []
    for name in names:
        contestant = Contestant(name, 128, arguments.precision)
        contestant.wait()
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
