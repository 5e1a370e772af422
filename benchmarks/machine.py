"""What a benchmark ran on, as every results file says it."""

import platform

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
