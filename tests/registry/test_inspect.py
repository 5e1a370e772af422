import shutil
from urllib.parse import urlparse

import pytest
from helpers import run, worsen

from vaeflow.common.workspace import Workspace
from vaeflow.registry.champion import apply_verdict
from vaeflow.registry.inspect import table, trace
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first


def test_the_table_shows_each_version(bundled):
    assert table(None) == ["no model is registered yet. Make one: vaeflow retrain"]
    apply_verdict(bundled, register(bundled))
    worsen(bundled.bundle, 0.5)
    apply_verdict(bundled, register(bundled))
    name, header, newest, first = table("digits-vae")
    assert name == "digits-vae"
    assert header.split() == ["version", "aliases", "bound", "data", "commit", "age", "verdict"]
    assert newest.startswith("2        @challenger")
    assert newest.endswith("refused: quality")
    assert first.startswith("1        @champion")
    assert first.endswith("passed")
    assert "fa096e85" in first
    printed = run(bundled.root, "vaeflow", "models").stdout.splitlines()
    assert printed[0] == name
    missing = run(bundled.root, "vaeflow", "models", "other", status=2).stderr
    assert missing.startswith("vaeflow: other: no such model")


def test_the_table_is_not_cut_at_a_page_of_the_registrys(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = connect()
    names = [f"model-{number:03}" for number in range(103)]  # MLflow's page has 100
    for name in names:
        client.create_registered_model(name)
    assert [line for line in table(None) if line.startswith("model-")] == names


def states(source):
    return {link.what: link.state for link in trace(source)}


def test_a_version_leads_to_all_it_was_made_of_until_that_is_gone(finished, tmp_path, monkeypatch):
    root = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(root)
    place = Workspace(root)
    version = register(place)
    assert states(version.uri) == {
        "version": "registered",
        "bundle": "there",
        "run": "there, FINISHED",
        "parameters": "as in params.yaml now",
        "split": "as in params.yaml now",
        "data": "there, in DVC's cache (2 files)",
        "commit": "there",
    }
    assert states(str(place.bundle))["bundle"] == "verified"

    client = connect(place)
    client.delete_run(client.get_model_version(*version).run_id)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("learning_rate: 0.003", "learning_rate: 0.002"))
    md5 = next(link.which for link in trace(version.uri) if link.what == "data")
    listed = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    listed.unlink()
    shutil.rmtree(root / ".git")
    run(root, "git", "init", "--quiet")
    shutil.rmtree(urlparse(client.get_model_version(*version).source).path)
    gone = states(version.uri)
    assert gone["run"] == "GONE from this tracking store"
    assert gone["parameters"] == "other than in params.yaml now"
    assert gone["split"] == "as in params.yaml now"  # which the learning rate has no part in
    assert gone["data"].startswith("not in DVC's cache here")
    assert gone["commit"] == "GONE from this repository"
    assert gone["bundle"].startswith("GONE from ")


def test_it_works_outside_of_a_workspace(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    found = states(str(bundle))
    assert found["run"] == "GONE from this tracking store"
    assert found["data"] == "no workspace here to look in"
