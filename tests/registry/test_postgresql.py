"""The registry on an MLflow server that keeps everything in PostgreSQL."""

import shutil
from pathlib import Path

import pytest
import same_process
from helpers import killed_before_each_change, mlflow_server, take_turns_while_killed, worsen
from postgres import postgresql

import vaeflow
from vaeflow.registry.champion import apply_verdict, rollback
from vaeflow.registry.inspect import table
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.servers

REGISTER = f"""
import sys
sys.path.append({str(Path(same_process.__file__).parent)!r})
import same_process
from vaeflow.registry.champion import apply_verdict
from vaeflow.registry.register import register
from vaeflow.common.workspace import Workspace
same_process.install()
apply_verdict(Workspace.find(), register(Workspace.find()))
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An MLflow server on a PostgreSQL database; it is this process's registry."""
    with postgresql() as database, mlflow_server(tmp_path / "server", database) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address


def test_the_registry_works_on_postgresql(server, bundled, tmp_path, digits):
    best = shutil.copytree(bundled.bundle, tmp_path / "best")
    worsen(bundled.bundle, 0.5)
    assert apply_verdict(bundled, register(bundled)).alias == "champion"
    shutil.rmtree(bundled.bundle)
    shutil.copytree(best, bundled.bundle)
    assert killed_before_each_change(REGISTER) > 5
    client = connect(bundled)
    assert len(client.search_model_versions("name='digits-vae'")) == 2
    assert apply_verdict(bundled, register(bundled)).alias == "champion"
    assert "better than version 1" in client.get_model_version("digits-vae", "2").tags["judged"]
    assert vaeflow.load("models:/digits-vae@champion").score(digits[:2]).shape == (2,)
    assert rollback("digits-vae", "").version.number == "1"
    assert len(table("digits-vae")) == 4


def test_of_eight_processes_that_are_killed_one_is_alone_on_postgresql(server, tmp_path):
    saw, kills = take_turns_while_killed(tmp_path / "turns", turns=40)
    assert set(saw) == {"alone"}
    assert kills > 12
