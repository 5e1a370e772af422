import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.io import arrays
from vaeflow.data.io.rules import Rules
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import (
    ANOMALY,
    CALIBRATION,
    SPLITS,
    SplitRule,
    evenly,
    for_calibration,
    load_split,
    pixel_digests,
)
from vaeflow.errors import DataError

ARRAYS = (*SPLITS, CALIBRATION, ANOMALY)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    return Workspace(tmp_path)


def test_splits_hold_every_image_once(place, digits):
    np.save(place.data / "images.npy", digits)
    counts, duplicates = prepare(place, Prepare())
    parts = {name: load_split(place.prepared, name) for name in ARRAYS}
    assert counts == {name: len(part) for name, part in parts.items()}
    together = Counter(image.tobytes() for part in parts.values() for image in part)
    assert together == Counter(image.tobytes() for image in digits)
    about = json.loads((place.prepared / "dataset.json").read_text())
    assert about == {
        "image_shape": [8, 8, 1],
        "levels": 17,
        "images": counts,
        "duplicates": duplicates,
        "given": {},
        "reading": Rules().model_dump(),
    }


def test_exact_copies_are_counted(place, digits, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_PER_BLOCK", 64 * 100)
    before = len(digits) - len({image.tobytes() for image in digits})
    np.save(place.data / "images.npy", np.concatenate([digits, digits[:30], digits[5:7]]))
    assert prepare(place, Prepare()).duplicates == before + 32


def test_the_index_leads_from_each_image_to_its_source_and_label(place, digits, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_PER_BLOCK", 64 * 100)
    labels = np.arange(len(digits), dtype=np.uint8) % 7
    np.save(place.data / "images.npy", digits)
    np.save(place.data / "labels.npy", labels)
    prepare(place, Prepare())
    index = parquet.read_table(place.prepared / "index.parquet").to_pydict()
    assert list(index) == ["id", "split", "label", "source", "sha256", "given", "picture"]
    assert set(index["given"]) == {None}
    assert index["id"] == list(range(len(digits)))
    assert index["label"] == labels.astype(str).tolist()
    assert index["source"] == [f"images.npy#{row}" for row in range(len(digits))]
    assert index["sha256"] == [hashlib.sha256(image.tobytes()).hexdigest() for image in digits]
    for name in ARRAYS:
        rows = [row for row, split in enumerate(index["split"]) if split == name]
        np.testing.assert_array_equal(load_split(place.prepared, name), digits[rows])


def test_image_files_are_indexed_by_their_paths(place, digits):
    for number, image in enumerate(digits[:60]):
        path = place.data / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    prepare(place, Prepare())
    index = parquet.read_table(place.prepared / "index.parquet").to_pydict()
    assert index["source"][:2] == ["a/00.png", "a/02.png"]
    assert index["label"] == [None] * 60
    assert index["sha256"][-1] == hashlib.sha256(digits[59].tobytes()).hexdigest()


@pytest.mark.parametrize("count", [0, 99, 101])
def test_labels_must_be_as_many_as_images(place, digits, count):
    np.save(place.data / "images.npy", digits[:100])
    np.save(place.data / "labels.npy", np.zeros(count, np.uint8))
    with pytest.raises(DataError, match=rf"labels\.npy: holds {count} labels for the 100 images"):
        prepare(place, Prepare())
    assert not place.prepared.exists()


def test_labels_must_be_integers(place, digits):
    np.save(place.data / "images.npy", digits[:100])
    np.save(place.data / "labels.npy", np.full(100, 0.5))
    with pytest.raises(DataError, match=r"labels\.npy: an array of float64"):
        prepare(place, Prepare())


MEMORY = """
import sys
from vaeflow.config.schema import Prepare
from vaeflow.data.prepare import prepare
from vaeflow.common.workspace import Workspace
from pathlib import Path

prepare(Workspace(Path(sys.argv[1])), Prepare())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Ten times the images, 150 MB of pixels: a few megabytes more."""
    megabytes = []
    for count in (20_000, 200_000):
        data = tmp_path / str(count) / "data"
        data.mkdir(parents=True)
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        np.save(data / "images.npy", images)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, data.parent], capture_output=True, text=True, check=True
        )
        megabytes.append(int(done.stdout) / 1024)
    assert megabytes[1] - megabytes[0] < 75


def test_fractions_are_kept_in_expectation(digits):
    counts = Counter(SplitRule(3, 0.2, 0.3).assign(pixel_digests(digits)).tolist())
    for name, share in (("validation", 0.2), ("test", 0.3), ("train", 0.5)):
        deviation = np.sqrt(share * (1 - share) / len(digits))
        assert counts[name] / len(digits) == pytest.approx(share, abs=4 * deviation)


def test_an_image_keeps_its_split_as_data_grow_and_duplicates_stay_together(place, digits):
    def splits_of(images):
        np.save(place.data / "images.npy", images)
        prepare(place, Prepare())
        return {
            image.tobytes(): name for name in ARRAYS for image in load_split(place.prepared, name)
        }

    before = splits_of(digits[:500])
    after = splits_of(np.concatenate([digits[::-1], digits[:100]]))
    assert before.items() <= after.items()
    held_out = {name: set(map(bytes, load_split(place.prepared, name))) for name in ARRAYS}
    assert not held_out["train"] & held_out["test"]


@given(image=st.binary(min_size=4, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_the_rule_is_the_published_one_for_ever(image, seed):
    """SHA-256, and SplitMix64 in plain integers: another rule would leak test images."""

    def mix(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    leading = int.from_bytes(hashlib.sha256(image).digest()[:8], "big")
    position = mix(leading ^ mix(seed)) / 2**64
    expected = "test" if position < 0.25 else "validation" if position < 0.5 else "train"
    pixels = np.frombuffer(image, np.uint8).reshape(1, 2, 2, 1)
    assert SplitRule(seed, 0.25, 0.25).assign(pixel_digests(pixels)).tolist() == [expected]


def test_another_seed_splits_otherwise(digits):
    digests = pixel_digests(digits)
    tests = [SplitRule(seed, 0.1, 0.1).assign(digests) == "test" for seed in (0, 1)]
    # As independent draws would: about a tenth of one test split is in the other too.
    assert np.mean(tests[1][tests[0]]) < 0.25


def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="vaeflow data add FOLDER"):
        prepare(Workspace(tmp_path), Prepare())
    (tmp_path / "data.dvc").touch()
    with pytest.raises(DataError, match="dvc pull"):
        prepare(Workspace(tmp_path), Prepare())


def test_too_few_images_are_refused_and_earlier_outputs_kept(place, digits):
    np.save(place.data / "images.npy", digits)
    prepare(place, Prepare())
    before = sorted(place.prepared.iterdir())
    np.save(place.data / "images.npy", digits[:2])
    with pytest.raises(DataError, match="too few images: of 2 none is in"):
        prepare(place, Prepare())
    assert sorted(place.prepared.iterdir()) == before
    assert list(place.prepared.parent.iterdir()) == [place.prepared]


def test_half_of_the_validation_images_calibrate(place, digits):
    np.save(place.data / "images.npy", digits)
    counts, _ = prepare(place, Prepare())
    assert counts[CALIBRATION] >= 99 + 20  # one false alarm in a hundred, and some to fit to
    validation = counts["validation"] + counts[CALIBRATION]
    assert counts[CALIBRATION] == pytest.approx(validation / 2, abs=2 * np.sqrt(validation))
    assert for_calibration(pixel_digests(load_split(place.prepared, CALIBRATION))).all()
    assert not for_calibration(pixel_digests(load_split(place.prepared, "validation"))).any()


def test_where_all_would_calibrate_it_says_so(place, digits):
    rule = SplitRule.of(Prepare())
    digests = pixel_digests(digits)
    splits = rule.assign(digests)
    chosen = np.flatnonzero((splits != "validation") | for_calibration(digests))
    np.save(place.data / "images.npy", digits[chosen])
    with pytest.raises(DataError, match=r"all \d+ of the validation split .* raise prepare"):
        prepare(place, Prepare())


def test_rows_that_are_shown_are_spread_over_all():
    assert evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(0, 5).tolist() == []
    rows = evenly(1797, 36)
    assert len(set(rows.tolist())) == 36
    assert rows[-1] >= 1797 * 35 // 36
