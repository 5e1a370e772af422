"""What a benchmark ran on, as every results file says it."""

import platform
import time

import numpy as np

from vaeflow.common.processes import cores

CORES = cores()  # before a benchmark keeps itself to some of them


def machine(device: str = "CPU") -> dict[str, object]:
    """Cores that may be used, system, Python, and the device in words."""
    return {
        "cores": CORES,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": device,
    }


def matrix_gflops(size: int = 2048, seconds: float = 2.0) -> float:
    """Billions of operations a second in products of two square float32 matrices, by NumPy.

    By it, times that were measured on different machines can be told apart.
    """
    matrix = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    matrix @ matrix  # the first one is slower
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        matrix @ matrix
        products += 1
    return round(products * 2 * size**3 / (time.perf_counter() - start) / 1e9, 1)
