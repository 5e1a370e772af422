"""Ray clusters: join one, give it plain tasks, and say what went wrong there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vaeflow.common.processes import cores
from vaeflow.errors import DataError, VaeflowError

ENGINES = ("local", "ray")
# How often a task is begun anew elsewhere when its node is gone.
RETRIES = 5
SECONDS_TO_CONNECT = 10
# Nothing is sent anywhere; and Ray need not hide GPUs from tasks that use none.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def check_engine(name: str, address: str | None) -> None:
    """Refuse what is none of `ENGINES`, and an address of a cluster that is not used.

    Raises:
        DataError: it is so.
    """
    if name not in ENGINES:
        raise DataError(f"engine {name!r}: expected {' or '.join(ENGINES)}.")
    if name == "local" and address is not None:
        raise DataError("an address is that of a Ray cluster: say --engine ray, too.")


class Cluster:
    """A Ray cluster that was joined, for plain tasks of one core each.

    Ray begins those of a node that is gone anew.

    Args:
        address: of the cluster; None for one of this machine's own, which ends with `close`.
        programs: that its workers need, for errors.
        kept: what becomes of the work when tasks are lost, for errors.

    Attributes:
        cores: of all its nodes.

    Raises:
        DataError: there is no cluster at the address, or one of another version.
    """

    def __init__(self, address: str | None, programs: str, kept: str) -> None:
        ray = import_ray()
        self._own = not ray.is_initialized()
        if self._own:
            connect(address)
        self.cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._programs, self._kept = programs, kept
        self._begun: set[Any] = set()

    def put(self, value: Any) -> Any:
        """Put something into Ray's store, from which each worker gets it once."""
        return import_ray().put(value)

    def task(self, function: Callable[..., Any]) -> Any:
        """Make a task of a function."""
        return import_ray().remote(num_cpus=1, max_retries=RETRIES)(function)

    def start(self, task: Any, *arguments: Any) -> Callable[[], Any]:
        """Begin with a task; what is returned waits for its result.

        It raises:
            VaeflowError: the task failed, or its nodes went one after the other.
        """
        ticket = task.remote(*arguments)
        self._begun.add(ticket)

        def result() -> Any:
            try:
                return self._result_of(ticket)
            finally:
                self._begun.discard(ticket)

        return result

    def close(self) -> None:
        """Let go of what has not begun, and of a cluster of this machine's own."""
        ray = import_ray()
        for ticket in self._begun:
            ray.cancel(ticket)
        if self._own:
            ray.shutdown()

    def _result_of(self, ticket: Any) -> Any:
        ray = import_ray()
        try:
            return ray.get(ticket)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VaeflowError):
                raise error.cause from None
            reason = str(error.cause or error).strip().splitlines()[-1]
            raise VaeflowError(
                f"a task failed on the Ray cluster: {reason}. Its workers need {self._programs} "
                "of the versions that are here (pip install vaeflow)."
            ) from None
        except ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            raise VaeflowError(
                f"the Ray cluster lost a task {RETRIES + 1} times: {reason} {self._kept}"
            ) from None


def import_ray() -> Any:
    """Import Ray, so that it sends nothing and finds its token."""
    if "ray" not in sys.modules:  # it reads these once, its servers whenever they are started
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # Clusters of `ray start` ask for the user's token.
        tokens = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        if tokens or Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    return ray


def refuse_other(
    expected: Mapping[str, str], here: Mapping[str, str], error: type[VaeflowError]
) -> None:
    """Refuse, in a worker, to compute with other programs than those of the machine that asks.

    Args:
        expected: versions there, by name; `code` is that of vaeflow.
        here: the same in this worker.
        error: is raised where they differ.
    """
    if here != expected:
        other = [name for name, version in expected.items() if here.get(name) != version]
        raise error(
            f"the Ray worker on {socket.gethostname()} has another version of "
            f"{' and '.join('vaeflow' if name == 'code' else name for name in other)} than the "
            "machine that asked it. Install the same on all."
        )


def connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine.

    Raises:
        DataError: there is none at the address, or one of another version.
    """
    import logging

    ray = import_ray()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Not "auto": a cluster is used only by whoever names it.
        ray.init(address="local", num_cpus=cores(), include_dashboard=False, **options)
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"--address {address}: no Ray cluster can be joined there ({reason}). From one of its "
            "machines: HOST:PORT, as `ray start --head` prints it, or auto; from another one: "
            "ray://HOST:10001. If it asks for a token, give it in RAY_AUTH_TOKEN."
        ) from None
