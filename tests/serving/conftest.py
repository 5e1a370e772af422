"""A server that the tests of its answers share."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving_helpers import Server, serving


@pytest.fixture(scope="session")
def server(finished, tmp_path_factory) -> Iterator[Server]:
    """One with the defaults; it must still be alive, and end well, when the tests are over."""
    with serving(finished / "outputs" / "bundle", tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="session")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened
