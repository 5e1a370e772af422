"""Read arrays from HDF5 and from MATLAB's `.mat`, of version 5 and 7.3 (which is HDF5)."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from vaeflow.data.io.arrays import ArrayFile, Members, check_expansion
from vaeflow.errors import BadImageError

SUFFIXES = {".mat", ".h5", ".hdf5"}
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
USER_BLOCK = 512  # before HDF5's magic number, in a .mat


def open_members(
    path: Path, file: IO[bytes], size: int, expansion: int, stack: ExitStack
) -> Members:
    """Open a file and list its arrays, by what their headers say.

    Args:
        path: of the file.
        file: the same, open.
        size: of it, in bytes.
        expansion: how far it may expand.
        stack: closes what is opened.
    """
    start = file.read(USER_BLOCK + len(HDF5_MAGIC))
    if start.startswith(HDF5_MAGIC) or start[USER_BLOCK:] == HDF5_MAGIC:
        return _hdf5(path, size, expansion, stack)
    if path.suffix.lower() != ".mat":
        raise ValueError("no HDF5")
    return _matlab5(path, size, expansion)


def _hdf5(path: Path, size: int, expansion: int, stack: ExitStack) -> Members:
    import h5py

    file = stack.enter_context(h5py.File(path, "r"))
    found: dict[str, Any] = {}

    def look(group: Any, prefix: str) -> None:
        for name in group:
            # Links could lead to other files, or in a circle.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Group):
                if not name.startswith("#") and prefix.count("/") < 8:
                    look(item, f"{prefix}{name}/")
            elif isinstance(item, h5py.Dataset) and item.dtype.kind in "biuf" and item.shape:
                found[f"{prefix}{name}"] = item

    look(file, "")
    # MATLAB's axes come in reverse.
    matlab = path.suffix.lower() == ".mat"

    def open_member(name: str) -> ArrayFile:
        item = found[name]
        if item.is_virtual or item.external:
            raise BadImageError(path, f"{name} lies in other files, which are not opened.")
        check_expansion(path, math.prod(item.shape) * item.dtype.itemsize, size, expansion)
        values = _Reversed(item) if matlab else item
        shape = item.shape[::-1] if matlab else item.shape
        member = name if len(found) > 1 else None
        packed = item.chunks is not None
        return ArrayFile(path, shape, item.dtype, values=values, packed=packed, member=member)

    shapes = {name: item.shape[::-1] if matlab else item.shape for name, item in found.items()}
    return Members(path, shapes, open_member)


class _Reversed:
    """A view of an HDF5 data set with its axes in reverse; what is indexed is read."""

    def __init__(self, item: Any) -> None:
        self._item = item

    def __getitem__(self, key: Any) -> np.ndarray:
        if key is ...:
            return np.asarray(self._item[...]).T
        axes = (*key, *(slice(None),) * (self._item.ndim - len(key)))
        return np.asarray(self._item[axes[::-1]]).T


def _matlab5(path: Path, size: int, expansion: int) -> Members:
    from scipy.io import loadmat, whosmat

    numeric = {"double", "single", "logical"} | {
        f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
    }
    shapes = {name: shape for name, shape, kind in whosmat(path) if kind in numeric}

    def open_member(name: str) -> ArrayFile:
        check_expansion(path, math.prod(shapes[name]), size, expansion)
        values = loadmat(path, variable_names=[name])[name]
        member = name if len(shapes) > 1 else None
        return ArrayFile(path, values.shape, values.dtype, values=values, member=member)

    return Members(path, shapes, open_member)
