"""How a batch on Ray would go on many machines: a simulation with measured times.

    python benchmarks/scheduler.py [--workers 10 100 1000] [--results FILE]

What is simulated is `vaeflow.scoring.score` with its Ray engine: one process reads images, cuts
them into shards of 8 tasks, and has as many shards in work as `_Scoring` would; workers take tasks
in their order; the process waits for the eldest shard before it reads on. How long a task takes on
a core of this machine, and how long the reading process is busy for a shard, are measured first
(the network of `presets/mnist.yaml`, 28x28).

Beside equal workers: with stragglers (of 100 workers 5 take three times as long), and with deaths,
too (a worker is lost after an hour in the mean; its task is begun again elsewhere 10 s later, and
the worker is back after a minute). `efficiency` is the rate over that of as many
workers that never wait.

Writes `benchmarks/results/scheduler.json`.
"""

import argparse
import heapq
import json
import math
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import score as scoring
from machine import machine

from vaeflow.common.files import atomic_file, write_json
from vaeflow.scoring.engines import TASKS_A_CORE
from vaeflow.scoring.score import FEWEST_AHEAD, TASKS_PER_SHARD

RESULTS = Path(__file__).parent / "results" / "scheduler.json"
COMMAND = "python benchmarks/scheduler.py"
SHARE_SLOW, SLOWER = 0.05, 3.0
SECONDS_OF_LIFE, SECONDS_UNTIL_NOTICED, SECONDS_AWAY = 3_600.0, 10.0, 60.0
ROUNDS = 200  # tasks a worker, in the mean: a batch long enough that its ends do not count
# Processor seconds of the process that reads, seconds of each task, and images a task.
MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from vaeflow.bundle.runtime import SCORE_SAMPLES, Bundle
from vaeflow.scoring import engines
from vaeflow.scoring.score import BLOCKS_PER_TASK, Batch, score
source, model, out = sys.argv[1:]
bundle = Bundle(model, threads=1)
size = BLOCKS_PER_TASK * bundle.images_at_once(SCORE_SAMPLES)
pixels = np.load(source)[:size]
seconds = []
for _ in range(10):
    start = time.perf_counter()
    numbers = engines.compute(bundle, True, pixels)
    seconds.append(time.perf_counter() - start)
class Ready:
    tasks = 2
    def start(self, pixels):
        return lambda: np.resize(numbers, (len(pixels), numbers.shape[1]))
    def close(self):
        pass
import vaeflow.scoring.score as module
module.open_engine = lambda *_: Ready()
start = time.process_time()
score(Batch((source,), model, Path(out), latents=True))
print(json.dumps({"busy": time.process_time() - start, "tasks": seconds[2:], "size": size}))
"""


def main() -> None:
    """Measure, simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--images", type=int, default=100_000, help="to measure the reading by")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), arguments.images)
    entries = [
        {"workers": workers, "workers_are": kind, **simulate(workers, kind, **measured)}
        for workers in arguments.workers
        for kind in ("equal", "some slow", "some slow, some lost")
    ]
    shown = {**measured, "task_seconds": float(np.median(measured["task_seconds"]))}
    result = {"measured": shown, "simulated": entries, "command": COMMAND, **machine("CPU")}
    print(json.dumps(result, indent=2))
    with atomic_file(arguments.results) as fresh:
        write_json(fresh, result)


def measure(scratch: Path, images: int) -> dict:
    """Seconds of tasks, and seconds for which the reading process is busy for an image."""
    bundle = scoring.make_bundle(scratch / "bundle")
    source = scoring.write_images(scratch / "images.npy", images)
    command = [sys.executable, "-c", MEASURE, source, bundle, scratch / "out.parquet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "task_seconds": found["tasks"],
        "images_a_task": found["size"],
        "reading_seconds_an_image": found["busy"] / images,
    }


def simulate(
    workers: int,
    kind: str,
    task_seconds: list[float],
    images_a_task: int,
    reading_seconds_an_image: float,
) -> dict:
    """Images per second of a batch, and the share of what the workers could do."""
    generator = np.random.default_rng(workers)
    slow = np.ones(workers)
    if kind != "equal":
        slow[: math.ceil(SHARE_SLOW * workers)] = SLOWER
    lost = "lost" in kind
    ahead = max(FEWEST_AHEAD, 1 + math.ceil(TASKS_A_CORE * workers / TASKS_PER_SHARD))
    shards = max(4 * ahead, ROUNDS * workers // TASKS_PER_SHARD)
    busy = reading_seconds_an_image * images_a_task * TASKS_PER_SHARD

    now = 0.0
    free = [(0.0, worker) for worker in range(workers)]  # when each may take a task
    heapq.heapify(free)

    def run(ready: float) -> float:
        """When a task ends that may begin at a time."""
        at, worker = heapq.heappop(free)
        begin = max(at, ready)
        takes = slow[worker] * generator.choice(task_seconds)
        if lost and generator.random() < takes / SECONDS_OF_LIFE:
            gone = begin + takes * generator.random()
            heapq.heappush(free, (gone + SECONDS_AWAY, worker))
            return run(gone + SECONDS_UNTIL_NOTICED)
        heapq.heappush(free, (begin + takes, worker))
        return begin + takes

    running: deque[float] = deque()
    for _ in range(shards):
        now += busy
        running.append(max(run(now) for _ in range(TASKS_PER_SHARD)))
        if len(running) > ahead:
            now = max(now, running.popleft())
    end = max(now, *running)
    rate = shards * TASKS_PER_SHARD * images_a_task / end
    possible = images_a_task / np.mean(task_seconds) * (1 / slow).sum()
    return {"images_per_second": round(float(rate)), "efficiency": round(float(rate / possible), 3)}


if __name__ == "__main__":
    main()
