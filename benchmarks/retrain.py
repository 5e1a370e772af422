"""What the flow costs beside plain DVC, and what registering costs.

    python benchmarks/retrain.py

clones this repository twice into a temporary folder and makes the same short trainings in both:
with `dvc repro` in one, with `vaeflow retrain` against a running Prefect server in the other, of
which the first run is not counted. Then it lets the flow run with nothing changed, and registers
bundles of 5 MB. Writes `benchmarks/results/retrain.json`: entries with `name`, `seconds` (the
median), `runs`, and the machine.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from machine import machine

from vaeflow.bundle.manifest import MANIFEST, describe_files
from vaeflow.common.processes import process_group

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "retrain.json"
RUNS = 5
BUNDLE_BYTES = 5_000_000
REGISTER = """
import sys, time
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect
from vaeflow.common.workspace import Workspace
workspace = Workspace.find()
connect(workspace).search_registered_models()
import mlflow.pyfunc
began = time.perf_counter()
register(workspace)
print(time.perf_counter() - began)
"""


def run(folder: Path, command: list[str], environment: dict[str, str]) -> float:
    """Seconds of a command; a failure ends the benchmark."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - began


def clone(folder: Path, environment: dict[str, str]) -> Path:
    """A clone with the sample data and a short training."""
    run(folder.parent, ["git", "clone", "--quiet", str(REPOSITORY), folder.name], environment)
    run(folder, ["dvc", "pull", "data.dvc"], environment)
    set_parameters(folder, epochs=3)
    return folder


def set_parameters(folder: Path, **train: int) -> None:
    """Change some of `params.yaml`."""
    from ruamel.yaml import YAML

    yaml = YAML()
    parameters = yaml.load(folder / "params.yaml")
    parameters["train"].update(train)
    yaml.dump(parameters, folder / "params.yaml")


def pad(bundle: Path, seed: int) -> None:
    """Another bundle of 5 MB: with random bytes in a file of their own."""
    (bundle / "padding").unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    (bundle / "padding").write_bytes(os.urandom(BUNDLE_BYTES - size))
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).unlink()
    manifest["files"] = {name: file.model_dump() for name, file in describe_files(bundle).items()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def entry(name: str, runs: list[float], **more: object) -> dict:
    """Print a line of the table, and return what is kept of it."""
    median = statistics.median(runs)
    print(f"{name:<50} {median:7.2f} s   (runs: {', '.join(f'{s:.2f}' for s in runs)})")
    rounded = [round(seconds, 3) for seconds in runs]
    return {"name": name, "seconds": round(median, 3), "runs": rounded, **more, **machine()}


def main() -> None:
    """Measure, print a table, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(Path(scratch) / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "VAEFLOW_CACHE": str(Path(scratch) / "cache"),
        }
        plain = clone(Path(scratch) / "plain", environment)
        flow = clone(Path(scratch) / "flow", environment)
        server = ["prefect", "server", "start", "--port", str(port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with process_group(server, env=environment, **quiet) as process:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health").close()
                    break
                except OSError:
                    time.sleep(0.3)
            entries = measure(plain, flow, environment)
    RESULTS.write_text(json.dumps(entries, indent=2) + "\n")


def measure(plain: Path, flow: Path, environment: dict[str, str]) -> list[dict]:
    """All figures, with the server running."""
    by_dvc, by_flow = [], []
    for seed in range(RUNS + 1):
        for folder in (plain, flow):
            set_parameters(folder, seed=seed)
        by_dvc.append(run(plain, ["dvc", "repro"], environment))
        by_flow.append(run(flow, ["vaeflow", "retrain"], environment))
    overhead = [ours - theirs for ours, theirs in zip(by_flow, by_dvc, strict=True)]
    nothing = [run(flow, ["vaeflow", "retrain"], environment) for _ in range(RUNS)]
    registered = []
    shutil.copytree(flow / "outputs" / "bundle", flow / "bundle")
    shutil.rmtree(flow / "outputs" / "bundle")
    shutil.move(flow / "bundle", flow / "outputs" / "bundle")  # writable, apart from DVC's cache
    for seed in range(RUNS):
        pad(flow / "outputs" / "bundle", seed)
        done = subprocess.run(
            [sys.executable, "-c", REGISTER],
            cwd=flow, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        registered.append(float(done.stdout.split()[-1]))
    return [
        entry("dvc repro, a training of 3 epochs", by_dvc[1:], command="dvc repro"),
        entry("vaeflow retrain, the same", by_flow[1:], command="vaeflow retrain"),
        entry("the flow's share (register, gate and promote too)", overhead[1:]),
        entry("vaeflow retrain, nothing changed", nothing, command="vaeflow retrain"),
        entry("registering a bundle of 5 MB on SQLite", registered, bytes=BUNDLE_BYTES),
    ]


if __name__ == "__main__":
    main()
