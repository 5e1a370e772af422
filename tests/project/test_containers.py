"""The containers of a project: linted always; built and run by `make test-containers`, as root.

Their base image is made with debootstrap, or is the one that `VAEFLOW_BASE_IMAGE` names.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import free_port, run

from vaeflow.common.processes import process_group

BUILDAH = ("buildah", "--storage-driver", "vfs")
MEGABYTES = 420  # of the server's image, unpacked
BASE = "localhost/vaeflow-test-base"
BUNDLE_OWNER = "65532:65532"
# Of a machine behind a certificate authority of its own.
AUTHORITY = "/etc/ssl/certs/ca-certificates.crt"
containers = [
    pytest.mark.containers,
    pytest.mark.xdist_group("containers"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("buildah"),
        reason="needs root, and: apt install buildah debootstrap",
    ),
]


def test_the_containerfiles_are_linted(tmp_path):
    run(tmp_path, sys.executable, "-m", "vaeflow", "init", "Mine")
    linter = Path(sys.executable).with_name("hadolint")
    for kind in ("serve", "pipeline"):
        run(tmp_path / "Mine", str(linter), f"containers/{kind}.Containerfile")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An image with Debian's Python, where none is given."""
    if given := os.environ.get("VAEFLOW_BASE_IMAGE"):
        yield given
        return
    root = tmp_path_factory.mktemp("base") / "root"
    sources = Path("/etc/apt").rglob("*.sources")
    mirrors = [
        line.split()[1]
        for path in sources
        for line in path.read_text().splitlines()
        if line.startswith("URIs:")
    ]
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root), *mirrors[:1]]
    run(root.parent, *command)
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    shutil.copy(AUTHORITY, root / AUTHORITY[1:])
    container = buildah("from", "scratch")
    buildah("copy", "--quiet", container, str(root), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)
    yield BASE
    buildah("rmi", "--force", BASE)


@pytest.fixture
def project(tmp_path, wheel) -> Path:
    run(tmp_path, sys.executable, "-m", "vaeflow", "init", "Mine", "--package", str(wheel))
    return tmp_path / "Mine"


def buildah(*arguments: str, cwd: Path | None = None) -> str:
    return run(cwd or Path.cwd(), *BUILDAH, *arguments).stdout.strip()


@contextmanager
def built(project: Path, kind: str, base: str):
    """Build an image; yield a container of it, where its files are, and its settings."""
    arguments = [f"BASE={base}", f"PIP_CERT={AUTHORITY}", f"SSL_CERT_FILE={AUTHORITY}"]
    buildah(
        *("build", "--isolation", "chroot", "--format", "docker", "--tag", f"mine-{kind}"),
        *(part for argument in arguments for part in ("--build-arg", argument)),
        *("--file", f"containers/{kind}.Containerfile", "."),
        cwd=project,
    )
    container = buildah("from", f"mine-{kind}")
    try:
        settings = json.loads(buildah("inspect", container))["Docker"]["config"]
        yield container, Path(buildah("mount", container)), settings
    finally:
        buildah("rm", container)
        buildah("rmi", f"mine-{kind}")


def size_of(folder: Path) -> float:
    """Megabytes."""
    return int(run(folder, "du", "-sm", ".").stdout.split()[0])


class TestContainers:
    pytestmark = containers

    def test_the_server_is_small_and_nobody_and_writes_nothing(self, project, base, bundle):
        subprocess.run(["chmod", "-R", "a+rX", str(bundle.parent)], check=True)
        with built(project, "serve", base) as (_, root, settings):
            assert size_of(root) <= MEGABYTES
            assert not list(root.glob("opt/vaeflow/lib/python3*/site-packages/tensorflow"))
            assert settings["User"] == "65532:65532"
            port = free_port()
            command = [*settings["Entrypoint"], *settings["Cmd"], "--port", port]
            with running(read_only(root, settings, bundle, command)) as server:
                url = f"http://127.0.0.1:{port}"
                wait_for_health(url, server)
                ask = f"{url}/sample?count=2&seed=1"
                assert len(json.load(post(ask))["images"]) == 2
                check = [
                    part.replace(":8000", f":{port}")
                    for part in settings["Healthcheck"]["Test"][1:]
                ]
                # In a namespace of its own it sees the same network.
                subprocess.run(read_only(root, settings, bundle, check), check=True)
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
            check[-1] = check[-1].replace(f":{port}", f":{free_port()}")
            assert subprocess.run(read_only(root, settings, bundle, check)).returncode != 0

    def test_the_pipeline_makes_a_champion_in_a_project_that_is_mounted(self, project, base):
        run(project, sys.executable, "-m", "vaeflow", "data", "add", "digits")
        subprocess.run(["chown", "-R", BUNDLE_OWNER, str(project)], check=True)
        with built(project, "pipeline", base) as (container, _, settings):
            said = buildah(
                *("run", "--isolation", "chroot", "--user", BUNDLE_OWNER),
                *("--volume", f"{project}:/project", container, "--"),
                *("vaeflow", "retrain", "--set", "train.epochs=3", "--set", "train.patience=0"),
            )
            assert settings["Cmd"] == ["make", "repro"]
            assert "models:/Mine/1 is " in said


def read_only(root: Path, settings: dict, bundle: Path, command: list[str]) -> list[str]:
    """Return how to run a command in an image as an engine does with `--read-only --tmpfs /tmp`."""
    (root / "model").mkdir(exist_ok=True)
    script = f"""
        mount --bind {root} {root} && cd {root} &&
        mount --bind -o ro {bundle} model && mount -t tmpfs tmpfs tmp && chmod 1777 tmp &&
        mount --rbind /dev dev && mount -t proc proc proc &&
        mount -o remount,ro,bind {root} &&
        exec env -i {" ".join(settings["Env"])} chroot --userspec={settings["User"]} . "$@"
    """
    return ["unshare", "--mount", "sh", "-c", script, "sh", *command]


@contextmanager
def running(command: list[str]):
    with process_group(command) as process:
        yield process


def wait_for_health(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).close()
            return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)


def post(url: str):
    return urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=60)
