import json
from collections import Counter

import numpy as np
import pytest

from vaeflow.config import Prepare
from vaeflow.data.batches import batches
from vaeflow.data.prepare import load_split, prepare
from vaeflow.data.splits import SPLITS, split_of
from vaeflow.errors import DataError
from vaeflow.workspace import Workspace


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    return Workspace(tmp_path)


def test_splits_hold_every_image_once(place, digits):
    np.save(place.data / "images.npy", digits)
    counts = prepare(place, Prepare())
    parts = {name: load_split(place.prepared, name) for name in SPLITS}
    assert counts == {name: len(part) for name, part in parts.items()}
    together = Counter(image.tobytes() for part in parts.values() for image in part)
    assert together == Counter(image.tobytes() for image in digits)
    about = json.loads((place.prepared / "dataset.json").read_text())
    assert about == {"image_shape": [8, 8, 1], "images": counts}


def test_fractions_are_kept_in_expectation(digits):
    counts = Counter(split_of(image, 3, 0.2, 0.3) for image in digits)
    for name, share in (("validation", 0.2), ("test", 0.3), ("train", 0.5)):
        deviation = np.sqrt(share * (1 - share) / len(digits))
        assert counts[name] / len(digits) == pytest.approx(share, abs=4 * deviation)


def test_an_image_keeps_its_split_as_data_grow_and_duplicates_stay_together(place, digits):
    def splits_of(images):
        np.save(place.data / "images.npy", images)
        prepare(place, Prepare())
        return {
            image.tobytes(): name for name in SPLITS for image in load_split(place.prepared, name)
        }

    before = splits_of(digits[:500])
    after = splits_of(np.concatenate([digits[::-1], digits[:100]]))
    assert before.items() <= after.items()
    held_out = {name: set(map(bytes, load_split(place.prepared, name))) for name in SPLITS}
    assert not held_out["train"] & held_out["test"]


def test_another_seed_splits_otherwise(digits):
    assert [split_of(i, 0, 0.1, 0.1) for i in digits] != [split_of(i, 1, 0.1, 0.1) for i in digits]


def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="dvc pull"):
        prepare(Workspace(tmp_path), Prepare())


def test_too_few_images_are_refused_and_earlier_outputs_kept(place, digits):
    np.save(place.data / "images.npy", digits)
    prepare(place, Prepare())
    before = sorted(place.prepared.iterdir())
    np.save(place.data / "images.npy", digits[:3])
    with pytest.raises(DataError, match="3 images split into"):
        prepare(place, Prepare())
    assert sorted(place.prepared.iterdir()) == before
    assert list(place.prepared.parent.iterdir()) == [place.prepared]


def test_batches_are_a_seeded_permutation_scaled_to_one(digits):
    def epochs(seed):
        dataset = batches(digits, 256, shuffle_seed=seed)
        return [np.concatenate(list(dataset.as_numpy_iterator())) for _ in range(2)]

    first, second = epochs(1)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(digits / np.float32(255), axis=0))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(epochs(1), [first, second])
    assert not np.array_equal(epochs(2)[0], first)


def test_batches_without_a_seed_keep_the_order(digits):
    in_order = np.concatenate(list(batches(digits, 100).as_numpy_iterator()))
    np.testing.assert_array_equal(in_order, digits / np.float32(255))
