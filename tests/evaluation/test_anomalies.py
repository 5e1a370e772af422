"""What `evaluate` tries the anomaly measure on, and the figures that come of it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from vaeflow.bundle.anomaly import Measure
from vaeflow.bundle.manifest import Manifest
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Evaluate, Prepare, load_parameters
from vaeflow.data.add import Addition, add
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import load_split
from vaeflow.evaluation.anomalies import auroc, looking_with
from vaeflow.evaluation.evaluate import evaluate
from vaeflow.evaluation.spoiling import SPOILINGS, spoil
from vaeflow.model.vae import load_vae


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (20, 33, 3), (5, 4, 2)])
@pytest.mark.parametrize("name", SPOILINGS)
def test_every_way_spoils_images_of_any_kind(name, shape):
    images = np.random.default_rng(0).integers(30, 220, (6, *shape), dtype=np.uint8)
    spoilt = spoil(name, images, 0)
    assert spoilt.images.shape == images.shape
    assert spoilt.images.dtype == np.uint8
    changed = (spoilt.images != images).any(axis=-1)
    spoils_all = changed.reshape(6, -1).any(axis=1)
    assert spoils_all.any() if name == "salt" else spoils_all.all()
    assert not changed[~spoilt.where].any()
    np.testing.assert_array_equal(spoil(name, images, 0).images, spoilt.images)
    if name in ("noise", "salt", "occluded", "dead_rows") and shape[0] > 8:
        assert (spoil(name, images, 1).images != spoilt.images).any()


def test_severities_are_what_they_say():
    images = np.random.default_rng(1).integers(40, 216, (200, 32, 32, 3), dtype=np.uint8)

    def changed(name):
        return spoil(name, images, 0).images

    assert (changed("noise").astype(int) - images).std() == pytest.approx(25, rel=0.03)
    salt = (changed("salt") != images).any(axis=-1)
    assert salt.mean() == pytest.approx(0.05, abs=0.003)
    assert spoil("occluded", images, 0).where.mean() == pytest.approx(0.15, abs=0.01)
    assert spoil("foreign_patch", images, 0).where.mean() == pytest.approx(0.25, abs=0.01)
    rows = spoil("dead_rows", images, 0).where.any(axis=2)
    assert (rows.sum(axis=1) == 3).all()
    np.testing.assert_array_equal(changed("inverted"), 255 - images)
    patches = changed("shuffled_patches")
    np.testing.assert_array_equal(np.sort(patches, axis=None), np.sort(images, axis=None))
    whole = images.astype(float)
    assert changed("blur").mean() == pytest.approx(whole.mean(), abs=0.5)
    assert changed("blur").std() < 0.5 * whole.std()


def test_the_area_is_that_of_another_library_and_its_error_that_of_resampling():
    rng = np.random.default_rng(2)
    usual, odd = rng.normal(size=150), rng.normal(1, 1.5, 100).round(1)  # some are ties
    usual = usual.round(1)
    area, error = auroc(usual, odd)
    truth = np.r_[np.zeros(150), np.ones(100)]
    assert area == pytest.approx(roc_auc_score(truth, np.r_[usual, odd]))
    areas = [auroc(rng.choice(usual, 150), rng.choice(odd, 100))[0] for _ in range(2_000)]
    assert error == pytest.approx(np.std(areas), rel=0.1)
    assert auroc(usual, usual + 100) == (1, 0)


@pytest.mark.slow
def test_the_stage_says_what_it_notices(finished):
    place = Workspace(finished)
    spoilt = json.loads((place.evaluation / "spoilt.json").read_text())
    metrics = json.loads((place.evaluation / "metrics.json").read_text())
    assert set(spoilt["kinds"]) == set(SPOILINGS)
    areas = [kind["auroc"] for kind in spoilt["kinds"].values()]
    assert metrics["spoilt_auroc"] == pytest.approx(np.mean(areas))
    assert metrics["false_alarms"] == spoilt["false_alarms"] < 0.1
    assert all(0 <= kind["standard_error"] < 0.1 for kind in spoilt["kinds"].values())
    assert np.mean(areas) > np.mean([kind["score_auroc"] for kind in spoilt["kinds"].values()])
    local = {name: kind["pixel_auroc"] for name, kind in spoilt["kinds"].items()}
    assert local["black"] is None
    assert local["occluded"] > 0.8
    assert local["foreign_patch"] > 0.6
    alarm = json.loads((place.evaluation / "alarm.json").read_text())
    manifest = Manifest.model_validate_json((place.bundle / "manifest.json").read_bytes())
    assert manifest.anomaly.model_dump() == alarm
    assert alarm["false_alarm_rate"] == 0.01


@pytest.mark.slow
def test_labelled_anomalies_are_told_from_test_images(finished, tmp_path, digits):
    root = tmp_path / "copy"
    shutil.copytree(finished, root, symlinks=True)
    place = Workspace(root)
    for folder, name in (("upside-down", "inverted"), ("blurred", "blur")):
        (tmp_path / "odd" / folder).mkdir(parents=True)
        for row, image in enumerate(spoil(name, digits[:40], 0).images):
            path = tmp_path / "odd" / folder / f"{row:02}.png"
            Image.fromarray(image[..., 0]).save(path)
    add(place, Prepare(), Addition(str(tmp_path / "odd"), anomalies=True, labels="folders"))
    prepare(place, load_parameters(place.parameters).prepare)
    metrics = evaluate(place, Evaluate(importance_samples=2))
    found = json.loads((place.evaluation / "anomalies.json").read_text())
    assert found["images"] == 80
    assert set(found["by_label"]) == {"upside-down", "blurred"}
    assert found["by_label"]["upside-down"]["auroc"] > 0.99
    assert found["by_label"]["upside-down"]["images"] == 40
    for key in ("auroc", "average_precision", "recall"):
        assert metrics[f"anomaly_{key}"] == found[key]
    recalls = [label["recall"] for label in found["by_label"].values()]
    assert found["recall"] == pytest.approx(np.mean(recalls))
    # Another computation of the best threshold.
    vae = load_vae(place.model / "model.keras")
    look = looking_with(vae)
    with (place.evaluation / "anomaly.npz").open("rb") as file:
        measure = Measure.load(file, (8, 8, 1), vae.config.latent_dim)
    usual, odd = (
        measure.anomaly(part[:].astype(np.float32) / 255, look(part))
        for part in (load_split(place.prepared, name) for name in ("test", "anomaly"))
    )
    truth = np.r_[np.zeros(len(usual)), np.ones(len(odd))]
    scores = [f1_score(truth, np.r_[usual, odd] >= value) for value in odd]
    assert found["best_f1"] == pytest.approx(max(scores))
