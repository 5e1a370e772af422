"""What the version before this one made goes on working; `keep.py` made `previous.tar.xz` by it."""

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import run

import vaeflow
from vaeflow.bundle.runtime import Bundle

pytestmark = pytest.mark.slow
PREVIOUS = Path(__file__).parent / "previous.tar.xz"


@pytest.fixture
def previous(tmp_path, monkeypatch) -> Path:
    """The workspace, somewhere else than it was made."""
    with tarfile.open(PREVIOUS) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "previous"
    run(root, "git", "init", "--quiet")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "as it was")
    monkeypatch.chdir(root)
    monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path / "cache"))
    return root


def scores(root: Path, model: Bundle) -> None:
    expected = json.loads((root / "expected.json").read_text())["scores"]
    images = np.load(root / "outputs" / "prepared" / "test.npy")
    np.testing.assert_allclose(model.score(images), expected, rtol=1e-4)


def test_its_bundle_and_its_champion_score_as_before(previous):
    scores(previous, vaeflow.load(previous / "outputs" / "bundle"))
    scores(previous, vaeflow.load("models:/digits-vae@champion"))


def test_its_workspace_is_retrained_and_the_challenger_is_compared_with_its_champion(previous):
    said = run(previous, "vaeflow", "retrain").stdout
    for stage in ("prepare", "train", "evaluate", "export", "report"):
        assert re.search(rf"^{stage} ", said, re.MULTILINE)
    last = said.splitlines()[-1]
    assert last.startswith("models:/digits-vae/2 is @")
    assert "there was no champion" not in last
    listed = run(previous, "vaeflow", "models").stdout
    assert {"1", "2"} <= set(re.findall(r"\b\d+\b", listed))


def test_a_training_it_was_stopped_in_is_made_anew(previous):
    """Its checkpoint is of other code."""
    checkpoints = list(previous.glob("outputs/checkpoints/*/*.checkpoint"))
    assert checkpoints
    run(previous, "vaeflow", "prepare")
    run(previous, "vaeflow", "train", env={**os.environ, "MLFLOW_TRACKING_URI": ""})
    assert (previous / "outputs" / "model" / "model.keras").is_file()
