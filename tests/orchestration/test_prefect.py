import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing

import psutil
import pytest
from helpers import SMALL, make_workspace, processes_in, run

from vaeflow.orchestration.prefect import WAITING

HELD_BACK_SECONDS = 120


def test_nobody_at_the_address_is_said_at_once(workspace):
    address = "http://127.0.0.1:9/api"
    environment = {**os.environ, "PREFECT_API_URL": address}
    done = run(workspace, "vaeflow", "retrain", status=2, env=environment)
    assert f"PREFECT_API_URL is {address}, and no Prefect server answers there" in done.stderr
    assert "unset PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_cannot_start_says_why(workspace, tmp_path):
    (tmp_path / "home").write_text("a file, not a folder")
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    done = run(workspace, "vaeflow", "retrain", status=2, env=environment)
    assert "PREFECT_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_of_a_newer_prefect_is_named_as_that(workspace, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with closing(sqlite3.connect(home / "prefect.db")) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
    done = run(
        workspace, "vaeflow", "retrain", status=2, env={**os.environ, "PREFECT_HOME": str(home)}
    )
    assert "a newer Prefect has made" in done.stderr
    assert "export PREFECT_HOME=FOLDER" in done.stderr


@pytest.mark.servers
def test_a_proxy_is_not_asked_for_this_machines_own_server(workspace):
    proxy = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": proxy, "HTTP_PROXY": proxy, "https_proxy": proxy}
    done = run(workspace, "vaeflow", "retrain", env=environment)
    assert done.stdout.splitlines()[-1].startswith("models:/digits-vae/1 is @")


@pytest.mark.servers
def test_a_server_that_is_held_back_for_two_minutes_is_waited_for(tmp_path):
    """Stopped as it begins, as on a machine that has no time for it."""
    root = make_workspace(tmp_path / "workspace", **{**SMALL, "epochs": 1})
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    log = tmp_path / "log"
    with log.open("w") as out:
        flow = subprocess.Popen(
            ["vaeflow", "retrain"], cwd=root, env=environment, stdout=out, stderr=out
        )
    server = None
    while server is None:
        assert flow.poll() is None, log.read_text()
        for child in psutil.Process(flow.pid).children():
            if "server" in child.cmdline():
                server = child
        time.sleep(0.05)
    server.send_signal(signal.SIGSTOP)
    time.sleep(HELD_BACK_SECONDS)
    assert flow.poll() is None, log.read_text()
    server.send_signal(signal.SIGCONT)
    assert flow.wait(300) == 0, log.read_text()
    assert WAITING in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("models:/digits-vae/1 is @")
    assert not processes_in(root)
