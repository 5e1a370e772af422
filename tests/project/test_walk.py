"""The tutorial, walked as somebody does who has nothing but the wheel, an empty home and images.

Its commands run as they stand there, in an environment that has the wheel and takes what that needs
from ours.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers import REPOSITORY, free_port, run, wait_for_http
from pictures import photographs

from vaeflow.common.processes import process_group

pytestmark = pytest.mark.servers
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
# What sets up, and what needs an engine for containers: test_containers.py has them.
LEFT_OUT = ("python3 -m venv", "source ", "pip ", "make image", "docker ")
SHORT = {"epochs": "12", "patience": "0", "kl_warmup_epochs": "0", "batch_size": "8"}


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith(LEFT_OUT)]


@pytest.fixture
def newcomer(tmp_path, wheel) -> dict[str, str]:
    """The environment variables of somebody whose active environment has the wheel."""
    uv = str(Path(sys.executable).with_name("uv"))
    run(tmp_path, uv, "venv", "--quiet", "--python", sys.executable, "env")
    run(tmp_path, uv, "pip", "install", "--quiet", "--no-deps", "--python", "env", str(wheel))
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    home = tmp_path / "home"
    photographs(home / "photos", 300, seed=0)
    photographs(home / "new-photos", 40, seed=1)
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_HOME"}
    return {
        **kept,
        "HOME": str(home),
        "VIRTUAL_ENV": str(tmp_path / "env"),
        "PATH": os.pathsep.join([str(tmp_path / "env" / "bin"), os.environ["PATH"]]),
    }


def test_the_tutorial(tmp_path, newcomer):
    place = tmp_path / "home"

    def do(line: str) -> str:
        return run(place, "bash", "-c", line, env=newcomer).stdout

    assert "site-packages/vaeflow" in do("python -c 'import vaeflow; print(vaeflow.__file__)'")
    done = []
    for line in commands():
        command, _, _ = line.partition("#")
        command = command.strip()
        done.append(command)
        if command.startswith("cd "):
            place /= command.removeprefix("cd ")
            shorten(place)
        elif command.startswith("vaeflow serve"):
            with served(place, command, newcomer) as url:
                answer = httpx.post(f"{url}/sample?count=2&seed=1", timeout=60)
                assert answer.status_code == 200
        elif command.startswith("vaeflow schedule"):
            assert "vaeflow schedule --cron" in command
            retrained_on_schedule(place, newcomer)
        elif command.startswith("dvc exp run"):
            do(command.replace("epochs=100", "epochs=4"))
        elif command == "vaeflow init --update":
            assert "nothing to do" in do(command)
        else:
            said = do(command)
        if command == "make repro":
            assert re.search(r"^models:/shapes/1 is @", said, re.MULTILINE)
            use(place, newcomer)
        if "train.network=networks:dense" in command:
            assert "outputs/report" in said
    assert [line for line in done if line.startswith("vaeflow init")] == [
        "vaeflow init shapes --images ~/photos --size 32x32 --skip-bad",
        "vaeflow init --update",
    ]


def shorten(project: Path) -> None:
    """Have trainings be of seconds; whoever follows the tutorial waits for longer ones."""
    path = project / "params.yaml"
    text = path.read_text()
    for key, value in SHORT.items():
        text, count = re.subn(rf"^  {key}: auto", f"  {key}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    path.write_text(text)


def use(project: Path, newcomer: dict[str, str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    said = run(project, "python", "-c", code, env=newcomer).stdout
    assert len(re.findall(r"[01]\.\d*", said)) == 10  # ten images, each with its rank


@contextmanager
def served(project: Path, command: str, newcomer: dict[str, str]):
    port = free_port()
    with process_group([*command.split(), "--port", port], cwd=project, env=newcomer) as process:
        wait_for_http(f"http://127.0.0.1:{port}/v2/health/ready", process)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def retrained_on_schedule(project: Path, newcomer: dict[str, str]) -> None:
    """The next minute's run finds nothing to do, and says so."""
    log = project.parent / "schedule.log"
    command = ["vaeflow", "schedule", "--cron", "* * * * *"]
    with (
        log.open("w") as out,
        process_group(
            command, cwd=project, env=newcomer, stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        deadline = time.monotonic() + 300
        while "nothing changed: models:/shapes/" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
    shutil.rmtree(project / "outputs" / "logs", ignore_errors=True)
