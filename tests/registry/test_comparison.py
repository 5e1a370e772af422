import numpy as np
import pytest
from scipy import stats

from vaeflow.registry.comparison import Comparison, compare


class Known:
    """Stands in for a bundle: a model whose bounds are known."""

    def __init__(self, bounds):
        self.bounds = bounds

    def importance_weighted_bound(self, images, samples):
        return self.bounds[: len(images)].astype(np.float32)


def test_it_is_the_paired_t_statistic():
    generator = np.random.default_rng(0)
    hardness = generator.normal(-100, 30, 500)
    ours, theirs = hardness + generator.normal(0.2, 1, 500), hardness
    compared = compare(Known(ours), Known(theirs), np.zeros((500, 1)), samples=1)
    expected = stats.ttest_rel(ours.astype(np.float32), theirs.astype(np.float32))
    statistic = compared.difference / compared.standard_error
    assert statistic == pytest.approx(expected.statistic, rel=1e-5)
    assert compared.images == 500
    assert compared.is_better(0.1)
    assert not compared.is_better(compared.difference + 0.01)


@pytest.mark.parametrize(
    ("difference", "standard_error", "better"), [(1.0, 0.4, True), (1.0, 0.6, False), (0, 0, False)]
)
def test_a_difference_that_chance_would_make_is_none(difference, standard_error, better):
    assert Comparison(0, 0, difference, standard_error, 9).is_better(0.0) == better
