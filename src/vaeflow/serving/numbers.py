"""Read and write JSON that is mostly numbers, in pieces.

Each piece is a call of a millisecond or two, and what is read becomes an array as it comes: a
parser of any JSON would make a Python object of each number, thirty times its size, and would hold
the interpreter's lock meanwhile. What is not numbers is refused where it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pydantic_core

from vaeflow.serving.refusals import RefusedError

PIECE = 32 << 10  # bytes of text read, or numbers written, at once
TEXT_BYTES = 64 << 10  # of a JSON, beside the numbers in it
MOST_AXES = 8
NAME = re.compile(rb'"((?:[^"\\]|\\.)*+)"(\s*:\s*(?=\[))?', re.DOTALL)
NO_NUMBERS = re.compile(rb"[^\[\]\s0-9eE+\-.,]")
SPACES = bytes.maketrans(b"[]", b"  ")


class Found:
    """The text of a nested list of numbers."""

    def __init__(self, text: bytes):
        self._text = text

    def read(self, dtype: np.dtype, field: str, most: int) -> np.ndarray:
        """Read the numbers.

        Args:
            dtype: of the array; integers must fit in.
            field: its name, for errors.
            most: numbers that there may be.

        Raises:
            RefusedError: 422 when they are ragged, no numbers, or do not fit into the type; 413
                when there are too many.
        """
        if (commas := self._text.count(b",")) >= most:
            raise RefusedError(
                413, f"{field}: {commas + 1} numbers; one request may have {most}.", field
            )
        shape = _shape(self._text)
        if shape is None:
            raise RefusedError(
                422, f"{field}: expected nested lists of numbers, of equal lengths.", field
            )
        count = math.prod(shape)
        text = self._text.translate(SPACES)
        if not text.strip():
            return np.empty((0,), dtype)
        array, filled = np.empty(count, dtype), 0
        for piece in _pieces(text):
            values = _numbers(piece, dtype, field)
            if filled + len(values) > count:
                break
            array[filled : filled + len(values)] = values
            filled += len(values)
        else:
            if filled == count:
                return array.reshape(shape)
        raise RefusedError(422, f"{field}: a number is missing in a list.", field)


def parse(body: bytes, *names: str) -> tuple[bytes, list[Found]]:
    """Take the lists of numbers under some names out of a JSON.

    Args:
        body: the JSON.
        names: after which the lists stand, at whatever depth.

    Returns:
        The JSON with the index of a list in the place of each, and the lists.

    Raises:
        RefusedError: 413 when much is left of it.
    """
    wanted = {name.encode() for name in names}
    rest: list[bytes] = []
    lists: list[Found] = []
    kept = at = 0
    while match := NAME.search(body, at, min(len(body), kept + TEXT_BYTES)):
        at = match.end()
        if not match[2] or match[1] not in wanted:
            continue
        end = _end_of_list(body, at)
        if body.count(b"[", at, end) != body.count(b"]", at, end):
            field = match[1].decode()
            raise RefusedError(422, f"{field}: expected nested lists of numbers.", field)
        rest += [body[kept:at], b"%d" % len(lists)]
        lists.append(Found(body[at:end]))
        if sum(map(len, rest)) > TEXT_BYTES:
            break
        kept = at = end
    rest.append(body[kept : kept + TEXT_BYTES + 1])
    if sum(map(len, rest)) > TEXT_BYTES:
        raise RefusedError(
            413, f"beside its numbers the JSON may hold {TEXT_BYTES} bytes at most.", "body"
        )
    return b"".join(rest), lists


def _end_of_list(body: bytes, start: int) -> int:
    """Return where a list of numbers ends that begins at `start`; it may hold something else."""
    at = start
    while at < len(body):
        stop = NO_NUMBERS.search(body, at, at + (1 << 20))
        if stop is not None:
            at = stop.start()
            break
        at += 1 << 20
    return max(body.rfind(b"]", start, at), start) + 1


def _shape(text: bytes) -> tuple[int, ...] | None:
    """Find out the shape of a nested list from its brackets and commas; None where it is ragged."""
    skeleton = text.translate(None, b" \t\r\n0123456789eE+-.")
    axes = len(skeleton) - len(skeleton.lstrip(b"["))
    if not 0 < axes <= MOST_AXES:
        return None
    # From the innermost list outwards: the first of a depth says what all must be.
    lengths = [skeleton.find(b"]") - axes + 1]
    unit = b"[" + b"," * (lengths[0] - 1) + b"]"
    for depth in range(1, axes):
        end = skeleton.find(b"]" * (depth + 1)) + depth  # where the first list of it ends
        length, odd = divmod(end - (axes - depth - 1), len(unit) + 1)
        if odd or length < 1:
            return None
        lengths.append(length)
        unit = b"[" + (unit + b",") * (length - 1) + unit + b"]"
        if not skeleton.startswith(unit, axes - depth - 1):
            return None
    return tuple(reversed(lengths)) if skeleton == unit else None


def _pieces(text: bytes) -> Iterator[bytes]:
    """Cut at commas."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind(b",", start, start + PIECE)
        if end < 0:
            break  # no number is as long: it is refused as what it is
        yield text[start:end]
        start = end + 1
    yield text[start : start + 2 * PIECE]


def _numbers(piece: bytes, dtype: np.dtype, field: str) -> np.ndarray:
    try:
        values = np.asarray(pydantic_core.from_json(b"[" + piece + b"]"))
    except (ValueError, OverflowError):
        values = np.empty((), object)
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise RefusedError(422, f"{field}: expected numbers, with a comma between two.", field)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        whole = values.dtype.kind in "iu"
        if not whole or (values.size and not info.min <= values.min() <= values.max() <= info.max):
            raise RefusedError(422, f"{field}: expected integers {info.min}..{info.max}.", field)
    with np.errstate(over="ignore"):  # becomes infinite, which is refused with its field
        return values.astype(dtype)


def write(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Write arrays by name, as a JSON object of nested lists."""
    parts: list[bytes] = []
    for name, array in arrays.items():
        parts += [b"," if parts else b"{", pydantic_core.to_json(name), b":", *_texts(array)]
    return b"".join([*(parts or [b"{"]), b"}"])


def write_flat(array: np.ndarray) -> bytes:
    """Write all numbers of an array as one list."""
    return b"".join(_texts(array.ravel()))


def _texts(array: np.ndarray) -> Iterator[bytes]:
    """Write some rows at a time."""
    rows = max(1, PIECE // max(1, math.prod(array.shape[1:])))
    yield b"["
    for start in range(0, len(array), rows):
        piece: Any = array[start : start + rows].tolist()
        yield (b"," if start else b"") + pydantic_core.to_json(piece)[1:-1]
    yield b"]"
