"""Where image files are decoded: by threads here, or by tasks on a Ray cluster.

This machine reads the files and hands their bytes out; what comes back are pixels and digests, or
what is wrong. Workers need neither the files nor the project. Order, images and faults are the same
by both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import PIL

from vaeflow.common import code
from vaeflow.common.cluster import Cluster, check_engine, refuse_other
from vaeflow.data.io.decoding import AHEAD, Decoded, Decoder, Picture, Pool
from vaeflow.errors import DataError


def open_pool(name: str, address: str | None) -> Pool | None:
    """Return what decodes image files; None for the threads of this machine, which need no pool.

    Args:
        name: `local` or `ray`.
        address: of a Ray cluster; None for one of this machine's own.

    Raises:
        DataError: there is no such engine, or no cluster at the address.
    """
    check_engine(name, address)
    return None if name == "local" else OnRay(address)


def programs() -> dict[str, str]:
    """Return the programs that may give other pixels when they change."""
    try:
        heif = metadata.version("pillow-heif")
    except metadata.PackageNotFoundError:
        heif = "none"
    return {"code": code.digest(code.PREPARE), "pillow": PIL.__version__, "pillow-heif": heif}


class OnRay:
    """Plain tasks of one core each; Ray begins those of a node that is gone anew."""

    is_here = False

    def __init__(self, address: str | None) -> None:
        kept = "Nothing was changed."
        self._cluster = Cluster(address, "vaeflow and pillow", kept)
        self.tasks = AHEAD * self._cluster.cores
        self._programs = programs()
        self._task = self._cluster.task(_decode)

    def start(self, decoder: Decoder, files: Sequence[Picture]) -> Callable[[], Decoded]:
        """See `Pool`."""
        if any(picture.content is None for picture in files):  # it cannot be sent
            return lambda: decoder.some(files)
        started = self._cluster.start(self._task, self._programs, decoder, files)

        def result() -> Decoded:
            decoded: Decoded = started()
            # Of a file with many pages the rest is decoded here.
            return decoded._replace(rest=files[len(files) - len(decoded.rest) :])

        return result

    def close(self) -> None:
        """See `Pool`."""
        self._cluster.close()


def _decode(programs_there: Mapping[str, str], decoder: Decoder, files: Any) -> Decoded:
    """Decode files, in a worker; their bytes need not go back."""
    refuse_other(programs_there, programs(), DataError)
    decoded = decoder.some(files)
    return decoded._replace(
        pictures=[picture._replace(content=None) for picture in decoded.pictures],
        rest=[picture._replace(content=None) for picture in decoded.rest],
    )
