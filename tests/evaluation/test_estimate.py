"""The mean bound from a quarter of the draws."""

import keras
import numpy as np
import pytest

from vaeflow.config.model import VAEConfig
from vaeflow.evaluation.bounds import _with_mean, compute_bounds, estimate_bound
from vaeflow.model.vae import VAE


@pytest.fixture(scope="module")
def vae():
    """A model whose weights vary much: its posteriors are far from what they stand for."""
    keras.utils.set_random_seed(0)
    model = VAE(VAEConfig((8, 8, 1), latent_dim=4, filters=(4,), hidden_units=16))
    for layer in ("hidden", "unflatten"):
        kernel = model.decoder.get_layer(layer).kernel
        kernel.assign(3 * kernel)
    return model


@pytest.mark.parametrize("share", [4, 8])
def test_it_is_unbiased_for_the_bound_from_all_draws(vae, digits, share):
    """Beside many of both: one image's bound from 60 draws is a random number as well."""
    images = digits[:400]
    whole = [
        compute_bounds(vae, images, 60, seed).importance_weighted_bound.mean()
        for seed in range(1000, 1020)
    ]
    found = [estimate_bound(vae, images, 60, seed, share) for seed in range(20)]
    means = [one.mean for one in found]
    error = np.hypot(np.std(whole), np.std(means)) / np.sqrt(20)
    assert np.mean(means) == pytest.approx(np.mean(whole), abs=4 * error)
    # That is no empty statement: the draws that all images get alone would give another number.
    few = [
        compute_bounds(vae, images, 5, seed).importance_weighted_bound.mean() for seed in range(20)
    ]
    assert np.mean(whole) - np.mean(few) > 5 * error
    assert np.mean([one.draws for one in found]) == pytest.approx(400 * 60 / share, rel=0.1)


def test_it_makes_more_draws_where_the_weights_vary():
    effective = np.array([1.0, 1.0, 100.0, 400.0])
    probability = _with_mean(1 / np.sqrt(effective), 0.25)
    assert probability.mean() == pytest.approx(0.25)
    assert list(probability) == sorted(probability, reverse=True)


@pytest.mark.parametrize("mean", [0.0, 0.3, 0.9, 1.0, 2.0])
def test_probabilities_have_the_mean_and_are_at_most_one(mean):
    shares = np.random.default_rng(0).exponential(size=500) + 1e-3
    probability = _with_mean(shares, mean)
    assert probability.max() <= 1
    assert probability.mean() == pytest.approx(min(mean, 1))


@pytest.mark.parametrize("samples", [1, 2, 12, 13])
def test_any_number_of_draws_will_do(vae, digits, samples):
    estimate = estimate_bound(vae, digits[:7], samples, seed=0)
    assert np.isfinite(estimate.mean)
    assert 7 <= estimate.draws <= 7 * samples
