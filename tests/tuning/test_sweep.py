"""Sweeps: every trial is kept, with its reason; killed and stopped ones are made again."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import optuna
import pytest
from helpers import change_parameters, make_workspace, run
from postgres import postgresql
from serving_helpers import wait_for

from vaeflow.common.processes import cores
from vaeflow.common.workspace import Workspace
from vaeflow.config.edit import apply_preset
from vaeflow.config.schema import load_parameters
from vaeflow.errors import ConfigError, DataError, TrainingError
from vaeflow.tracking.runs import connect
from vaeflow.training.history import Reached
from vaeflow.tuning import sweep as sweeps
from vaeflow.tuning.sweep import shares, tune

RATES = "train.learning_rate: [0.002, 0.003]\n"


@pytest.fixture
def prepared(finished, tmp_path):
    """A workspace whose stages are made, with an empty registry."""
    root = tmp_path / "workspace"
    shutil.copytree(finished / "outputs" / "prepared", root / "outputs" / "prepared")
    for name in ("dvc.yaml", "params.yaml", "data.dvc"):
        shutil.copy(finished / name, root)
    change_parameters(root, train={"epochs": 1})
    return Workspace(root)


def sweep(workspace, space, trials, *, workers=1, name="s", storage=None):
    """Make a sweep; return the best trial and what was said."""
    said = []
    file = workspace.root / "space.yaml"
    file.write_text(space)
    parameters = load_parameters(workspace.parameters)
    best = tune(workspace, parameters, file, name, trials, workers, storage, said.append)
    return best, said


def table(workspace, name="s"):
    path = workspace.tuning / name / "trials.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def trial_runs(workspace, name="s"):
    """The MLflow runs of a sweep's trials, in their order, and that of the sweep."""
    client = connect(workspace)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    (parent,) = [found for found in runs if found.info.run_name == f"sweep {name}"]
    trials = [found for found in runs if found.data.tags.get("sweep") == name]
    assert {found.data.tags["mlflow.parentRunId"] for found in trials} <= {parent.info.run_id}
    return sorted(trials, key=lambda found: int(found.data.tags["trial"])), parent


def test_every_trial_is_kept_and_the_best_is_a_preset(prepared):
    best, said = sweep(prepared, RATES, 3, workers=2)
    rows = table(prepared)
    assert len(rows) == 3  # of two different ones: what is known is not trained again
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    same = [row for row in rows if row["reason"].startswith("the same parameters as ")]
    assert len(same) == sum(row["state"] == "pruned" for row in rows)  # while that one was running
    runs, parent = trial_runs(prepared)
    assert len(runs) == 2
    assert {found.info.status for found in (*runs, parent)} == {"FINISHED"}
    assert parent.data.metrics["best_validation_elbo"] == best.value
    assert best.value == max(float(row["validation_elbo"]) for row in rows if row["epochs"])
    assert not list((prepared.trials / "s").iterdir())  # what they came to is recorded

    # The preset, as it stands, leads to the same weights' bound.
    preset = prepared.presets / "s.yaml"
    apply_preset(prepared.parameters, preset)
    train = load_parameters(prepared.parameters).train
    assert train.learning_rate == best.user_attrs["values"]["train.learning_rate"]
    printed = run(prepared.root, "vaeflow", "train").stdout
    assert f"validation ELBO {best.value:.3f} nats" in printed

    _, said = sweep(prepared, "train.batch_size: [8, 16]", 1, name="t")
    assert said[0] == "sweep t: 0 of 1 trials made, 1 at once"
    assert len(table(prepared)) == 3


def test_it_goes_on_and_refuses_what_could_not_be_compared(prepared):
    sweep(prepared, RATES, 1)
    sweep(prepared, RATES, 1)
    assert len(table(prepared)) == 1
    sweep(prepared, RATES, 2)
    assert len(table(prepared)) == 2
    with pytest.raises(ConfigError, match=r"made with other search space: .* another --name"):
        sweep(prepared, "train.learning_rate: [0.002]", 3)
    change_parameters(prepared.root, train={"depth": 2})
    with pytest.raises(ConfigError, match="other parameters"):
        sweep(prepared, RATES, 3)


def test_trials_that_fail_are_kept_with_the_reason_and_end_the_sweep_if_all_do(prepared):
    space = "train.kl_warmup_epochs: {low: 2, high: 60}"  # of one epoch
    with pytest.raises(TrainingError, match=r"first 3 trials failed; .* must be at most epochs"):
        sweep(prepared, space, 9)
    rows = table(prepared)
    assert [row["state"] for row in rows] == ["failed"] * 3
    assert all("must be at most epochs" in row["reason"] for row in rows)
    assert not (prepared.presets / "s.yaml").exists()


def test_a_training_that_fails_says_why(prepared):
    # Its steps are not finite: the stage ends with an error.
    change_parameters(prepared.root, train={"skipped_steps_limit": 3, "gradient_limit": 1e-9})
    with pytest.raises(TrainingError, match=r"the first [34] trials failed"):
        sweep(prepared, "train.latent_dim: {low: 2, high: 90}", 9, workers=2)
    runs = {found.data.tags["trial"]: found for found in trial_runs(prepared)[0]}
    # One that was at work when the sweep ended was stopped.
    failed = [row for row in table(prepared) if not row["reason"].startswith("stopped")]
    assert len(failed) >= 3
    for row in failed:
        assert "steps in a row had a gradient" in row["reason"]
        assert runs[row["trial"]].info.status == "FAILED"
        assert runs[row["trial"]].data.tags["trial_reason"] == row["reason"]
    logs = sorted((prepared.tuning / "s" / "logs").iterdir())
    assert [log.name for log in logs[:1]] == ["trial-0000.log"] and logs[0].read_text()


def test_the_same_parameters_twice_at_once_are_trained_once(prepared, monkeypatch):
    """The trial of the lower number comes second, when the other is at work."""
    storage = f"sqlite:///{prepared.root / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    for _ in range(2):
        study.enqueue_trial({"train.learning_rate": "0.002"})  # as it stands in the space
    begin = sweeps._Sweep._try

    def late(self, trial):
        if trial.number == 0:
            wait_for(lambda: list((prepared.trials / "s").glob("*/process")))
        return begin(self, trial)

    monkeypatch.setattr(sweeps._Sweep, "_try", late)
    sweep(prepared, RATES, 3, workers=2, storage=storage)
    late, early, _ = table(prepared)
    assert (early["state"], early["reason"]) == ("complete", "")
    assert late["reason"] == "the same parameters as a trial that is at work"


def test_what_is_worse_than_the_others_is_pruned(prepared, monkeypatch):
    monkeypatch.setattr(sweeps, "PRUNED_BESIDE", 1)
    monkeypatch.setattr(sweeps, "PRUNED_FROM", 0)
    change_parameters(prepared.root, train={"epochs": 4})
    storage = f"sqlite:///{prepared.root / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    for rate in (0.003, 1e-7):
        study.enqueue_trial({"train.learning_rate": rate})
    best, said = sweep(
        prepared, "train.learning_rate: {low: 1e-7, high: 0.01, log: true}", 2, storage=storage
    )
    good, bad = table(prepared)
    assert (good["state"], bad["state"]) == ("complete", "pruned")
    assert bad["reason"].startswith("pruned after epoch 1 of 4: ")
    assert float(good["validation_elbo"]) == best.value
    assert "below the median" in said[-1]
    runs, _ = trial_runs(prepared)
    assert [found.info.status for found in runs] == ["FINISHED", "KILLED"]
    assert runs[1].data.tags["trial_reason"] == bad["reason"]


def test_of_more_than_a_hundred_epochs_one_of_each_share_is_reported():
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    for epoch in range(1, 251):
        sweeps.judge(trial, Reached(epoch, 250, float(epoch)))
    assert sorted(study.trials[0].intermediate_values) == list(range(101))


def test_images_that_are_changed_meanwhile_end_it(prepared):
    (prepared.root / "space.yaml").write_text(RATES)

    def say(line):
        if line.startswith("trial 0"):
            (prepared.prepared / "index.parquet").write_bytes(b"others")

    parameters = load_parameters(prepared.parameters)
    with pytest.raises(DataError, match="changed while the sweep was at work"):
        tune(prepared, parameters, prepared.root / "space.yaml", "s", 3, 1, None, say)
    assert [row["state"] for row in table(prepared)] == ["complete"]


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////absent/folder/study.db"])
def test_a_storage_that_cannot_be_used(prepared, storage):
    with pytest.raises(ConfigError, match=f"--storage {storage} cannot be used"):
        sweep(prepared, RATES, 1, storage=storage)


def test_a_name_that_cannot_be_used(prepared):
    with pytest.raises(ConfigError, match="--name"):
        sweep(prepared, RATES, 1, name="../s")


def test_cores_are_divided():
    mine = sorted(os.sched_getaffinity(0))
    assert sorted(core for share in shares(cores()) for core in share) == mine
    assert shares(1) == [mine]
    assert shares(cores() + 1) == [None] * (cores() + 1)


LONG = {"epochs": 12, "checkpoint_minutes": 0.0}


def start(folder, *options, **environment):
    command = ["vaeflow", "tune", "--space", "space.yaml", *options]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_epochs(folder, epochs, process):
    """Wait until some trial has told of so many epochs."""
    logs = folder / "outputs" / "tuning" / "space" / "logs"
    while True:
        assert process.poll() is None, process.stdout.read()
        for log in logs.glob("*"):
            if log.read_text().count("\nepoch ") >= epochs:
                return log
        time.sleep(0.1)


@pytest.mark.kills
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_after_a_kill_no_finished_trial_is_lost_and_the_others_go_on(tmp_path, number):
    folder = make_workspace(tmp_path / "workspace", **LONG)
    (folder / "space.yaml").write_text("train.latent_dim: {low: 2, high: 60}\n")
    sweep = Workspace(folder)
    run(folder, "vaeflow", "tune", "--space", "space.yaml", "--trials", "1")
    first = table(sweep, "space")[0]["validation_elbo"]

    with start(folder, "--trials", "3", "--workers", "1") as process:
        while not (sweep.tuning / "space" / "logs" / "trial-0001.log").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        while "\nepoch 5/" not in (sweep.tuning / "space/logs/trial-0001.log").read_text():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.send_signal(number)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)

    printed = run(folder, "vaeflow", "tune", "--space", "space.yaml", "--trials", "3").stdout
    rows = table(sweep, "space")
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "complete"]
    assert rows[0]["validation_elbo"] == first
    assert "made again as trial 2" in rows[1]["reason"]
    assert rows[2]["train.latent_dim"] == rows[1]["train.latent_dim"]
    log = (sweep.tuning / "space" / "logs" / "trial-0002.log").read_text()
    assert "going on after epoch" in log
    assert "3 trials" not in printed or process.returncode
    runs, _ = trial_runs(sweep, "space")
    assert {found.info.status for found in runs} == {"FINISHED"}  # the same run was gone on with


@pytest.mark.servers
def test_machines_that_begin_at_once_all_make_the_tables():
    begin = (
        "import sys; from vaeflow.tuning.sweep import _study; print('ready', flush=True); input(); "
        "_study(None, 'one', sys.argv[1], 0)"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with postgresql() as storage:
        command = [sys.executable, "-c", begin, storage]
        machines = [subprocess.Popen(command, text=True, **pipes) for _ in range(5)]
        for machine in machines:
            assert machine.stdout.readline() == "ready\n"
        for machine in machines:
            machine.stdin.write("\n")
            machine.stdin.flush()
        for machine in machines:
            _, problems = machine.communicate(timeout=120)
            assert machine.returncode == 0, problems


@pytest.mark.servers
def test_two_machines_share_a_sweep_on_postgresql_and_one_is_killed(tmp_path):
    with postgresql() as storage:
        options = ("--trials", "4", "--workers", "1", "--storage", storage)
        folders = [tmp_path / "one", tmp_path / "two"]
        make_workspace(folders[0], epochs=3)
        shutil.copytree(folders[0], folders[1])
        for folder in folders:
            (folder / "space.yaml").write_text("train.latent_dim: {low: 2, high: 60}\n")
        with start(folders[0], *options) as one, start(folders[1], *options) as two:
            wait_for_epochs(folders[0], 1, one)
            one.kill()
            assert two.wait(timeout=300) == 0, two.stdout.read()
        run(folders[0], "vaeflow", "tune", "--space", "space.yaml", *options)
        study = optuna.load_study(study_name="space", storage=storage)
        made = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
        assert 4 <= len(made) <= 5
        assert json.dumps(study.best_params) in map(json.dumps, (one.params for one in made))
