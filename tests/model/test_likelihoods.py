"""Likelihoods against SciPy, and the same with NumPy's operations as with Keras's."""

import itertools
import typing

import numpy as np
import pytest
from keras import ops
from scipy import special, stats

from vaeflow.bundle.manifest import Manifest
from vaeflow.bundle.runtime import NumpyOperations
from vaeflow.config.schema import Train
from vaeflow.model.likelihoods import (
    LIKELIHOODS,
    PixelSpec,
    is_binary,
    likelihood_warning,
)


def make(name, channels=1, **spec):
    return LIKELIHOODS[name](ops, PixelSpec(channels, **spec))


def drawn_parameters(likelihood, rng, *shape):
    """Parameters of images `(*shape, channels)`, anywhere within their bounds."""
    parameters = {}
    for name, need in likelihood.parameters.items():
        places = shape if need.per == "pixel" else (*shape[:-2], 1, 1)
        low, high = need.bounds or (-4.0, 4.0)
        parameters[name] = rng.uniform(low, high, (*places, need.numbers)).astype("float32")
    return parameters


def test_bernoulli_log_likelihood_equals_scipy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, size=(5, 3, 4, 2)).astype("float32")
    logits = rng.normal(scale=3, size=(7, 5, 3, 4, 2)).astype("float32")
    expected = stats.bernoulli.logpmf(images, special.expit(logits.astype("float64")))
    actual = make("bernoulli", 2).log_likelihood(images, logits)
    assert actual.shape == (7, 5)
    np.testing.assert_allclose(actual, expected.sum(axis=(-3, -2, -1)), rtol=1e-4)


def test_bernoulli_log_likelihood_is_finite_at_extreme_logits():
    images = np.float32([[[[0.0], [1.0]]]])
    logits = np.float32([[[[200.0], [-200.0]]]])
    assert float(make("bernoulli").log_likelihood(images, logits)[0]) == pytest.approx(-400)


def levels_of(rng, *shape, levels=256):
    return (rng.integers(0, levels, shape) / (levels - 1)).astype("float32")


def test_gaussian_log_likelihood_equals_scipy_with_a_scale_a_channel():
    rng = np.random.default_rng(0)
    images = levels_of(rng, 5, 3, 4, 2)
    mean = rng.random((7, 5, 3, 4, 2), dtype="float32")
    log_scale = np.broadcast_to(np.float32([-1.0, 0.3]), (7, 5, 1, 1, 2))
    expected = stats.norm.logpdf(images, mean, np.exp(log_scale)).sum(axis=(-3, -2, -1))
    actual = make("gaussian", 2).log_likelihood(images, mean, log_scale)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_array_equal(make("gaussian", 2).mean(mean, log_scale), mean)


def logistic_levels(location, log_scale, levels=256):
    """Probability of each of the levels, by SciPy."""
    edges = np.concatenate([[-np.inf], (np.arange(levels - 1) + 0.5) / (levels - 1), [np.inf]])
    return np.diff(stats.logistic.cdf(edges, location, np.exp(log_scale)))


@pytest.mark.parametrize("levels", [256, 17])
@pytest.mark.parametrize("location", [0.0, 0.31, 1.0, 1.4])
@pytest.mark.parametrize("log_scale", [-5.5, -3.0, 0.0, 1.0])
def test_discretized_logistic_equals_scipy_and_its_levels_add_up_to_one(
    location, log_scale, levels
):
    images = (np.arange(levels, dtype="float32") / (levels - 1)).reshape(levels, 1, 1, 1)
    parameters = [np.full_like(images, value) for value in (location, log_scale)]
    likelihood = make("discretized_logistic", levels=levels)
    actual = np.asarray(likelihood.log_likelihood(images, *parameters), np.float64)
    expected = logistic_levels(location, log_scale, levels)
    seen = expected > 1e-12  # below, a difference of two of SciPy's numbers has no digits left
    np.testing.assert_allclose(np.exp(actual[seen]), expected[seen], rtol=2e-3)
    assert np.exp(actual).sum() == pytest.approx(1, abs=1e-4)


def test_pixels_beside_a_level_count_as_the_level():
    """16 / 255 stands for the first of 16 steps, as whoever scaled 17 levels to bytes rounded."""
    images = np.float32([[[[0.0], [16 / 255], [32 / 255], [239 / 255]]]])
    exact = np.float32([[[[0.0], [1 / 16], [2 / 16], [15 / 16]]]])
    likelihood = make("discretized_logistic", levels=17)
    parameters = np.full_like(images, 0.1), np.full_like(images, -3.0)
    np.testing.assert_array_equal(
        likelihood.log_likelihood(images, *parameters),
        likelihood.log_likelihood(exact, *parameters),
    )


@pytest.mark.parametrize("location", [-3.0, 0.0, 0.0019, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("log_scale", [-8.0, -5.0, -2.0, 1.0])
def test_the_logistics_mean_is_that_of_its_levels(location, log_scale):
    expected = logistic_levels(location, log_scale) @ (np.arange(256) / 255)
    mean = make("discretized_logistic").mean(np.float32(location), np.float32(log_scale))
    assert float(mean) == pytest.approx(expected, abs=0.5 / 255)
    assert 0 <= float(mean) <= 1


def test_discretized_logistic_is_finite_where_it_is_as_wrong_as_can_be():
    images = np.float32([[[[0.0], [0.5], [1.0]]]])
    for location in (-50.0, 50.0):
        value = make("discretized_logistic").log_likelihood(
            images, np.full_like(images, location), np.full_like(images, -8.0)
        )
        assert np.isfinite(float(value[0]))


# === The mixture: every image of one pixel and few levels can be counted ===

LEVELS = 9


def every_pixel(channels):
    """All images of one pixel, `(levels ** channels, 1, 1, channels)`."""
    levels = np.arange(LEVELS) / (LEVELS - 1)
    found = list(itertools.product(levels, repeat=channels))
    return np.float32(found).reshape(-1, 1, 1, channels)


def mixture_of(channels, seed=0):
    likelihood = make("mixture_logistic", channels, levels=LEVELS, mixtures=3)
    rng = np.random.default_rng(seed)
    parameters = {
        name: rng.uniform(-1, 1, (1, 1, 1, need.numbers)).astype("float32")
        for name, need in likelihood.parameters.items()
    }
    parameters["location"] = rng.uniform(0.2, 0.8, parameters["location"].shape).astype("float32")
    parameters["log_scale"] = parameters["log_scale"] - 2.5
    return likelihood, parameters


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_mixtures_probabilities_add_up_to_one(channels):
    likelihood, parameters = mixture_of(channels)
    log_probabilities = likelihood.log_likelihood(every_pixel(channels), **parameters)
    assert np.exp(np.float64(log_probabilities)).sum() == pytest.approx(1, abs=1e-4)


def test_the_mixture_equals_scipy_channel_after_channel():
    likelihood, parameters = mixture_of(3)
    images = every_pixel(3)[::7]
    logits, location, log_scale, coefficient = (
        np.float64(parameters[name]).ravel()
        for name in ("logits", "location", "log_scale", "coefficient")
    )
    location, log_scale, coefficient = (
        values.reshape(3, 3) for values in (location, log_scale, coefficient)
    )
    expected = []
    for red, green, blue in np.float64(images).reshape(-1, 3):
        masses = np.log(special.softmax(logits))
        for k in range(3):
            red_off = red - location[0, k]
            green_at = location[1, k] + coefficient[0, k] * red_off
            blue_at = location[2, k] + coefficient[1, k] * red_off
            blue_at += coefficient[2, k] * (green - location[1, k])
            places = (location[0, k], green_at, blue_at)
            for channel, value in enumerate((red, green, blue)):
                table = logistic_levels(places[channel], log_scale[channel, k], LEVELS)
                masses[k] += np.log(table[round(value * (LEVELS - 1))])
        expected.append(special.logsumexp(masses))
    actual = np.asarray(likelihood.log_likelihood(images, **parameters), np.float64)
    seen = np.array(expected) > np.log(1e-12)
    np.testing.assert_allclose(actual[seen], np.array(expected)[seen], atol=5e-3)
    assert seen.sum() > 50


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mixtures_mean_is_that_of_all_images(channels, seed):
    likelihood, parameters = mixture_of(channels, seed)
    images = every_pixel(channels)
    probabilities = np.exp(np.float64(likelihood.log_likelihood(images, **parameters)))
    expected = probabilities @ images.reshape(-1, channels)
    actual = np.asarray(likelihood.mean(**parameters)).ravel()
    np.testing.assert_allclose(actual, expected, atol=0.5 / (LEVELS - 1))


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_follow_the_probabilities(name, channels):
    rng = np.random.default_rng(0)
    if name == "mixture_logistic":
        likelihood, parameters = mixture_of(channels)
    else:
        likelihood = make(name, channels, levels=LEVELS)
        parameters = drawn_parameters(likelihood, rng, 1, 1, 1)
    uniform = rng.uniform(1e-6, 1, (200_000, 1, 1, 1 + channels)).astype("float32")
    draws = ops.convert_to_numpy(likelihood.draw(uniform, **parameters))
    assert draws.shape == (200_000, 1, 1, channels)
    if name == "gaussian":
        mean, scale = parameters["mean"], np.exp(parameters["log_scale"])
        expected = stats.norm.cdf(0.6, mean, scale).ravel()
        np.testing.assert_allclose((draws < 0.6).mean(axis=(0, 1, 2)), expected, atol=0.01)
        return
    images = np.unique(draws, axis=0)
    expected = np.exp(np.float64(likelihood.log_likelihood(images, **parameters)))
    assert expected.sum() > 0.99
    for image, share in zip(images, expected, strict=True):
        seen = (draws == image).all(axis=(1, 2, 3)).mean()
        assert abs(seen - share) < 6 * np.sqrt(share / len(draws)) + 1e-5


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_numpy_gives_the_same_numbers(name, channels):
    rng = np.random.default_rng(0)
    likelihood = make(name, channels)
    twin = LIKELIHOODS[name](NumpyOperations, likelihood.spec)
    parameters = drawn_parameters(likelihood, rng, 3, 5, 6, 7)
    images = levels_of(rng, 5, 6, 7, channels)
    expected = ops.convert_to_numpy(likelihood.log_likelihood(images, **parameters))
    actual = twin.log_likelihood(images, **parameters)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual.dtype == np.float32
    mean = ops.convert_to_numpy(likelihood.mean(**parameters))
    np.testing.assert_allclose(twin.mean(**parameters), mean, atol=2e-6)
    assert twin.mean(**parameters).dtype == np.float32
    uniform = rng.uniform(1e-4, 1 - 1e-4, (3, 5, 6, 7, 1 + channels)).astype("float32")
    drawn = ops.convert_to_numpy(likelihood.draw(uniform, **parameters))
    # A number on the edge of a level may fall on either side.
    differ = np.abs(twin.draw(uniform, **parameters) - drawn) > 1e-4
    assert differ.mean() < 2e-3


def test_the_names_are_the_same_everywhere():
    for model in (Train, Manifest):
        names = typing.get_args(model.model_fields["likelihood"].annotation)
        assert set(names) == set(LIKELIHOODS)


@pytest.mark.parametrize(
    ("likelihood", "levels", "expected"),
    [
        ("bernoulli", [0, 128, 255], "cross-entropy"),
        ("bernoulli", [0, 255], None),
        ("gaussian", [0, 255], "grows without bound"),
        ("gaussian", [0, 3, 255], None),
        ("discretized_logistic", [0, 255], "never occur"),
        ("discretized_logistic", [0, 1, 255], None),
        ("mixture_logistic", [0, 255], "never occur"),
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
