"""The kit for a GPU, on a CPU: whole, with nothing but what its machine will have; cut; failing."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
# Beside Python itself. PyTorch and optax are measured beside, where they are; here they are not.
PACKAGES = ("jax", "numpy", "h5py", "keras", "pydantic", "ruamel.yaml")
ENTRIES = {
    "limits": {"matrix products", "copying", "threefry2x32", "rbg"},
    "correctness": {"conv step", "residual step", "conv curve", "residual curve", "resuming"},
    "rates": {"vaeflow"},
    "nats": {"vaeflow"},
    "likelihood": {"vaeflow"},
    "bound": {"bound"},
}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment that has only those packages, as the lock has them."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    installed = subprocess.run(
        [
            *(uv, "pip", "install", "--quiet", "--python", folder, *PACKAGES),
            *("--constraint", REPOSITORY / "requirements.txt"),
        ],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
    )
    if installed.returncode:
        pytest.skip(f"no packages to be had here: {installed.stderr.strip()[-200:]}")
    return folder / "bin" / "python"


@pytest.mark.backends
def test_it_runs_whole_where_only_its_packages_are(python, tmp_path):
    """Each part finds all that it is for; a second run has no rate to measure again."""
    for parts in ([], ["--parts", "rates"]):
        done = subprocess.run(
            [BENCHMARKS / "gpu.sh", "--tiny", "--minutes", "60", "--work", tmp_path, *parts],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "results.json").read_text())
    assert not [entry for entry in entries if "failed" in (entry["name"], *entry)], entries
    found = {}
    for entry in entries:
        found.setdefault(entry["part"], {})[entry["name"]] = entry
        assert entry["device"] == "CPU"
        assert entry["jax"]
    assert {part: set(names) for part, names in found.items()} == ENTRIES
    for name in ("conv step", "residual step"):
        assert found["correctness"][name]["within"]
        assert found["correctness"][name.replace("step", "curve")]["largest_relative_error"] < 1e-3
    assert found["correctness"]["resuming"]["bit_exact"]
    assert found["likelihood"]["vaeflow"]["epochs"] > 0
    assert {entry["network"] for entry in entries if entry["part"] == "rates"} == {
        "tiny-conv",
        "tiny-residual",
    }
    assert "images per second" in done.stdout
    assert "vaeflow tiny" not in done.stdout  # those rates were there


@pytest.mark.backends
def test_a_training_that_is_cut_goes_on_in_the_next_run(python, tmp_path):
    """Even where its half minute was over by then, two epochs of the least of three are left."""
    command = [python, BENCHMARKS / "gpu.py", "--only", "likelihood", "--tiny", "--work", tmp_path]
    paths = os.pathsep.join([str(BENCHMARKS), str(REPOSITORY / "src")])
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": paths}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        line = ""
        while "epoch 1:" not in line:
            line = process.stdout.readline()
            assert line, "it has ended before"
        process.terminate()
        process.communicate(timeout=600)
    assert process.returncode == 143
    assert not (tmp_path / "likelihood-tiny" / "training.json").exists()
    spent = json.loads((tmp_path / "likelihood-tiny" / "seconds.json").read_text())
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "epoch 1:" not in done.stdout
    entry = json.loads(done.stdout.strip().splitlines()[-1])
    assert entry["train_seconds"] > spent > 0
    assert entry["epochs"] >= 3


@pytest.fixture
def kit(monkeypatch):
    """The module that runs the parts."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(kit, tmp_path):
    """Results of a card, still empty."""
    arguments = argparse.Namespace(
        work=tmp_path, out=tmp_path / "gpu.json", tiny=False, data=None, again=False, minutes=8
    )
    found = kit.Found(arguments)
    found.begin("GPU: a card", jax="1.0")
    return found


def says(monkeypatch, kit, program):
    """Have every part be this program."""
    monkeypatch.setattr(kit, "command_of", lambda part, found: [sys.executable, "-c", program])


def test_a_part_that_is_cut_loses_only_the_rest(kit, found, monkeypatch, capsys):
    """Told to end when its time is over, it is killed if it does not; so is what it has begun."""
    monkeypatch.setattr(kit, "GRACE", 3)
    says(
        monkeypatch,
        kit,
        "import signal, subprocess, sys, time\n"
        'signal.signal(signal.SIGTERM, lambda *_: print(\'{"name": "late"}\', flush=True))\n'
        'print(\'{"name": "early"}\', flush=True)\n'
        "subprocess.Popen(['sleep', '1000'])\n"
        "while True: time.sleep(0.1)",
    )
    start = time.monotonic()
    kit.run_part("rates", found, 15)
    assert time.monotonic() - start < 60
    entries = json.loads(found.path.read_text())
    assert [entry["name"] for entry in entries] == ["early", "late"]
    assert {entry["device"] for entry in entries} == {"GPU: a card"}
    assert "cut off" in capsys.readouterr().out


def test_a_part_that_fails_is_noted_until_it_is_made(kit, found, monkeypatch):
    says(monkeypatch, kit, "raise SystemExit('there is no such thing')")
    kit.run_part("nats", found, 60)
    [entry] = json.loads(found.path.read_text())
    assert (entry["part"], entry["name"]) == ("nats", "failed")
    assert entry["why"] == "there is no such thing"
    says(monkeypatch, kit, 'print(\'{"name": "vaeflow", "seconds": 1}\')')
    kit.run_part("nats", found, 60)
    [entry] = json.loads(found.path.read_text())
    assert entry["name"] == "vaeflow"


def test_results_of_other_cards_stay_and_those_of_this_one_are_replaced(kit, found):
    row = {"name": "vaeflow", "network": "conv", "batch_size": 128, "precision": "float32"}
    for card, rate in (("GPU: a card", 1), ("GPU: another", 2), ("GPU: a card", 3)):
        found.device = card
        found.add("rates", {**row, "images_per_second": rate})
    rates = {entry["device"]: entry["images_per_second"] for entry in found.entries}
    assert rates == {"GPU: another": 2, "GPU: a card": 3}
    assert "conv" in kit.table(found.entries, "GPU: another")


def test_what_needs_mnist_says_so_before_anything_is_started():
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "likelihood and nats need --data" in done.stderr


def test_what_failed_is_measured_again_in_the_next_run(kit, tmp_path, monkeypatch):
    parts = sys.modules["gpu_parts"]
    monkeypatch.setattr(parts, "device_name", lambda: "GPU: a card")
    path = tmp_path / "gpu.json"
    row = {"part": "rates", "name": "vaeflow", "network": "conv", "device": "GPU: a card"}
    for entry, expected in (({**row, "failed": "it has ended"}, None), (row, row)):
        path.write_text(json.dumps([entry]))
        arguments = argparse.Namespace(out=path)
        assert parts.known(arguments, part="rates", name="vaeflow", network="conv") == expected
