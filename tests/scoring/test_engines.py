"""The same batch on a Ray cluster: the same bytes, whoever is killed."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import cluster, node
from helpers import run

import vaeflow
from vaeflow.errors import BundleError, DataError
from vaeflow.scoring.score import Batch, score

pytestmark = pytest.mark.slow  # a real bundle has to be made first

MANY = 40_000  # more than one shard: of 64 blocks of 195


@pytest.fixture
def model(finished):
    return str(finished / "outputs" / "bundle")


@pytest.fixture
def many(tmp_path):
    """An array of noise, and what a batch of it should give."""
    path = tmp_path / "many.npy"
    noise = np.random.default_rng(0).integers(0, 256, (MANY, 8, 8, 1), np.uint8)
    np.save(path, noise)
    return path


def score_command(source, model, out, address):
    return (
        "vaeflow", "score", str(source), "--model", model, "--out", str(out), "--latents",
        "--engine", "ray", "--address", address,
    )  # fmt: skip


def parts(out):
    return list(out.parent.glob(f".{out.name}.parts/*.npy"))


def test_on_a_cluster_of_its_own_the_bytes_are_the_same(model, tmp_path):
    for name in ("local", "ray"):
        batch = Batch(("digits",), model, tmp_path / f"{name}.parquet", latents=True, engine=name)
        assert score(batch).count == 1797
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


@pytest.mark.parametrize(
    ("engine", "address", "said"),
    [
        ("spark", None, "expected local or ray"),
        ("local", "auto", "say --engine ray, too"),
        ("ray", "127.0.0.1:1", "no Ray cluster can be joined there .*refused"),
        ("ray", "ray://127.0.0.1:1", "no Ray cluster can be joined there .*refused"),
    ],
)
def test_engines_that_are_not_there(model, tmp_path, engine, address, said):
    out = tmp_path / "scores.parquet"
    with pytest.raises(DataError, match=said):
        score(Batch(("digits",), model, out, engine=engine, address=address))
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_an_error_of_the_batch(model, tmp_path, monkeypatch):
    monkeypatch.setattr("vaeflow.scoring.engines.programs", lambda: {"code": "other"})
    with pytest.raises(BundleError, match=r"worker on .* has another version of vaeflow"):
        score(Batch(("digits",), model, tmp_path / "scores.parquet", engine="ray"))


@pytest.mark.servers
def test_a_worker_and_a_node_are_killed_and_the_bytes_are_the_same(model, many, tmp_path):
    expected = tmp_path / "expected.parquet"
    score(Batch((str(many),), model, expected, latents=True))
    out = tmp_path / "scores.parquet"
    with (
        cluster() as address,
        node(f"--address={address}") as second,
        node(f"--address={address}"),
    ):
        command = score_command(many, model, out, address)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            while not parts(out):
                assert driver.poll() is None, driver.stdout.read()
                time.sleep(0.05)
            workers = [process for process in psutil.process_iter(["cmdline"]) if is_task(process)]
            assert workers
            workers[0].kill()
            os.killpg(second.pid, signal.SIGKILL)
            assert driver.wait(timeout=300) == 0
    assert out.read_bytes() == expected.read_bytes()


def is_task(process):
    return " ".join(process.info["cmdline"] or []).startswith("ray::_run")


@pytest.mark.servers
def test_a_killed_driver_goes_on_with_what_is_kept(model, many, tmp_path):
    expected = tmp_path / "expected.parquet"
    score(Batch((str(many),), model, expected, latents=True))
    out = tmp_path / "scores.parquet"
    with cluster() as address:
        command = score_command(many, model, out, address)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
            while not parts(out):
                assert driver.poll() is None
                time.sleep(0.05)
            driver.kill()
        printed = run(tmp_path, *command).stdout
    assert "scored before by a run that did not end" in printed
    assert out.read_bytes() == expected.read_bytes()


@pytest.mark.servers
def test_a_worker_with_another_vaeflow_is_named(model, tmp_path):
    package = Path(vaeflow.__file__).parent
    other = shutil.copytree(package, tmp_path / "other" / "vaeflow")
    with (other / "scoring" / "score.py").open("a") as file:
        file.write("# another version\n")
    out = tmp_path / "scores.parquet"
    with cluster(PYTHONPATH=str(other.parent)) as address:
        command = score_command("digits", model, out, address)
        said = run(tmp_path, *command, status=2).stderr
    assert "has another version of vaeflow" in said
    assert "Install the same on all." in said
