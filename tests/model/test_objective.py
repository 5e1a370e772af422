"""The objective's terms against independent computations."""

import numpy as np
import pytest
from keras import ops
from scipy import integrate, stats

from vaeflow.model import objective

rng = np.random.default_rng(0)


@pytest.mark.parametrize(("mean", "log_variance"), [(0, 0), (1.5, -2), (-0.7, 1.2), (3, -6)])
def test_kl_equals_numerical_integration(mean, log_variance):
    posterior = stats.norm(mean, np.exp(log_variance / 2))

    def integrand(t):
        return posterior.pdf(t) * (posterior.logpdf(t) - stats.norm.logpdf(t))

    spread = 12 * np.exp(log_variance / 2)
    expected, _ = integrate.quad(integrand, mean - spread, mean + spread, points=[mean])
    actual = objective.kl_divergence(np.float32([[mean]]), np.float32([[log_variance]]))
    assert float(actual[0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_kl_sums_over_latent_dimensions_only():
    mean, log_variance = rng.normal(size=(2, 3, 4)).astype("float32")
    whole = objective.kl_divergence(mean, log_variance)
    parts = [objective.kl_divergence(mean[:, [i]], log_variance[:, [i]]) for i in range(4)]
    assert whole.shape == (3,)
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)


def test_gaussian_log_density_equals_scipy():
    values, mean, log_variance = rng.normal(size=(3, 6, 4)).astype("float32")
    expected = stats.norm.logpdf(values, mean, np.exp(log_variance / 2)).sum(axis=-1)
    actual = objective.gaussian_log_density(values, mean, log_variance)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_reparameterised_draws_have_the_posterior_moments():
    noise = rng.standard_normal((200_000, 1, 1)).astype("float32")
    draws = objective.reparameterise(np.float32([[2.0]]), np.float32([[np.log(0.25)]]), noise)
    draws = ops.convert_to_numpy(draws)
    assert draws.mean() == pytest.approx(2.0, abs=4 * 0.5 / np.sqrt(200_000))
    assert draws.var() == pytest.approx(0.25, rel=0.02)


class LinearGaussian:
    """p(x|t) = N(x; a t, s²) in one dimension, whose evidence N(x; 0, a² + s²) is known."""

    a, s, x = 1.3, 0.6, 0.9

    def log_weights(self, samples, batch, mean, log_variance):
        noise = rng.standard_normal((samples, batch, 1)).astype("float32")
        mean, log_variance = np.float32([[mean]]), np.float32([[log_variance]])
        latents = objective.reparameterise(mean, log_variance, noise)
        log_likelihood = stats.norm.logpdf(self.x, self.a * latents[..., 0], self.s)
        return objective.log_importance_weights(
            log_likelihood.astype("float32"), latents, mean, log_variance
        )

    @property
    def evidence(self):
        return stats.norm.logpdf(self.x, 0, np.hypot(self.a, self.s))


def test_importance_weighted_bound_tends_to_the_evidence_from_below():
    model = LinearGaussian()
    means = []
    for samples in (1, 4, 16, 2048):
        weights = model.log_weights(samples, 4000, mean=0.2, log_variance=-1.0)
        means.append(float(ops.mean(objective.importance_weighted_bound(weights))))
    assert means == sorted(means)
    assert means[0] < model.evidence - 0.1
    assert means[-1] == pytest.approx(model.evidence, abs=0.005)


def test_importance_weight_of_the_exact_posterior_is_the_evidence():
    model = LinearGaussian()
    precision = 1 + model.a**2 / model.s**2
    mean = model.a * model.x / model.s**2 / precision
    weights = model.log_weights(5, 1, mean=mean, log_variance=-np.log(precision))
    np.testing.assert_allclose(weights, model.evidence, rtol=1e-4)
