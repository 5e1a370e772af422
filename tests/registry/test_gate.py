import json
import shutil

import numpy as np
import pytest
from helpers import change_manifest, change_parameters, worsen

from vaeflow.bundle.manifest import MANIFEST
from vaeflow.data.splits import SplitRule
from vaeflow.registry.champion import apply_verdict
from vaeflow.registry.gate import judge
from vaeflow.registry.held_out import read_held_out
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"


@pytest.fixture
def champion(bundled, tmp_path):
    """A workspace whose model is champion; its bundle may be changed into another."""
    assert apply_verdict(bundled, register(bundled)).alias == "champion"
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
    assert verdict.decision.comparison.difference < 0
    tags = connect(champion).get_model_version(*version).tags
    assert tags["gate.quality"].startswith("refused: not better than version 1")
    assert float(tags["gate.difference"]) == pytest.approx(
        verdict.decision.comparison.difference, rel=1e-4
    )
    assert tags["gate.against"] == "1"


def test_a_better_model_must_be_better_by_as_much_as_is_asked(bundled, tmp_path):
    better = shutil.copytree(bundled.bundle, tmp_path / "better")
    worsen(bundled.bundle, 0.5)
    apply_verdict(bundled, register(bundled))
    shutil.rmtree(bundled.bundle)
    shutil.copytree(better, bundled.bundle)
    version = register(bundled)
    gained = judge(bundled, version).decision.comparison.difference
    assert gained > 0
    for asked, passes in ((gained - 0.01, True), (gained + 0.01, False)):
        change_parameters(bundled.root, registry={"min_improvement": asked})
        assert judge(bundled, version).passed == passes


def test_the_same_model_in_another_bundle_is_no_better(champion):
    change_manifest(champion.bundle, created="2020-01-01T00:00:00Z")
    verdict = judge(champion, register(champion))
    assert not verdict.passed
    assert verdict.decision.comparison.difference == 0


def split_by(place, **changes):
    """Another bundle, whose images were split by another rule."""
    lineage = json.loads((place.bundle / MANIFEST).read_text())["lineage"]
    rule = SplitRule.parse(lineage["split"])._replace(**changes)
    change_manifest(place.bundle, lineage={**lineage, "split": str(rule)})


def test_models_of_other_splits_are_compared_on_the_images_that_neither_had(champion):
    split_by(champion, test_fraction=0.05)  # half of the champion's test images
    decision = judge(champion, register(champion)).decision
    digests = read_held_out(champion.prepared).digests
    new_to_both = np.count_nonzero(SplitRule(0, 0.1, 0.05).assign(digests) == "test")
    assert decision.comparison.images == new_to_both < len(digests) == 158


def test_where_the_splits_leave_too_few_it_is_refused_and_no_try_is_counted(champion):
    split_by(champion, seed=1)
    version = register(champion)
    verdict = judge(champion, version)
    assert not verdict.passed
    assert verdict.decision is None
    assert verdict.reason.startswith(
        "quality: it does not compare with the champion: only 20 of 158 test images are new to both"
    )
    tags = connect(champion).get_registered_model(NAME).tags
    assert not [key for key in tags if key.startswith("gate.tries")]


def test_a_model_of_before_splits_were_recorded_is_refused(champion):
    lineage = json.loads((champion.bundle / MANIFEST).read_text())["lineage"]
    del lineage["split"]
    change_manifest(champion.bundle, lineage=lineage)
    verdict = judge(champion, register(champion))
    assert "which images version 2 was trained on is not known" in verdict.reason


def test_a_verdict_made_again_is_the_same_try_and_the_next_version_is_another(champion):
    for attempt in (1, 2):
        change_manifest(champion.bundle, created=f"2020-01-0{attempt}T00:00:00Z")
        version = register(champion)
        assert [judge(champion, version).decision.attempt for _ in range(2)] == [attempt] * 2


def test_a_bound_of_another_likelihood_or_size_does_not_compare(champion):
    change_manifest(champion.bundle, binarize="dynamic")
    verdict = judge(champion, register(champion))
    assert not verdict.passed
    assert "its bound is of binarised images of 8 x 8 x 1 under likelihood" in verdict.reason
    assert "and version 1's of images as they are of 8 x 8 x 1" in verdict.reason


def test_static_and_dynamic_binarisation_are_judged_by_the_same_images(bundled):
    change_manifest(bundled.bundle, binarize="static")
    apply_verdict(bundled, register(bundled))
    change_manifest(bundled.bundle, binarize="dynamic")
    decision = judge(bundled, register(bundled)).decision
    assert decision.comparison.difference == 0


def test_a_collapsed_posterior_is_refused(bundled):
    metrics = json.loads((bundled.bundle / MANIFEST).read_text())["metrics"]
    change_manifest(bundled.bundle, metrics={**metrics, "active_units": 0})
    verdict = judge(bundled, register(bundled))
    assert not verdict.passed
    assert verdict.reason.startswith("sanity: posterior collapse: 0 of 8 latent dimensions")


@pytest.mark.fresh_process
def test_a_model_that_answers_with_no_numbers_is_not_servable(bundled):
    worsen(bundled.bundle, float("nan"))
    verdict = judge(bundled, register(bundled))
    assert list(verdict.checks) == ["servability"]
    assert "not finite" in verdict.reason


@pytest.mark.fresh_process
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
