"""Writing files whole or not at all, their digests, and where downloads are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    What stood at `target` is replaced whole; when the block raises, it is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh = staging / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(staging / "old")
        fresh.rename(target)
    finally:
        if (staging / "old").exists() and not target.exists():  # interrupted between the renames
            (staging / "old").rename(target)
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`, renamed to it when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        yield fresh
        fresh.replace(target)


def cache_folder() -> Path:
    """Where what was downloaded is kept: `VAEFLOW_CACHE`, by default `~/.cache/vaeflow`."""
    default = Path.home() / ".cache" / "vaeflow"
    return Path(os.environ.get("VAEFLOW_CACHE", default)).absolute()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
