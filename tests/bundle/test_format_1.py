"""Bundles of format 1 answer as the version answered that wrote this one, in November 2026.

`format_1/` was made of 8x8 digits, before there were learned priors, mixtures and fewer levels.
"""

from pathlib import Path

import numpy as np
import pytest

from vaeflow.bundle.runtime import Bundle
from vaeflow.errors import BundleError
from vaeflow.model.vae import load_vae
from vaeflow.registry.comparison import compare
from vaeflow.registry.gate import measure

OLD = Path(__file__).parent / "format_1"
SCORES = [206.3462829, 134.2499389, 186.1192016, 198.7842864, 174.0415496]
BOUNDS = [-204.3545227, -133.0820770, -186.3615112, -197.1395263, -174.5689239]


def test_it_scores_bounds_and_samples_as_it_did(digits):
    model = Bundle(OLD)
    assert (model.manifest.format_version, model.manifest.prior) == (1, "standard")
    np.testing.assert_allclose(model.score(digits[:5]), SCORES, rtol=1e-5)
    np.testing.assert_allclose(model.importance_weighted_bound(digits[:5], 16), BOUNDS, rtol=1e-5)
    assert model.sample(3, seed=1).sum() == pytest.approx(60.4739037, rel=1e-5)


def test_it_says_that_it_has_no_anomaly_measure(digits):
    model = Bundle(OLD)
    assert not model.detects
    with pytest.raises(BundleError, match="has no anomaly measure"):
        model.detect(digits[:1])


def test_its_keras_file_loads_with_what_it_did_not_know_of_as_it_was(digits):
    vae = load_vae(OLD / "model.keras")
    assert (vae.config.prior, vae.config.levels) == ("standard", 256)
    images = digits[:5] / np.float32(255)
    mean = np.asarray(vae.encoder(images)["mean"])
    np.testing.assert_allclose(Bundle(OLD).encode(digits[:5]).mean, mean, atol=1e-5)


def test_it_compares_with_models_of_the_same_levels_only(digits):
    old = Bundle(OLD)
    comparison = compare(old, old, digits[:50], 4)
    assert comparison.difference == 0

    def with_manifest(**changes):
        model = Bundle(OLD)
        model.manifest = model.manifest.model_copy(update=changes)
        return model

    mixture = with_manifest(likelihood="mixture_logistic", prior="flow", format_version=2)
    assert measure(mixture) == measure(old)
    assert "a probability of 256 levels" in measure(old)
    assert "a probability of 17 levels" in measure(with_manifest(levels=17))
    assert "likelihood bernoulli" in measure(with_manifest(likelihood="bernoulli"))
