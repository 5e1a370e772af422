import numpy as np

from vaeflow.data.stored import StoredImages


def test_it_is_read_like_the_array(digits, tmp_path):
    np.save(tmp_path / "images.npy", digits)
    stored = StoredImages(np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert stored.shape == digits.shape
    assert len(stored) == len(digits)
    rows = np.random.default_rng(0).permutation(np.arange(len(digits), dtype=np.uint32))
    for picked in (rows, rows[:0], [3, 5], slice(10, 20), slice(1790, 9999), slice(5, 2)):
        np.testing.assert_array_equal(stored[picked], digits[picked])
        assert stored[picked].dtype == np.uint8
