"""How long the main jobs take, with the environment installed.

    python benchmarks/main_job.py

clones this repository into a temporary folder, runs there what `make repro` runs after
installation, then `dvc repro` and `vaeflow --help`; makes a project of 1,000 images (grey crops of
28x28 from the two photographs of scikit-learn, as PNG files), brings that to a champion, and loads
its bundle. It writes `benchmarks/results/main_job.json`: a list of entries with `name`, `command`,
`seconds` (the median), `runs`, and the machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crops import photograph_crops
from machine import machine, matrix_gflops
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "main_job.json"


def measure(name: str, command: str, folder: Path, runs: int) -> dict:
    """Time a shell command; the first failure ends the benchmark."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PREFECT_HOME": str(folder.parent / "prefect"),
        "VIRTUAL_ENV": sys.prefix,  # active, as make sees it
    }
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(
            command, shell=True, cwd=folder, env=environment, check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - start)
    median = round(statistics.median(seconds), 3)
    print(f"{name:<40} {median:8.2f} s   (runs: {', '.join(f'{s:.2f}' for s in seconds)})")
    return {"name": name, "command": command, "seconds": median, "runs": runs}


def main() -> None:
    """Measure, print a table, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        job = "vaeflow retrain --pull"
        entries = [
            measure("make repro, after installation", job, clone, runs=1),
            measure("dvc repro, nothing to do", "dvc repro", clone, runs=5),
            measure("vaeflow --help", "vaeflow --help", clone, runs=9),
        ]
        images = Path(scratch) / "images"
        images.mkdir()
        for index, pixels in enumerate(photograph_crops("train", 28, 1_000, grey=True)):
            Image.fromarray(pixels[..., 0]).save(images / f"{index:04}.png")
        loads = "import vaeflow; vaeflow.load('outputs/bundle')"
        place, project = Path(scratch), Path(scratch) / "crops"
        entries += [
            measure("vaeflow init", "rm -rf empty && vaeflow init empty", place, runs=5),
            measure(
                "vaeflow init, to the champion of 1,000 images",
                "vaeflow init crops --images images && cd crops && make repro",
                place,
                runs=1,
            ),
            measure("a bundle loaded", f'python -c "{loads}"', project, runs=9),
        ]
        gflops = matrix_gflops()
    RESULTS.parent.mkdir(exist_ok=True)
    about = {**machine(), "matrix_gflops": gflops}
    RESULTS.write_text(json.dumps([{**entry, **about} for entry in entries], indent=2) + "\n")


if __name__ == "__main__":
    main()
