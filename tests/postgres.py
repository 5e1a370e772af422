"""A PostgreSQL server of the tests' own."""

import os
import pwd
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import SCRATCH, free_port


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
def postgresql():
    """A database server of its own; yields the address of an empty database."""
    if program("initdb") is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    if account() is None:
        pytest.skip("PostgreSQL does not run as root")
    # Not below pytest's own folder, which other users may not enter.
    SCRATCH.chmod(0o755)
    folder = SCRATCH / f"postgresql-{free_port()}"
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
