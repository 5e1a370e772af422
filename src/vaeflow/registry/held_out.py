"""Which test images two models are compared on, and how often these have decided before."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vaeflow.data.splits import SplitRule, digest_keys, given_splits, shuffle_keys
from vaeflow.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from vaeflow.registry.versions import Version


SEED = 0  # of the choice among the test images
LEAST_IMAGES = 30
# On the registered model, a tag for each set of test images: how many tries, and a sketch of it.
TRIES_TAG = "gate.tries."
# On a version: which set and champion its last try was on, and its number there.
TRY_TAG = "gate.try"
SKETCHED = 64  # images that stand for a set
DIGITS = 8  # hexadecimal ones of each
# A set of which more has changed than stayed is another one.
SAME_SHARE = 0.5


class HeldOut(NamedTuple):
    """The images of the test split as the index has them.

    Attributes:
        digests: of their pixels, uint8 `(count, 32)`, in the order of `test.npy`.
        labels: text, or None, `(count,)`.
        given: for images whose split was given, the digest of all that were given with theirs;
            None for the others, `(count,)`.
        all_given: those digests of the whole data set.
        origins: digests of the pictures of which they are tiles, or their own; None: their own.
    """

    digests: np.ndarray
    labels: np.ndarray
    given: np.ndarray | None = None
    all_given: frozenset[str] = frozenset()
    origins: np.ndarray | None = None


def read_held_out(prepared: Path) -> HeldOut:
    """Read the test split of the prepared images."""
    import pyarrow.compute
    import pyarrow.parquet

    by_part = given_splits(prepared)
    columns = ["label", "sha256", "picture", *(["given"] if by_part else ())]
    table = pyarrow.parquet.read_table(
        prepared / "index.parquet", columns=columns, filters=[("split", "=", "test")]
    )
    given = None
    if by_part:
        parts = table["given"].to_pylist()
        given = np.array([part and by_part[part] for part in parts], dtype=object)
    digests, origins = (
        np.frombuffer(bytes.fromhex("".join(column.to_pylist())), np.uint8).reshape(-1, 32)
        for column in (
            table["sha256"],
            pyarrow.compute.coalesce(table["picture"], table["sha256"]),
        )
    )
    labels = np.array(table["label"].to_pylist(), dtype=object)
    return HeldOut(
        digests,
        labels,
        given,
        frozenset(by_part.values()),
        origins,
    )


def unseen_images(split: HeldOut, rules: dict[str, str | None]) -> np.ndarray:
    """Find the images that none of the models had for training or validation.

    Args:
        split: the images there are.
        rules: by what a model is called, how its images were split; None where nobody knows.

    Returns:
        Booleans, `(count,)`.

    Raises:
        RegistryError: it is not known of one, or too few are left.
    """
    unseen = np.ones(len(split.digests), bool)
    origins = split.digests if split.origins is None else split.origins
    for model, text in rules.items():
        try:
            rule = SplitRule.parse(text or "")
        except ValueError:
            raise RegistryError(
                f"which images {model} was trained on is not known (its split is "
                f"{text or 'not recorded'}), so that no image is sure to be new to it"
            ) from None
        if gone := set(rule.given) - split.all_given:
            raise RegistryError(
                f"which images {model} was trained on is not known: the splits that came with some "
                f"of them ({', '.join(sorted(gone))}) are not in data/ any more"
            )
        in_test = rule.assign(origins) == "test"
        if split.given is not None:
            in_test |= np.isin(split.given.astype(str), list(rule.given))
        unseen &= in_test
    # Where both were split alike, all are new, however few they are.
    if (left := np.count_nonzero(unseen)) < LEAST_IMAGES and left < len(unseen):
        named = "; ".join(f"{model}: {text}" for model, text in rules.items())
        raise RegistryError(
            f"only {left} of {len(unseen)} test images are new to both, and {LEAST_IMAGES} are "
            f"needed: their images were split differently ({named})"
        )
    return unseen


def choose_images(split: HeldOut, among: np.ndarray, count: int) -> np.ndarray:
    """Choose images at random, of every label its share, and no image twice.

    The same images come in whatever order the split has them, and when images are added most of
    those chosen before stay.

    Args:
        split: the images there are.
        among: which of them may be chosen, booleans.
        count: how many at most.

    Returns:
        Row numbers, in ascending order.

    Raises:
        RegistryError: there are not two different ones.
    """
    rows = np.flatnonzero(among)
    rows = rows[np.sort(np.unique(digest_keys(split.digests[rows]), return_index=True)[1])]
    order = rows[np.argsort(shuffle_keys(split.digests[rows], SEED), kind="stable")]
    if len(order) < 2:
        raise RegistryError(
            "there are not two different test images to compare on; add images, or raise "
            "prepare.test_fraction"
        )
    if len(order) <= count:
        return np.sort(order)
    labels = [str(label) for label in split.labels[order]]
    _, strata, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    # Every image's place among those of its label, in units of a share of all: the lowest places
    # of all labels together take of each label as much as it has, to one image.
    places = np.empty(len(order))
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    of_label = np.arange(len(order)) - starts + 0.5
    places[np.argsort(strata, kind="stable")] = of_label / np.repeat(sizes, sizes)
    return np.sort(order[np.argsort(places, kind="stable")[:count]])


# === Tries ===


def count_try(client: MlflowClient, version: Version, champion: str, digests: np.ndarray) -> int:
    """Count one more try on some test images; nobody else may count meanwhile.

    The count goes on while most of the images stay the same, as they do in a data set that grows;
    it begins anew when most are new. The same comparison made again, after a kill perhaps, is the
    same try.

    Args:
        client: of the registry.
        version: the challenger.
        champion: the number of the version that it is compared with.
        digests: of the images, uint8 `(count, 32)`.

    Returns:
        Which try it is, from 1.
    """
    sketch = _sketch(digests)
    whole = hashlib.sha256(np.sort(digest_keys(digests)).tobytes()).hexdigest()[:16]
    this = f"against {champion} on {whole}: "
    made = client.get_model_version(*version).tags.get(TRY_TAG, "")
    if made.startswith(this):
        return int(made.removeprefix(this))
    known = {
        key: value.split(" ", 1)
        for key, value in client.get_registered_model(version.name).tags.items()
        if key.startswith(TRIES_TAG)
    }
    alike = {key: _similarity(sketch, other) for key, (_, other) in known.items()}
    key = max(alike, key=lambda key: alike[key], default="")
    if alike.get(key, 0) < SAME_SHARE:
        key, known = f"{TRIES_TAG}{whole[:DIGITS]}", {}
    tries, first = known.get(key, ("0", sketch))
    attempt = int(tries) + 1
    client.set_registered_model_tag(version.name, key, f"{attempt} {first}")
    client.set_model_version_tag(*version, TRY_TAG, f"{this}{attempt}")
    return attempt


def _sketch(digests: np.ndarray) -> str:
    """Keep the lowest of some digests, which stand for all (bottom-k; Cohen and Kaplan 2007)."""
    return "".join(sorted(bytes(row).hex()[:DIGITS] for row in digests)[:SKETCHED])


def _similarity(one: str, other: str) -> float:
    """Estimate how many of the images of two sets are in both, as a share of those in either."""
    ours, theirs = (
        {sketch[start : start + DIGITS] for start in range(0, len(sketch), DIGITS)}
        for sketch in (one, other)
    )
    lowest = sorted(ours | theirs)[:SKETCHED]
    return len(ours & theirs & set(lowest)) / max(1, len(lowest))
