"""Where the numbers of a batch are computed: by threads here, or by tasks on a Ray cluster.

Ray's workers are given the bundle and the pixels, and need neither the files nor the registry. The
images are cut alike for both engines, so that both give the same bytes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vaeflow.bundle.runtime import Bundle
from vaeflow.common import code
from vaeflow.common.files import atomic_directory, cache_folder
from vaeflow.common.processes import cores
from vaeflow.errors import BundleError, DataError, VaeflowError
from vaeflow.registry.model import Model
from vaeflow.registry.versions import Located

ENGINES = ("local", "ray")
# How often a task is begun anew elsewhere when its node is gone.
RETRIES = 5
# For each core of the cluster, of about 100 kB of pixels each: a slow or lost machine must not stop
# the others soon. See benchmarks/scheduler.py.
TASKS_A_CORE = 16
SECONDS_TO_CONNECT = 10
# Nothing is sent anywhere; and Ray need not hide GPUs from tasks that use none.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}

Result = Callable[[], np.ndarray]


class Engine(Protocol):
    """Computes the numbers of images, several tasks at a time.

    Attributes:
        tasks: how many are given to it before the first is waited for.
    """

    tasks: int

    def start(self, pixels: np.ndarray) -> Result:
        """Begin with some images; what is returned waits for their numbers, see `compute`."""

    def close(self) -> None:
        """Let go of what has not begun."""


def open_engine(name: str, address: str | None, model: Model, latents: bool) -> Engine:
    """Return the engine of that name.

    Args:
        name: one of `ENGINES`.
        address: of a Ray cluster; None for one of this machine's own, which ends with the batch.
        model: that computes.
        latents: whether the posterior means are wanted.

    Raises:
        DataError: there is no such engine, or no cluster at the address.
    """
    if name not in ENGINES:
        raise DataError(f"engine {name!r}: expected {' or '.join(ENGINES)}.")
    if name == "local":
        if address is not None:
            raise DataError("an address is that of a Ray cluster: say --engine ray, too.")
        return Threads(model.bundle, latents)
    return OnRay(model, latents, address)


def compute(bundle: Bundle, latents: bool, pixels: np.ndarray) -> np.ndarray:
    """Compute the numbers of images, float32 `(count, numbers)`; see `vaeflow.scoring.rows.Shard`.

    Raises:
        BundleError: a score is not finite.
    """
    with np.errstate(all="ignore"):  # refused below
        if bundle.detects:
            scores = np.column_stack(bundle.detect(pixels)[:2])
        else:
            scores = bundle.score(pixels)
    if not np.isfinite(scores).all():
        raise BundleError(f"{bundle.manifest.name}: its scores are not finite. Train it again.")
    means = [bundle.encode(pixels).mean] if latents else []
    return np.column_stack([scores, *means])


def programs() -> dict[str, str]:
    """Return the programs that may give other numbers when they change."""
    import onnxruntime

    return {"code": code.digest(code.SCORE), "onnxruntime": onnxruntime.__version__}


class Threads:
    """A thread a core."""

    def __init__(self, bundle: Bundle, latents: bool) -> None:
        self.tasks = 2 * cores()
        self._bundle, self._latents = bundle, latents
        self._pool = ThreadPoolExecutor(cores())

    def start(self, pixels: np.ndarray) -> Result:
        """See `Engine`."""
        return self._pool.submit(compute, self._bundle, self._latents, pixels).result

    def close(self) -> None:
        """See `Engine`."""
        self._pool.shutdown(wait=False, cancel_futures=True)


# === Ray ===


class Orders(NamedTuple):
    """What a task has to know beside the pixels.

    Attributes:
        files: of the bundle, by their names, in Ray's store: only a worker without them gets them.
        sha256: of the bundle.
        latents: whether the posterior means are wanted.
        programs: that the numbers have to come from.
    """

    files: Any
    sha256: str
    latents: bool
    programs: Mapping[str, str]


class OnRay:
    """Plain tasks of one core each; Ray begins those of a node that is gone anew."""

    def __init__(self, model: Model, latents: bool, address: str | None) -> None:
        ray = _import_ray()
        self._own = not ray.is_initialized()
        if self._own:
            _connect(address)
        self.tasks = TASKS_A_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        names = [path for path in sorted(model.folder.rglob("*")) if path.is_file()]
        files = {str(path.relative_to(model.folder)): path.read_bytes() for path in names}
        self._orders = Orders(ray.put(files), model.sha256, latents, programs())
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_run)
        self._begun: set[Any] = set()

    def start(self, pixels: np.ndarray) -> Result:
        """See `Engine`."""
        ticket = self._task.remote(self._orders, np.ascontiguousarray(pixels))
        self._begun.add(ticket)

        def result() -> np.ndarray:
            try:
                return _result_of(ticket)
            finally:
                self._begun.discard(ticket)

        return result

    def close(self) -> None:
        """See `Engine`."""
        ray = _import_ray()
        for ticket in self._begun:
            ray.cancel(ticket)
        if self._own:
            ray.shutdown()


def _import_ray() -> Any:
    if "ray" not in sys.modules:  # it reads these once, its servers whenever they are started
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # Clusters of `ray start` ask for the user's token.
        tokens = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        if tokens or Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    return ray


def _connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine.

    Raises:
        DataError: there is none at the address, or one of another version.
    """
    import logging

    ray = _import_ray()
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


def _result_of(ticket: Any) -> np.ndarray:
    """Wait for a task.

    Raises:
        VaeflowError: it failed, or its nodes went one after the other.
    """
    ray = _import_ray()
    try:
        numbers: np.ndarray = ray.get(ticket)
        return numbers
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VaeflowError):
            raise error.cause from None
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise VaeflowError(
            f"a task failed on the Ray cluster: {reason}. Its workers need vaeflow and onnxruntime "
            "of the versions that are here (pip install vaeflow)."
        ) from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise VaeflowError(
            f"the Ray cluster lost a task {RETRIES + 1} times: {reason} What was scored is kept; "
            "the same command goes on."
        ) from None


def _run(orders: Orders, pixels: np.ndarray) -> np.ndarray:
    """Compute the numbers of images, in a worker."""
    return compute(_bundle(orders), orders.latents, pixels)


def _bundle(orders: Orders) -> Bundle:
    """Return the bundle, loaded once in each worker.

    Raises:
        BundleError: this worker would compute other numbers.
    """
    here = programs()
    if here != orders.programs:
        other = [name for name, version in orders.programs.items() if here[name] != version]
        raise BundleError(
            f"the Ray worker on {socket.gethostname()} has another version of "
            f"{' and '.join('vaeflow' if name == 'code' else name for name in other)} than the "
            "machine that asked it. Install the same on all."
        )
    folder = cache_folder() / "ray" / orders.sha256
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with atomic_directory(folder) as fresh:
            for name, content in _import_ray().get(orders.files).items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_bytes(content)
    return _load(folder, orders.sha256)


@lru_cache(maxsize=1)
def _load(folder: Path, sha256: str) -> Bundle:
    return Model.load(Located(folder, None, sha256), threads=1).bundle
