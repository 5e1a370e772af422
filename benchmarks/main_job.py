"""How long the main job takes, from a fresh clone with the environment installed.

    python benchmarks/main_job.py

clones this repository into a temporary folder, runs there what `make repro` runs after
installation, then `dvc repro` and `vaeflow --help`, and writes
`benchmarks/results/main_job.json`: a list of entries with `name`, `command`, `seconds` (the
median), `runs`, and the machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "main_job.json"


def measure(name: str, command: str, folder: Path, runs: int) -> dict:
    """Time a shell command; the first failure ends the benchmark."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PREFECT_HOME": str(folder.parent / "prefect"),
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
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([{**entry, **machine()} for entry in entries], indent=2) + "\n")


if __name__ == "__main__":
    main()
