"""Real workspaces for the tests: DVC, MLflow and Prefect as they are, in temporary folders."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vaeflow.common import code
from vaeflow.common.workspace import Workspace

REPOSITORY = Path(__file__).parents[1]
# `params.yaml`, `data.dvc` and DVC's settings as they are shipped; whoever uses this clone has
# others in their place.
SAMPLE = Path(__file__).parent / "sample"
# A copy of MNIST's files, where there is one: tests that use it are skipped elsewhere.
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
SCRATCH = Path(tempfile.mkdtemp(prefix="vaeflow-tests-"))
# Settings of which none is `auto`, for tests of what is not about these.
PLAIN = {
    "latent_dim": 8,
    "filters": [32, 64],
    "depth": 1,
    "hidden_units": 128,
    "likelihood": "bernoulli",
    "levels": 256,
    "binarize": "none",
    "kl_warmup_epochs": 0,
    "epochs": 60,
    "patience": 0,
    "batch_size": 64,
    "learning_rate": 0.003,
    "learning_rate_schedule": "constant",
    "weight_average": 0.0,
}
# A training of seconds, long enough that the latents carry something.
SMALL = {**PLAIN, "epochs": 3, "filters": [8, 16], "hidden_units": 32, "batch_size": 8}

# How often a test kills what it starts, and the seed of when; `VAEFLOW_TEST_SEED=7 make test-kills`
# tries other moments.
KILLS = 10
SEED = int(os.environ.get("VAEFLOW_TEST_SEED", "0"))

# Nothing of the user's own is read or written: no tracking server, cache or Prefect profile.
for variable in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_", "DVC_"))]:
    del os.environ[variable]
os.environ |= {
    "DO_NOT_TRACK": "1",
    "PREFECT_HOME": str(SCRATCH / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "VAEFLOW_CACHE": str(SCRATCH / "cache"),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GIT_AUTHOR_NAME": "tests",
    "GIT_AUTHOR_EMAIL": "tests@localhost",
    "GIT_COMMITTER_NAME": "tests",
    "GIT_COMMITTER_EMAIL": "tests@localhost",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "DVC_GLOBAL_CONFIG_DIR": str(SCRATCH / "dvc"),
    "DVC_SYSTEM_CONFIG_DIR": str(SCRATCH / "dvc"),
    "DVC_SITE_CACHE_DIR": str(SCRATCH / "dvc-site"),
}


class Terminal(io.StringIO):
    """Standard output as on a terminal."""

    def isatty(self) -> bool:
        return True


def run(folder: Path, *command: str, status: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a command in a folder and check its exit status."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_workspace(folder: Path, **train: object) -> Path:
    """This project's pipeline in a folder, with the sample data and other training parameters.

    Data, parameters and remote are those that the project is shipped with: this clone may have
    others by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copy(SAMPLE / "params.yaml", folder)
    shutil.copy(SAMPLE / "data.pointer", folder / "data.dvc")  # by that name DVC would find it here
    shutil.copytree(REPOSITORY / "pipelines", folder / "pipelines")
    (folder / ".dvc").mkdir()
    shutil.copy(SAMPLE / "config", folder / ".dvc" / "config")
    shutil.copy(REPOSITORY / ".dvc" / ".gitignore", folder / ".dvc" / ".gitignore")
    shutil.copytree(REPOSITORY / ".dvc" / "sample-remote", folder / ".dvc" / "sample-remote")
    code.link(Workspace(folder))
    change_parameters(folder, train=train)
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "workspace")
    run(folder, "dvc", "pull", "data.dvc")
    return folder


def change_parameters(folder: Path, **sections: dict) -> None:
    """Edit `params.yaml`, keeping its layout."""
    from ruamel.yaml import YAML

    yaml = YAML()
    path = folder / "params.yaml"
    parameters = yaml.load(path)
    for section, values in sections.items():
        parameters[section].update(values)
    yaml.dump(parameters, path)


@contextmanager
def arrow_memory():
    """Count the memory that Arrow takes while the block runs; yields the pool that does."""
    import pyarrow

    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)
    pyarrow.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pyarrow.set_memory_pool(usual)


def aliases(root: Path) -> dict[str, str]:
    """Alias to version of the sample model; some stores answer with numbers."""
    from vaeflow.common.workspace import Workspace
    from vaeflow.tracking.runs import connect

    registered = connect(Workspace(root)).get_registered_model("digits-vae")
    return {alias: str(version) for alias, version in registered.aliases.items()}


def change_manifest(bundle: Path, **changes: object) -> None:
    """Another bundle: with other entries in its manifest."""
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def worsen(bundle: Path, shift: float) -> None:
    """Another bundle, and a worse model: a constant is added to the decoder's logits."""
    import onnx

    from vaeflow.bundle.manifest import describe_files

    path = bundle / "decoder.onnx"
    model = onnx.load(path)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[:] = ["unshifted"]
    constant = onnx.numpy_helper.from_array(np.array(shift, np.float32), "shift")
    model.graph.initializer.append(constant)
    model.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], ["logits"]))
    onnx.save(model, path)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["decoder.onnx"] = describe_files(bundle)["decoder.onnx"].model_dump()
    change_manifest(bundle, files=files)


@contextmanager
def mlflow_server(
    folder: Path, database: str | None = None, port: str | None = None
) -> Iterator[str]:
    """A tracking server of its own that keeps the artifacts; yields its address."""
    from vaeflow.common.processes import process_group

    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
    command += ["--backend-store-uri", database or f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "store"), "--workers", "1"]
    with (
        (folder / "log").open("w") as log,
        process_group(command, cwd=folder, stdout=log, stderr=log) as process,
    ):
        wait_for_http(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for_http(address: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until it answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.2)


KILLER = """
import os, signal, sys
import onnxruntime, scipy.stats, vaeflow.registry.champion, vaeflow.registry.register
from mlflow import MlflowClient

def run(code, left):
    def killing(method):
        def call(*arguments, **options):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return method(*arguments, **options)
        return call
    for name, method in list(vars(MlflowClient).items()):
        if name.startswith(("create", "delete", "log", "set", "update")):
            setattr(MlflowClient, name, killing(method))
    exec(code, {})
    sys.stdout.flush()
    os._exit(0)

kills = 0
while True:
    child = os.fork() or run(sys.argv[1], kills)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    kills += 1
print(kills)
"""


def killed_before_each_change(code: str) -> int:
    """Run code again and again, each time killed (-9) one change to MLflow's store later.

    Returns:
        After how many kills it came to its end.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLER, code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def processes_in(root):
    """Processes whose working directory is the workspace."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(root):
                found.append(process)
        except psutil.Error:
            continue
    return found


# === Processes that take turns ===

ONE_OF_MANY = """
import os, random, sys, time
from pathlib import Path
from vaeflow.registry.lock import hold_lock
from vaeflow.tracking.runs import connect
client, place = connect(), Path(sys.argv[1])
while True:
    with hold_lock(client, "digits-vae") as alone:
        inside = place / f"inside-{os.getpid()}"
        inside.touch()
        others = [p for p in place.glob("inside-*") if p != inside]
        alive = [p for p in others if Path("/proc", p.name.removeprefix("inside-")).exists()]
        time.sleep(random.uniform(0, 0.02))
        alone.confirm()
        with (place / "log").open("a") as log:
            log.write(f"{os.getpid()} {'TWO' if alive else 'alone'}\\n")
        inside.unlink()
"""


def take_turns_while_killed(place, turns, processes=8):
    """Have processes take turns while one after the other is killed and replaced.

    Returns:
        What each turn saw, and how many were killed.
    """
    place.mkdir()
    log = place / "log"
    log.touch()
    command = [sys.executable, "-c", ONE_OF_MANY, str(place)]

    def begin():
        with (place / "errors").open("a") as errors:
            return subprocess.Popen(command, stderr=errors)

    chance = random.Random(SEED)
    running, kills = [begin() for _ in range(processes)], 0
    deadline = time.monotonic() + 500
    try:
        while (done := len(log.read_text().splitlines())) < turns:
            assert time.monotonic() < deadline, (done, kills, (place / "errors").read_text())
            assert all(process.poll() is None for process in running), (
                place / "errors"
            ).read_text()
            if done > kills:  # as long as there is progress in between
                victim = chance.randrange(processes)
                # The one inside, where there is one, as often as another.
                inside = [p.name.removeprefix("inside-") for p in place.glob("inside-*")]
                for index, process in enumerate(running):
                    if str(process.pid) in inside and chance.random() < 0.5:
                        victim = index
                running[victim].send_signal(signal.SIGKILL)
                running[victim].wait()
                running[victim] = begin()
                kills += 1
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [line.split()[1] for line in log.read_text().splitlines()], kills
