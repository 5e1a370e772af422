"""Processes of one machine that make a stage together; on many machines others start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from vaeflow.common.processes import cores, python_command, shares

# Seconds that the others are given to end by themselves, with a reason and a checkpoint.
GRACE = 60


def launch(command: str, processes: int) -> int:
    """Run a command in several processes, each on its share of the cores, until all have ended.

    Lines of all but the first begin with their number. What tells this process to end tells them,
    and they all end after the same step, with a checkpoint.

    Args:
        command: of `vaeflow`: `train` or `evaluate`.
        processes: how many.

    Returns:
        The exit status of the first that failed; 0 if none did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {
        # JAX makes a thread a core, and has a process of one core wait with it for the others.
        "NPROC": str(max(2, cores() // processes)),
        **os.environ,
    }
    together["VAEFLOW_HOSTS"] = ",".join([f"127.0.0.1:{port}", *["127.0.0.1"] * (processes - 1)])
    started: list[subprocess.Popen[str]] = []
    try:
        for process, share in enumerate(shares(processes)):
            started.append(
                subprocess.Popen(
                    python_command("vaeflow", command),
                    env={**together, "VAEFLOW_PROCESS": str(process)},
                    stdout=subprocess.PIPE if process else None,
                    stderr=subprocess.STDOUT if process else None,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            )
            if share:
                os.sched_setaffinity(started[-1].pid, share)
        for process, one in enumerate(started[1:], 1):
            threading.Thread(target=_print_lines, args=(process, one.stdout), daemon=True).start()
        return _wait(started)
    finally:
        _end(started)


def _wait(started: list[subprocess.Popen[str]]) -> int:
    """Wait until all have ended, or one has failed."""
    while True:
        statuses = [process.poll() for process in started]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            # A process that a signal has ended has its number below zero.
            return next((128 - status if status < 0 else status for status in failed), 0)
        time.sleep(0.1)


def _end(started: list[subprocess.Popen[str]]) -> None:
    """Tell those that are left to end; kill what has not after a while."""
    deadline = time.monotonic() + GRACE
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _print_lines(process: int, lines: IO[str] | None) -> None:
    assert lines is not None
    for line in lines:
        print(f"[{process}] {line}", end="", file=sys.stdout, flush=True)
