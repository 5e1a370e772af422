import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from serving_helpers import Server, register_champion, sent, serving, wait_for

pytestmark = pytest.mark.slow  # a real bundle has to be made first


@pytest.fixture
def folder(finished):
    return finished / "outputs" / "bundle"


def started(server: Server) -> list[int]:
    """Process ids of all workers so far."""
    found = re.findall(r"Started server process \[(\d+)\]", server.log.read_text())
    return [int(process) for process in found]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def listening(server: Server) -> int:
    return server.log.read_text().count("running on http")


def answered(server: Server) -> int:
    """Samples that all workers together say they drew."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'requests_total\{route="/sample",status="200"\} (\S+)', text)
    return int(float(found[1])) if found else 0


def test_a_killed_worker_is_replaced_and_sigterm_drains_all(folder, tmp_path):
    with serving(folder, tmp_path, "--workers", "2") as server:
        wait_for(lambda: listening(server) == 2)
        for _ in range(20):
            assert httpx.post(f"{server.url}/sample").status_code == 200
        assert answered(server) == 20  # whichever is asked

        killed = started(server)[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: listening(server) == 3)
        for _ in range(20):
            assert httpx.post(f"{server.url}/sample").status_code == 200
        assert answered(server) == 40
        assert f"worker {killed} ended (-9)" in server.log.read_text()

        connections = sent(server, "/sample?count=100", 12)
        server.process.terminate()
        assert [connection.getresponse().status for connection in connections] == [200] * 12
        assert server.process.wait(30) == 0
        assert not any(alive(process) for process in started(server))


def test_workers_end_with_the_process_that_keeps_them(folder, tmp_path):
    with serving(folder, tmp_path, "--workers", "2") as server:
        wait_for(lambda: listening(server) == 2)
        server.process.kill()
        wait_for(lambda: not any(alive(process) for process in started(server)))


def test_each_worker_follows(bundled):
    register_champion(bundled)
    options = ("--workers", "2", "--follow", "1s")
    with serving("models:/digits-vae@champion", bundled.root, *options) as server:
        wait_for(lambda: listening(server) == 2)
        assert register_champion(bundled, metrics={"elbo": 1.0}) == "2"
        wait_for(lambda: server.log.read_text().count("version 2 replaces 1") == 2)
        # One that is started now begins with the version that the others have come to.
        os.kill(started(server)[0], signal.SIGKILL)
        wait_for(lambda: listening(server) == 3)
        assert "version 2 running on" in server.log.read_text()
        for _ in range(20):  # each on a connection of its own, which may be any worker's
            assert httpx.post(f"{server.url}/sample").headers["x-model-version"] == "2"
        assert server.stop() == 0


def test_what_no_worker_can_serve_is_said_once(bundle):
    (bundle / "decoder.onnx").write_bytes(b"junk")
    command = [sys.executable, "-m", "vaeflow", "serve", "--port", "0", "--workers", "3"]
    done = subprocess.run(
        [*command, "--model", str(bundle)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("decoder.onnx") == 1
    assert "Traceback" not in done.stderr
