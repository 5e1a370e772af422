import numpy as np
import pytest

from vaeflow.data.images import Binarized, StoredImages, row_numbers


def test_it_is_read_like_the_array(digits, tmp_path):
    np.save(tmp_path / "images.npy", digits)
    stored = StoredImages(np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert stored.shape == digits.shape
    assert len(stored) == len(digits)
    rows = np.random.default_rng(0).permutation(np.arange(len(digits), dtype=np.uint32))
    for picked in (
        *(rows, rows[:0], [3, 5], [], [-1, 0], rows % 3 == 0, rows > len(rows)),
        *(slice(10, 20), slice(1790, 9999), slice(5, 2), slice(None, None, 3), slice(None)),
        *(slice(9, 2, -1), slice(None, None, -1), slice(-3, None), slice(2, 9, 4)),
    ):
        np.testing.assert_array_equal(stored[picked], digits[picked])
        assert stored[picked].dtype == np.uint8
        # A view of them picks alike: each image has its own draw, however it is come by.
        drawn, all_drawn = Binarized(stored, 0), Binarized(digits, 0)[:]
        np.testing.assert_array_equal(drawn[picked], all_drawn[picked])


@pytest.mark.parametrize("rows", [[5], [-6], [True, False], [0.0], 3, [[1]]])
def test_rows_that_are_not_there_are_an_error(rows):
    with pytest.raises(IndexError, match=r"of 5"):
        row_numbers(rows, 5)
