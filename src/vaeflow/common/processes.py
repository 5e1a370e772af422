"""Child processes that leave nothing behind, names by which processes know one another, and memory.

TensorFlow, MLflow and Prefect make hundreds of thousands of objects while they are imported, and
all of them stay. By default Python's garbage collector goes through them again and again, and once
more at the end: two of the six seconds that a process takes which only imports TensorFlow.

`python -m vaeflow.common.processes MODULE ARGUMENT...` is `python -m MODULE ARGUMENT...` with the
collector kept out of the way.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

# Objects made before the collector looks at them, and how often it passes over older ones.
COLLECTION_THRESHOLDS = (50_000, 50, 50)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shares(workers: int) -> list[Sequence[int] | None]:
    """Divide this machine's cores among workers; None where they share all of them."""
    if not hasattr(os, "sched_setaffinity") or workers > cores():
        return [None] * workers
    mine = sorted(os.sched_getaffinity(0))
    return [mine[worker::workers] for worker in range(workers)]


@contextmanager
def process_group(
    command: list[str], *, grace: float = 10, end: int = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a command in a process group of its own, and end the whole group with the block.

    A signal to the command alone would leave what it started running.

    Args:
        command: program and arguments.
        grace: seconds the group is given to end by itself before it is killed.
        end: the signal that tells it to.
        options: as for `subprocess.Popen`.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        _end_group(process, grace, end)
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def _end_group(process: subprocess.Popen[Any], grace: float, end: int) -> None:
    """Ask the whole group to end, wait for the last of it, then make it end."""
    with suppress(ProcessLookupError):  # nobody is left: the usual case
        os.killpg(process.pid, end)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            process.poll()  # the leader itself counts as there until its status is read
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def this_process() -> str:
    """Return a name no other process has: host, process id, and when it began, in seconds."""
    return process_name(os.getpid())


def process_name(number: int) -> str:
    """Return the name of a process of this host, as `this_process` does for itself."""
    import psutil

    return f"{_host()} {number} {psutil.Process(number).create_time():.2f}"


def is_gone(process: str) -> bool:
    """Return whether a process of this host, named by `this_process`, has ended."""
    import psutil

    host, number, began = process.rsplit(" ", 2)
    if host != _host():
        return False  # nobody here can tell
    try:
        found = psutil.Process(int(number))
        # One that nobody asks for its status stays in the table of processes, but is no more.
        ended = found.status() == psutil.STATUS_ZOMBIE
        return ended or abs(found.create_time() - float(began)) > 1
    except psutil.NoSuchProcess:
        return True


def end_left_behind(process: str, grace: float) -> None:
    """End the group of a process of this host, named by `process_name`, whose parent was killed."""
    host, number, _ = process.rsplit(" ", 2)
    if host != _host():
        return
    deadline = time.monotonic() + grace
    with suppress(ProcessLookupError):
        while not is_gone(process):
            end = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
            os.killpg(int(number), end)
            time.sleep(0.2)


def _host() -> str:
    """Name where a process id means this process: containers may share the name of their host."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink()  # pid:[4026531836]
        return f"{socket.gethostname()}/{namespace.name[5:-1]}"
    except OSError:  # no Linux
        return socket.gethostname()


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Collect garbage less often inside; then freeze survivors so that exit skips them."""
    gc.set_threshold(*COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.freeze()


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module with rare collections, in its own process."""
    return [sys.executable, "-m", "vaeflow.common.processes", module, *arguments]


class Ended(NamedTuple):
    """What became of a process: its exit status, its output, and its last line of errors."""

    status: int
    output: bytes
    complaint: str


async def run_to_end(command: Sequence[str], seconds: float, given: bytes = b"") -> Ended:
    """Run a program, with something to read; it is killed when it takes too long or is cancelled.

    Raises:
        TimeoutError: it took longer than so many seconds.
    """
    import asyncio  # here, since most commands start none

    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate(given)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    lines = errors.decode(errors="replace").strip().splitlines()
    assert process.returncode is not None
    return Ended(process.returncode, output, lines[-1] if lines else "")


if __name__ == "__main__":
    del sys.argv[0]  # what is left is the module's own
    with rare_garbage_collection():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
