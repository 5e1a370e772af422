"""What a server may be told, and the limits that it keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vaeflow.common.processes import cores
from vaeflow.errors import ServingError
from vaeflow.registry.versions import SCHEME

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Settings:
    """How to serve which model.

    Attributes:
        model: a bundle's folder, or the address of a model in the registry.
        workers: processes that share the port. The limits below are of each of them.
        follow: seconds between looks at the registry for a new version; 0 never looks.
        token: what requests must carry as `Authorization: Bearer TOKEN`; empty asks for none.
        batch: rows (images or latents) that are run together at most.
        wait: seconds that requests wait for others where some are expected.
        queue: rows that may wait; more are refused.
        rows: rows that one request may hold.
        body: bytes that one request may hold.
        deadline: seconds within which a request is answered.
        in_flight: requests that are received, run or answered at once.
        false_alarm_rate: the share of usual images that may count as anomalous; None for that of
            the model.
    """

    model: str
    workers: int = 1
    follow: float = 0
    token: str = ""
    batch: int = 64
    wait: float = 0.002
    queue: int = 2048
    rows: int = 1024
    body: int = 16 << 20
    deadline: float = 10
    in_flight: int = 512
    false_alarm_rate: float | None = None

    @property
    def threads(self) -> int:
        """Of one run of the model: the cores are shared out among the workers."""
        return max(1, cores() // self.workers)

    def __post_init__(self) -> None:
        if self.follow and not self.model.startswith(SCHEME):
            raise ServingError(f"{self.model} is a folder; only {SCHEME}NAME@ALIAS is followed.")


def parse_seconds(text: str) -> float:
    """Parse seconds from a text such as 30s, 5m or 1h.

    Raises:
        ServingError: it is none.
    """
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip(), re.ASCII)):
        raise ServingError(f"{text!r} is no time; expected one such as 30s, 5m or 1h.")
    return float(match[1]) * UNITS[match[2]]
