"""The registry on an MLflow server that keeps everything in PostgreSQL."""

import os
import pwd
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import same_process
from helpers import (
    SCRATCH,
    free_port,
    killed_before_each_change,
    mlflow_server,
    take_turns_while_killed,
    worsen,
)

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


def program(name):
    """One of PostgreSQL's own, which Debian keeps off the path."""
    found = [*Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), shutil.which(name)]
    return next((str(path) for path in found if path), None)


def account():
    """PostgreSQL does not run as root."""
    if os.getuid():
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return None


@contextmanager
def postgresql(folder):
    """A database server of its own; yields the address of an empty database."""
    folder.mkdir()
    options = account()
    if "user" in options:
        os.chown(folder, options["user"], options["group"])
    port = free_port()
    data, log = folder / "data", folder / "log"
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"

    def call(name, *arguments):
        subprocess.run(
            [program(name), *arguments], cwd=folder, check=True, timeout=120,
            stdout=subprocess.DEVNULL, **options,
        )  # fmt: skip

    call("initdb", "-D", str(data), "-U", "vaeflow", "-A", "trust", "--no-sync")
    call("pg_ctl", "-D", str(data), "-l", str(log), "-o", settings, "-w", "start")
    try:
        yield f"postgresql+psycopg2://vaeflow@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An MLflow server on a PostgreSQL database; it is this process's registry."""
    if program("initdb") is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    if account() is None:
        pytest.skip("PostgreSQL does not run as root")
    # Not below pytest's own folder, which other users may not enter.
    SCRATCH.chmod(0o755)
    with (
        postgresql(SCRATCH / f"postgresql-{free_port()}") as database,
        mlflow_server(tmp_path / "server", database) as address,
    ):
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
