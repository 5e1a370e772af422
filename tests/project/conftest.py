"""What several tests of projects need."""

import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, run

UV = str(Path(sys.executable).with_name("uv"))
BUILD = (UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheel of this package, and its source archive."""
    out = tmp_path_factory.mktemp("dist")
    run(REPOSITORY, *BUILD, "--out-dir", str(out))
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))
