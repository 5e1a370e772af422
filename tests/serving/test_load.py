"""Twice the load that a server can carry: what is too much is refused, and nothing else goes wrong.

`make test-load` does it for two minutes and prints a report; `VAEFLOW_LOAD` sets the
seconds.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from serving_helpers import npy, serving

from vaeflow.serving.settings import Settings

pytestmark = [
    pytest.mark.load,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

SECONDS = float(os.environ.get("VAEFLOW_LOAD", "120"))
CLIENTS = 16
FLAT_MB = 30
ROWS, QUEUE = 8, 256  # of a request, and of the server's queue
# An accepted request waits for the queue before it to be run at the sustainable rate; and while
# the server refuses as many again, for longer.
PATIENCE = 4


def load(url: str, body: Path, *options: object) -> dict:
    """What `benchmarks/http_load.py`, in a process of its own, saw."""
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "http_load.py"), url]
    program += ["--body", str(body), "--header", "Content-Type: application/x-npy"]
    done = subprocess.run(
        [*program, *map(str, options)], capture_output=True, text=True, timeout=SECONDS + 120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def memory_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def test_twice_the_sustainable_load(finished, digits, tmp_path):
    body = tmp_path / "body"
    body.write_bytes(npy(digits[:ROWS]))
    options = ("--queue", str(QUEUE))
    with serving(finished / "outputs" / "bundle", tmp_path, *options) as server:
        url = f"{server.url}/score?samples=128"
        carried = load(url, body, "--clients", CLIENTS, "--seconds", SECONDS / 6)
        assert set(carried["statuses"]) == {"200"}
        sustainable = carried["accepted_per_second"]

        memory, done = [], threading.Event()

        def watch() -> None:
            while not done.wait(SECONDS / 50):
                memory.append(memory_mb(server.process.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        start = time.monotonic()
        seen = load(url, body, "--rate", 2 * sustainable, "--seconds", SECONDS)
        done.set()
        watching.join()
        memory = memory[len(memory) // 4 :]  # by then there are as many requests in it as may be
        bound_ms = 1000 * PATIENCE * (QUEUE + Settings.batch) / ROWS / sustainable
        print(
            f"\n{time.monotonic() - start:.0f} s of {2 * sustainable:.0f} requests/s, twice what "
            f"{CLIENTS} clients get through: {seen['statuses']}; accepted "
            f"{seen['accepted_per_second']}/s, p50 {seen['p50_ms']} ms, p99 {seen['p99_ms']} ms "
            f"(bound {bound_ms:.0f}); memory {min(memory):.0f}..{max(memory):.0f} MB"
        )
        assert set(seen["statuses"]) == {"200", "429"}
        assert np.ptp(memory) < FLAT_MB
        assert seen["p99_ms"] < bound_ms
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()
