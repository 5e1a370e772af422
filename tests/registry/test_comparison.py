import math

import numpy as np
import pytest
from scipy import stats

from vaeflow.registry.comparison import Comparison, Decision, compare, error_spent_by, level_of_try


class Known:
    """Stands in for a bundle: a model whose bounds are known."""

    def __init__(self, bounds):
        self.bounds = bounds

    def importance_weighted_bound(self, images, samples):
        return self.bounds[: len(images)].astype(np.float32)


def test_it_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    hardness = generator.normal(-100, 30, 500)
    ours, theirs = hardness + generator.normal(0.2, 1, 500), hardness
    compared = compare(Known(ours), Known(theirs), np.zeros((500, 1)), samples=1)
    expected = stats.ttest_rel(
        ours.astype(np.float32), theirs.astype(np.float32), alternative="greater"
    )
    assert compared.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    assert compared.images == 500
    other = compare(Known(theirs), Known(ours), np.zeros((500, 1)), samples=1)
    assert other.p_value == pytest.approx(1 - compared.p_value)


def test_all_tries_together_spend_no_more_than_the_whole():
    levels = [level_of_try(attempt, 0.01) for attempt in range(1, 100_000)]
    assert levels == sorted(levels, reverse=True)
    assert 0.00996 < math.fsum(levels) < 0.01
    for attempt in (1, 10, 365):
        assert error_spent_by(attempt, 0.01) == pytest.approx(math.fsum(levels[:attempt]))
    assert error_spent_by(365, 0.01) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("difference", "standard_error", "least", "attempt", "better"),
    [
        (1.0, 0.235, 0.0, 1, True),  # 4.3 standard errors
        (1.0, 0.235, 0.0, 365, False),
        (1.0, 0.2, 0.0, 365, True),
        (1.0, 0.4, 0.0, 1, False),
        (1.0, 0.1, 1.1, 1, False),
        (-1.0, 0.1, 0.0, 1, False),
        (0.0, 0.0, 0.0, 1, False),
        (0.1, 0.0, 0.0, 1, True),
    ],
)
def test_a_difference_that_chance_would_make_in_so_many_tries_is_none(
    difference, standard_error, least, attempt, better
):
    found = Comparison(0, 0, difference, standard_error, 500)
    assert Decision(found, attempt, 0.01, least).better == better


def test_the_smallest_gain_is_one_that_nine_of_ten_tries_would_see():
    generator = np.random.default_rng(1)
    found = Comparison(0, 0, 0, 1 / math.sqrt(40), 40)
    gain = found.smallest_gain(0.001)
    tries = generator.normal(gain, 1, (20_000, 40))
    errors = tries.std(axis=1, ddof=1) / math.sqrt(40)
    seen = stats.t.sf(tries.mean(axis=1) / errors, 39) <= 0.001
    assert seen.mean() == pytest.approx(0.9, abs=0.02)


def test_it_is_said_what_was_found_what_was_spent_and_what_would_have_been_seen():
    found = Comparison(-23.0, -23.1, 0.1, 0.05, 158)
    assert str(Decision(found, 2, 0.01, 0.0)) == (
        "-23.000 nats against -23.100: a difference of +0.100 with a standard error of 0.050, on "
        "158 test images; p = 0.024 (wanted: at most 2.7e-05). Try 2 on these images: 0.0054 % of "
        "the 1 % allowed for false promotions is spent; it would have seen a gain of 0.27 nats "
        "nine times out of ten"
    )
    assert "at most 2.7e-05 and 0.5 nats)" in str(Decision(found, 2, 0.01, 0.5))
