import os
import shutil
import signal
import subprocess
import sys

import pytest

from vaeflow.common.workspace import Workspace
from vaeflow.errors import RegistryError
from vaeflow.tracking.runs import champion_parameters, connect, find_run, start_run

RECORD = """
import sys
from pathlib import Path
from vaeflow.tracking.runs import start_run
from vaeflow.common.workspace import Workspace

with start_run(Workspace(Path(sys.argv[1])), None, {"a": 1}, {"b": "2"}) as run:
    run.log_metrics({"elbo": -1.5}, step=3)
print(run.run_id)
"""


@pytest.fixture
def place(tmp_path):
    return Workspace(tmp_path)


def test_a_run_keeps_what_it_was_given_at_the_workspace_root(place, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with start_run(place, "mine", {"train.epochs": 3}, {"data_md5": "abc"}) as run:
        run.log_metrics({"elbo": -2.0}, step=1)
        run.log_metrics({"elbo": -1.0}, step=2)
        note = tmp_path / "note.txt"
        note.write_text("hello")
        run.log_file(note, "figures")
    assert (tmp_path / "mlflow.db").is_file()
    assert not list(elsewhere.iterdir())
    assert [path.name for path in (tmp_path / "mlartifacts").rglob("*.txt")] == ["note.txt"]

    client = connect(place)
    kept = client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"train.epochs": "3"}
    assert kept.data.tags["data_md5"] == "abc"
    assert [m.value for m in client.get_metric_history(run.run_id, "elbo")] == [-2.0, -1.0]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")],
)
def test_a_run_that_ends_badly_is_closed_as_such(place, error, status):
    with pytest.raises(error), start_run(place, None, {}, {}) as run:
        raise error
    assert connect(place).get_run(run.run_id).info.status == status


@pytest.mark.slow
def test_processes_that_first_use_a_database_together_do_not_break_it(place):
    command = [sys.executable, "-c", RECORD, str(place.root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    runs = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(runs) == 4
    assert all(connect(place).get_run(run).info.status == "FINISHED" for run in runs)


@pytest.mark.slow
def test_a_kill_while_the_database_is_made_leaves_nothing_broken(place):
    """The tables are made under another name; whenever the kill comes, the next process works."""
    command = [sys.executable, "-c", RECORD, str(place.root)]
    process = subprocess.Popen(command)
    while not (place.root / "mlflow.new").exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (place.root / "mlflow.db").exists()
    with start_run(place, None, {}, {}) as run:
        pass
    assert connect(place).get_run(run.run_id).info.status == "FINISHED"


def test_a_run_of_another_store_is_none(place):
    assert find_run(place, "0" * 32) is None


def test_the_tracking_uri_of_the_environment_wins(place, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.chdir(tmp_path)
    with start_run(place, None, {}, {}):
        pass
    assert (tmp_path / "other.db").is_file()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_is_not_there_is_one_clear_error(place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"):
        find_run(place, "0" * 32)
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"), start_run(place, None, {}, {}):
        pass


def test_a_copy_of_a_workspace_keeps_its_runs_files_for_itself(tmp_path):
    place = Workspace(tmp_path / "first")
    place.root.mkdir()
    with start_run(place, None, {}, {}) as run:
        run.log_file(write(place.root / "first.txt"))
    copy = Workspace(shutil.copytree(place.root, tmp_path / "copy"))
    copied = find_run(copy, run.run_id)
    copied.log_file(write(copy.root / "second.txt"))
    run.log_folder(write(place.root / "new" / "third.txt").parent, "folder")
    assert files(place) == ["first.txt", "folder/third.txt"]
    assert files(copy) == ["first.txt", "second.txt"]


def write(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(path.name)
    return path


def files(place):
    (folder,) = (place.root / "mlartifacts").glob("*/artifacts")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_temporary_experiment_of_dvc_keeps_its_runs_in_the_repository(tmp_path):
    temporary = Workspace(tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp123")
    assert temporary.repository == tmp_path
    assert Workspace(tmp_path).repository == tmp_path


def test_the_run_of_a_killed_process_is_closed_by_the_next_one(place):
    open_run = RECORD.replace("print(run.run_id)", "").replace(
        "    run.log_metrics",
        "    print(run.run_id, flush=True); os.kill(os.getpid(), 9)\n    run.log_metrics",
    )
    command = [sys.executable, "-c", f"import os\n{open_run}", str(place.root)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    client = connect(place)
    assert client.get_run(killed.stdout.strip()).info.status == "RUNNING"
    with start_run(place, None, {}, {}) as alive, start_run(place, None, {}, {}):
        assert client.get_run(killed.stdout.strip()).info.status == "KILLED"
        assert client.get_run(alive.run_id).info.status == "RUNNING"


def test_a_champions_run_says_by_which_parameters_it_was_trained(place):
    assert champion_parameters(place, "digits-vae") is None  # no such model
    with start_run(place, "first", {"train.latent_dim": 5}, {}) as run:
        pass
    client = run.client
    client.create_registered_model("digits-vae")
    assert champion_parameters(place, "digits-vae") is None  # no champion
    version = client.create_model_version("digits-vae", "nowhere", run_id=run.run_id)
    client.set_registered_model_alias("digits-vae", "champion", version.version)
    assert champion_parameters(place, "digits-vae") == {"train.latent_dim": "5"}
    client.delete_run(run.run_id)
    assert champion_parameters(place, "digits-vae") == {"train.latent_dim": "5"}
    other = client.create_model_version("digits-vae", "nowhere", run_id="gone")
    client.set_registered_model_alias("digits-vae", "champion", other.version)
    assert champion_parameters(place, "digits-vae") is None  # its run is elsewhere
