import json
import os
import shutil
import subprocess
import sys
import urllib.request

import mlflow
import numpy as np
import pytest
from helpers import (
    change_manifest,
    free_port,
    killed_before_each_change,
    mlflow_server,
    run,
    wait_for_http,
)

import vaeflow
from vaeflow.bundle.manifest import MANIFEST, bundle_sha256
from vaeflow.common.processes import process_group
from vaeflow.errors import BundleError
from vaeflow.registry import register as registering
from vaeflow.registry.register import find_registered, register
from vaeflow.tracking.runs import connect, find_run, start_run

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"
REGISTER = """
from vaeflow.registry.register import register
from vaeflow.common.workspace import Workspace
print(register(Workspace.find()).number)
"""


def versions(place):
    return connect(place).search_model_versions(f"name='{NAME}'")


def test_a_version_carries_its_lineage_and_figures(bundled):
    registered = register(bundled)
    assert registered.uri == f"models:/{NAME}/1"
    (version,) = versions(bundled)
    manifest = json.loads((bundled.bundle / MANIFEST).read_text())
    assert version.tags["bundle_sha256"] == bundle_sha256(bundled.bundle)
    assert manifest["lineage"].items() <= version.tags.items()
    assert float(version.tags["elbo"]) == manifest["metrics"]["elbo"]
    lock = (bundled.root / "dvc.lock").read_text()
    for stage in ("prepare", "train", "evaluate", "export"):
        assert version.tags[f"dvc_{stage}"] in lock


def test_registering_again_changes_nothing(bundled):
    assert find_registered(bundled) is None
    first = register(bundled)
    assert register(bundled) == find_registered(bundled) == first
    assert len(versions(bundled)) == 1
    change_manifest(bundled.bundle, created="2020-01-01T00:00:00Z")
    assert register(bundled).number == "2"


def test_processes_that_register_one_bundle_at_once_leave_one_version(bundled):
    connect(bundled)
    command = [sys.executable, "-c", REGISTER]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=120)[0].split()[-1:] for process in started]
    (version,) = versions(bundled)
    assert printed == [[str(version.version)]] * 4


def test_a_second_version_that_another_process_deleted_first_is_no_error(bundled, monkeypatch):
    """Two processes find the same second version at once; here, one with an old list."""
    register(bundled)
    client = connect(bundled)
    (first,) = versions(bundled)
    client.create_model_version(NAME, first.source, run_id=first.run_id, tags=first.tags)
    old = registering._versions(client, NAME, first.tags["bundle_sha256"])
    client.delete_model_version(NAME, "2")
    monkeypatch.setattr(registering, "_versions", lambda *_: old)
    assert register(bundled).number == "1"


def test_versions_left_by_a_process_that_was_killed_before_it_looked_again_are_removed(bundled):
    register(bundled)
    client = connect(bundled)
    (first,) = versions(bundled)
    client.create_model_version(NAME, first.source, run_id=first.run_id, tags=first.tags)
    assert len(versions(bundled)) == 2
    assert register(bundled).number == "1"
    assert len(versions(bundled)) == 1


def test_a_run_that_this_store_does_not_have_is_replaced(bundled):
    """A model from DVC's cache, in a workspace whose mlflow.db was deleted, is still registered."""
    manifest = json.loads((bundled.bundle / MANIFEST).read_text())
    assert find_run(bundled, manifest["run_id"]) is None
    version = connect(bundled).get_model_version(*register(bundled))
    run = connect(bundled).get_run(version.run_id)
    assert run.data.tags["trained_in_run"] == manifest["run_id"]
    assert run.info.status == "FINISHED"


def test_a_run_that_lost_its_server_is_completed(bundled):
    """As a training leaves it that could tell the server nothing after its first epoch."""
    with pytest.raises(SystemExit), start_run(bundled, None, {}, {}) as run:
        run.log_metrics({"elbo": -40.0, "validation_elbo": -41.0}, step=1)
        sys.exit()
    change_manifest(bundled.bundle, run_id=run.run_id)
    register(bundled)
    found = connect(bundled).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert run.steps_of("validation_elbo") == {1, 2, 3}
    metrics = json.loads((bundled.evaluation / "metrics.json").read_text())
    assert found.data.metrics["test_elbo"] == pytest.approx(metrics["elbo"])
    kept = {artifact.path for artifact in connect(bundled).list_artifacts(run.run_id)}
    assert {"history.csv", "figures", "bundle"} <= kept


def test_a_run_deleted_by_hand_is_replaced(bundled):
    first = register(bundled)
    client = connect(bundled)
    run_id = client.get_model_version(*first).run_id
    client.delete_run(run_id)
    assert find_run(bundled, run_id) is None
    change_manifest(bundled.bundle, created="2020-01-01T00:00:00Z")
    assert register(bundled).number == "2"


def test_a_tampered_bundle_is_not_registered(bundled):
    (bundled.bundle / "model.keras").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.keras"):
        register(bundled)


def test_it_is_a_standard_mlflow_model(bundled, digits, monkeypatch):
    uri = register(bundled).uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{bundled.root}/mlflow.db")
    model = mlflow.pyfunc.load_model(uri)
    images = digits[:5] / np.float32(255)
    ours = vaeflow.load(bundled.bundle)
    answer = model.predict(images)
    found = ours.detect(images)
    np.testing.assert_allclose(answer["score"], ours.score(images), rtol=1e-6)
    for name in ("anomaly", "p_value", "anomalous"):
        np.testing.assert_allclose(answer[name], getattr(found, name), rtol=1e-3)
    percentile = 100 * ours.score_rank(answer["score"])
    np.testing.assert_allclose(answer["percentile"], percentile, atol=1e-4)
    assert answer["percentile"].max() > 1
    encoded = model.predict(images, params={"output": "encode"})
    np.testing.assert_array_equal(encoded["mean"], ours.encode(images).mean)
    decoded = model.predict(images, params={"output": "reconstruct"})
    np.testing.assert_array_equal(decoded["reconstruction"], ours.reconstruct(images))

    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 8, 8, 1)
    assert model.input_example.shape == (1, 8, 8, 1)
    with pytest.raises(Exception, match="expected one of score, encode, reconstruct"):
        model.predict(images, params={"output": "other"})
    with pytest.raises(Exception, match="Failed to enforce schema"):
        model.predict(images[:, :4])
    stored = bundled.root / "mlartifacts"
    assert not [path for path in stored.rglob("*") if path.suffix in (".pkl", ".pickle")]
    (requirements,) = stored.rglob("requirements.txt")
    assert all("==" in line for line in requirements.read_text().splitlines())


def test_it_answers_over_http_through_mlflow(bundled, digits, tmp_path):
    uri = register(bundled).uri
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{bundled.root}/mlflow.db"}
    images = digits[:2] / np.float32(255)
    with (
        (tmp_path / "log").open("w") as log,
        process_group(command, env=environment, stdout=log, stderr=log) as process,
    ):
        wait_for_http(f"http://127.0.0.1:{port}/ping", process)
        body = json.dumps({"inputs": images.tolist(), "params": {"output": "score"}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    expected = vaeflow.load(bundled.bundle).score(images)
    np.testing.assert_allclose(answer["predictions"]["score"], expected, rtol=1e-5)


def test_a_real_tracking_server_works_as_the_file_does(bundled, tmp_path, monkeypatch, digits):
    """Register and pull over HTTP, the server keeping the artifacts."""
    with mlflow_server(tmp_path / "server") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        uri = register(bundled).uri
        assert vaeflow.load(uri).score(digits[:3]).shape == (3,)
    assert not (bundled.root / "mlflow.db").exists()
    assert list((tmp_path / "server" / "store").rglob("encoder.onnx"))


@pytest.mark.kills
def test_a_process_killed_while_it_registers_leaves_nothing_that_matters(bundled):
    """Killed before each change to the store in turn, and run again: one version."""
    kills = killed_before_each_change(REGISTER)
    assert kills > 3
    assert register(bundled).number == "1"
    assert len(versions(bundled)) == 1
    shutil.rmtree(bundled.bundle)
    run(bundled.root, "vaeflow", "pull", f"models:/{NAME}/1", str(bundled.bundle))
    assert vaeflow.load(bundled.bundle).latent_dim == 8
