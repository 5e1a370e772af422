"""What several processes bring on one machine: as much as it can tell of several machines.

    python benchmarks/scale.py [--parts ray memory sweep hosts stages] [--images 200000]
        [--trials 12] [--seconds 60] [--results FILE]

Parts:

- `ray`: `vaeflow score --engine ray` on a cluster that runs already, beside the local engine, on
  the same cores: random images of 28x28, the network of `presets/mnist.yaml`, untrained (its
  weights do not change its speed). The bytes are compared, too;
- `memory`: the peak memory of the process that reads and writes, for a tenth of the images and for
  all of them, with the digits network;
- `sweep`: `vaeflow tune` with two trials at once, of one core each, beside one after the other
  with both cores; each of at least so many seconds by itself. Nothing is pruned, and the trials are
  the same;
- `hosts`: training of the network of `presets/mnist.yaml` on JAX, float32, batches of 512 and 128
  random images: two processes of one core each, beside one process of two cores. Images a second,
  the median of epochs, after one to compile in; the runs take turns;
- `stages`: seconds and peak memory of `vaeflow data add` and `vaeflow prepare` for a tenth of the
  images and for all of them (random, 28x28), and of `vaeflow drift` on as many scores.

Writes `benchmarks/results/scale.json`: a list with an entry a part; those of parts that were not
asked for stay.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import score as scoring
from machine import machine

from vaeflow.common.files import atomic_file, write_json
from vaeflow.common.processes import cores, shares

REPOSITORY = Path(__file__).parents[1]
PRESET = REPOSITORY / "presets" / "mnist.yaml"
RESULTS = Path(__file__).parent / "results" / "scale.json"
# Seconds and peak kilobytes of a batch, in a process of its own, imports left out.
SCORE = """
import sys, time
from pathlib import Path
from vaeflow.scoring.score import Batch, score
source, model, out, engine = sys.argv[1:]
if engine == "ray":
    from vaeflow.common.cluster import connect
    connect(None)  # what starts Ray is not measured
    score(Batch(("digits.npy",), model, Path("warm.parquet"), engine="ray"))
start = time.perf_counter()
score(Batch((source,), model, Path(out), latents=True, engine=engine))
seconds = time.perf_counter() - start
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(seconds, peak)
"""
# Seconds, peak kilobytes and exit status of a program. From a process that is small itself: a new
# process counts the memory of the one that made it.
MEASURED = """
import os, sys, time
start = time.perf_counter()
process = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, used = os.wait4(process, 0)
print(time.perf_counter() - start, used.ru_maxrss, os.waitstatus_to_exitcode(status))
"""
# Seconds of each epoch's steps.
TRAIN = """
import sys, time
from pathlib import Path
import keras
from vaeflow.config.schema import Parameters, load_parameters
from vaeflow.model.hosts import joined
from vaeflow.training.loop import fit

class Clock(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.begun, self.steps = time.perf_counter(), 0
    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.begun

prepared, preset, hosts, process, batch_size, epochs = sys.argv[1:]
changed = {"batch_size": int(batch_size), "epochs": int(epochs)}
changed |= {"finish_epochs": 0, "kl_warmup_epochs": 0}
train = load_parameters(Path(preset)).train.model_copy(update=changed)
clock, seconds = Clock(), []
with joined(hosts or None, int(process), 120) as together:
    fit(Path(prepared), Parameters(train=train), callbacks=[clock], hosts=together,
        report=lambda row: seconds.append(clock.seconds))
print("seconds", *seconds[1:])
"""
BATCH_SIZES, EPOCH_IMAGES, EPOCHS, RUNS = (512, 128), 3_072, 4, 3
CALIBRATION = 4, 34  # epochs of a trial, to know how long one takes


def main() -> None:
    """Measure the parts that are named, and merge them into the results."""
    parts = {
        "ray": measure_ray,
        "memory": measure_memory,
        "sweep": measure_sweep,
        "hosts": measure_hosts,
        "stages": measure_stages,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--images", type=int, default=200_000, help="to score")
    parser.add_argument("--trials", type=int, default=12, help="of the sweep")
    parser.add_argument("--seconds", type=float, default=60, help="of a trial, at least")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            found = parts[name](Path(scratch), arguments)
        command = f"python benchmarks/scale.py --parts {name}"
        entry = {"name": name, **found, "command": command, **machine("CPU")}
        print(json.dumps(entry, indent=2), flush=True)
        before = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        kept = [other for other in before if other["name"] != name]
        with atomic_file(arguments.results) as fresh:
            write_json(fresh, [*kept, entry])


def run_score(scratch: Path, images: Path, bundle: Path, engine: str) -> tuple[float, int, bytes]:
    """Seconds, peak memory in kilobytes, and what was written."""
    out = scratch / f"{engine}.parquet"
    command = [sys.executable, "-c", SCORE, images, bundle, out, engine]
    done = subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.PIPE, text=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak), out.read_bytes()


def measure_ray(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The time of Ray's tasks over that of threads."""
    bundle = scoring.make_bundle(scratch / "bundle")
    images = scoring.write_images(scratch / "images.npy", arguments.images)
    scoring.write_images(scratch / "digits.npy", 1_000)
    local, _, expected = run_score(scratch, images, bundle, "local")
    ray, _, found = run_score(scratch, images, bundle, "ray")
    return {
        "images": arguments.images,
        "local_seconds": round(local, 1),
        "ray_seconds": round(ray, 1),
        "ratio": round(ray / local, 3),
        "at_most": 1.15,
        "same_bytes": found == expected,
    }


def measure_memory(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The peak memory of the driver on Ray for ten times the images, over that for them."""
    bundle = scoring.make_bundle(scratch / "bundle")
    scoring.write_images(scratch / "digits.npy", 1_000)
    peaks = {}
    for count in (arguments.images // 10, arguments.images):
        images = scoring.write_images(scratch / f"{count}.npy", count)
        peaks[count] = run_score(scratch, images, bundle, "ray")[1]
    few, many = peaks.values()
    return {
        "peak_memory_mb": {f"{count}": round(peak / 1024, 1) for count, peak in peaks.items()},
        "ratio": round(many / few, 3),
        "at_most": 1.1,
    }


def measure_sweep(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The time of two trials at once over that of one after the other."""
    workspace = scratch / "workspace"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, workspace], check=True)
    few, more = (run_sweep(workspace, f"of-{n}", 1, 1, n, arguments) for n in CALIBRATION)
    an_epoch = (more - few) / (CALIBRATION[1] - CALIBRATION[0])
    # Of its epochs alone a trial is long enough.
    epochs = math.ceil(arguments.seconds / an_epoch)
    alone = run_sweep(workspace, "alone", arguments.trials, 1, epochs, arguments)
    together = run_sweep(workspace, "together", arguments.trials, 2, epochs, arguments)
    return {
        "trials": arguments.trials,
        "epochs": epochs,
        "seconds_a_trial_alone": round(alone / arguments.trials, 1),
        "one_after_the_other_seconds": round(alone, 1),
        "two_at_once_seconds": round(together, 1),
        "ratio": round(together / alone, 3),
        "at_most": 0.85,
    }


def run_sweep(
    workspace: Path,
    name: str,
    trials: int,
    workers: int,
    epochs: int,
    arguments: argparse.Namespace,
) -> float:
    """Seconds of a sweep, whose trials are fixed."""
    script = f"""
import optuna
from pathlib import Path
from vaeflow.cli.tuning import tune
from vaeflow.tuning import sweep
sweep.PRUNED_BESIDE = 1_000_000
folder = Path("outputs/tuning/{name}")
folder.mkdir(parents=True)
storage = "sqlite:///" + str(folder.absolute() / "study.db")
study = optuna.create_study(study_name="{name}", storage=storage, direction="maximize")
for trial in range({trials}):
    study.enqueue_trial({{"train.latent_dim": 8 + trial}})
tune(Path("space.yaml"), {trials}, {workers}, "{name}", None)
"""
    (workspace / "space.yaml").write_text("train.latent_dim: {low: 8, high: 200}\n")
    changed = f"train:\n  epochs: {epochs}\n  patience: 0\n  kl_warmup_epochs: 0\n"
    (workspace / "preset.yaml").write_text(changed)
    edit = [sys.executable, "-m", "vaeflow.config.edit", "preset.yaml"]
    subprocess.run(edit, check=True, cwd=workspace, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, cwd=workspace)
    return time.perf_counter() - start


def measure_hosts(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The rate of two JAX processes of one core over that of one of two cores."""
    images = np.random.default_rng(0).integers(0, 256, (EPOCH_IMAGES, 28, 28, 1), dtype=np.uint8)
    np.save(scratch / "train.npy", images)
    np.save(scratch / "validation.npy", images[:512])
    write_json(scratch / "dataset.json", {"image_shape": [28, 28, 1]})
    found: dict[str, object] = {"at_least": 0.85}
    for batch_size in BATCH_SIZES:
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(RUNS):
            for processes, so_far in seconds.items():
                so_far += train(scratch, batch_size, processes)
        rates = {count: EPOCH_IMAGES / statistics.median(took) for count, took in seconds.items()}
        found[f"batches_of_{batch_size}"] = {
            "one_process_images_a_second": round(rates[1]),
            "two_processes_images_a_second": round(rates[2]),
            "ratio": round(rates[2] / rates[1], 3),
        }
    return found


def train(prepared: Path, batch_size: int, processes: int) -> list[float]:
    """Seconds of each epoch but the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hosts = f"127.0.0.1:{free.getsockname()[1]},127.0.0.1" if processes > 1 else ""
    started = []
    for process, cores_of_it in enumerate(shares(processes)):
        arguments = (prepared, PRESET, hosts, process, batch_size, EPOCHS)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, *map(str, arguments)],
                env={**os.environ, "KERAS_BACKEND": "jax", "NPROC": "2"},  # as `launch` has it
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        os.sched_setaffinity(started[-1].pid, cores_of_it or range(cores()))
    said = [process.communicate(timeout=1_000)[0] for process in started]
    assert not any(process.returncode for process in started), said
    return [float(number) for number in said[0].split("seconds ")[1].split()]


def measure_stages(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds and megabytes of what surrounds training, for two numbers of images."""
    workspace = scratch / "workspace"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, workspace], check=True)
    stage(workspace, "dvc", "pull", "data.dvc")
    stage(workspace, "dvc", "repro", "export")
    model = ("--model", "outputs/bundle")
    found: dict[str, dict[str, list[float]]] = {}
    for count in (arguments.images // 10, arguments.images):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        np.save(workspace / "small.npy", pixels)
        score = ("vaeflow", "score", "small.npy", *model, "--latents")
        stage(workspace, *score, "--out", "small.parquet")
        drift = ("vaeflow", "drift", "small.parquet", *model, "--out", "drift.json")
        found.setdefault("drift", {})[f"{count}"] = stage(workspace, *drift, may_be=(0, 1))
    for count in (arguments.images // 10, arguments.images):
        scoring.write_images(workspace / "many.npy", count)
        add = ("vaeflow", "data", "add", "many.npy", "--size", "28x28")
        found.setdefault("data add", {})[f"{count}"] = stage(workspace, *add)
        found.setdefault("prepare", {})[f"{count}"] = stage(workspace, "vaeflow", "prepare")
    return {"seconds_and_peak_mb": found}


def stage(
    workspace: Path, program: str, *arguments: str, may_be: Sequence[int] = (0,)
) -> list[float]:
    """Run a program, and return its seconds and the peak memory of its process, in MB."""
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, check=True, cwd=workspace, stdout=subprocess.PIPE, text=True)
    seconds, kilobytes, status = done.stdout.split()[-3:]
    assert int(status) in may_be, command
    return [round(float(seconds), 1), round(int(kilobytes) / 1024, 1)]


if __name__ == "__main__":
    main()
