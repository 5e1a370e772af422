"""Likelihoods against SciPy, and against their NumPy twins."""

import typing

import numpy as np
import pytest
from keras import ops
from scipy import special, stats

from vaeflow.bundle import runtime as twins
from vaeflow.bundle.manifest import Manifest
from vaeflow.config.schema import Train
from vaeflow.model.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    is_binary,
    likelihood_warning,
)


def test_bernoulli_log_likelihood_equals_scipy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, size=(5, 3, 4, 2)).astype("float32")
    logits = rng.normal(scale=3, size=(7, 5, 3, 4, 2)).astype("float32")
    expected = stats.bernoulli.logpmf(images, special.expit(logits.astype("float64")))
    actual = Bernoulli.log_likelihood(images, logits)
    assert actual.shape == (7, 5)
    np.testing.assert_allclose(actual, expected.sum(axis=(-3, -2, -1)), rtol=1e-4)


def test_bernoulli_log_likelihood_is_finite_at_extreme_logits():
    images = np.float32([[[[0.0], [1.0]]]])
    logits = np.float32([[[[200.0], [-200.0]]]])
    assert float(Bernoulli.log_likelihood(images, logits)[0]) == pytest.approx(-400)


def levels_of(rng, *shape):
    return (rng.integers(0, 256, shape) / 255).astype("float32")


def test_gaussian_log_likelihood_equals_scipy_with_a_scale_a_channel():
    rng = np.random.default_rng(0)
    images = levels_of(rng, 5, 3, 4, 2)
    mean = rng.random((7, 5, 3, 4, 2), dtype="float32")
    log_scale = np.broadcast_to(np.float32([-1.0, 0.3]), (7, 5, 1, 1, 2))
    expected = stats.norm.logpdf(images, mean, np.exp(log_scale)).sum(axis=(-3, -2, -1))
    actual = Gaussian.log_likelihood(images, mean, log_scale)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_array_equal(Gaussian.mean(mean, log_scale), mean)


def logistic_levels(location, log_scale):
    """Probability of each of the 256 levels, by SciPy."""
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    return np.diff(stats.logistic.cdf(edges, location, np.exp(log_scale)))


@pytest.mark.parametrize("location", [0.0, 0.31, 1.0, 1.4])
@pytest.mark.parametrize("log_scale", [-5.5, -3.0, 0.0, 1.0])
def test_discretized_logistic_equals_scipy_and_its_levels_add_up_to_one(location, log_scale):
    images = (np.arange(256, dtype="float32") / 255).reshape(256, 1, 1, 1)
    parameters = [np.full_like(images, value) for value in (location, log_scale)]
    actual = np.asarray(DiscretizedLogistic.log_likelihood(images, *parameters), np.float64)
    expected = logistic_levels(location, log_scale)
    seen = expected > 1e-12  # below, a difference of two of SciPy's numbers has no digits left
    np.testing.assert_allclose(np.exp(actual[seen]), expected[seen], rtol=2e-3)
    assert np.exp(actual).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("location", [-3.0, 0.0, 0.0019, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("log_scale", [-8.0, -5.0, -2.0, 1.0])
def test_the_logistics_mean_is_that_of_its_levels(location, log_scale):
    expected = logistic_levels(location, log_scale) @ (np.arange(256) / 255)
    actual = float(DiscretizedLogistic.mean(np.float32(location), np.float32(log_scale)))
    assert actual == pytest.approx(expected, abs=0.5 / 255)
    assert 0 <= actual <= 1


def test_discretized_logistic_is_finite_where_it_is_as_wrong_as_can_be():
    images = np.float32([[[[0.0], [0.5], [1.0]]]])
    for location in (-50.0, 50.0):
        value = DiscretizedLogistic.log_likelihood(
            images, np.full_like(images, location), np.full_like(images, -8.0)
        )
        assert np.isfinite(float(value[0]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_numpy_twin_gives_the_same_numbers(name):
    rng = np.random.default_rng(0)
    likelihood, twin = LIKELIHOODS[name], twins.LIKELIHOODS[name]
    assert tuple(likelihood.parameters) == twin.parameters
    parameters = {}
    for parameter, need in likelihood.parameters.items():
        shape = (3, 5, 1, 1, 2) if need.per == "channel" else (3, 5, 6, 7, 2)
        low, high = need.bounds or (-4.0, 4.0)
        parameters[parameter] = rng.uniform(low, high, shape).astype("float32")
    images = levels_of(rng, 5, 6, 7, 2)
    expected = ops.convert_to_numpy(likelihood.log_likelihood(images, **parameters))
    np.testing.assert_allclose(twin.log_likelihood(images, **parameters), expected, rtol=1e-5)
    mean = ops.convert_to_numpy(likelihood.mean(**parameters))
    np.testing.assert_allclose(twin.mean(**parameters), mean, atol=1e-6)
    assert twin.mean(**parameters).dtype == np.float32


def test_the_names_are_the_same_everywhere():
    for model in (Train, Manifest):
        names = typing.get_args(model.model_fields["likelihood"].annotation)
        assert set(names) == set(LIKELIHOODS) == set(twins.LIKELIHOODS)


@pytest.mark.parametrize(
    ("likelihood", "levels", "expected"),
    [
        ("bernoulli", [0, 128, 255], "cross-entropy"),
        ("bernoulli", [0, 255], None),
        ("gaussian", [0, 255], "grows without bound"),
        ("gaussian", [0, 3, 255], None),
        ("discretized_logistic", [0, 255], "never occur"),
        ("discretized_logistic", [0, 1, 255], None),
    ],
)
def test_a_likelihood_that_does_not_fit_is_told_with_a_better_one(likelihood, levels, expected):
    images = np.random.default_rng(0).choice(np.uint8(levels), (9, 4, 4, 1))
    reason = likelihood_warning(likelihood, images)
    if expected is None:
        assert reason is None
    else:
        assert expected in reason
        assert "Set train." in reason


def test_one_grey_pixel_in_a_late_block_is_seen():
    images = np.zeros((10, 2, 2, 1), np.uint8)
    assert is_binary(images, block=4)
    images[9, 1, 1] = 1
    assert not is_binary(images, block=4)
