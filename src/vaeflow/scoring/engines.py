"""Where the numbers of a batch are computed: by threads here, or by tasks on a Ray cluster.

Ray's workers are given the bundle and the pixels, and need neither the files nor the registry. The
images are cut alike for both engines, so that both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vaeflow.bundle.runtime import Bundle
from vaeflow.common import code
from vaeflow.common.cluster import Cluster, check_engine, import_ray, refuse_other
from vaeflow.common.files import atomic_directory, cache_folder
from vaeflow.common.processes import cores
from vaeflow.errors import BundleError
from vaeflow.registry.model import Model
from vaeflow.registry.versions import Located

# For each core of the cluster, of about 100 kB of pixels each: a slow or lost machine must not stop
# the others soon. See benchmarks/scheduler.py.
TASKS_A_CORE = 16

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
    check_engine(name, address)
    if name == "local":
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
        kept = "What was scored is kept; the same command goes on."
        self._cluster = Cluster(address, "vaeflow and onnxruntime", kept)
        self.tasks = TASKS_A_CORE * self._cluster.cores
        names = [path for path in sorted(model.folder.rglob("*")) if path.is_file()]
        files = {str(path.relative_to(model.folder)): path.read_bytes() for path in names}
        self._orders = Orders(self._cluster.put(files), model.sha256, latents, programs())
        self._task = self._cluster.task(_run)

    def start(self, pixels: np.ndarray) -> Result:
        """See `Engine`."""
        return self._cluster.start(self._task, self._orders, np.ascontiguousarray(pixels))

    def close(self) -> None:
        """See `Engine`."""
        self._cluster.close()


def _run(orders: Orders, pixels: np.ndarray) -> np.ndarray:
    """Compute the numbers of images, in a worker."""
    return compute(_bundle(orders), orders.latents, pixels)


def _bundle(orders: Orders) -> Bundle:
    """Return the bundle, loaded once in each worker.

    Raises:
        BundleError: this worker would compute other numbers.
    """
    refuse_other(orders.programs, programs(), BundleError)
    folder = cache_folder() / "ray" / orders.sha256
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with atomic_directory(folder) as fresh:
            for name, content in import_ray().get(orders.files).items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_bytes(content)
    return _load(folder, orders.sha256)


@lru_cache(maxsize=1)
def _load(folder: Path, sha256: str) -> Bundle:
    return Model.load(Located(folder, None, sha256), threads=1).bundle
