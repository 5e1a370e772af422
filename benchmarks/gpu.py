"""What a GPU makes of vaeflow, in minutes: one command for whoever gets to one.

    benchmarks/gpu.sh [--data MNIST] [--parts PART ...] [--minutes 8] [--tiny] [--again]

Needs Python, JAX, numpy, h5py, Keras, pydantic and ruamel.yaml; PyTorch and optax where they are to
be measured beside. Parts, the most valuable first, each in a process and with a time of its own:

- `limits`: the card's own, by large matrix products and by copying; and JAX's two generators;
- `correctness`: a step and 200 steps beside those of a CPU (`results/gpu_reference.npz`), and
  whether a training that was ended goes on to the same weights, bit for bit;
- `rates`: images per second of the networks of `presets/mnist*.yaml`, in turns with PyTorch (eager;
  compiled, its steps recorded as CUDA graphs) and with a plain JAX script;
- `nats`: seconds until the ELBO of the test images is -100 nats, compilation included;
- `likelihood`: four minutes of `presets/mnist-residual.yaml`, then the bound of 10,000 test images
  from 1,000 samples each; takes what time is left, and goes on in the next run;
- `bound`: how fast that bound is computed, beside the decoder alone.

Results go into `benchmarks/results/gpu.json` as they are found, by name and card: what is cut off
loses the rest only, and `--again` measures anew what is there. A part that fails is noted there and
passed over; its log is in `benchmarks/work/gpu/`. With `--tiny`, a trial on whatever there is, they
go into that folder instead.

`--parts paper` needs no GPU: what an H100 could reach by its data sheet. `--write-reference` writes
the CPU's side of `correctness`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpu_parts import PARTS, slower

from vaeflow.common.files import atomic_file, write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "gpu.json"
WORK = FOLDER / "work" / "gpu"
# Seconds that each may take, in the order in which they are taken.
LIMITS = {
    "device": 60,
    "limits": 40,
    "correctness": 110,
    "rates": 210,
    "nats": 70,
    "likelihood": 420,
    "bound": 40,
    "paper": 300,
}
USUAL = ("limits", "correctness", "rates", "nats", "likelihood", "bound")
GRACE = 15  # seconds that a part has to keep what it has when its time is over
KEY = ("part", "name", "network", "batch_size", "precision", "device")
FAILED = "failed"  # the name of an entry that says that a part did


def main() -> None:
    """Run the parts that are asked for, keep and print what they find."""
    arguments = parse()
    # For each part and all that it starts; many share the card.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.only:
        PARTS[arguments.only](arguments)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    found = Found(arguments)
    run_part("device", found, LIMITS["device"] * slower(arguments))
    if not found.device:
        raise SystemExit(f"JAX does not start: see {arguments.work / 'device.log'}")
    if not found.device.startswith("GPU") and not arguments.tiny and arguments.parts != ["paper"]:
        raise SystemExit("JAX sees no GPU, so there is nothing to measure. --tiny tries the kit.")
    print(f"on {found.device}; results go to {found.path}", flush=True)
    limits = {part: seconds * slower(arguments) for part, seconds in LIMITS.items()}
    for index, part in enumerate(arguments.parts):
        later = arguments.parts[index + 1 :]
        # What takes all the time there is leaves theirs to those after it.
        kept = sum(limits[name] for name in later) if part == "likelihood" else 0
        limit = min(limits[part], end - time.monotonic() - kept)
        if limit < 2 * GRACE:
            print(f"{part}: no time is left for it", flush=True)
            continue
        run_part(part, found, limit)
    print(table(found.entries, found.device))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST's four files")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS)[1:], default=USUAL)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="in all; above 8 each part has more"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--out", type=Path, help="where results are merged")
    parser.add_argument("--work", type=Path, default=WORK, help="where logs and models are kept")
    parser.add_argument("--write-reference", action="store_true", help="of `correctness`")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a part, in its own process
    arguments = parser.parse_args()
    if arguments.write_reference:
        arguments.only = "reference"
    elif not arguments.only and not arguments.data and not arguments.tiny:
        needing = {"nats", "likelihood"} & set(arguments.parts)
        if needing:
            parser.error(f"{' and '.join(sorted(needing))} need --data, MNIST's folder")
    return arguments


class Found:
    """The entries of the results file, written anew whenever one is added."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device, self.versions = arguments, "", {}
        self.path: Path | None = None
        self.entries: list[dict] = []

    def begin(self, device: str, **versions: str) -> None:
        """Take up what is in the file that this device's results go to."""
        self.device, self.versions = device, versions
        usual = RESULTS if device.startswith("GPU") and not self.arguments.tiny else None
        self.path = self.arguments.out or usual or self.arguments.work / "results.json"
        if self.path.exists():
            self.entries = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, part: str, entry: dict) -> None:
        """Add an entry, in the place of one of the same name from the same card."""
        entry = {"part": part, "device": self.device, **entry, **self.versions}
        entry["command"] = f"benchmarks/gpu.sh --parts {part}{' --tiny' * self.arguments.tiny}"
        key = [entry.get(name) for name in KEY]
        others = [old for old in self.entries if [old.get(name) for name in KEY] != key]
        if entry["name"] != FAILED:
            others = [old for old in others if (old["part"], old["name"]) != (part, FAILED)]
        self.entries = [*others, entry]
        with atomic_file(self.path) as fresh:
            write_json(fresh, self.entries)
        shown = {k: v for k, v in entry.items() if k not in {*KEY, *self.versions, "command"}}
        named = " ".join(str(entry[k]) for k in KEY[1:-1] if entry.get(k) is not None)
        print(f"  {named}: {json.dumps(shown)[1:-1]}", flush=True)


def run_part(part: str, found: Found, limit: float) -> None:
    """Run a part in a process of its own, and note what it says as it says it."""
    arguments = found.arguments
    log = arguments.work / f"{part}.log"
    start = time.monotonic()
    print(f"{part} (at most {limit:.0f} s)", flush=True)
    paths = [str(FOLDER), str(FOLDER.parent / "src"), os.environ.get("PYTHONPATH", "")]
    with log.open("w") as errors:
        process = subprocess.Popen(
            list(map(str, command_of(part, found))),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()

        def add(entry: dict) -> None:
            found.begin(**entry) if part == "device" else found.add(part, entry)

        cut = _listen(lines, process, start + limit - GRACE, add)
        with contextlib.suppress(ProcessLookupError):  # whatever it has started and left
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if cut:
        print(f"  cut off after {time.monotonic() - start:.0f} s; the rest is missing", flush=True)
    elif status:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
        if found.path:
            found.add(part, {"name": FAILED, "why": last[:300]})


def command_of(part: str, found: Found) -> list:
    """What runs a part."""
    arguments = found.arguments
    command = [sys.executable, __file__, "--only", part, "--work", arguments.work]
    command += ["--minutes", arguments.minutes]
    command += ["--data", arguments.data] * bool(arguments.data) + ["--tiny"] * arguments.tiny
    return command + ["--again"] * arguments.again + ["--out", found.path] * bool(found.path)


def _pass_on(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _listen(lines: queue.Queue, process: subprocess.Popen, end: float, add) -> bool:
    """Take lines until there are no more; whether the process had to be ended for that."""
    told = False
    while True:
        try:
            line = lines.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            if told:
                return True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            told, end = True, end + GRACE
            continue
        if line is None:
            return told
        if line.startswith("{"):
            add(json.loads(line))


def table(entries: list[dict], device: str) -> str:
    """The rates beside one another, a row for each network, batch size and precision."""
    lines = []
    rows: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        if entry["part"] == "rates" and entry["device"] == device and entry["name"] != FAILED:
            row = entry["network"], entry["batch_size"], entry["precision"]
            rows.setdefault(row, {})[entry["name"]] = entry
    for (network, size, precision), found in rows.items():
        lines.append(f"{network}, batches of {size}, {precision}: images per second")
        ours = found.get("vaeflow", {}).get("images_per_second")
        for name, entry in found.items():
            rate = entry.get("images_per_second")
            ratio = f"{ours / rate:6.2f}" if ours and rate else "     -"
            share = entry.get("share_of_limit", "-")
            lines.append(f"  {name:14} {rate or 'failed':>9}  vaeflow/it {ratio}  of limit {share}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
