"""The flow as its users run it: whole commands, real servers, real signals."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers import aliases, change_parameters, make_workspace, run

import vaeflow
from vaeflow.model.vae import load_vae
from vaeflow.training.tracking import connect
from vaeflow.workspace import Workspace

pytestmark = pytest.mark.slow


def weights_of(root):
    return load_vae(root / "outputs" / "model" / "model.keras").get_weights()


def test_the_flow_registers_a_champion_and_equals_dvc_repro(
    finished, tmp_path, monkeypatch, digits
):
    small = {"epochs": 3, "filters": [8, 16], "hidden_units": 32}  # as `finished`
    root = make_workspace(tmp_path / "flow", **small)
    first = run(root, "vaeflow", "retrain")
    assert "models:/digits-vae/1 is @champion" in first.stdout + first.stderr

    for ours, theirs in zip(weights_of(root), weights_of(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    metrics = [
        json.loads((r / "outputs/evaluation/metrics.json").read_text()) for r in (root, finished)
    ]
    assert metrics[0] == metrics[1]
    assert "up to date" in run(root, "dvc", "repro").stdout

    monkeypatch.chdir(root)
    assert vaeflow.load("models:/digits-vae@champion").score(digits[:2]).shape == (2,)

    again = run(root, "vaeflow", "retrain")
    assert "is @champion: it was registered before" in again.stdout + again.stderr
    assert aliases(root) == {"champion": "1"}


def test_changed_data_stop_the_flow_before_anything_runs(workspace):
    path = workspace / "data" / "digits" / "images.npy"
    images = np.load(path)
    path.unlink()
    np.save(path, images[:500])
    pointer = (workspace / "data.dvc").read_text()
    done = run(workspace, "vaeflow", "retrain", status=2)
    assert done.stderr.startswith("vaeflow: data/ differs from data.dvc")
    assert (workspace / "data.dvc").read_text() == pointer
    assert not (workspace / "mlflow.db").exists()


def test_a_failed_stage_fails_the_flow_with_its_message_and_no_traceback(workspace):
    np.save(workspace / "wide.npy", np.zeros((4, 9, 9), np.int64))
    run(workspace, "rm", "-r", "data")
    run(workspace, "mkdir", "data")
    run(workspace, "mv", "wide.npy", "data/images.npy")
    run(workspace, "dvc", "add", "data")
    done = run(workspace, "vaeflow", "retrain", status=2)
    assert "images.npy: pixels have dtype int64" in done.stderr
    assert "vaeflow: stage prepare failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Task run 'train'" not in done.stderr


def test_a_terminated_flow_ends_its_training_and_the_next_one_works(tmp_path):
    root = make_workspace(tmp_path / "killed", epochs=500)
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(["vaeflow", "retrain"], cwd=root, stdout=log, stderr=log)
    wait_for("epoch 2/500", tmp_path / "log", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not still_running(root)
    (run_info,) = connect(Workspace(root)).search_runs(["1"])
    assert run_info.info.status == "KILLED"

    change_parameters(root, train={"epochs": 1})
    assert "@champion" in run(root, "vaeflow", "retrain").stderr


@pytest.mark.skipif("VAEFLOW_TEST_ALL" not in os.environ, reason="over a minute: make test-all")
def test_a_schedule_starts_runs_and_ends_with_everything_it_started(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "scheduled", symlinks=True)
    (root / "elsewhere").mkdir()
    log = (tmp_path / "log").open("w+")
    command = ["vaeflow", "schedule", "--cron", "* * * * *"]
    process = subprocess.Popen(command, cwd=root / "elsewhere", stdout=log, stderr=log)
    wait_for("is @champion", tmp_path / "log", process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not still_running(root)


def wait_for(text, log, process, seconds=180):
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def still_running(root):
    """Processes whose working directory is the workspace."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if process.cwd() == str(root):
                found.append(process.info)
        except psutil.Error:
            continue
    return found


def test_dvc_experiments_metrics_params_and_plots_work(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    run(root, "git", "add", "dvc.lock")
    run(root, "git", "commit", "--quiet", "--message", "trained")
    run(root, "dvc", "exp", "run", "-S", "train.epochs=2")
    metrics = json.loads(run(root, "dvc", "metrics", "diff", "--json").stdout)
    changed = metrics["outputs/evaluation/metrics.json"]
    assert set(changed["elbo"]) == {"old", "new", "diff"}
    shown = json.loads(run(root, "dvc", "metrics", "show", "--json").stdout)
    written = json.loads((root / "outputs" / "evaluation" / "metrics.json").read_text())
    assert shown[""]["data"]["outputs/evaluation/metrics.json"]["data"] == written
    parameters = json.loads(run(root, "dvc", "params", "diff", "--json").stdout)
    assert parameters["params.yaml"]["train.epochs"] == {"old": 3, "new": 2, "diff": -1}
    plots = json.loads(run(root, "dvc", "plots", "show", "--json").stdout)["data"]
    assert {"elbo", "kl"} <= set(plots)
    name = run(root, "dvc", "exp", "list", "--name-only").stdout.strip()
    (latest, _) = connect(Workspace(root)).search_runs(["1"])
    assert latest.info.run_name == name
