"""How fast and in how much memory images are prepared.

    python benchmarks/data.py

prepares 60,000 random images of 28x28 and, side by side, reads, hashes (SHA-256, image by image)
and writes the same bytes with NumPy alone; then prepares 1,000,000 such images and, for comparison,
100. Writes `benchmarks/results/data.json`: a list of entries with `name`, `seconds` (the median of
warm runs, imports left out) or `peak_memory_mb` (of a process of its own), and the machine.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vaeflow.config import Prepare
from vaeflow.data.arrays import ArrayWriter
from vaeflow.data.prepare import prepare
from vaeflow.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "data.json"
RUNS = 7


def make_workspace(root: Path, count: int) -> Workspace:
    """A folder with `count` random images in `data/`."""
    (root / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    writer = ArrayWriter(root / "data" / "images.npy", (28, 28, 1))
    for start in range(0, count, 10_000):
        shape = (min(10_000, count - start), 28, 28, 1)
        writer.write(generator.integers(0, 256, shape, dtype=np.uint8))
    writer.close()
    return Workspace(root)


def read_hash_write(workspace: Workspace) -> None:
    """What must be done at the least: read, one SHA-256 an image, write."""
    images = np.load(workspace.data / "images.npy")
    digests = [hashlib.sha256(image).digest() for image in images]
    np.save(workspace.root / "copy.npy", images)
    np.save(workspace.root / "digests.npy", digests)


def seconds_of(function) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory(workspace: Workspace) -> float:
    """Peak resident memory of `prepare` in a process of its own, in MB."""
    script = (
        "import sys; from pathlib import Path; from vaeflow.config import Prepare\n"
        "from vaeflow.data.prepare import prepare; from vaeflow.workspace import Workspace\n"
        "prepare(Workspace(Path(sys.argv[1])), Prepare())\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, workspace.root]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(int(done.stdout) / 1024, 1)


def main() -> None:
    """Measure, print, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        place = make_workspace(Path(scratch) / "60000", 60_000)
        tasks = {
            "prepare, 60,000 images": lambda: prepare(place, Prepare()),
            "NumPy reads, hashes and writes the same": lambda: read_hash_write(place),
        }
        seconds = {name: [] for name in tasks}
        for run in range(RUNS + 1):  # interleaved; the first warms up
            for name, task in tasks.items():
                elapsed = seconds_of(task)
                if run:
                    seconds[name].append(elapsed)
        entries = [
            {"name": name, "seconds": round(statistics.median(times), 4), "runs": RUNS}
            for name, times in seconds.items()
        ]
        for count in (100, 1_000_000):
            memory = peak_memory(make_workspace(Path(scratch) / str(count), count))
            entries.append({"name": f"prepare, {count:,} images", "peak_memory_mb": memory})
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": "CPU",
    }
    RESULTS.write_text(json.dumps([{**entry, **machine} for entry in entries], indent=2) + "\n")
    for entry in entries:
        print(" ".join(f"{value!s:<42}" for value in list(entry.values())[:2]))
    print(f"ratio of the times: {entries[0]['seconds'] / entries[1]['seconds']:.2f}")


if __name__ == "__main__":
    main()
