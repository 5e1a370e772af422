"""Gradient estimates against quadrature: unbiased, in w and in φ, for one and two latents.

The model is small enough to integrate: three binary pixels with logits "matrix t + bias", which
are w, and φ = (m, v) directly. The expected gradient is that of the integral over t (Gauss-Hermite,
float64), by central differences: no sampling and no automatic differentiation. Each draw of an
estimate gets its own copy of the parameters, so one pass gives the gradient of every draw.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from scipy import special, stats

from vaeflow.model import objective
from vaeflow.model.likelihoods import Bernoulli, PixelSpec

PIXELS = np.array([1.0, 0.0, 1.0])
DRAWS = 40_000


def make_parameters(latent_dim):
    rng = np.random.default_rng(latent_dim)
    return {
        "matrix": rng.normal(size=(3, latent_dim)),
        "bias": rng.normal(size=3),
        "m": rng.normal(size=latent_dim),
        "v": rng.normal(-0.5, 0.3, size=latent_dim),
    }


# === The integral ===


def log_ratio_terms(latents, matrix, bias, m, v):
    """Log p(x|t) and log p(t) - log q(t), by SciPy."""
    logits = latents @ matrix.T + bias
    log_likelihood = (PIXELS * special.log_expit(logits)).sum(-1)
    log_likelihood += ((1 - PIXELS) * special.log_expit(-logits)).sum(-1)
    log_prior = stats.norm.logpdf(latents).sum(-1)
    return log_likelihood, log_prior - stats.norm.logpdf(latents, m, np.exp(v / 2)).sum(-1)


def integral(parameters, samples, weight):
    """E log mean_k p(x|t_k) (p(t_k)/q(t_k))^weight over independent t_k ~ q."""
    latent_dim = len(parameters["m"])
    nodes, masses = np.polynomial.hermite_e.hermegauss({1: 40, 2: 24, 4: 14}[latent_dim * samples])
    noise = np.array(list(itertools.product(nodes, repeat=latent_dim * samples)))
    mass = np.prod(list(itertools.product(masses / masses.sum(), repeat=latent_dim * samples)), 1)
    noise = noise.reshape(-1, samples, latent_dim)
    latents = parameters["m"] + np.exp(parameters["v"] / 2) * noise
    log_likelihood, log_ratio = log_ratio_terms(latents, **parameters)
    log_weights = log_likelihood + weight * log_ratio
    return mass @ (special.logsumexp(log_weights, axis=1) - np.log(samples))


def expected_gradient(parameters, samples=1, weight=1.0):
    gradient = {name: np.zeros_like(value) for name, value in parameters.items()}
    for name, value in parameters.items():
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-4
            above, below = (
                integral({**parameters, name: value + sign * step}, samples, weight)
                for sign in (1, -1)
            )
            gradient[name][index] = (above - below) / 2e-4
    return gradient


# === The estimates ===


def sampled(parameters, samples):
    """A float32 copy of the parameters for each draw, and noise `(samples, draws, latent_dim)`."""
    copies = {
        name: tf.constant(np.tile(value, (DRAWS, *[1] * value.ndim)), tf.float32)
        for name, value in parameters.items()
    }
    rng = np.random.default_rng(7)
    return copies, rng.standard_normal((samples, DRAWS, len(parameters["m"])), dtype=np.float32)


def log_likelihood_of(copies, latents):
    logits = tf.einsum("npd,snd->snp", copies["matrix"], latents) + copies["bias"]
    images = tf.constant(PIXELS.reshape(1, 1, 3, 1), tf.float32)
    return Bernoulli(ops, PixelSpec(1)).log_likelihood(images, logits[:, :, None, :, None])


def reparameterised(parameters, samples):
    copies, noise = sampled(parameters, samples)
    with tf.GradientTape() as tape:
        tape.watch(copies)
        latents = objective.reparameterise(copies["m"], copies["v"], noise)
        log_likelihood = tf.reduce_mean(log_likelihood_of(copies, latents), axis=0)
        kl = objective.kl_per_dimension(copies["m"], copies["v"])
        # The mean over the draws, times their number: the gradient of each draw on its own.
        value = DRAWS * objective.weighted_elbo(log_likelihood, kl)
    return tape.gradient(value, copies)


def score_function(parameters, samples):
    copies, noise = sampled(parameters, samples)
    latents = tf.stop_gradient(objective.reparameterise(copies["m"], copies["v"], noise))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        log_density = objective.gaussian_log_density(latents, copies["m"], copies["v"])
        values = log_likelihood_of(copies, latents)
        surrogate = objective.score_function_surrogate(values, log_density)
        surrogate -= objective.kl_divergence(copies["m"], copies["v"])
    return tape.gradient(surrogate, copies)


def importance_weighted(parameters, samples, weight=1.0):
    """The plain gradient of the bound, through everything."""
    copies, noise = sampled(parameters, samples)
    with tf.GradientTape() as tape:
        tape.watch(copies)
        latents = objective.reparameterise(copies["m"], copies["v"], noise)
        log_weights = objective.log_importance_weights(
            log_likelihood_of(copies, latents), latents, copies["m"], copies["v"], weight
        )
        bound = objective.importance_weighted_bound(log_weights)
    return tape.gradient(bound, copies)


def doubly_reparameterised(parameters, samples, weight=1.0):
    copies, noise = sampled(parameters, samples)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(copies)
        latents = objective.reparameterise(copies["m"], copies["v"], noise)
        fixed = tf.stop_gradient(copies["m"]), tf.stop_gradient(copies["v"])
        log_weights = objective.log_importance_weights(
            log_likelihood_of(copies, latents), latents, *fixed, weight
        )
        bound = objective.importance_weighted_bound(log_weights)
    decoder, in_latents = tape.gradient(
        bound, [{n: copies[n] for n in ("matrix", "bias")}, latents]
    )
    factor = objective.doubly_reparameterised_factor(log_weights, weight)[..., None]
    encoder = tape.gradient(
        latents, {name: copies[name] for name in ("m", "v")}, output_gradients=factor * in_latents
    )
    return {**decoder, **encoder}


def assert_mean_is(gradients, expected):
    """Within four standard errors, for each number of each parameter."""
    for name, draws in gradients.items():
        draws = np.asarray(draws, np.float64)
        standard_error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
        distance = np.abs(draws.mean(axis=0) - expected[name])
        assert np.all(distance <= 4 * standard_error + 1e-5), name


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("estimate", [reparameterised, score_function])
def test_elbo_gradients_are_unbiased(estimate, samples, latent_dim):
    parameters = make_parameters(latent_dim)
    assert_mean_is(estimate(parameters, samples), expected_gradient(parameters))


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("estimate", [importance_weighted, doubly_reparameterised])
def test_importance_weighted_gradients_are_unbiased(estimate, latent_dim, weight):
    """For the gradient of the bound of two draws, not of log p(x): that is what DReG estimates."""
    parameters = make_parameters(latent_dim)
    expected = expected_gradient(parameters, samples=2, weight=weight)
    assert_mean_is(estimate(parameters, 2, weight), expected)


def test_the_two_elbo_gradients_agree_in_the_mean_and_differ_in_variance():
    parameters = make_parameters(2)
    first, second = reparameterised(parameters, 1), score_function(parameters, 1)
    for name in ("m", "v"):
        assert_mean_is({name: first[name] - second[name]}, {name: 0.0})
        assert np.all(np.var(second[name], axis=0) > 3 * np.var(first[name], axis=0))


def test_double_reparameterisation_agrees_in_the_mean_and_has_less_variance_with_many_draws():
    # A posterior wider than the exact one: of a narrower one the weights have no variance.
    parameters = {**make_parameters(2), "m": np.array([0.3, -0.2]), "v": np.array([0.1, 0.1])}
    plain, double = importance_weighted(parameters, 64), doubly_reparameterised(parameters, 64)
    for name in ("m", "v"):
        assert_mean_is({name: plain[name] - double[name]}, {name: 0.0})
        assert np.all(np.var(double[name], axis=0) < 0.5 * np.var(plain[name], axis=0))
    for name in ("matrix", "bias"):
        np.testing.assert_allclose(plain[name], double[name], rtol=1e-3, atol=1e-5)


def test_mini_batch_estimates_average_to_the_full_batch():
    """N/M times the sum over a batch, divided by N, is the batch's mean: its average is the whole.

    All batches of one epoch together, of equal size, as the lecture's estimate needs it.
    """
    rng = np.random.default_rng(0)
    log_likelihood = rng.normal(-20, 5, 12).astype(np.float32)
    kl = rng.exponential(1, (12, 2)).astype(np.float32)
    whole = float(objective.weighted_elbo(log_likelihood, kl))
    batches = [slice(start, start + 3) for start in range(0, 12, 3)]
    parts = [float(objective.weighted_elbo(log_likelihood[rows], kl[rows])) for rows in batches]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-6)
    sums = [(12 / 3) * np.sum(log_likelihood[rows] - kl[rows].sum(axis=1)) for rows in batches]
    assert np.mean(sums) / 12 == pytest.approx(whole, rel=1e-6)


def test_the_kl_weight_rises_linearly_and_stays():
    steps = np.arange(6, dtype=np.float32)
    weights = [float(objective.kl_weight(step, 4, 2.0)) for step in steps]
    np.testing.assert_allclose(weights, [0.5, 1, 1.5, 2, 2, 2], rtol=1e-6)
    assert objective.kl_weight(steps[0], 0, 0.7) == 0.7


def test_free_bits_floor_each_dimension_of_each_image():
    kl = tf.constant([[0.0, 1.0, 5.0], [0.2, 3.0, 0.3]])
    with tf.GradientTape() as tape:
        tape.watch(kl)
        value = objective.free_bits_kl(kl, 0.5)
    np.testing.assert_allclose(value, [0.5 + 1 + 5, 0.5 + 3 + 0.5])
    np.testing.assert_allclose(tape.gradient(value, kl), [[0, 1, 1], [0, 1, 0]])
    np.testing.assert_allclose(objective.free_bits_kl(kl, 0.0), [6, 3.5], rtol=1e-6)


def test_with_free_bits_mini_batches_average_to_the_whole():
    """However the images are shared out, and with every dimension on both sides of the floor."""
    rng = np.random.default_rng(0)
    kl = rng.exponential(1.0, (12, 3)).astype(np.float32)
    log_likelihood = rng.normal(size=12).astype(np.float32)
    assert ((kl > 0.5).any(axis=0) & (kl < 0.5).any(axis=0)).all()
    whole = float(objective.weighted_elbo(log_likelihood, kl, 0.7, 0.5))
    for parts in (2, 3, 4, 12):
        rows = np.split(rng.permutation(12), parts)
        values = [float(objective.weighted_elbo(log_likelihood[r], kl[r], 0.7, 0.5)) for r in rows]
        assert np.mean(values) == pytest.approx(whole, rel=1e-5)
