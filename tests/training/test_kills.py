"""Real training processes, killed at random moments and started again."""

import signal
import subprocess
import time

import numpy as np
import pytest
from helpers import KILLS, SEED, make_workspace, run

from vaeflow.common.workspace import Workspace
from vaeflow.model.vae import load_vae
from vaeflow.tracking.runs import connect

SMALL = {
    "epochs": 40,
    "filters": [4, 8],
    "hidden_units": 16,
    "binarize": "dynamic",
    "weight_average": 0.9,
    "learning_rate_schedule": "cosine",
    "checkpoint_minutes": 0.002,  # in the middle of epochs too
}


pytestmark = pytest.mark.kills


@pytest.fixture
def prepared_workspace(tmp_path):
    folder = make_workspace(tmp_path / "workspace", **SMALL)
    run(folder, "dvc", "repro", "prepare")
    return folder


def kill_after_epochs(folder, epochs: int, delay: float) -> None:
    """Start a training, and kill it a moment after it has told of so many epochs."""
    command = ["vaeflow", "train"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        told = 0
        while told < epochs:
            line = process.stdout.readline()
            assert line, "the training has ended"
            told += line.startswith("epoch ")
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_random_moments_it_ends_with_the_same_bytes(prepared_workspace):
    folder, outputs = prepared_workspace, prepared_workspace / "outputs"
    run(folder, "vaeflow", "train")
    expected = load_vae(outputs / "model" / "model.keras").get_weights()
    history = (outputs / "model" / "history.csv").read_text()
    assert not list((outputs / "checkpoints").iterdir())

    random = np.random.default_rng(SEED)
    for _ in range(KILLS):
        moment = random.integers(1, 4), random.uniform(0, 0.3)
        print("killed after epochs and seconds", moment)  # shown when the test fails
        kill_after_epochs(folder, *moment)
    resumed = run(folder, "dvc", "repro", "train").stdout

    weights = load_vae(outputs / "model" / "model.keras").get_weights()
    assert [array.tobytes() for array in weights] == [array.tobytes() for array in expected]
    assert (outputs / "model" / "history.csv").read_text() == history
    assert "from a checkpoint" in resumed
    assert not list((outputs / "checkpoints").iterdir())

    # What was killed and gone on with is one run.
    client = connect(Workspace(folder))
    first, *others = client.search_runs(["1"], order_by=["attributes.start_time ASC"])
    assert [other.info.status for other in others][:1] == ["FINISHED"]
    assert len(others) == 1
    steps = [point.step for point in client.get_metric_history(others[0].info.run_id, "elbo")]
    assert sorted(set(steps)) == list(range(1, 41))
    assert first.info.status == "FINISHED"


def test_the_same_training_twice_at_once_is_refused(prepared_workspace):
    command = ["vaeflow", "train"]
    options = {"cwd": prepared_workspace, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline().startswith("training on")
        deadline = time.monotonic() + 60
        while not list(prepared_workspace.glob("outputs/checkpoints/*/lock")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = run(prepared_workspace, *command, status=2)
        assert "another process is making this very training" in done.stderr
        # Before its first step there is nothing to keep.
        assert any(line.startswith("epoch 1/") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert "told to stop (SIGTERM) in epoch" in said
    assert process.returncode == 128 + signal.SIGTERM
    assert list(prepared_workspace.glob("outputs/checkpoints/*/*.checkpoint"))
