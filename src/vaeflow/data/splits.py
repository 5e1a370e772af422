"""Which split an image belongs to, decided by its content alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "validation", "test")


def pixel_digests(images: np.ndarray) -> np.ndarray:
    """SHA-256 of each image's pixels.

    Args:
        images: uint8, `(count, height, width, channels)`.

    Returns:
        uint8, `(count, 32)`.
    """
    rows = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    return as_digests([hashlib.sha256(row).digest() for row in rows])


def pixel_digest(image: np.ndarray) -> bytes:
    """SHA-256 of one image's pixels, uint8 `(height, width, channels)`."""
    return hashlib.sha256(np.ascontiguousarray(image)).digest()


def as_digests(digests: Sequence[bytes]) -> np.ndarray:
    """Digests of 32 bytes as an array, uint8 `(count, 32)`."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def digest_keys(digests: np.ndarray) -> np.ndarray:
    """Half of each digest, `(count,)` of 16 bytes: tells images apart as surely, in less memory."""
    return digests[:, :16].copy().view("V16")[:, 0]


def assign_splits(
    digests: np.ndarray, seed: int, validation_fraction: float, test_fraction: float
) -> np.ndarray:
    """The split of each image: its digest, mixed with the seed, read as a number in [0, 1).

    Equal images get equal splits, so a duplicate never straddles two; and an image keeps its split
    when the data set grows, so test images stay unseen.

    Args:
        digests: from `pixel_digests`, `(count, 32)`.
        seed: another seed gives another split.
        validation_fraction, test_fraction: expected shares, each in (0, 1).

    Returns:
        A name of `SPLITS` for each image, `(count,)`.
    """
    leading = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    position = _mix(leading ^ _mix(np.array([seed], np.uint64))) / 2.0**64
    in_test = position < test_fraction
    in_validation = position < test_fraction + validation_fraction
    return np.select([in_test, in_validation], ["test", "validation"], "train")


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): one to one, and every bit depends on every other."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
