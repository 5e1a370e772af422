"""Which split an image belongs to, decided by its content alone, and the splits as prepared."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from vaeflow.config.schema import Prepare


SPLITS = ("train", "validation", "test")
# Given to images of train where no others were given for that split: their content decides.
OTHERS_BY_CONTENT = {"validation": "train or validation", "test": "train or test"}
# Half of validation: never looked at in training, not even to end it, so that it can say how usual
# an image is (see `vaeflow.bundle.anomaly`).
CALIBRATION = "calibration"
LEFT_OUT = "left out"  # like an image of another split than its own
ANOMALY = "anomaly"  # known not to be as it should be: what is noticed is tried on these
GIVEN = (*SPLITS, *OTHERS_BY_CONTENT.values(), LEFT_OUT, ANOMALY)
WRITTEN = re.compile(
    r"content, seed (\d+), validation ([\d.e-]+), test ([\d.e-]+)(?:; given ([0-9a-f, ]+))?"
)


def evenly(count: int, most: int) -> np.ndarray:
    """Choose rows that are spread over all: the first of a folder sorted by label are of one label.

    Args:
        count: rows there are.
        most: to choose.

    Returns:
        Row numbers in ascending order, `(min(count, most),)`.
    """
    return np.arange(min(count, most)) * count // max(1, min(count, most))


def pixel_digests(images: np.ndarray) -> np.ndarray:
    """Return the SHA-256 of each image's pixels.

    Args:
        images: uint8, `(count, height, width, channels)`.

    Returns:
        uint8, `(count, 32)`.
    """
    rows = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    return as_digests([hashlib.sha256(row.data).digest() for row in rows])


def pixel_digest(image: np.ndarray) -> bytes:
    """Return the SHA-256 of one image's pixels, uint8 `(height, width, channels)`."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def as_digests(digests: Sequence[bytes]) -> np.ndarray:
    """Convert digests of 32 bytes to an array, uint8 `(count, 32)`."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def digest_keys(digests: np.ndarray) -> np.ndarray:
    """Return half of each digest, `(count,)` of 16 bytes: enough to tell images apart."""
    return digests[:, :16].copy().view("V16")[:, 0]


class SplitRule(NamedTuple):
    """How images are split: by their digests, mixed with a seed, read as numbers in [0, 1).

    Equal images get equal splits, so a duplicate never straddles two; and an image keeps its split
    when the data set grows, so test images stay unseen. Written with a model as text, the rule
    tells of any image which split it was in when the model was trained.

    Some images come with a split, from their publisher or by the folders they lay in. It is kept
    for ever; which images those were is written down, too.

    Attributes:
        seed: another seed gives another split.
        validation_fraction, test_fraction: expected shares, each in (0, 1).
        given: digests of the splits that came with images, one for each part of the data set.

    Examples:
        >>> str(SplitRule(0, 0.1, 0.1))
        'content, seed 0, validation 0.1, test 0.1'
    """

    seed: int
    validation_fraction: float
    test_fraction: float
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, parameters: Prepare, given: Iterable[str] = ()) -> SplitRule:
        """Return the rule that the parameters describe."""
        shares = (parameters.validation_fraction, parameters.test_fraction)
        return cls(parameters.seed, *shares, tuple(sorted(given)))

    def assign(self, digests: np.ndarray, given: Sequence[str | None] | None = None) -> np.ndarray:
        """Assign a split to each image.

        Args:
            digests: from `pixel_digests`, `(count, 32)`.
            given: of `GIVEN`, where an image came with its split.

        Returns:
            A name of `SPLITS` for each image, or `LEFT_OUT` or `ANOMALY`; `(count,)`.
        """
        splits = self._by_content(digests)
        if given is None or not any(given):
            return splits
        kept = np.array([split or "" for split in given])
        for split, by_content in OTHERS_BY_CONTENT.items():
            chosen = kept == by_content
            kept[chosen] = np.where(splits[chosen] == split, split, SPLITS[0])
        return np.where(kept == "", splits, kept)

    def _by_content(self, digests: np.ndarray) -> np.ndarray:
        position = _numbers(digests[:, :8], self.seed) / 2.0**64
        in_test = position < self.test_fraction
        in_validation = position < self.test_fraction + self.validation_fraction
        return np.select([in_test, in_validation], ["test", "validation"], "train")

    def __str__(self) -> str:
        # repr: these very fractions again.
        shares = f"validation {self.validation_fraction!r}, test {self.test_fraction!r}"
        given = f"; given {', '.join(self.given)}" if self.given else ""
        return f"content, seed {self.seed}, {shares}{given}"

    @classmethod
    def parse(cls, text: str) -> SplitRule:
        """Parse what `str` has written.

        Raises:
            ValueError: it has not.
        """
        if not (match := WRITTEN.fullmatch(text)):
            raise ValueError(f"{text!r} is no split by content.")
        given = tuple(match[4].split(", ")) if match[4] else ()
        return cls(int(match[1]), float(match[2]), float(match[3]), given)


def for_calibration(digests: np.ndarray) -> np.ndarray:
    """Choose the half of the validation images that calibrates, by their content.

    Args:
        digests: from `pixel_digests`, `(count, 32)`.

    Returns:
        Booleans, `(count,)`.
    """
    return _numbers(digests[:, 16:24], 0) % np.uint64(2) == 1


def shuffle_keys(digests: np.ndarray, seed: int) -> np.ndarray:
    """Return a number for each image, to order images at random: the same for equal ones.

    Has nothing to do with which split an image is in.

    Args:
        digests: from `pixel_digests`, `(count, 32)`.
        seed: another seed gives another order.

    Returns:
        uint64, `(count,)`.
    """
    return _numbers(digests[:, 8:16], seed)


def _numbers(digits: np.ndarray, seed: int) -> np.ndarray:
    leading = np.ascontiguousarray(digits).view(">u8")[:, 0].astype(np.uint64)
    return _mix(leading ^ _mix(np.array([seed], np.uint64)))


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix bits by SplitMix64 (Steele, Lea and Flood 2014), one to one."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def load_split(prepared: Path, name: str) -> np.memmap:
    """Load one split, memory-mapped: uint8 `(count, height, width, channels)`.

    Args:
        prepared: the folder that `prepare` wrote.
        name: of `SPLITS`, or `CALIBRATION` or `ANOMALY`.
    """
    return np.load(prepared / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def read_labels(prepared: Path, split: str) -> np.ndarray | None:
    """Read the labels of a split in the order of its array, text `(images,)`; None without any.

    An image without a label among others that have one is labelled `none`.

    Args:
        prepared: the folder that `prepare` wrote.
        split: `train`, `validation`, `calibration`, `test` or `anomaly`.
    """
    labels = _index(prepared, split, "label")["label"]
    if labels.null_count == len(labels):
        return None
    return labels.fill_null("none").to_numpy().astype(str)


def read_pictures(prepared: Path, split: str) -> np.ndarray | None:
    """Read of which picture each image is a tile: a number a picture, `(images,)`.

    None where no image is a tile; one that is none among others is a picture by itself.

    Args:
        prepared: the folder that `prepare` wrote.
        split: `train`, `validation`, `calibration`, `test` or `anomaly`.
    """
    import pyarrow.compute

    table = _index(prepared, split, "picture", "sha256")
    if table["picture"].null_count == len(table):
        return None
    pictures = pyarrow.compute.coalesce(table["picture"], table["sha256"])
    return np.unique(pictures.to_numpy().astype(str), return_inverse=True)[1]


def read_sources(prepared: Path, split: str) -> list[str]:
    """Read where each image of a split came from, in the order of its array.

    Args:
        prepared: the folder that `prepare` wrote.
        split: `train`, `validation`, `calibration`, `test` or `anomaly`.
    """
    return [str(source) for source in _index(prepared, split, "source")["source"].to_pylist()]


def _index(prepared: Path, split: str, *columns: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(
        prepared / "index.parquet", columns=list(columns), filters=[("split", "=", split)]
    )


def given_splits(prepared: Path) -> dict[str, str]:
    """Read the digest of the splits that came with images, by the part of `data/` they are in."""
    path = prepared / "dataset.json"
    return dict(json.loads(path.read_text()).get("given", {})) if path.is_file() else {}


def image_shape(prepared: Path) -> tuple[int, int, int]:
    """Read the `(height, width, channels)` of the prepared images."""
    return tuple(json.loads((prepared / "dataset.json").read_text())["image_shape"])
