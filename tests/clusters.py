"""Real Ray clusters of several nodes on this machine."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from helpers import free_port

from vaeflow.common.processes import process_group


@contextmanager
def node(*options, **environment):
    """A node of a Ray cluster, with all its processes."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    variables = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    started = process_group([*command, *options], env=variables, **quiet)
    with started as process:
        yield process


@contextmanager
def cluster(**environment):
    """The head of a cluster with one core; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    options = ("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false")
    with node(*options, **environment) as process:
        join = f"import ray; ray.init('{address}', log_to_driver=False)"
        probe = ["env", "RAY_AUTH_MODE=token", sys.executable, "-c", join]
        deadline = time.monotonic() + 120
        while subprocess.run(probe, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < deadline
        yield address
