import csv

import keras
import numpy as np
import pytest
from scipy import stats

from vaeflow.config.model import VAEConfig
from vaeflow.evaluation.bounds import Bounds, compute_bounds
from vaeflow.evaluation.evaluate import collapse_warning, summarise, write_dimensions
from vaeflow.model.vae import VAE


def small_vae(**options):
    keras.utils.set_random_seed(0)
    return VAE(VAEConfig((8, 8, 1), latent_dim=3, filters=(4,), hidden_units=8, **options))


@pytest.fixture(scope="module")
def some():
    """Bounds of 50 images, made up."""
    rng = np.random.default_rng(0)
    kl = rng.exponential(size=(50, 3))
    log_likelihood = rng.normal(-20, 3, 50)
    elbo = log_likelihood - kl.sum(axis=1)
    means = rng.normal(size=(50, 3)) * [1, 1, 0]
    return Bounds(elbo, log_likelihood, kl.sum(axis=1), elbo + 0.5, kl, means, np.zeros_like(means))


def test_each_mean_has_its_standard_error(some, digits):
    metrics = summarise(some, small_vae(), digits[:50])
    for name in ("elbo", "log_likelihood", "kl", "importance_weighted_bound"):
        values = getattr(some, name)
        assert metrics[name] == pytest.approx(np.mean(values))
        assert metrics[f"{name}_standard_error"] == pytest.approx(stats.sem(values))
    assert metrics["rate"] + metrics["distortion"] == pytest.approx(-metrics["elbo"])
    assert metrics["active_units"] == 2
    assert metrics["proper_likelihood"] == 0
    assert summarise(some, small_vae(), digits[:50] // 255 * 255)["proper_likelihood"] == 1


def test_one_image_has_no_standard_error(digits):
    vae = small_vae()
    metrics = summarise(compute_bounds(vae, digits[:1], samples=3, seed=0), vae, digits[:1])
    assert not [name for name in metrics if "standard_error" in name]
    assert np.isfinite(list(metrics.values())).all()


def test_bits_per_dimension_of_uniform_noise_are_eight_or_more():
    """No model can need fewer than 8 bits a pixel for pixels that hold 8 bits each."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    vae = small_vae(likelihood="discretized_logistic")
    vae.compile(optimizer=keras.optimizers.Adam(1e-2))
    vae.fit(noise / np.float32(255), epochs=8, batch_size=20, verbose=0)
    metrics = summarise(compute_bounds(vae, noise, samples=5, seed=0), vae, noise)
    nats = -metrics["importance_weighted_bound"] / 64
    assert metrics["bits_per_dimension"] == pytest.approx(np.log2(np.exp(nats)))
    assert 8 < metrics["bits_per_dimension"] < 9
    assert metrics["proper_likelihood"] == 1


@pytest.mark.parametrize(
    ("active", "latent_dim", "expected"),
    [(0, 8, "no latent dimension"), (4, 50, "only 4 of 50"), (5, 50, None), (1, 8, None)],
)
def test_a_collapsed_posterior_is_told(active, latent_dim, expected):
    reason = collapse_warning(active, latent_dim)
    assert reason is None if expected is None else expected in reason


def test_under_a_learned_prior_a_dimension_is_active_by_its_own_scale(some, digits):
    """Latents that are a hundred times as small carry as much information as before."""
    small = some._replace(
        means=some.means / 100, log_variances=some.log_variances - 2 * np.log(100)
    )
    assert summarise(some, small_vae(prior="flow"), digits[:50])["active_units"] == 2
    assert summarise(small, small_vae(prior="flow"), digits[:50])["active_units"] == 2
    assert summarise(small, small_vae(), digits[:50])["active_units"] == 0


def test_the_table_of_dimensions(some, tmp_path):
    write_dimensions(tmp_path / "dimensions.csv", some, np.ones(3))
    rows = list(csv.DictReader((tmp_path / "dimensions.csv").read_text().splitlines()))
    assert [row["active"] for row in rows] == ["1", "1", "0"]
    np.testing.assert_allclose(
        [float(row["kl"]) for row in rows], some.kl_per_dimension.mean(axis=0)
    )
    np.testing.assert_allclose(
        [float(row["mean_variance"]) for row in rows], np.var(some.means, axis=0)
    )
