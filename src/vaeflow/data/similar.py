"""Find near-duplicates: the same picture saved again, in another size, darker, or a little noisy.

A picture is reduced to 16 x 16 cells of grey. The signs of its 64 lowest frequencies are its
perceptual hash (Zauner 2010): near-duplicates share at least one quarter of it. Of those that do,
the cells are compared. Small pictures full of detail that were reduced and enlarged are not found.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaeflow.data.io.reading import Images
from vaeflow.data.splits import ANOMALY, LEFT_OUT, OTHERS_BY_CONTENT, SPLITS, digest_keys

EDGE = 16  # cells
BITS, BANDS = 64, 4
MOST_BITS_APART = 10
# Of the cells of two pictures. Two different digits of MNIST reach 0.9951, two of scikit-learn's
# 0.993; a digit and its JPEG of quality 50 have 0.997 or more.
LEAST_CORRELATION = 0.996
LARGEST_BUCKET, NEIGHBOURS = 1_000, 100
PAIRS_AT_ONCE, CELLS_AT_ONCE = 1 << 16, 1 << 12
LARGEST_MAPPED = 64 << 20  # bytes
VALUES_AT_ONCE, IMAGES_AT_ONCE = 1 << 19, 1 << 11
PLACES = np.sort([*SPLITS, LEFT_OUT, ANOMALY])
_MAY_BE = {given: {SPLITS[0], split} for split, given in OTHERS_BY_CONTENT.items()}


class Pair(NamedTuple):
    """Two images that are nearly the same, by their row numbers."""

    earlier: int
    later: int


class Fingerprints:
    """The hashes of a growing set of images; their cells are kept in a file until it is closed.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from threadpoolctl import threadpool_limits

        # The cores are decoding images: a product that asks for all of them waits for each.
        self._one_thread = threadpool_limits(1, "blas")
        self._path = path
        self._file = path.open("wb")
        self._hashes: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._splits: list[np.ndarray] = []  # places in `PLACES`: a byte an image

    def add(self, images: Images, splits: np.ndarray) -> None:
        """Add images, with the split of each."""
        # Few at once stay in the processor's cache; of tiny images there may be many in a block.
        at_once = max(1, min(IMAGES_AT_ONCE, VALUES_AT_ONCE // images.pixels[0].size))
        for start in range(0, len(images.pixels), at_once):
            cells = _cells(images.pixels[start : start + at_once])
            self._hashes.append(_hashes(cells))
            # Tiles of pictures may be of one colour: those are near to none.
            largest = np.maximum(np.abs(cells).max(axis=1, keepdims=True), 1e-6)
            self._file.write(np.rint(127 * cells / largest).astype("i1").data)
        # Half of a key: of a million images no two share it by chance.
        self._keys.append(digest_keys(images.digests).view(np.uint64)[::2].copy())
        self._splits.append(np.searchsorted(PLACES, splits).astype(np.uint8))

    @cached_property
    def keys(self) -> np.ndarray:
        """A number of each digest, `(count,)`; to be asked for when all were added."""
        return np.concatenate(self._keys)

    @cached_property
    def splits(self) -> Sequence[str]:
        """The split of each image as it was added; to be asked for when all were."""
        places = np.concatenate(self._splits) if self._splits else np.empty(0, np.uint8)
        return _Splits(places)

    def pairs(self) -> list[Pair]:
        """Return the pairs of near-duplicates, exact copies among them, in order of the later."""
        self._file.flush()
        hashes = np.concatenate(self._hashes) if self._hashes else np.empty(0, np.uint64)
        if not len(hashes):
            return []
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cells = np.frombuffer(mapped, "i1").reshape(-1, EDGE * EDGE)
        copy_of = _first_of_equals(self.keys)
        copies = np.flatnonzero(copy_of != np.arange(len(copy_of), dtype=np.int32))
        found = {Pair(int(copy_of[row]), int(row)) for row in copies}
        # A copy is as near to others as its original is.
        originals = np.flatnonzero(copy_of == np.arange(len(copy_of), dtype=np.int32))
        for rows in _candidates(hashes[originals]):
            left, right = originals[rows[:, 0]], originals[rows[:, 1]]
            near = _correlation(cells[left], cells[right]) >= LEAST_CORRELATION
            pairs = np.sort(np.column_stack([left[near], right[near]]), axis=1)
            found.update(Pair(*pair) for pair in pairs.tolist())
            # What was touched of a mapped file counts as memory until it is given back.
            if len(mapped) > LARGEST_MAPPED:
                mapped.madvise(mmap.MADV_DONTNEED)
        return sorted(found, key=lambda pair: (pair.later, pair.earlier))

    def same(self, pair: Pair) -> bool:
        """Return whether two images are exact copies."""
        return bool(self.keys[pair.earlier] == self.keys[pair.later])

    def close(self) -> None:
        """Remove the file."""
        self._one_thread.restore_original_limits()
        self._file.close()
        os.unlink(self._path)  # noqa: PTH108


class _Splits(Sequence[str]):
    """Names of splits, of which each takes a byte."""

    def __init__(self, places: np.ndarray) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: Any) -> Any:
        return str(PLACES[self._places[row]])


class Joined(NamedTuple):
    """What near-duplicates do to splits.

    Attributes:
        splits: of the images that get another than they had, by row.
        images: how many are near-duplicates of an earlier one; exact copies do not count.
        left_out: how many stand between two splits, and are in none.
        straddling: pairs that stand in two splits, as published.
    """

    splits: dict[int, str]
    images: int
    left_out: int
    straddling: int


def join_splits(
    fingerprints: Fingerprints, held: int, given: Sequence[str | None], published: bool
) -> Joined:
    """Let near-duplicates join the split that was assigned first.

    Args:
        fingerprints: of all images.
        held: images before this row are in `data/` already: they stay as they are.
        given: the split that each later image came with; None: its content decides.
        published: whether they keep that.

    Returns:
        What has changed.
    """
    splits, changed = fingerprints.splits, dict[int, str]()
    near: dict[int, set[int]] = {}
    alike: set[int] = set()
    for pair in fingerprints.pairs():
        near.setdefault(pair.later, set()).add(pair.earlier)
        if pair.later >= held and not fingerprints.same(pair):
            alike.add(pair.later)
    straddling = 0
    for row, others in sorted(near.items()):
        found = {changed.get(other, splits[other]) for other in others} - {LEFT_OUT, ANOMALY}
        if row < held or splits[row] == ANOMALY:
            continue
        if published and (own := given[row - held]) is not None:
            may_be = _MAY_BE.get(own, {own})
            straddling += len(found - may_be)
            found &= may_be
        if not found:
            continue
        wanted = found.pop() if len(found) == 1 else LEFT_OUT
        if wanted != splits[row]:
            changed[row] = wanted
    left_out = sum(split == LEFT_OUT for split in changed.values())
    return Joined(changed, len(alike), left_out, straddling)


def _first_of_equals(keys: np.ndarray) -> np.ndarray:
    """Return the first row with the same key, for each row."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    new = np.r_[True, keys[order[1:]] != keys[order[:-1]]]
    first = np.empty(len(keys), np.int32)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs of rows that share a quarter of their hash, `(count, 2)`."""
    bands = hashes.view(np.uint16).reshape(-1, BANDS)
    for band in range(BANDS):
        order = np.lexsort((hashes, bands[:, band])).astype(np.int32)
        values = bands[order, band]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        sizes = np.diff(np.r_[starts, len(values)]).astype(np.int32)
        # How many of its bucket come after each, as far as they are compared.
        after = np.repeat(starts + sizes, sizes).astype(np.int32)
        after -= np.arange(1, len(values) + 1, dtype=np.int32)
        np.minimum(after, NEIGHBOURS, where=np.repeat(sizes > LARGEST_BUCKET, sizes), out=after)
        # Images next to each other, then the second next, and so on, all buckets at once.
        for step in itertools.count(1):
            left = np.flatnonzero(after >= step)
            if not len(left):
                break
            for start in range(0, len(left), PAIRS_AT_ONCE):
                here = left[start : start + PAIRS_AT_ONCE]
                rows = np.column_stack([order[here], order[here + step]])
                apart = np.bitwise_count(hashes[rows[:, 0]] ^ hashes[rows[:, 1]])
                rows = rows[apart <= MOST_BITS_APART]
                for first in range(0, len(rows), CELLS_AT_ONCE):
                    yield rows[first : first + CELLS_AT_ONCE]


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float32), right.astype(np.float32)
    product = (left * right).sum(axis=1)
    return product / np.sqrt(np.square(left).sum(axis=1) * np.square(right).sum(axis=1))


def _cells(pixels: np.ndarray) -> np.ndarray:
    """Reduce images to cells of grey about their mean, float32 `(count, 256)`."""
    cells = _averaged(pixels)
    cells -= cells.mean(axis=1, keepdims=True)
    cells[:, 0] += 1e-6 * (np.abs(cells).max(axis=1) == 0)  # of one colour: no division by 0
    return cells


def _averaged(pixels: np.ndarray) -> np.ndarray:
    count, height, width, channels = pixels.shape
    rows = pixels.reshape(count, height, width * channels)
    # Grey is the mean of the channels.
    weights = np.repeat(_averages(width), channels, axis=1).T / np.float32(channels)
    if height >= 2 * EDGE:
        # Whole rows to a cell, whose sum is quickly taken; the few rows that are over are left out.
        deep = height // EDGE
        kind = np.uint16 if deep * 255 < 2**16 else np.uint32
        stacked = rows[:, : EDGE * deep].reshape(count, EDGE, deep, -1)
        sums = stacked.sum(axis=2, dtype=kind).reshape(count * EDGE, -1)
        return np.asarray(sums.astype(np.float32) @ weights / deep).reshape(count, EDGE * EDGE)
    narrow = (rows.reshape(count * height, -1).astype(np.float32) @ weights).reshape(
        count, height, EDGE
    )
    cells = np.tensordot(narrow, _averages(height), axes=(1, 1)).transpose(0, 2, 1)
    return np.ascontiguousarray(cells).reshape(count, EDGE * EDGE)


@cache
def _averages(edge: int) -> np.ndarray:
    """Return weights that average an edge in `EDGE` cells, `(EDGE, edge)`; both may be larger."""
    bounds = np.arange(EDGE + 1) * edge / EDGE
    pixel = np.arange(edge)
    inside = np.minimum(bounds[1:, None], pixel + 1) - np.maximum(bounds[:-1, None], pixel)
    return (np.clip(inside, 0, None) * EDGE / edge).astype(np.float32)


@cache
def _frequencies() -> np.ndarray:
    """Return the lowest cosines of `EDGE` x `EDGE` cells, `(BITS, EDGE * EDGE)`.

    So ordered that each quarter of the hash has low ones and high ones.
    """
    place = (np.arange(EDGE) + 0.5) * np.pi / EDGE
    cosines = np.cos(np.arange(EDGE)[:, None] * place)
    numbers = sorted(
        ((i, j) for i in range(EDGE) for j in range(EDGE) if i or j),
        key=lambda pair: (sum(pair), pair),
    )
    numbers = [pair for band in range(BANDS) for pair in numbers[:BITS][band::BANDS]]
    return np.stack([np.outer(cosines[i], cosines[j]).ravel() for i, j in numbers]).astype("f4")


def _hashes(cells: np.ndarray) -> np.ndarray:
    """Return the perceptual hash of each image, uint64 `(count,)`."""
    positive = cells @ _frequencies().T > 0
    return np.packbits(positive, axis=1).view(np.uint64)[:, 0]
