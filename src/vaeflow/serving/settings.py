"""What a server may be told, and the limits that it keeps."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaeflow.common.processes import cores
from vaeflow.errors import ServingError
from vaeflow.registry.versions import SCHEME

TOKEN = re.compile(r"[!-~]+")  # what a header can carry
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
        held: bytes of bodies and answers in memory at once; three quarters of them of
            one address.
        connections: that are open at once.
        connections_of_address: of one address; 0 for as many as there may be, as behind a proxy,
            where all come from one.
        grpc: port to answer gRPC at, on the same address; None for none, 0 for any free one.
        hosts: names that requests may give for this server; none for any.
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
    held: int = 128 << 20
    connections: int = 1024
    connections_of_address: int = 256
    grpc: int | None = None
    hosts: tuple[str, ...] = ()
    false_alarm_rate: float | None = None

    @property
    def threads(self) -> int:
        """Of one run of the model: the cores are shared out among the workers."""
        return max(1, cores() // self.workers)

    @property
    def ends_within(self) -> float:
        """Seconds from SIGTERM to the end: two deadlines, a body's and an answer's, and sending."""
        return 2 * self.deadline + 10

    def __post_init__(self) -> None:
        if self.follow and not self.model.startswith(SCHEME):
            raise ServingError(f"{self.model} is a folder; only {SCHEME}NAME@ALIAS is followed.")
        if self.workers > 1 and self.grpc == 0:
            raise ServingError("workers share a port of gRPC: name one, with --grpc-port.")


def parse_seconds(text: str) -> float:
    """Parse seconds from a text such as 30s, 5m or 1h.

    Raises:
        ServingError: it is none.
    """
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip(), re.ASCII)):
        raise ServingError(f"{text!r} is no time; expected one such as 30s, 5m or 1h.")
    return float(match[1]) * UNITS[match[2]]


def read_token(path: Path | None, variable: str | None) -> str:
    """Read the token of a server from a file, or else take it from the environment.

    It is no option itself: the command line of a process is for all to see.

    Args:
        path: the file, if one is named.
        variable: what `VAEFLOW_TOKEN` is, if it is set.

    Returns:
        The token; empty where none is asked for.

    Raises:
        ServingError: it is empty, or has characters that a header cannot carry.
    """
    if path is not None:
        try:
            text, source = path.read_text().strip(), str(path)
        except (OSError, ValueError) as error:
            raise ServingError(f"{path}: the token cannot be read ({error}).") from None
    elif variable is None:
        return ""
    else:
        text, source = variable, "VAEFLOW_TOKEN"
    if not TOKEN.fullmatch(text):
        raise ServingError(
            f"{source} has no token: expected printable ASCII without spaces. Unset it for a "
            "server that asks for none."
        )
    return text


def hosts_of(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the names that the Host header may have; none of them for any.

    A page whose own name was made to mean this machine gives that name.

    Args:
        host: what the server listens on.
        allowed: names that were set; they are for any address.
    """
    if "*" in allowed:
        return ()
    if allowed:
        return tuple(name.lower() for name in allowed)
    if not _is_loopback(host):
        return ()
    return tuple(dict.fromkeys(["localhost", "127.0.0.1", "[::1]", _as_in_header(host)]))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _as_in_header(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()
