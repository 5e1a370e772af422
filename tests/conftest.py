"""Fixtures: workspaces in the states that tests begin from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
from filelock import FileLock
from helpers import SCRATCH, SEED, SMALL, free_port, make_workspace, run, wait_for_http

from vaeflow.common.processes import cores, process_group
from vaeflow.common.workspace import Workspace

# No test is timed: on a busy machine an example may take a while.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Names the folder of what only one of the workers of a run has to make.
SHARED = "VAEFLOW_TESTS_SHARED"
GIB = 2**30
WORKERS, GIB_A_WORKER = 4, 4


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config):
    """Fix the seed; make the folder that all workers share, before any of them is started."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)
    config.shared = None if SHARED in os.environ else tempfile.mkdtemp(prefix="vaeflow-shared-")
    if config.shared:
        os.environ[SHARED] = config.shared
        # Of the tests that train on JAX many compile the same steps.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(config.shared) / "jax")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_report_header():
    return f"seed of kills and of generated tests: {SEED} (VAEFLOW_TEST_SEED)"


def pytest_unconfigure(config):
    if config.shared:
        shutil.rmtree(config.shared, ignore_errors=True)
        del os.environ[SHARED]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """As many workers as have a core and room for a training each."""
    return max(1, min(cores(), psutil.virtual_memory().total // (GIB_A_WORKER * GIB), WORKERS))


def pytest_sessionstart():
    """Have signals mean what they do in a terminal: a shell's background jobs ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionfinish():
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture
def workspace(tmp_path) -> Path:
    """A fresh workspace with data, nothing run yet."""
    return make_workspace(tmp_path / "workspace", epochs=1)


@pytest.fixture(scope="session")
def finished() -> Path:
    """A workspace after `dvc repro`, short training; shared, so tests must not change it."""
    shared = Path(os.environ[SHARED])
    folder, made = shared / "finished", shared / "finished.made"
    with FileLock(shared / "finished.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_workspace(folder, **SMALL)
            run(folder, "dvc", "repro")
            made.touch()
    return folder


@pytest.fixture(autouse=True)
def not_deterministic_for_good() -> Iterator[None]:
    """A stage that a test runs in this process makes TensorFlow deterministic: not for the next.

    XLA compiles nothing then.
    """
    yield
    if config := sys.modules.get("tensorflow.python.framework.config"):
        config.disable_op_determinism()


@pytest.fixture
def bundle(finished, tmp_path) -> Path:
    """A copy of a real bundle, to be damaged at will."""
    return Path(shutil.copytree(finished / "outputs" / "bundle", tmp_path / "bundle"))


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """The sample images, uint8 (1797, 8, 8, 1)."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * 255 / 16).astype(np.uint8)[..., np.newaxis]


@pytest.fixture
def bundled(finished, tmp_path, monkeypatch) -> Workspace:
    """A workspace with a built bundle, an empty registry, and an empty cache of pulled models."""
    root = tmp_path / "workspace"
    for name in ("prepared", "model", "evaluation", "bundle"):
        shutil.copytree(finished / "outputs" / name, root / "outputs" / name)
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copy(finished / name, root)
    monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(root)
    return Workspace(root)


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect server of our own; a flow that finds one need not start another."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    api = f"http://127.0.0.1:{port}/api"
    with process_group([*command, "--port", str(port)], **quiet) as process:
        wait_for_http(f"{api}/health", process)
        yield api


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that moves when told."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now
