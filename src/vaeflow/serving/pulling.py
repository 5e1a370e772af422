"""`python -m vaeflow.serving.pulling ADDRESS`: fetch a registered model, print where it lies."""

from __future__ import annotations

import json
import sys

from vaeflow.errors import VaeflowError


def main(address: str) -> None:
    """Print the folder and the version as JSON; what goes wrong is one line and status 1."""
    try:
        from vaeflow.registry.pull import pull_version

        pulled = pull_version(address)
    except VaeflowError as error:
        sys.exit(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        sys.exit(f"this needs the package {error.name}: pip install 'vaeflow[pipeline]'")
    print(json.dumps({"folder": str(pulled.folder), "version": pulled.version}))


if __name__ == "__main__":
    main(sys.argv[1])
