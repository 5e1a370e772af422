"""Writing files whole or not at all, their digests, and where downloads are kept."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vaeflow.errors import VaeflowError

NEW, OLD = "new", "old"
# Of Linux, see renameat2(2).
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    What stood at `target` is replaced whole; when the block raises, it is left as it was. Whatever
    happens to process or machine, one of the two is there afterwards: what is new is on the disk
    before it takes the place, and where the system can, the two change places in one step. Where it
    cannot, the old folder is for a moment aside, and after a kill just then the next call puts it
    back.
    """
    with _staging(target) as staging:
        fresh = staging / NEW
        fresh.mkdir()
        yield fresh
        _sync_tree(fresh)
        if not (os.path.lexists(target) and _exchange(fresh, target)):
            if os.path.lexists(target):
                target.rename(staging / OLD)
            fresh.rename(target)
        _sync(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`, renamed to it, and on the disk, when the block ends well."""
    with _staging(target) as staging:
        fresh = staging / target.name
        yield fresh
        _sync(fresh)
        fresh.replace(target)
        _sync(target.parent)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target`, locked while it is in use, and removed afterwards.

    What others left behind that were killed is tidied up first.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)
    prefix = f".{target.name}.staging-"
    for left in target.parent.glob(f"{glob.escape(prefix)}????????"):
        with suppress(BlockingIOError, FileNotFoundError, NotADirectoryError), locked(left, False):
            _tidy_up(left, target)
    with ExitStack() as held:
        folder: Path | None = None
        while folder is None:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            try:
                held.enter_context(locked(folder, True))
            except FileNotFoundError:
                folder = None
        held.callback(_tidy_up, folder, target)
        yield folder


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Lock a folder while the block runs: nobody else has it, or takes it for one left behind.

    Args:
        folder: it may be removed in the block.
        wait: for whoever has it.

    Raises:
        BlockingIOError: somebody has it, in this process or in another.
        FileNotFoundError: it is gone; somebody tidied it up before it was locked.
    """
    import fcntl  # Windows, where bundles are read, has none

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        folder.stat()
        yield
    finally:
        os.close(handle)


def _tidy_up(staging: Path, target: Path) -> None:
    """Remove a staging folder, and put back the old target when the new one did not follow it."""
    new, old = staging / NEW, staging / OLD
    if new.exists() and os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
        _sync(target.parent)
    shutil.rmtree(new, ignore_errors=True)  # first, lest a part of the old one be put back
    shutil.rmtree(staging, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; return whether the system could."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # a C library from before 2018
        return False
    return call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network drives say of a folder
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def cache_folder() -> Path:
    """Return where downloads are kept: `VAEFLOW_CACHE`, by default `~/.cache/vaeflow`.

    Raises:
        VaeflowError: it cannot be made, or is no folder.
    """
    folder = _cache_path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What others could write there they could have loaded here.
        if (mode := stat.S_IMODE(folder.stat().st_mode)) & 0o022:
            folder.chmod(mode & ~0o022)
    except OSError as error:
        raise VaeflowError(_unusable(folder, error)) from None
    return folder


def cache_error_message(error: OSError) -> str | None:
    """Return a message for a file system error in the cache; None for any other error."""
    folder = _cache_path()
    if not error.filename or folder not in Path(os.fsdecode(error.filename)).parents:
        return None
    return _unusable(folder, error)


def _cache_path() -> Path:
    # Set and empty is unset: it would be the working directory.
    return Path(os.environ.get("VAEFLOW_CACHE") or "~/.cache/vaeflow").expanduser().absolute()


def _unusable(cache: Path, error: OSError) -> str:
    return (
        f"{cache}: downloads and pulled models cannot be kept there ({error.strerror}). Name a "
        "folder that can be written in VAEFLOW_CACHE."
    )


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
