import json
import shutil

import pytest
from helpers import change_manifest, change_parameters, worsen

from vaeflow.bundle.manifest import MANIFEST
from vaeflow.registry.gate import judge
from vaeflow.registry.promotion import settle
from vaeflow.registry.register import register
from vaeflow.training.tracking import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"


@pytest.fixture
def champion(bundled, tmp_path):
    """A workspace whose model is champion; its bundle may be changed into another."""
    assert settle(bundled, register(bundled)).alias == "champion"
    return bundled


def test_the_first_needs_no_champion_to_beat(bundled):
    version = register(bundled)
    verdict = judge(bundled, version)
    assert verdict.passed
    assert verdict.against is None
    assert verdict.reason.startswith("there was no champion; its bound is -")
    tags = connect(bundled).get_model_version(*version).tags
    assert tags["gate.quality"].startswith("passed: there was no champion")
    assert tags["gate.servability"].startswith("passed: pulled, verified and answering")
    assert tags["gate.sanity"].startswith("passed: ")


def test_a_worse_model_is_refused_with_its_numbers(champion):
    worsen(champion.bundle, 0.5)
    version = register(champion)
    verdict = judge(champion, version)
    assert not verdict.passed
    assert verdict.against == "1"
    assert verdict.comparison.difference < 0
    tags = connect(champion).get_model_version(*version).tags
    assert tags["gate.quality"].startswith("refused: not better than version 1")
    assert float(tags["gate.difference"]) == pytest.approx(verdict.comparison.difference, rel=1e-4)
    assert tags["gate.against"] == "1"


def test_a_better_model_must_be_better_by_as_much_as_is_asked(bundled, tmp_path):
    better = shutil.copytree(bundled.bundle, tmp_path / "better")
    worsen(bundled.bundle, 0.5)
    settle(bundled, register(bundled))
    shutil.rmtree(bundled.bundle)
    shutil.copytree(better, bundled.bundle)
    version = register(bundled)
    gained = judge(bundled, version).comparison.difference
    assert gained > 0
    for asked, passes in ((gained - 0.01, True), (gained + 0.01, False)):
        change_parameters(bundled.root, registry={"min_improvement": asked})
        assert judge(bundled, version).passed == passes


def test_the_same_model_in_another_bundle_is_no_better(champion):
    change_manifest(champion.bundle, created="2020-01-01T00:00:00Z")
    verdict = judge(champion, register(champion))
    assert not verdict.passed
    assert verdict.comparison.difference == 0


def test_a_bound_of_another_likelihood_or_size_does_not_compare(champion):
    change_manifest(champion.bundle, binarize="dynamic")
    verdict = judge(champion, register(champion))
    assert not verdict.passed
    assert "of binarised images of 8 x 8 x 1 under likelihood bernoulli" in verdict.reason
    assert "version 1's, of images as they are of 8 x 8 x 1" in verdict.reason


def test_static_and_dynamic_binarisation_are_judged_by_the_same_images(bundled):
    change_manifest(bundled.bundle, binarize="static")
    settle(bundled, register(bundled))
    change_manifest(bundled.bundle, binarize="dynamic")
    comparison = judge(bundled, register(bundled)).comparison
    assert comparison.difference == 0


def test_a_collapsed_posterior_is_refused(bundled):
    metrics = json.loads((bundled.bundle / MANIFEST).read_text())["metrics"]
    change_manifest(bundled.bundle, metrics={**metrics, "active_units": 0})
    verdict = judge(bundled, register(bundled))
    assert not verdict.passed
    assert verdict.reason.startswith("sanity: posterior collapse: 0 of 8 latent dimensions")


def test_a_model_that_answers_with_no_numbers_is_not_servable(bundled):
    worsen(bundled.bundle, float("nan"))
    verdict = judge(bundled, register(bundled))
    assert list(verdict.checks) == ["servability"]
    assert "not finite" in verdict.reason


def test_a_model_whose_files_were_changed_in_the_store_is_not_servable(bundled):
    version = register(bundled)
    (stored,) = (bundled.root / "mlartifacts").rglob("decoder.onnx")
    stored.write_bytes(b"x")
    verdict = judge(bundled, version)
    assert not verdict.passed
    assert "decoder.onnx" in verdict.reason


def test_a_champion_that_cannot_be_had_is_not_replaced_by_itself(champion):
    shutil.rmtree(champion.root / "mlartifacts")
    change_manifest(champion.bundle, created="2020-01-01T00:00:00Z")
    shutil.rmtree(champion.root.parent / "cache")
    verdict = judge(champion, register(champion))
    assert not verdict.passed
    assert "the champion, version 1, cannot be had" in verdict.reason
