"""The runtime against Keras for every likelihood and prior, on untrained models."""

import json

import numpy as np
import pytest
from keras import ops
from model_bundles import make_model, write_bundle
from scipy.special import logsumexp

from vaeflow.bundle.manifest import MANIFEST
from vaeflow.bundle.runtime import Bundle
from vaeflow.errors import BundleError
from vaeflow.model import objective
from vaeflow.model.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.slow


CASES = [*((name, "standard") for name in LIKELIHOODS), ("bernoulli", "flow")]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def pair(request, tmp_path_factory):
    """A model, and the folder of a bundle of it."""
    likelihood, prior = request.param
    vae = make_model((9, 7, 3), likelihood=likelihood, prior=prior)
    folder = tmp_path_factory.mktemp("bundle")
    return vae, write_bundle(folder, vae)


def test_answers_equal_keras(pair):
    vae, folder = pair
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
    expected = vae(images / np.float32(255))
    model = Bundle(folder)
    np.testing.assert_allclose(model.reconstruct(images), expected["reconstruction"], atol=1e-5)

    noise = np.random.default_rng(4).standard_normal((5, 1, 2), dtype=np.float32)
    elbo = ops.convert_to_numpy(vae.terms(images / np.float32(255), noise).elbo)
    np.testing.assert_allclose(model.score(images, samples=5, seed=4), -elbo, rtol=1e-4)


def test_the_importance_weighted_bound_equals_keras(pair):
    vae, folder = pair
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
    scaled = images / np.float32(255)
    posterior = vae.encoder(scaled)
    mean, log_variance = posterior["mean"], posterior["log_variance"]
    noise = np.random.default_rng(4).standard_normal((6, 5, 2), dtype=np.float32).swapaxes(0, 1)
    latents = objective.reparameterise(mean, log_variance, noise)
    log_weights = objective.log_importance_weights(
        vae.log_likelihood(scaled, latents),
        latents,
        mean,
        log_variance,
        prior_correction=vae.prior.correction(latents),
    )
    expected = logsumexp(log_weights, axis=0) - np.log(5)
    bound = Bundle(folder).importance_weighted_bound(images, samples=5, seed=4)
    np.testing.assert_allclose(bound, expected, rtol=1e-4)


def test_samples_are_decoded_draws_of_the_prior(pair):
    vae, folder = pair
    noise = np.random.default_rng(4).standard_normal((5, 2), dtype=np.float32)
    model = Bundle(folder)
    np.testing.assert_allclose(model.sample(5, seed=4), vae.sample(noise), atol=1e-5)
    assert np.allclose(model.draw(5, seed=4), noise) == (vae.config.prior == "standard")


def test_pixels_are_drawn_as_keras_draws_them_and_scatter_about_their_means(pair):
    vae, folder = pair
    model = Bundle(folder)
    latents = np.float32([[0.3, -0.2]])
    uniform = np.random.default_rng((4, 1)).random((1, 9, 7, 4), dtype=np.float32)
    drawn = model.draw_pixels(latents, seed=4)
    differ = np.abs(drawn - vae.draw_pixels(latents, uniform)) > 1e-4
    assert differ.mean() < 0.01  # a number at the edge of a level may round to either side
    many = model.draw_pixels(np.repeat(latents, 4000, axis=0), seed=0)
    assert many.dtype == np.float32
    assert len(np.unique(many)) > 1
    np.testing.assert_allclose(many.mean(axis=0), model.decode(latents)[0], atol=0.04)


def test_a_decoder_of_another_likelihood_is_refused(pair):
    vae, folder = pair
    other = next(name for name in LIKELIHOODS if name != vae.config.likelihood)
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "likelihood": other}))
    with pytest.raises(BundleError, match=rf"decoder\.onnx gives .*{other} takes"):
        Bundle(folder)
