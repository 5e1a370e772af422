import json
import os
import re

import keras
import numpy as np
import pytest
from helpers import run
from PIL import Image
from scipy import special, stats

from vaeflow.common.workspace import Workspace
from vaeflow.config.model import VAEConfig
from vaeflow.data.splits import load_split
from vaeflow.evaluation import bounds
from vaeflow.evaluation.bounds import active_units, compute_bounds
from vaeflow.model.vae import VAE
from vaeflow.tracking.runs import connect


@pytest.fixture(scope="module", params=["standard", "flow"])
def vae(request):
    keras.utils.set_random_seed(0)
    sizes = {"latent_dim": 2, "filters": (4,), "hidden_units": 8, "prior": request.param}
    model = VAE(VAEConfig((8, 8, 1), **sizes))
    for variable in model.prior.trainable_variables:
        variable.assign(0.2 * keras.random.normal(variable.shape))
    return model


def test_bounds_tend_to_quadrature_over_the_latent(vae, digits):
    """log p(x) and the ELBO by summing over a fine grid of t, against many samples.

    The grid also gives the variance of each estimate, and so how far it may be off.
    """
    images = (digits[:4] > 127).astype(np.uint8) * 255
    samples = 4000
    axis = np.linspace(-7, 7, 281)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    cell = (axis[1] - axis[0]) ** 2
    logits = np.asarray(vae.decoder.predict(grid, batch_size=4096, verbose=0)["logits"], np.float64)
    log_sigmoid, log_one_minus = special.log_expit(logits), special.log_expit(-logits)
    posterior = {name: np.asarray(v) for name, v in vae.encoder(images / np.float32(255)).items()}
    computed = compute_bounds(vae, images, samples=samples, seed=0)
    for index, image in enumerate(images / 255.0):
        terms = image * log_sigmoid + (1 - image) * log_one_minus
        log_likelihood = terms.sum(axis=(1, 2, 3))
        mean = posterior["mean"][index]
        scale = np.exp(posterior["log_variance"][index] / 2)
        log_prior = stats.norm.logpdf(grid).sum(axis=1)
        correction = np.float64(vae.prior.correction(np.float32(grid)))
        log_prior += correction
        log_posterior = stats.norm.logpdf(grid, mean, scale).sum(axis=1)
        density = np.exp(log_posterior) * cell

        kl = np.sum(density * (log_posterior - log_prior))
        expected = np.sum(density * log_likelihood)
        variance = np.sum(density * (log_likelihood - expected) ** 2)
        kl_variance = np.sum(density * (correction - np.sum(density * correction)) ** 2)
        evidence = special.logsumexp(log_likelihood + log_prior + np.log(cell))
        relative_weights = np.exp(log_likelihood + log_prior - log_posterior - evidence)
        weight_variance = np.sum(density * (relative_weights - 1) ** 2)

        error = 5 * np.sqrt(variance / samples)
        kl_error = 1e-3 + 5 * np.sqrt(kl_variance / samples)
        assert computed.kl[index] == pytest.approx(kl, abs=kl_error)
        assert computed.log_likelihood[index] == pytest.approx(expected, abs=error)
        assert computed.elbo[index] == pytest.approx(expected - kl, abs=error + kl_error)
        error = 5 * np.sqrt(weight_variance / samples)
        assert computed.importance_weighted_bound[index] == pytest.approx(evidence, abs=error)


def test_blocks_change_nothing_and_bound_what_is_decoded_at_once(vae, digits, monkeypatch):
    whole = compute_bounds(vae, digits[:100], samples=300, seed=0)
    decoded = []
    compiled = bounds._compiled

    def watched(vae):
        decode = compiled(vae)

        def note(images, mean, log_variance, noise):
            decoded.append(noise.shape[0] * noise.shape[1])
            return decode(images, mean, log_variance, noise)

        return note

    monkeypatch.setattr(bounds, "_compiled", watched)
    widest = 8 * 8  # no layer of the decoder has more numbers than the image has pixels
    monkeypatch.setattr(bounds, "VALUES_PER_BLOCK", widest * 64 * 7)
    parts = compute_bounds(vae, digits[:100], samples=300, seed=0)
    assert max(decoded) <= 64 * 7
    assert sum(decoded) == 100 * 300
    for name, values in whole._asdict().items():
        assert values.shape[0] == 100
        np.testing.assert_allclose(getattr(parts, name), values, atol=2e-4, err_msg=name)
    if vae.config.prior == "standard":
        np.testing.assert_allclose(whole.kl_per_dimension.sum(axis=1), whole.kl, rtol=1e-6)


def test_active_units_are_the_dimensions_whose_mean_varies():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(500, 4)) * [1.0, 0.05, 0.5, 0.0]
    np.testing.assert_array_equal(active_units(means), [True, False, True, False])


@pytest.mark.slow
def test_the_stage_writes_its_metrics_and_figures(finished):
    place = Workspace(finished)
    metrics = json.loads((place.evaluation / "metrics.json").read_text())
    terms = ("elbo", "log_likelihood", "kl", "importance_weighted_bound")
    errors = {f"{name}_standard_error" for name in terms}
    counts = {"active_units", "images", "proper_likelihood"}
    anomalies = {"false_alarms", "spoilt_auroc"}
    assert set(metrics) == {*terms, *errors, *counts, *anomalies, "rate", "distortion"}
    assert metrics["elbo"] == pytest.approx(metrics["log_likelihood"] - metrics["kl"], rel=1e-5)
    assert metrics["importance_weighted_bound"] > metrics["elbo"]
    assert metrics["proper_likelihood"] == 0  # grey pixels, as Bernoulli
    assert metrics["images"] == len(load_split(place.prepared, "test"))
    figures = (
        "latent_dimensions",
        "latent_map",
        "reconstructions",
        "samples",
        "scores",
        "spoilt",
        "training_curves",
        "traversals",
    )
    for name in figures:
        with Image.open(place.evaluation / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("L").getcolors()) > 10

    run_id = json.loads((place.model / "run.json").read_text())["run_id"]
    client = connect(place)
    tracked = client.get_run(run_id).data.metrics
    assert tracked["test_elbo"] == pytest.approx(metrics["elbo"])
    kept = {item.path for item in client.list_artifacts(run_id, "figures")}
    assert kept == {f"figures/{name}.png" for name in figures}


@pytest.mark.slow
def test_the_run_carries_parameters_curves_and_lineage(finished):
    place = Workspace(finished)
    kept = json.loads((place.model / "run.json").read_text())
    client = connect(place)
    tracked = client.get_run(kept["run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["train.epochs"] == "3"
    assert len(client.get_metric_history(kept["run_id"], "validation_elbo")) == 3
    head = run(finished, "git", "rev-parse", "HEAD").stdout.strip()
    assert tracked.data.tags["git_commit"] == head
    assert tracked.data.tags["git_dirty"] == "false"
    assert tracked.data.tags["data_md5"] in (finished / "data.dvc").read_text()
    assert len(tracked.data.tags["parameters_sha256"]) == 64
    assert kept["lineage"].items() <= tracked.data.tags.items()


@pytest.mark.backends
def test_under_jax_the_figures_are_those_of_tensorflow_and_the_bundle_is_exported(bundled):
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'vaeflow[jax]'")
    expected = json.loads((bundled.evaluation / "metrics.json").read_text())
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run(bundled.root, "vaeflow", "evaluate", env=environment)
    found = json.loads((bundled.evaluation / "metrics.json").read_text())
    assert found == pytest.approx(expected, rel=1e-4)
    exported = run(bundled.root, "vaeflow", "export", env=environment)
    assert re.search(
        r"^outputs/bundle: \d+ files, largest difference", exported.stdout, re.MULTILINE
    )
