"""A workspace is its own, wherever it is put, and under whatever name."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from helpers import run

from vaeflow.common.workspace import Workspace
from vaeflow.registry.champion import promote
from vaeflow.registry.pull import pull_to
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect, start_run


def addresses(root: Path) -> set[str]:
    """All that the database says of files."""
    with sqlite3.connect(root / "mlflow.db") as database:
        dump = "\n".join(database.iterdump())
    return {word for word in dump.split("'") if word.startswith(("file:", "/"))}


def new_run(place: Workspace) -> None:
    with start_run(place, "next", {}, {}) as next_run:
        next_run.log_file(place.root / "dvc.yaml")


def test_a_moved_workspace_uses_its_own_files(bundled, tmp_path, monkeypatch):
    version = register(bundled)
    moved = tmp_path / "elsewhere"
    shutil.move(bundled.root, moved)
    monkeypatch.chdir(moved)
    place = Workspace(moved)
    promote(place, version.uri, force=True, reason="moved")
    pull_to("models:/digits-vae@champion", tmp_path / "pulled", offline_ok=False)
    new_run(place)
    assert not bundled.root.exists()
    assert all(address.startswith(moved.as_uri()) for address in addresses(moved))


def test_a_copy_leaves_the_original_alone(bundled, tmp_path, monkeypatch):
    register(bundled)
    copy = Path(shutil.copytree(bundled.root, tmp_path / "copy"))
    files = sorted(bundled.root.rglob("*"))
    database = (bundled.root / "mlflow.db").read_bytes()
    monkeypatch.chdir(copy)
    new_run(Workspace(copy))
    pull_to("models:/digits-vae/1", tmp_path / "pulled", offline_ok=False)
    assert sorted(bundled.root.rglob("*")) == files
    assert (bundled.root / "mlflow.db").read_bytes() == database
    assert len(list((copy / "mlartifacts").rglob("dvc.yaml"))) == 1


def test_artifacts_that_were_put_elsewhere_stay_there(bundled, tmp_path, monkeypatch):
    store = tmp_path / "disk" / "mlartifacts"
    store.mkdir(parents=True)
    connect(bundled).create_experiment("apart", artifact_location=store.as_uri())
    connect(bundled)
    assert store.as_uri() in addresses(bundled.root)


@pytest.mark.parametrize("name", ["what?", "no#1", "100% mine", "two words", "データ é", "a&b=c;d"])
def test_any_name_will_do(bundled, tmp_path, monkeypatch, name):
    root = tmp_path / name
    shutil.move(bundled.root, root)
    monkeypatch.chdir(root)
    before = set(tmp_path.iterdir())
    version = register(Workspace(root))
    new_run(Workspace(root))
    pull_to(version.uri, root / "pulled", offline_ok=False)
    assert "digits-vae" in run(root, "vaeflow", "models").stdout
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}
    assert len(list((root / "mlartifacts").rglob("dvc.yaml"))) == 1


def test_a_name_that_mlflow_would_read_otherwise_is_refused(bundled, tmp_path):
    root = tmp_path / "50%20"
    shutil.move(bundled.root, root)
    done = run(root, "vaeflow", "models", status=2)
    assert f"{root}: MLflow would read the %" in done.stderr


def test_a_database_of_another_mlflow_is_named_with_the_remedy(bundled):
    assert "no model is registered" in run(bundled.root, "vaeflow", "models").stdout
    database = bundled.root / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    done = run(bundled.root, "vaeflow", "models", status=2)
    assert f"{database} cannot be used with MLflow" in done.stderr
    assert "mlflow db upgrade sqlite:///mlflow.db" in done.stderr
    database.write_text("no database at all, but of some length " * 100)
    done = run(bundled.root, "vaeflow", "models", status=2)
    assert f"{database} cannot be used with MLflow" in done.stderr
