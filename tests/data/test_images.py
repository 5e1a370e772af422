import numpy as np
import pytest
from scipy import stats

from vaeflow.data.batches import Batches
from vaeflow.data.images import Binarized, binarized


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 256, (40, 5, 6, 2), dtype=np.uint8)


def test_a_pixel_is_white_as_often_as_its_level_says():
    count = 20_000
    levels = np.uint8([0, 1, 64, 128, 254, 255])
    images = np.broadcast_to(levels.reshape(1, 6, 1, 1), (count, 6, 1, 1))
    white = Binarized(images, seed=3)[:] == 255
    for level, often in zip(levels, white.sum(axis=0).ravel(), strict=True):
        assert stats.binomtest(int(often), count, level / 255).pvalue > 1e-4


def test_an_image_is_drawn_alike_however_it_is_read(grey):
    view = Binarized(grey, seed=1)
    whole = view[:]
    assert whole.dtype == np.uint8
    assert set(np.unique(whole)) == {0, 255}
    assert len(view) == 40
    assert view.shape == grey.shape
    np.testing.assert_array_equal(view[7:20], whole[7:20])
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(view[order], whole[order])
    np.testing.assert_array_equal(np.concatenate(list(Batches(view, 16))), whole)


def test_another_seed_and_another_image_are_drawn_differently():
    grey = np.full((2, 8, 8, 1), 128, np.uint8)
    first, second = Binarized(grey, seed=1)[:]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Binarized(grey, seed=2)[:1][0])


def test_without_binarising_images_stay_as_they_are(grey):
    assert binarized(grey, "none", 0) is grey
    assert isinstance(binarized(grey, "dynamic", 0), Binarized)
