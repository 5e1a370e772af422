"""Try a model in a process of its own before it may answer.

Whatever it does there, as never ending or taking all memory, it does not do to the server.
`python -m vaeflow.serving.trial` reads from its input which model; a fault is one line and status
1.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from vaeflow.common.processes import python_command, run_to_end
from vaeflow.errors import BundleError, VaeflowError
from vaeflow.registry.model import Model
from vaeflow.registry.versions import Located
from vaeflow.serving.service import open_model
from vaeflow.serving.settings import Settings

SECONDS = 30
MEMORY = 2 << 30  # bytes of data, beside four times those of the model's files


async def try_model(located: Located, present: Model, settings: Settings) -> None:
    """Load and run a candidate apart, and compare it with the model that answers now.

    Raises:
        BundleError: it is not fit to take that model's place.
    """
    orders = {
        "located": [str(located.folder), located.version, located.sha256],
        "settings": asdict(settings) | {"token": ""},
        "present": [present.name, list(present.bundle.image_shape), present.bundle.latent_dim],
    }
    command = python_command("vaeflow.serving.trial")
    try:
        ended = await run_to_end(command, SECONDS, json.dumps(orders).encode())
    except TimeoutError:
        raise BundleError(
            f"version {located.version}: it did not load and answer within {SECONDS} seconds."
        ) from None
    if ended.status:
        reason = ended.complaint or f"its process ended ({ended.status})"
        raise BundleError(f"version {located.version}: {reason}")


def find_fault(located: Located, settings: Settings, present: list[object]) -> str | None:
    """Load and run a model; return what speaks against it, None where nothing does."""
    try:
        model = open_model(located, settings)
    except VaeflowError as error:
        return " ".join(str(error).split())
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        return f"it cannot be run ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    own = [model.name, list(model.bundle.image_shape), model.bundle.latent_dim]
    for what, old, new in zip(("name", "image_shape", "latent_dim"), present, own, strict=True):
        if old != new:
            return f"{what} {new}, and clients count on {old}. Serve it from a server of its own."
    return None


def _limit_memory(folder: Path) -> None:
    """Bound the memory of this process, where the system can."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        files = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        most = MEMORY + 4 * files
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    """Try the model that the input names."""
    orders = json.loads(sys.stdin.read())
    folder, version, sha256 = orders["located"]
    located = Located(Path(folder), version, sha256)
    _limit_memory(located.folder)
    sys.exit(find_fault(located, Settings(**orders["settings"]), orders["present"]))


if __name__ == "__main__":
    main()
