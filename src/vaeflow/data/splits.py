"""Which split an image belongs to, decided by its content alone."""

from __future__ import annotations

import hashlib

import numpy as np

SPLITS = ("train", "validation", "test")


def split_of(image: np.ndarray, seed: int, validation_fraction: float, test_fraction: float) -> str:
    """The split of one image: a hash of seed, shape and pixels, read as a number in [0, 1).

    Equal images get equal splits, so a duplicate never straddles two; and an image keeps its split
    when the data set grows, so test images stay unseen.

    Args:
        image: uint8, `(height, width, channels)`.
        seed: another seed gives another split.
        validation_fraction, test_fraction: expected shares, each in (0, 1).
    """
    digest = hashlib.sha256(f"{seed}:{image.shape}:".encode())
    digest.update(np.ascontiguousarray(image))
    position = int.from_bytes(digest.digest()[:8], "big") / 2**64
    if position < test_fraction:
        return "test"
    if position < test_fraction + validation_fraction:
        return "validation"
    return "train"
