"""How fast and in how much memory images become prepared splits.

    python benchmarks/data.py

measures, side by side in one run:

- an IDX file of 60,000 random images of 28x28 in `data/`, prepared, beside NumPy alone reading,
  hashing (SHA-256, image by image) and writing the same bytes; and `vaeflow data add` of that file,
  DVC's part included, then prepared;
- folders of 10,000 PNG files, colour crops from the two photographs that scikit-learn ships, of
  256x256 brought to 32x32, and of 128x128 as they are: decoded, checked, hashed and written as
  `vaeflow data add` does, before DVC takes over, beside a bare loop of Pillow's decoder in one
  process;
- the peak memory of preparing 1,000,000 images of 28x28, beside that of preparing 100.

Writes `benchmarks/results/data.json`: a list of entries with `name`, `seconds` (the median of
interleaved warm runs, imports left out) or `peak_memory_mb` (of a process of its own), and the
machine; entries of ratios have `ratio` and the `aim`.
"""

import hashlib
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import CORES, machine
from PIL import Image

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add, write_part
from vaeflow.data.io.arrays import ArrayWriter
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.prepare import prepare
from vaeflow.data.survey import Report, Survey

RESULTS = Path(__file__).parent / "results" / "data.json"
IDX = "images-idx3-ubyte"
IMAGES, PICTURES = 60_000, 10_000


def write_idx(path: Path) -> None:
    """60,000 random images of 28x28."""
    path.parent.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes())


def read_hash_write(idx: Path, scratch: Path) -> None:
    """What must be done at the least: read, one SHA-256 an image, write."""
    images = np.fromfile(idx, np.uint8, offset=16).reshape(IMAGES, 28, 28, 1)
    digests = [hashlib.sha256(image).digest() for image in images]
    np.save(scratch / "copy.npy", images)
    np.save(scratch / "digests.npy", digests)


def write_pictures(folder: Path, edge: int) -> None:
    """10,000 colour crops as PNG."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        photograph = photographs[number % len(photographs)]
        top, left = (generator.integers(0, length - edge) for length in photograph.shape[:2])
        crop = photograph[top : top + edge, left : left + edge]
        Image.fromarray(crop).save(folder / f"{number:05}.png")


def decode_all(folder: Path) -> None:
    """A bare decode loop."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            np.asarray(picture)


def add_pictures(folder: Path, part: Path, size: tuple[int, int] | None) -> None:
    """`vaeflow data add`, up to where DVC takes over."""
    rule = Prepare()
    addition = Addition(str(folder), conversion=Conversion(size))
    write_part(part, addition, rule, Report(Survey(rule)), set())


def add_and_prepare(place: Workspace, idx: Path) -> None:
    """From a file elsewhere to a version and its splits."""
    add(place, Prepare(), Addition(str(idx)))
    prepare(place, Prepare())


def dvc_workspace(root: Path) -> Workspace:
    """An empty one, under git and DVC."""
    root.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=root, check=True)
    return Workspace(root)


def medians(tasks: dict[str, Callable], runs: int, output: Path | None = None) -> list[dict]:
    """Wall time of each task, interleaved; the first round warms up.

    `output` is a folder that tasks write, removed beforehand, and the disk left to rest.
    """
    seconds = {name: [] for name in tasks}
    for run in range(runs + 1):
        for name, task in tasks.items():
            if output:
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
            start = time.perf_counter()
            task()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return [
        {"name": name, "seconds": round(statistics.median(times), 4), "runs": runs}
        for name, times in seconds.items()
    ]


def peak_memory(root: Path, count: int) -> dict:
    """Peak resident memory of `prepare` on random images, in a process of its own."""
    (root / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    writer = ArrayWriter(root / "data" / "images.npy", (28, 28, 1))
    for start in range(0, count, 10_000):
        shape = (min(10_000, count - start), 28, 28, 1)
        writer.write(generator.integers(0, 256, shape, dtype=np.uint8))
    writer.close()
    # VmHWM: what getrusage calls the maximum begins at the parent's.
    script = (
        "import sys; from pathlib import Path; from vaeflow.config.schema import Prepare\n"
        "from vaeflow.data.prepare import prepare; from vaeflow.common.workspace import Workspace\n"
        "prepare(Workspace(Path(sys.argv[1])), Prepare())\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, root]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes = round(int(done.stdout) / 1024, 1)
    return {"name": f"prepare, {count:,} images of 28x28", "peak_memory_mb": megabytes}


def measure_pictures(
    scratch: Path, edge: int, size: tuple[int, int] | None, how: str
) -> list[dict]:
    """Adding a folder of pictures, and decoding it."""
    folder, part = scratch / f"pictures-{edge}", scratch / "part"
    write_pictures(folder, edge)
    name = f"10,000 PNG files of {edge}x{edge}"
    return medians(
        {
            f"{name} {how}": lambda: add_pictures(folder, part, size),
            f"Pillow decodes {name}": lambda: decode_all(folder),
        },
        runs=3,
        output=part,
    )


def measure(scratch: Path) -> list[dict]:
    """All entries; those of ratios last."""
    place = Workspace(scratch / "prepared")
    idx = place.data / IDX
    write_idx(idx)
    versioned = dvc_workspace(scratch / "versioned")
    entries = medians(
        {
            "IDX of 60,000 images to prepared splits": lambda: prepare(place, Prepare()),
            "NumPy reads, hashes and writes the same": lambda: read_hash_write(idx, scratch),
        },
        runs=9,
    )
    entries += medians(
        {"vaeflow data add IDX, then prepare": lambda: add_and_prepare(versioned, idx)}, runs=3
    )
    for edge, size, how in ((256, (32, 32), "to 32x32"), (128, None, "as they are")):
        entries += measure_pictures(scratch, edge, size, how)
    prepared, numpy_alone, _, resized, large_bare, plain, bare = (e["seconds"] for e in entries)
    small, large = (peak_memory(scratch / str(count), count) for count in (100, 1_000_000))
    more = large["peak_memory_mb"] - small["peak_memory_mb"]
    ratios = [
        ("time of IDX to splits / NumPy's", prepared / numpy_alone, "at most 2"),
        ("rate of PNG to 32x32 / (cores x Pillow's)", large_bare / resized / CORES, "at least 0.8"),
        ("rate of PNG as it is / (cores x Pillow's)", bare / plain / CORES, "at least 0.8"),
        ("MB of 1,000,000 images more than 100", more, "at most 300"),
    ]
    entries += [small, large]
    return entries + [
        {"name": name, "ratio": round(value, 3), "aim": aim} for name, value, aim in ratios
    ]


def main() -> None:
    """Measure, print, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        entries = measure(Path(scratch))
    RESULTS.write_text(json.dumps([{**entry, **machine()} for entry in entries], indent=2) + "\n")
    for entry in entries:
        print(" ".join(f"{value!s:<46}" for value in list(entry.values())[:3]))


if __name__ == "__main__":
    main()
