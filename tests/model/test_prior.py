"""The learned prior: a density that adds up to one, draws that follow it, and its unbiased KL."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from scipy import stats

from vaeflow.config.model import VAEConfig
from vaeflow.model import objective
from vaeflow.model.prior import LARGEST_LOG_SCALE, FlowPrior
from vaeflow.model.steps import backend
from vaeflow.model.vae import VAE


def scrambled(latent_dim, couplings=4, spread=0.3, seed=1):
    """Make a flow that is far from where it begins."""
    flow = FlowPrior(latent_dim, couplings, 16, dtype="float32")
    generator = np.random.default_rng(seed)
    for variable in flow.trainable_variables:
        variable.assign(generator.normal(scale=spread, size=variable.shape))
    return flow


def log_density(flow, latents):
    latents = np.float32(latents)
    normal = stats.norm.logpdf(np.float64(latents)).sum(axis=-1)
    return normal + ops.convert_to_numpy(flow.correction(latents))


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 40])
def test_begins_as_the_standard_normal(latent_dim):
    flow = FlowPrior(latent_dim, 8, 16, dtype="float32")
    points = np.random.default_rng(0).normal(size=(50, latent_dim)).astype(np.float32)
    np.testing.assert_allclose(flow.correction(points), 0, atol=1e-5)
    np.testing.assert_allclose(flow.sample(points), points, atol=1e-5)


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 40])
def test_both_directions_undo_each_other(latent_dim):
    flow = scrambled(latent_dim, spread=0.1)
    noise = np.random.default_rng(0).normal(size=(50, latent_dim)).astype(np.float32)
    latents = flow.sample(noise)
    assert np.abs(latents - noise).max() > 0.1
    np.testing.assert_allclose(flow.to_normal(latents)[0], noise, atol=2e-3)


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_log_determinant_is_that_of_the_jacobian(latent_dim):
    flow = scrambled(latent_dim)
    point = tf.constant(np.random.default_rng(3).normal(size=(1, latent_dim)), "float32")
    with tf.GradientTape() as tape:
        tape.watch(point)
        normal, log_determinant = flow.to_normal(point)
    jacobian = tape.jacobian(normal, point)[0, :, 0, :]
    _, expected = np.linalg.slogdet(np.float64(jacobian))
    assert float(log_determinant[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_density_adds_up_to_one(latent_dim):
    flow = scrambled(latent_dim, spread=0.2)
    edge = np.linspace(-30, 30, 3001 if latent_dim == 1 else 1201)
    grid = np.stack(np.meshgrid(*[edge] * latent_dim, indexing="ij"), axis=-1)
    density = np.exp(log_density(flow, grid.reshape(-1, latent_dim)))
    assert density.sum() * (edge[1] - edge[0]) ** latent_dim == pytest.approx(1, abs=2e-3)


def test_draws_follow_the_density():
    flow = scrambled(2, spread=0.2)
    noise = np.random.default_rng(0).standard_normal((100_000, 2)).astype(np.float32)
    draws = ops.convert_to_numpy(flow.sample(noise))
    edges = [np.quantile(draws[:, axis], [0.05, 0.3, 0.6, 0.95]) for axis in (0, 1)]
    counts, *_ = np.histogram2d(*draws.T, bins=edges)
    for i in range(3):
        for j in range(3):
            sides = [np.linspace(*edges[0][i : i + 2], 101), np.linspace(*edges[1][j : j + 2], 101)]
            centres = [(side[1:] + side[:-1]) / 2 for side in sides]
            grid = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
            area = np.prod([side[1] - side[0] for side in sides])
            expected = np.exp(log_density(flow, grid)).sum() * area * len(draws)
            assert abs(counts[i, j] - expected) < 5 * np.sqrt(expected)


def test_what_one_coupling_stretches_is_bounded():
    flow = FlowPrior(2, 1, 4, dtype="float32")
    for variable in flow.trainable_variables:
        variable.assign(1000 * np.ones(variable.shape, np.float32))
    flow.lower.assign(np.zeros(flow.lower.shape))
    flow.upper.assign(np.zeros(flow.upper.shape))
    _, log_determinant = flow.to_normal(np.float32([[3, -4]]))
    # Two dimensions of the linear map, and the one that the coupling changes.
    assert abs(log_determinant[0]) <= 3 * LARGEST_LOG_SCALE + 1e-5


def test_kl_is_unbiased_for_what_quadrature_gives():
    """The exact KL from N(0, I) less the mean correction, beside a sum over a fine grid."""
    flow = scrambled(2, spread=0.2)
    mean, log_variance = np.float32([[1.7, -2.1]]), np.float32([[-0.5, 0.4]])
    spread = np.exp(log_variance[0] / 2)
    edges = [np.linspace(m - 9 * s, m + 9 * s, 700) for m, s in zip(mean[0], spread, strict=True)]
    grid = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(-1, 2)
    log_q = stats.norm.logpdf(grid, mean[0], spread).sum(axis=-1)
    area = np.prod([edge[1] - edge[0] for edge in edges])
    expected = np.sum(np.exp(log_q) * (log_q - log_density(flow, grid))) * area

    noise = np.random.default_rng(0).standard_normal((200_000, 1, 2)).astype(np.float32)
    latents = objective.reparameterise(mean, log_variance, noise)
    correction = ops.convert_to_numpy(flow.correction(latents))
    terms = objective.Terms(np.zeros((len(noise), 1)), latents, correction, mean, log_variance)
    error = correction.std() / np.sqrt(len(noise))
    assert float(terms.kl[0]) == pytest.approx(expected, abs=5 * error)
    assert abs(correction.mean()) > 20 * error


@pytest.mark.parametrize("find", ["elbo_gradients", "importance_weighted_gradients"])
def test_gradient_of_the_prior_is_that_of_the_loss(find):
    """The decoder's and the prior's gradients are cut nowhere: differences confirm them."""
    keras.utils.set_random_seed(0)
    objective_name = find.removesuffix("_gradients")
    sizes = {"latent_dim": 3, "filters": (4,), "hidden_units": 8}
    vae = VAE(VAEConfig((6, 5, 1), **sizes, prior="flow", objective=objective_name, samples=3))
    generator = np.random.default_rng(0)
    for variable in vae.prior.trainable_variables:
        variable.assign(generator.normal(scale=0.2, size=variable.shape))
    images = generator.random((4, *vae.config.image_shape)).astype(np.float32)
    noise = generator.standard_normal((3, 4, 3)).astype(np.float32)
    _, _, gradients = getattr(backend(), find)(vae, images, noise, 1.0)
    by_path = {
        variable.path: gradient
        for variable, gradient in zip(vae.trainable_variables, gradients, strict=True)
    }
    for variable in (vae.prior.shift, vae.prior.log_scale, vae.prior.bias, vae.prior.lower):
        direction = generator.normal(size=variable.shape).astype(np.float32)
        direction *= np.float32(0.02 / np.linalg.norm(direction))
        before = variable.numpy()
        losses = []
        for sign in (1, -1):
            variable.assign(before + sign * direction)
            losses.append(float(vae.loss_of(vae.terms(images, noise), 1.0)))
        variable.assign(before)
        expected = np.sum(direction * by_path[variable.path]) * 2
        assert losses[0] - losses[1] == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_learns_a_prior_that_no_normal_is():
    """Of two clumps of latents: the entropy that a flow finds is well below a normal's."""
    flow = FlowPrior(2, 8, 32, dtype="float32")
    generator = np.random.default_rng(0)
    clumps = 2.0 * generator.choice([-1, 1], (4096, 1)) * np.ones((1, 2))
    points = np.float32(clumps + 0.3 * generator.standard_normal((4096, 2)))
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(flow.trainable_variables)

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(flow.correction(batch))
        optimizer.apply(tape.gradient(loss, flow.trainable_variables))

    for start in range(0, 4096 * 40, 256):
        step(tf.constant(points[start % 4096 : start % 4096 + 256]))
    found = log_density(flow, points).mean()
    normal = stats.multivariate_normal(points.mean(0), np.cov(points.T)).logpdf(points).mean()
    true = -np.log(2 * np.pi * 0.09) - 1 - np.log(2)
    assert found > (normal + true) / 2
