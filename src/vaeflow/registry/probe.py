"""Whether a registered model is fit to answer.

In a process of its own and with an empty cache, as on the machine of somebody who has never seen
the model: it is downloaded, verified, loaded, warmed and asked everything that it can be asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from types import TracebackType

from vaeflow.common import processes
from vaeflow.errors import VaeflowError

SECONDS = 600
IMAGES = 16


class Probe:
    """A fresh process that can be asked about a model.

    It may be started ahead, to import what it needs while its caller does something else. As a
    context manager it leaves no process behind.

    Args:
        registry: the registry's own address.

    Examples:
        >>> with Probe("http://localhost:5000") as probe:
        ...     probe.start()
        ...     version = register(workspace)
        ...     wrong = probe.ask(version.uri)
    """

    def __init__(self, registry: str):
        self.registry = registry
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def start(self) -> subprocess.Popen[str]:
        """Start the process, unless one stands ready."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                processes.python_command("vaeflow.registry.probe"),
                env={**os.environ, "MLFLOW_TRACKING_URI": self.registry},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        return self._process

    def ask(self, address: str) -> str | None:
        """Ask about `models:/NAME/VERSION`; every question has a fresh process.

        Returns:
            None when the model is fit to answer, else what is wrong with it.
        """
        process, self._process = self.start(), None
        with tempfile.TemporaryDirectory() as cache:
            try:
                _, said = process.communicate(f"{address}\n{cache}\n", SECONDS)
            except subprocess.TimeoutExpired:
                return f"it did not answer within {SECONDS} seconds"
            finally:
                process.kill()
                process.wait()
        if not process.returncode:
            return None
        return (said.strip().splitlines() or [f"exit status {process.returncode}"])[-1]


def find_fault(address: str) -> str | None:
    """Load a model and ask it everything that it can be asked.

    Args:
        address: `models:/NAME/VERSION`.

    Returns:
        None when it is fit to answer, else what is wrong with it.
    """
    import numpy as np

    from vaeflow.bundle.runtime import Bundle
    from vaeflow.registry.model import locate

    try:
        model = Bundle(locate(address).folder)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (IMAGES, *model.image_shape), dtype=np.uint8)
        answers = {
            "encode": np.stack(model.encode(images)),
            "reconstruct": model.reconstruct(images),
            "sample": model.sample(IMAGES, seed=0),
            "score": model.score(images),
        }
        if model.detects:
            found = model.detect(images, maps=True)
            answers |= {"detect": found.anomaly, "detect, maps": np.asarray(found.maps)}
    except VaeflowError as error:
        return " ".join(str(error).split())
    for name, values in answers.items():
        if not np.isfinite(values).all():
            return f"`{name}` gives numbers that are not finite"
    for name in ("reconstruct", "sample"):
        if answers[name].min() < 0 or answers[name].max() > 1:
            return f"`{name}` gives pixels outside of [0, 1]"
    return None


def main() -> None:
    """Read which model, and which cache is to be its own; a fault is one line and status 1."""
    import onnxruntime  # noqa: F401 (so that it is there when the question comes)

    import vaeflow.bundle.runtime  # noqa: F401
    from vaeflow.tracking.runs import connect

    try:
        connect()
    except VaeflowError as error:
        sys.exit(" ".join(str(error).split()))
    address, os.environ["VAEFLOW_CACHE"] = sys.stdin.read().splitlines()
    sys.exit(find_fault(address))  # None is status 0


if __name__ == "__main__":
    main()
