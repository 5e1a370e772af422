"""The flow as its users run it: whole commands, real servers, real signals."""

import base64
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    REPOSITORY,
    SMALL,
    aliases,
    change_parameters,
    free_port,
    make_workspace,
    mlflow_server,
    processes_in,
    run,
    wait_for_http,
)

import vaeflow
from vaeflow.common.processes import process_group
from vaeflow.common.versioning import data_md5
from vaeflow.common.workspace import Workspace
from vaeflow.model.vae import load_vae
from vaeflow.orchestration import dvc
from vaeflow.tracking.runs import connect

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def prefect_server(prefect_api, monkeypatch):
    """Have flows find a server: what they do without one is `test_prefect_server`'s matter."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)


def weights_of(root):
    return load_vae(root / "outputs" / "model" / "model.keras").get_weights()


def test_the_flow_registers_a_champion_and_equals_dvc_repro(
    finished, tmp_path, monkeypatch, digits
):
    root = make_workspace(tmp_path / "flow", **SMALL)
    first = run(root, "vaeflow", "retrain")
    assert first.stdout.splitlines()[-1].startswith("models:/digits-vae/1 is @champion")
    assert first.stderr == ""
    assert len(first.stdout.splitlines()) < 25
    (log,) = (root / "outputs" / "logs").iterdir()
    assert first.stdout.splitlines()[0] == f"all details: {log.relative_to(root)}"
    assert "epoch 1/3" in log.read_text()

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
    assert "nothing changed: models:/digits-vae/1 is @champion" in again.stdout
    assert "Task run 'train'" not in again.stderr
    assert aliases(root) == {"champion": "1"}

    # Parameters for one run, under another name, and everything pushed.
    before = (root / "params.yaml").read_bytes()
    other = run(root, "vaeflow", "retrain", "--set", "train.epochs=2", "--name", "other", "--push")
    assert other.stdout.splitlines()[-1].startswith("models:/other/1 is @champion")
    assert (root / "params.yaml").read_bytes() == before
    assert "in sync" in run(root, "dvc", "status", "--cloud").stdout
    found = artifacts()
    assert "models:/other/1" in found["retrain-summary"]
    assert "| servability | passed: pulled, verified" in found["retrain-summary"]
    assert "importance_weighted_bound" in found["retrain-metrics"]
    picture = found["retrain-reconstructions"].strip('"').removeprefix("data:image/png;base64,")
    drawn = (root / "outputs" / "evaluation" / "reconstructions.png").read_bytes()
    assert base64.b64decode(picture) == drawn

    # The stage's page has no verdict; that beside the model in MLflow has.
    page = (root / "outputs" / "report" / "index.html").read_text(encoding="utf-8")
    published = (root / "mlartifacts").rglob("report/index.html")
    texts = [path.read_text(encoding="utf-8") for path in published]
    assert len(texts) == 2
    (judged,) = (text for text in texts if "models:/other/1 is @champion: there was no" in text)
    assert 'id="verdict"' not in page
    assert "<dt>servability</dt><dd>passed: pulled, verified" in judged
    assert judged.partition("</main>")[2] == page.partition("</main>")[2]


def artifacts():
    """The newest artifact of each key that flows left in Prefect's database."""
    database = sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")
    return dict(database.execute("SELECT key, data FROM artifact ORDER BY created"))


def test_imported_data_follow_their_source(tmp_path):
    root = make_workspace(tmp_path / "workspace", epochs=1)
    place = Workspace(root)

    source = tmp_path / "source"
    (source / "digits").mkdir(parents=True)
    images = np.load(root / "data" / "digits" / "images.npy")
    np.save(source / "digits" / "images.npy", images[:900])
    run(root, "dvc", "remove", "data.dvc")
    run(root, "rm", "-r", "data")
    run(root, "dvc", "import-url", str(source), "data")
    before = data_md5(place)
    dvc.fetch_data(place)
    assert data_md5(place) == before
    np.save(source / "digits" / "images.npy", images)
    dvc.fetch_data(place)
    assert data_md5(place) != before
    assert len(np.load(root / "data" / "digits" / "images.npy")) == len(images)


@pytest.mark.servers
def test_of_two_flows_at_once_the_second_waits_or_is_cancelled(tmp_path):
    root = make_workspace(tmp_path / "workspace", **{**SMALL, "epochs": 30})
    logs = [tmp_path / "first", tmp_path / "second"]
    first = start_flow(root, logs[0])
    wait_for("epoch 1/30", logs[0], first)
    cancelled = run(root, "vaeflow", "retrain", "--busy", "cancel", status=2)
    assert f"vaeflow: another flow is at work in {root}" in cancelled.stderr
    second = start_flow(root, logs[1])
    wait_for("waiting for another flow", logs[1], second)
    assert first.wait(300) == 0
    assert second.wait(120) == 0
    assert "nothing changed: models:/digits-vae/1 is @champion" in logs[1].read_text()


@pytest.mark.kills
def test_a_killed_flow_leaves_a_workspace_that_the_next_can_use(tmp_path):
    """Killed with everything it started, its own parameters still in params.yaml."""
    root = make_workspace(tmp_path / "workspace", **SMALL)
    before = (root / "params.yaml").read_bytes()
    log = tmp_path / "log"
    killed = start_flow(root, log, "--set", "train.epochs=500")
    wait_for("epoch 2/500", log, killed)
    killed.kill()
    killed.wait()
    for process in processes_in(root):
        process.kill()
    assert (root / "params.yaml").read_bytes() != before
    done = run(root, "vaeflow", "retrain")
    assert "models:/digits-vae/1 is @champion" in done.stdout
    assert (root / "params.yaml").read_bytes() == before
    first, second = connect(Workspace(root)).search_runs(
        ["1"], order_by=["attributes.start_time ASC"]
    )
    assert [first.info.status, second.info.status] == ["KILLED", "FINISHED"]


@pytest.mark.servers
def test_a_training_goes_on_when_its_tracking_server_stops(tmp_path, monkeypatch):
    root = make_workspace(tmp_path / "workspace", **{**SMALL, "epochs": 25})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run(root, "dvc", "repro", "prepare")
    log = tmp_path / "log"
    with mlflow_server(tmp_path / "server") as address:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": address}
        with log.open("w") as out:
            training = subprocess.Popen(
                ["dvc", "repro"], cwd=root, env=environment, stdout=out, stderr=out
            )
        wait_for("epoch 2/25", log, training)
    assert training.wait(300) == 0
    assert "the training goes on without" in log.read_text()
    run_id = json.loads((root / "outputs" / "model" / "run.json").read_text())["run_id"]
    port = address.rsplit(":", 1)[1]
    with mlflow_server(tmp_path / "server", port=port):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = connect()
        assert client.get_run(run_id).info.status == "RUNNING"
        assert "models:/digits-vae/1 is @champion" in run(root, "vaeflow", "retrain").stdout
        assert client.get_run(run_id).info.status == "FINISHED"
        assert len(client.get_metric_history(run_id, "elbo")) == 25
        assert client.get_model_version("digits-vae", "1").run_id == run_id
        found = artifacts()
        assert f"{address}/#/models/digits-vae/versions/1" in found["retrain-mlflow"]
        assert f"/runs/{run_id}/artifacts/report/index.html" in found["retrain-report"]
        (page,) = client.list_artifacts(run_id, "report")
        assert page.path == "report/index.html"


def start_flow(root, log, *options):
    with log.open("w") as out:
        return subprocess.Popen(
            ["vaeflow", "retrain", "--verbose", *options], cwd=root, stdout=out, stderr=out
        )


def test_changed_data_stop_the_flow_before_anything_runs(workspace):
    path = workspace / "data" / "digits" / "images.npy"
    images = np.load(path)
    path.unlink()
    np.save(path, images[:500])
    pointer = (workspace / "data.dvc").read_text()
    done = run(workspace, "vaeflow", "retrain", status=2)
    assert "vaeflow: data/ differs from data.dvc" in done.stderr
    assert len(np.load(path)) == 500
    assert (workspace / "data.dvc").read_text() == pointer
    assert not (workspace / "outputs" / "prepared").exists()


def test_a_failed_stage_fails_the_flow_with_its_message_and_no_traceback(workspace):
    np.save(workspace / "wide.npy", np.zeros((4, 9, 9), complex))
    run(workspace, "rm", "-r", "data")
    run(workspace, "mkdir", "data")
    run(workspace, "mv", "wide.npy", "data/images.npy")
    run(workspace, "dvc", "add", "data")
    done = run(workspace, "vaeflow", "retrain", status=2)
    assert "images.npy: numbers of type complex128" in done.stderr
    assert "vaeflow: stage prepare failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert "train begins" not in done.stdout


@pytest.mark.kills
def test_a_terminated_flow_ends_its_training_and_the_next_one_works(tmp_path):
    root = make_workspace(tmp_path / "killed", **{**SMALL, "epochs": 500})
    process = start_flow(root, tmp_path / "log")
    wait_for("epoch 2/500", tmp_path / "log", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not processes_in(root)
    (run_info,) = connect(Workspace(root)).search_runs(["1"])
    assert run_info.info.status == "KILLED"

    change_parameters(root, train={"epochs": SMALL["epochs"]})
    assert "is @champion" in run(root, "vaeflow", "retrain").stdout


@pytest.mark.servers
def test_a_schedule_starts_runs_and_ends_with_everything_it_started(
    finished, tmp_path, monkeypatch
):
    monkeypatch.delenv("PREFECT_API_URL")  # its own server, too
    root = shutil.copytree(finished, tmp_path / "scheduled", symlinks=True)
    (root / "elsewhere").mkdir()
    log = (tmp_path / "log").open("w+")
    command = ["vaeflow", "schedule", "--cron", "* * * * *"]
    process = subprocess.Popen(command, cwd=root / "elsewhere", stdout=log, stderr=log)
    wait_for("is @champion", tmp_path / "log", process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not processes_in(root)
    assert "was never awaited" not in (tmp_path / "log").read_text()


@pytest.mark.servers
def test_a_killed_worker_leaves_no_run_behind_that_blocks_the_next(tmp_path):
    """A server, a work pool, the deployments of prefect.yaml, and a worker killed in a training."""
    root = make_workspace(tmp_path / "workspace", **SMALL)
    shutil.copy(REPOSITORY / "prefect.yaml", root)
    port = free_port()
    home, api = tmp_path / "prefect", f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": api}
    before = (root / "params.yaml").read_bytes()

    def prefect(*arguments):
        return run(root, "prefect", *arguments, env=environment).stdout

    def worker(log):
        with log.open("w") as out:
            return subprocess.Popen(
                ["prefect", "worker", "start", "--pool", "vaeflow"],
                cwd=root,
                env=environment,
                stdout=out,
                stderr=out,
            )

    logs = [tmp_path / "first", tmp_path / "second"]
    server = ["prefect", "server", "start", "--port", port]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with process_group(server, env=environment, **quiet) as process:
        wait_for_http(f"{environment['PREFECT_API_URL']}/health", process)
        prefect("work-pool", "create", "vaeflow", "--type", "process")
        prefect("--no-prompt", "deploy", "--all")
        first = worker(logs[0])
        long = ["--param", 'overrides={"train.epochs": 500}']
        prefect("deployment", "run", "retrain/retrain-nightly", *long)
        wait_for("epoch 2/500", logs[0], first)
        first.kill()
        first.wait()
        prefect("deployment", "run", "retrain/retrain-nightly")
        second = worker(logs[1])
        try:
            wait_for("models:/digits-vae/1 is @champion", logs[1], second, seconds=600)
            champion = {"model": "models:/digits-vae@champion"}
            asked = json.dumps({"sources": ["outputs/prepared/test.npy"], **champion})
            prefect("deployment", "run", "score/score-images", "--watch", "--params", asked)
        finally:
            second.terminate()
            second.wait(60)
    assert (root / "params.yaml").read_bytes() == before
    assert (root / "outputs" / "scores.parquet").exists()
    assert {run.info.status for run in connect(Workspace(root)).search_runs(["1"])} == {
        "KILLED",
        "FINISHED",
    }


@pytest.mark.servers
def test_workers_elsewhere_clone_and_pull_and_one_is_killed(tmp_path, monkeypatch):
    """A pool of two workers in folders of their own; they get the workspace as the docs say."""
    root = make_workspace(tmp_path / "workspace", **SMALL)
    shutil.copy(REPOSITORY / "prefect.yaml", root)
    page = (REPOSITORY / "docs" / "how-to" / "retrain.md").read_text()
    pull = "pull:" + page.split("```yaml\npull:")[1].split("```")[0]
    pull = pull.replace("https://git.example.com/team/project.git", f"file://{root}")
    branch = run(root, "git", "branch", "--show-current").stdout.strip()
    deployments = (root / "prefect.yaml").read_text()
    (root / "prefect.yaml").write_text(f"{pull.replace('main', branch)}\n{deployments}")
    shared = tmp_path / "remote"
    run(root, "dvc", "remote", "add", "--default", "shared", str(shared))
    run(root, "dvc", "push", "data.dvc")
    run(root, "git", "add", "prefect.yaml", ".dvc/config")
    run(root, "git", "commit", "--quiet", "--message", "for workers elsewhere")
    pushed = len(list(shared.rglob("*")))
    port = free_port()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")

    @contextmanager
    def worker(name):
        (tmp_path / name).mkdir()
        log = tmp_path / f"{name}.log"
        command = ["prefect", "worker", "start", "--pool", "vaeflow"]
        with (
            log.open("w") as out,
            process_group(command, cwd=tmp_path / name, stdout=out, stderr=out) as process,
        ):
            yield log, process

    server = ["prefect", "server", "start", "--port", port]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with mlflow_server(tmp_path / "mlflow") as tracking, process_group(server, **quiet) as process:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
        wait_for_http(f"{os.environ['PREFECT_API_URL']}/health", process)
        run(root, "prefect", "work-pool", "create", "vaeflow", "--type", "process")
        run(root, "prefect", "--no-prompt", "deploy", "--all")
        start = ("prefect", "deployment", "run", "retrain/retrain-nightly", "--param", "push=true")
        with worker("first") as (log, process):
            run(root, *start, "--param", 'overrides={"train.epochs": 500}')
            wait_for("epoch 2/500", log, process)
            os.killpg(process.pid, signal.SIGKILL)
        run(root, *start)
        with worker("second") as (log, process):
            wait_for("models:/digits-vae/1 is @champion", log, process, seconds=600)
            wait_for("Finished in state Completed", log, process)
        version = connect().get_model_version_by_alias("digits-vae", "champion")
        tags = connect().get_run(version.run_id).data.tags
    assert tags["git_commit"] == run(root, "git", "rev-parse", "HEAD").stdout.strip()
    assert len(list(shared.rglob("*"))) > pushed
    assert not (root / "outputs").exists()
    assert not any(tmp_path.joinpath("second").iterdir())


def wait_for(text, log, process, seconds=180):
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


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


def test_a_failed_run_has_the_sentence_and_the_stages_lines_on_prefects_page(workspace):
    change_parameters(workspace, evaluate={"importance_samples": 20})
    np.save(workspace / "data" / "wide.npy", np.zeros((4, 9, 9), np.uint8))
    run(workspace, "dvc", "add", "data")
    run(workspace, "vaeflow", "retrain", status=2)
    database = sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")
    (message,) = database.execute(
        "SELECT s.message FROM flow_run f JOIN flow_run_state s ON f.state_id = s.id "
        "ORDER BY f.start_time DESC LIMIT 1"
    ).fetchone()
    assert "stage prepare failed" in message
    assert "wide.npy" in message
    lines = "\n".join(row[0] for row in database.execute("SELECT message FROM log"))
    assert str(workspace / "data") in lines
