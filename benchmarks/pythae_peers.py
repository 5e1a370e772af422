"""How likely MNIST's test images are under two models of pythae, beside ours.

    python benchmarks/pythae_peers.py [vae] [iwae] [--data FOLDER] [--minutes 30] [--samples 500]
        [--images 1000] [--results FILE] [--work FOLDER]

pythae is a library of autoencoders for PyTorch. It gets an environment of its own, in the work
folder (by pip, whose own settings are respected), and trains its VAE and its IWAE with the
convolutional networks that it has for MNIST. The results go beside those of
`benchmarks/mnist_likelihood.py`. Its decoder is so large that 5,000 draws of an image take seconds:
by default the bound is from fewer. What was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import machine, matrix_gflops
from mnist import mnist

from vaeflow.common.files import atomic_file, write_json

HERE = Path(__file__).parent
MNIST = HERE.parents[1] / "shared" / "data" / "mnist"
PACKAGES = ("pythae==0.1.2", "torch==2.13.0")


def main() -> None:
    """Make the environment, have each trained and judged, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=["vae", "iwae"], metavar="NAME")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's IDX files")
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--samples", type=int, default=500, help="importance samples an image")
    parser.add_argument("--images", type=int, default=1_000, help="test images, the first ones")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "mnist_likelihood.json")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    arguments = parser.parse_args()
    python = make_environment(arguments.work / "pythae")
    for name in arguments.names:
        folder = arguments.work / f"pythae-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        images = folder / "images.npz"
        np.savez(
            images,
            train=mnist(arguments.data, "train"),
            test=mnist(arguments.data, "test")[: arguments.images],
        )
        # That of the training: what goes on with the bounds may run beside other work.
        measured = folder / "machine.json"
        if not measured.exists():
            with atomic_file(measured) as fresh:
                write_json(fresh, {**machine(), "matrix_gflops": matrix_gflops()})
        script = HERE / "contestants" / "pythae_models.py"
        command = [python, script, name, images, arguments.minutes, arguments.samples, folder]
        done = subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True
        )
        result = {
            "name": f"pythae-{name}",
            **json.loads(done.stdout.splitlines()[-1]),
            "minutes": arguments.minutes,
            "command": f"python benchmarks/pythae_peers.py {name} --minutes {arguments.minutes:g} "
            f"--samples {arguments.samples} --images {arguments.images}",
            **json.loads(measured.read_text()),
        }
        merge(arguments.results, result)
        print(json.dumps(result, indent=2))


def make_environment(folder: Path) -> Path:
    """Return the Python of an environment that has pythae, made if there is none."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.touch()
    return python


def merge(path: Path, result: dict[str, object]) -> None:
    """Put a result in the place of the one of the same name, or after the others.

    Of the same training, what was found before and is not found anew stays.
    """
    results = json.loads(path.read_text()) if path.exists() else []
    by_name = {other["name"]: other for other in results}
    before = by_name.get(result["name"], {})
    trained = ("train_seconds", "parameters", "seed")
    same = all(before.get(key) == result.get(key) for key in trained)
    by_name[result["name"]] = {**before, **result} if same else result
    with atomic_file(path) as fresh:
        write_json(fresh, list(by_name.values()))


if __name__ == "__main__":
    main()
