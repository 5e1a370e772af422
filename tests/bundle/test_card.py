"""The model's card: whatever the manifest says, and only that."""

from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from vaeflow.bundle.card import CARD, MEANINGS, model_card
from vaeflow.bundle.manifest import Alarm, Manifest

OLD = Path(__file__).parent / "format_1" / "manifest.json"


@pytest.fixture
def manifest():
    return Manifest.model_validate_json(OLD.read_bytes())


def parts(card):
    _, front, text = card.split("---\n", 2)
    return YAML(typ="safe").load(front), text


@pytest.mark.slow
def test_a_bundle_has_a_card_of_its_own_facts(finished):
    bundle = finished / "outputs" / "bundle"
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    assert CARD in manifest.files
    card = (bundle / CARD).read_text(encoding="utf-8")
    facts, text = parts(card)
    (model,) = facts["model-index"]
    assert model["name"] == manifest.name == "digits-vae"
    (result,) = model["results"]
    assert manifest.lineage["data_md5"] in result["dataset"]["name"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {name: manifest.metrics[name] for name in MEANINGS if name in manifest.metrics}
    assert "importance_weighted_bound" in found
    assert f"git checkout {manifest.lineage['git_commit']}" in text
    assert f"above {manifest.anomaly.threshold:.4g}" in text
    assert "8 x 8 pixels, grey" in text
    assert ("chosen by the images" in text) == bool(manifest.chosen)


def test_what_a_bundle_lacks_its_card_lacks(manifest):
    _, text = parts(model_card(manifest))
    assert "it has none" in text
    assert "chosen by the images" not in text
    assert "and says which are anomalous" not in text
    alarm = Alarm(false_alarm_rate=0.02, threshold=3.25, images=500)
    pictures = Alarm(false_alarm_rate=0.04, threshold=4.5, images=25, of_pictures=None)
    tiled = manifest.model_copy(
        update={"anomaly": alarm.model_copy(update={"of_pictures": pictures})}
    )
    _, text = parts(model_card(tiled))
    assert "above 3.25" in text
    assert "above 4.5, of usual pictures 0.04, by 25 pictures" in text
    improper = manifest.model_copy(update={"metrics": {"elbo": -1.0, "proper_likelihood": 0}})
    assert "are no bounds of log p(x)" in model_card(improper)


def test_names_stay_text(manifest):
    evil = "a<script>alert(1)</script> [x](http://e) **b** ---\n# c"
    lineage = {"split": evil, "version_x": evil, "data_md5": "0", "git_commit": "f"}
    facts, text = parts(model_card(manifest.model_copy(update={"name": evil, "lineage": lineage})))
    assert facts["model-index"][0]["name"] == evil
    html = MarkdownIt("commonmark", {"html": True}).render(text)
    assert "<script" not in html
    assert "<a " not in html
    assert "<strong>" not in html
