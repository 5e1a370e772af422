import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import vaeflow
from vaeflow.bundle import runtime
from vaeflow.bundle.manifest import MANIFEST
from vaeflow.bundle.runtime import Bundle
from vaeflow.common.files import sha256_of
from vaeflow.common.workspace import Workspace
from vaeflow.data.splits import load_split
from vaeflow.errors import BundleError, DataError
from vaeflow.evaluation.anomalies import looking_with
from vaeflow.evaluation.bounds import compute_bounds, score_noise
from vaeflow.evaluation.spoiling import spoil
from vaeflow.model.vae import load_vae

pytestmark = pytest.mark.slow  # a real bundle has to be made first


@pytest.fixture(scope="module")
def model(finished):
    return vaeflow.load(finished / "outputs" / "bundle")


@pytest.fixture(scope="module")
def vae(finished):
    return load_vae(finished / "outputs" / "model" / "model.keras")


def test_answers_equal_keras(model, vae, digits):
    images = digits[:600]
    expected = vae.predict(images / np.float32(255), verbose=0)
    posterior = model.encode(images)
    np.testing.assert_allclose(posterior.mean, expected["mean"], atol=1e-4)
    np.testing.assert_allclose(posterior.log_variance, expected["log_variance"], atol=1e-4)
    np.testing.assert_allclose(model.reconstruct(images), expected["reconstruction"], atol=1e-4)
    decoded = model.decode(posterior.mean)
    assert decoded.shape == (600, 8, 8, 1)
    assert decoded.dtype == np.float32


def test_the_score_is_minus_the_elbo(model, vae, digits):
    images = digits[:50]
    elbo = compute_bounds(vae, images, samples=2000, seed=1).elbo
    np.testing.assert_allclose(model.score(images, samples=2000), -elbo, atol=0.15)


def test_what_calibrates_is_what_is_served(model, vae, digits):
    """`evaluate` looks at images with Keras, a service with ONNX and NumPy."""
    images = digits[:200]
    theirs, ours = looking_with(vae)(images), model._look(images, score_noise(vae))
    for expected, found in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    found = model.detect(images, maps=True)
    np.testing.assert_allclose(found.score, model.score(images), rtol=1e-6)
    scaled = images.astype(np.float32) / 255
    np.testing.assert_allclose(found.anomaly, model.measure.anomaly(scaled, theirs), rtol=2e-3)
    np.testing.assert_allclose(found.maps, model.measure.map(scaled, theirs), atol=0.05)
    assert found.maps.shape == images.shape[:3]


def test_an_image_is_judged_alike_alone_and_among_others(model, digits, monkeypatch):
    together = model.detect(digits[:50], maps=True)
    alone = [model.detect(image[None], maps=True) for image in digits[:50]]
    for all_of_them, *each in zip(together, *alone, strict=True):
        np.testing.assert_allclose(np.concatenate(each), all_of_them, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(runtime, "VALUES_AT_ONCE", 64 * 7)
    for cut, whole in zip(model.detect(digits[:50]), together, strict=False):
        if cut is not None:
            np.testing.assert_allclose(cut, whole, rtol=1e-4)


def test_what_was_spoilt_raises_an_alarm(model, finished):
    test = load_split(Workspace(finished).prepared, "test")
    assert model.detect(test).anomalous.mean() < 0.1  # in the mean of all calibrations 0.01
    for name in ("black", "white", "grey", "one_colour", "noise", "inverted", "shuffled_patches"):
        found = model.detect(spoil(name, test, 0).images, false_alarm_rate=0.05)
        assert found.anomalous.mean() > 0.9, name
    # Where it was spoilt the map is higher.
    spoilt = spoil("occluded", test, 0)
    maps = model.detect(spoilt.images, maps=True).maps
    assert maps[spoilt.where].mean() > 3 * maps[~spoilt.where].mean()


def test_the_threshold_is_that_of_the_rate(model):
    alarm = model.manifest.anomaly
    assert alarm.images == len(model.measure.calibration.anomalies) >= 99
    assert model.threshold() == pytest.approx(model.threshold(alarm.false_alarm_rate))
    assert model.threshold(0.5) < model.threshold(0.1) < model.threshold(0.02)
    with pytest.raises(DataError, match=r"cannot vouch for a false alarm rate of 0\.0001"):
        model.detect(np.zeros((1, 8, 8), np.uint8), false_alarm_rate=1e-4)


@pytest.mark.parametrize("rate", [0, 1, -0.5, 3, float("nan")])
def test_a_rate_is_a_share(model, rate):
    with pytest.raises(DataError, match="expected a share between 0 and 1"):
        model.threshold(rate)


def test_without_a_measure_it_says_how_to_make_one(bundle):
    content = json.loads((bundle / MANIFEST).read_text())
    content["anomaly"] = None
    del content["files"]["anomaly.npz"]
    (bundle / "anomaly.npz").unlink()
    (bundle / MANIFEST).write_text(json.dumps(content))
    model = Bundle(bundle)
    assert not model.detects
    assert model.score(np.zeros((1, 8, 8), np.uint8)).shape == (1,)
    with pytest.raises(BundleError, match=r"no anomaly measure.*dvc repro"):
        model.detect(np.zeros((1, 8, 8), np.uint8))


def test_scores_are_calibrated_on_the_validation_images(model, finished):
    validation = load_split(Workspace(finished).prepared, "validation")
    scores = model.score(validation)
    for share, value in model.manifest.score_quantiles.items():
        assert value == pytest.approx(np.quantile(scores, float(share)), abs=1e-3)
    ranks = model.score_rank(scores)
    # Interpolated between eleven shares, the furthest apart by a quarter.
    expected = (stats.rankdata(scores) - 1) / (len(scores) - 1)
    np.testing.assert_allclose(ranks, expected, atol=0.05)
    assert list(model.score_rank(np.array([-1e9, 1e9]))) == [0, 1]


def test_a_bundle_without_quantiles_ranks_nothing(bundle):
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**content, "score_quantiles": {}}))
    with pytest.raises(BundleError, match="export it again"):
        Bundle(bundle).score_rank(np.zeros(3))


def test_a_score_does_not_depend_on_the_neighbours(model, digits):
    whole = model.score(digits[:300])
    np.testing.assert_allclose(model.score(digits[7:8]), whole[7:8], rtol=1e-5)
    np.testing.assert_allclose(model.score(digits[:300][::-1])[::-1], whole, rtol=1e-5)


def test_noise_scores_worse_than_digits(model, digits):
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    assert np.median(model.score(noise)) > np.quantile(model.score(digits), 0.99)


def test_uint8_and_floating_point_and_missing_channels_are_the_same(model, digits):
    images = digits[:10]
    for same in (images / np.float32(255), images / 255.0, images[..., 0]):
        np.testing.assert_array_equal(model.encode(same).mean, model.encode(images).mean)


def test_samples_are_seeded_and_a_prefix_of_more(model):
    first = model.sample(300, seed=1)
    np.testing.assert_allclose(model.sample(10, seed=1), first[:10], atol=1e-6)
    assert not np.array_equal(model.sample(10, seed=2), first[:10])
    assert first.min() >= 0
    assert first.max() <= 1


def nan_image():
    images = np.zeros((3, 8, 8, 1))
    images[1, 2, 3] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (nan_image(), "image 1 has NaN"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"this model takes \(8, 8, 1\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"this model takes \(8, 8, 1\)"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((0, 8, 8, 1), np.uint8), "no images"),
        (np.zeros((2, 8, 8, 1), np.int32), "int32"),
        (np.full((2, 8, 8, 1), 255.0), "scale them"),
        ([["a"]], "dtype"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "reconstruct", "score"])
def test_what_are_no_images_for_this_model_is_refused(model, method, images, expected):
    with pytest.raises(DataError, match=expected):
        getattr(model, method)(images)


def test_wrong_latents_and_counts_are_refused(model):
    for latents in (np.zeros((2, 3)), np.zeros(8), np.zeros((0, 8)), np.full((1, 8), np.nan)):
        with pytest.raises(DataError, match="latents"):
            model.decode(latents)
    for call in (
        lambda: model.sample(0, 1),
        lambda: model.sample(1, -1),
        lambda: model.score(np.zeros((1, 8, 8), np.uint8), samples=0),
        lambda: model.score(np.zeros((1, 8, 8), np.uint8), seed=-1),
    ):
        with pytest.raises(DataError, match="expected"):
            call()


def test_a_tampered_bundle_is_refused_before_it_is_opened(bundle):
    path = bundle / "encoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx: size or SHA-256 differ"):
        Bundle(bundle)


def test_a_file_that_is_as_listed_but_no_model_is_refused(bundle):
    (bundle / "decoder.onnx").write_bytes(b"junk")
    content = json.loads((bundle / MANIFEST).read_text())
    content["files"]["decoder.onnx"] = {"size": 4, "sha256": sha256_of(b"junk")}
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"decoder\.onnx: not a readable ONNX model"):
        Bundle(bundle)


LIGHT = """
import sys
import numpy as np
import vaeflow

model = vaeflow.load(sys.argv[1])
model.score(np.zeros((2, 8, 8, 1), np.uint8))
model.sample(3, seed=0)
heavy = {"tensorflow", "keras", "mlflow", "dvc", "prefect", "pandas", "pyarrow", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_local_bundle_needs_nothing_heavy(finished):
    command = [sys.executable, "-c", LIGHT, finished / "outputs" / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
