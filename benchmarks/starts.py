"""Whether a flow starts on a machine that has no time for it.

    python benchmarks/starts.py [STARTS]

runs `vaeflow retrain --force` with one epoch that often (20), in a clone of this repository, each
time with an empty home of Prefect's, files out of the page cache where that is allowed, and three
processes that keep the cores busy. Writes `benchmarks/results/starts.json`: how many starts there
were, how many came to their end, the seconds that each took in all, and the machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "starts.json"
BUSY = 3


def drop_page_cache() -> bool:
    """Whether it could be done: only the superuser may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main(starts: int) -> None:
    """Start, count, write the JSON."""
    seconds, failures = [], []
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            clone = Path(scratch) / "clone"
            subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            for number in range(starts):
                dropped = drop_page_cache()
                home = Path(scratch) / f"prefect{number}"
                environment = {**os.environ, "PATH": path, "PREFECT_HOME": str(home)}
                command = ["vaeflow", "retrain", "--pull", "--force", "--set", "train.epochs=1"]
                begin = time.perf_counter()
                done = subprocess.run(
                    command, cwd=clone, env=environment, capture_output=True, text=True
                )
                seconds.append(round(time.perf_counter() - begin, 1))
                print(f"{number + 1:3}  {seconds[-1]:6.1f} s  status {done.returncode}", flush=True)
                if done.returncode:
                    failures.append(done.stderr)
                    print(done.stderr, flush=True)
    finally:
        for process in busy:
            process.kill()
    result = {
        "name": "starts of a one-epoch flow",
        "starts": starts,
        "succeeded": starts - len(failures),
        "seconds": seconds,
        "busy_processes": BUSY,
        "page_cache_dropped": dropped,
        **machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
