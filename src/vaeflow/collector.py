"""Python's garbage collector, kept out of the way of a command.

TensorFlow, MLflow and Prefect make hundreds of thousands of objects while they are imported, and
all of them stay. By default the collector goes through them again and again, and once more at the
end: two of the six seconds that a process takes which only imports TensorFlow.

`python -m vaeflow.collector MODULE ARGUMENT...` is `python -m MODULE ARGUMENT...` run like this.
"""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Objects made before the collector looks at them, and how often it passes over older ones.
SELDOM = (50_000, 50, 50)


@contextmanager
def seldom() -> Iterator[None]:
    """Inside, it collects less often; afterwards, what is still there is left to the system."""
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.freeze()


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module like this, in a process of its own."""
    return [sys.executable, "-m", "vaeflow.collector", module, *arguments]


if __name__ == "__main__":
    del sys.argv[0]  # what is left is the module's own
    with seldom():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
