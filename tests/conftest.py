"""Fixtures: workspaces in the states that tests begin from."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from helpers import SCRATCH, SMALL, make_workspace, run

from vaeflow.workspace import Workspace

# No test is timed: on a busy machine an example may take a while.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


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
    folder = make_workspace(SCRATCH / "finished", **SMALL)
    run(folder, "dvc", "repro")
    return folder


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
