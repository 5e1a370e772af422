"""Several processes that train together, as on several hosts: real ones, on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import PLAIN, change_parameters, free_port, make_workspace, run

from vaeflow.common.workspace import Workspace
from vaeflow.data.batches import Batches
from vaeflow.errors import ConfigError, TrainingError
from vaeflow.model.hosts import Hosts, Watch, joined
from vaeflow.tracking.runs import connect

TRAIN = """
import sys
from pathlib import Path
import vaeflow
import keras, numpy as np
from test_resume import TerminateAfter, settings
from vaeflow.model.hosts import joined
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.loop import fit

prepared, out, hosts, process, precision, stop = sys.argv[1:]
if precision == "float64":  # also what is float32 whatever the precision: outputs, the latents
    import keras.src.dtype_policies as policies

    keras.config.set_floatx("float64")
    known = policies.get
    policies.get = lambda name: known("float64" if name == "float32" else name)
unusual = {"binarize": "dynamic", "weight_average": 0.9, "patience": 5}
parameters = settings(batch_size=20, epochs=2, checkpoint_minutes=1e-4, **unusual)
train = parameters.train.model_copy(update={"precision": precision})
parameters = parameters.model_copy(update={"train": train})
with joined(hosts or None, int(process), 60) as together:
    # One process is told to stop, in the middle of the second epoch, and both do.
    told = [TerminateAfter(int(stop))] if int(stop) and not together.leads else []
    kept = Checkpoints(Path(out)) if together.leads else None
    rows = []
    vae = fit(Path(prepared), parameters, checkpoints=kept, callbacks=told, hosts=together,
              resumed=rows.extend, report=rows.append)
    together.leave()
    if together.leads:
        metrics = [list(row.values()) for row in rows]
        np.savez(f"{out}.npz", *vae.trainable_weights, metrics=metrics)
"""


def start(prepared, out, hosts, process, precision="float32", stop=0):
    arguments = (prepared, out, hosts, process, precision, stop)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_ENABLE_X64": "true" if precision == "float64" else "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(prepared, out, processes, status=0, **options):
    """The weights that a training by so many processes gives, and its metrics."""
    names = [f"127.0.0.1:{free_port()}", *["127.0.0.1"] * (processes - 1)]
    hosts = ",".join(names) if processes > 1 else ""
    started = [start(prepared, out, hosts, number, **options) for number in range(processes)]
    for process in started:
        _, problems = process.communicate(timeout=600)
        assert process.returncode == status, problems
    if status == 0:
        with np.load(f"{out}.npz") as arrays:
            return dict(arrays)
    return None


@pytest.fixture(autouse=True)
def with_jax():
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'vaeflow[jax]'")


@pytest.mark.backends
@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("float64", 1e-8)])
def test_two_processes_make_the_steps_of_one(prepared, tmp_path, precision, within):
    """The same images in the same batches, the same noise, the mean gradient of both."""
    one = train(prepared, tmp_path / "one", 1, precision=precision)
    two = train(prepared, tmp_path / "two", 2, precision=precision)
    np.testing.assert_allclose(two.pop("metrics"), one.pop("metrics"), rtol=1e-5)  # in float32
    assert {str(array.dtype) for array in one.values()} == {precision}
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, rtol=within, atol=within)


@pytest.mark.backends
def test_told_to_stop_all_stop_and_go_on_to_the_same_bytes(prepared, tmp_path):
    expected = train(prepared, tmp_path / "whole", 2)
    train(prepared, tmp_path / "parts", 2, stop=13, status=128 + signal.SIGTERM)
    got = train(prepared, tmp_path / "parts", 2)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)


def test_each_process_reads_its_part_of_every_batch(digits):
    whole = Batches(digits, 256, shuffle_seed=1, multiple_of=4)
    parts = [Batches(digits, 256, shuffle_seed=1, multiple_of=4, part=(n, 4)) for n in range(4)]
    for index, batch in enumerate(whole.at(3)):
        pieces = [part.at(3)[index] for part in parts]
        assert len({len(piece) for piece in pieces}) == 1
        np.testing.assert_array_equal(np.concatenate(pieces), batch)


# === The command ===


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    small = {**PLAIN, "epochs": 400, "filters": [4], "hidden_units": 8, "checkpoint_minutes": 0.01}
    folder = make_workspace(tmp_path_factory.mktemp("hosts") / "workspace", **small)
    run(folder, "dvc", "repro", "prepare")
    return folder


def launch(folder, *options, **environment):
    return subprocess.Popen(
        ["vaeflow", "launch", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", **environment},
    )


def until(process, beginning):
    """Read what a command prints up to a line that begins so."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(beginning):
            return "".join(said)
    raise AssertionError("".join(said))


def process_of(launched, number):
    """The process id of one of those that were launched."""
    import psutil

    for child in psutil.Process(launched.pid).children():
        if child.environ()["VAEFLOW_PROCESS"] == str(number):
            return child.pid
    raise AssertionError(number)


@pytest.mark.kills
def test_when_one_is_gone_or_stuck_all_end_and_the_same_command_goes_on(workspace):
    reached = 0
    for killed, number, sign in [
        (1, signal.SIGKILL, "process 1 (127.0.0.1) is gone"),
        (0, signal.SIGKILL, "process 0 (127.0.0.1) is gone"),
        (1, signal.SIGSTOP, "process 1 (127.0.0.1) gave no sign of life for 30 s"),
    ]:
        with launch(workspace, VAEFLOW_HOSTS_TIMEOUT="30") as process:
            said = until(process, f"epoch {reached + 3}/")
            assert ("from a checkpoint" in said) == (reached > 0)
            victim = process_of(process, killed)
            os.kill(victim, number)
            if number == signal.SIGSTOP:
                said = until(process, "vaeflow: ")
                os.kill(victim, signal.SIGCONT)
            said, _ = process.communicate(timeout=120) if number != signal.SIGSTOP else (said, "")
            process.wait(120)
            assert sign in said
            assert process.returncode not in (0, None)
        reached += 3
        assert list(workspace.glob("outputs/checkpoints/*/*.checkpoint"))
    with launch(workspace) as process:
        until(process, f"epoch {reached + 3}/")
        process.terminate()
        said, _ = process.communicate(timeout=120)
    assert "told to stop (SIGTERM) in epoch" in said
    client = connect(Workspace(workspace))
    (only,) = client.search_runs(["1"])  # of the leader, gone on with each time
    assert only.info.status in ("KILLED", "FAILED")


@pytest.mark.backends
def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    small = {**PLAIN, "epochs": 2, "filters": [4], "hidden_units": 8}
    folder = make_workspace(tmp_path / "workspace", **small)
    run(folder, "dvc", "repro", "prepare")
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    assert "2 epochs, validation ELBO" in run(folder, "vaeflow", "launch", env=environment).stdout
    metrics = folder / "outputs" / "evaluation" / "metrics.json"
    found = []
    for command in (["launch", "evaluate", "--processes", "3"], ["evaluate"]):
        assert "bound -" in run(folder, "vaeflow", *command, env=environment).stdout
        found.append(json.loads(metrics.read_text()))
    assert found[0] == found[1]
    (training,) = connect(Workspace(folder)).search_runs(["1"])
    assert training.info.status == "FINISHED"


@pytest.mark.backends
def test_one_with_other_images_is_named(workspace, tmp_path):
    other = make_workspace(tmp_path / "other")
    change_parameters(other, prepare={"seed": 7})
    run(other, "dvc", "repro", "prepare")
    hosts = f"127.0.0.1:{free_port()},127.0.0.1"
    both = []
    for number, folder in enumerate((workspace, other)):
        command = ["vaeflow", "train", "--hosts", hosts, "--process", str(number)]
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        both.append(subprocess.Popen(command, cwd=folder, env=environment, **options))
    for process in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 2
        assert "process 1 (127.0.0.1) has other images or another vaeflow than process 0" in said


# === Who joins ===


def join(names, process, timeout, outcomes):
    watch = Watch(Hosts(names, process), timeout)
    try:
        watch.join()
        outcomes[process] = "joined"
    except TrainingError as error:
        outcomes[process] = str(error)


def test_a_host_that_never_joins_is_named():
    outcomes = {}
    names = [f"127.0.0.1:{free_port()}", "b.example", "c.example"]
    others = threading.Thread(target=join, args=(names, 1, 30, outcomes))
    others.start()
    join(names, 0, 2, outcomes)
    others.join()
    for process in (0, 1):
        assert "process 2 (c.example) did not join within 2 s" in outcomes[process]


def test_a_leader_that_is_not_there():
    outcomes = {}
    port = free_port()
    join([f"127.0.0.1:{port}", "b"], 1, 1, outcomes)
    assert f"process 0 (127.0.0.1) could not be reached at 127.0.0.1:{port}" in outcomes[1]


def test_strangers_and_wrong_callers_keep_nobody_from_joining():
    names = [f"127.0.0.1:{free_port()}", "b", "c"]
    outcomes = {}
    leader = threading.Thread(target=join, args=(names, 0, 30, outcomes))
    leader.start()
    address = ("127.0.0.1", int(names[0].rpartition(":")[2]))
    time.sleep(0.5)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n\n", b"\xff\xfe\n", b"[1]\n", b"x" * 100_000, b""):
        with socket.create_connection(address) as stranger:
            stranger.sendall(garbage)
    others = [threading.Thread(target=join, args=(names, n, 30, outcomes)) for n in (1, 2)]
    others[0].start()
    wrong = {}
    join([*names, "d"], 3, 30, wrong)
    assert "was given other --hosts than process 0" in wrong[3]
    join([names[0], "b", "c"], 1, 30, wrong)
    assert "is not the only process 1 (b)" in wrong[1]
    others[1].start()
    for thread in (leader, *others):
        thread.join()
    assert outcomes == {0: "joined", 1: "joined", 2: "joined"}


def test_a_port_that_is_taken():
    outcomes = {}
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        join([f"127.0.0.1:{port}", "b"], 0, 5, outcomes)
    assert f"port {port} of 127.0.0.1:{port} cannot be used" in outcomes[0]


@pytest.mark.parametrize(
    ("hosts", "process", "said"),
    [
        ("a,b", 0, "HOST:PORT,HOST"),
        ("a:70000,b", 0, "HOST:PORT,HOST"),
        ("a:4000,,b", 0, "HOST:PORT,HOST"),
        ("a:4000,b", 2, "--process 2: expected .* from 0 to 1"),
        ("a:4000,b", None, "--process None"),
    ],
)
def test_hosts_that_cannot_be_meant(monkeypatch, hosts, process, said):
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    with pytest.raises(ConfigError, match=said), joined(hosts, process, 1):
        pass


def test_tensorflow_trains_in_one_process(monkeypatch):
    monkeypatch.setattr("keras.backend.backend", lambda: "tensorflow")
    with pytest.raises(ConfigError, match="KERAS_BACKEND=jax"), joined("a:4000,b", 0, 1):
        pass
