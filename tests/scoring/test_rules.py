"""New images are read by the rules of those that the model was trained on."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from serving_helpers import npy

import vaeflow
from vaeflow.bundle.manifest import MANIFEST, ImageSpec, read_verified
from vaeflow.config.schema import Limits
from vaeflow.data.io.rules import Rules
from vaeflow.errors import DataError
from vaeflow.scoring.images import Asked, read, reading_for
from vaeflow.scoring.score import Batch, score
from vaeflow.serving.bodies import RefusedError, images_of

SPEC = {"height": 8, "width": 8, "channels": 1}
RANDOM = np.random.default_rng(0)


def spec(**rules):
    return ImageSpec(**SPEC, reading=Rules(**rules))


@pytest.fixture
def trained(bundle):
    """A bundle as it would be if its images had been read by other rules."""

    def with_rules(**rules):
        manifest = json.loads((bundle / MANIFEST).read_text())
        manifest["image"]["reading"] = Rules(**rules).model_dump(mode="json")
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        return vaeflow.load(bundle)

    return with_rules


@pytest.fixture
def icons(tmp_path):
    alpha = RANDOM.integers(0, 256, (6, 8, 8, 2), dtype=np.uint8)
    (tmp_path / "icons").mkdir()
    for number, image in enumerate(alpha):
        Image.fromarray(image).save(tmp_path / "icons" / f"{number}.png")
    colour, behind = alpha[..., :1].astype(float), 1 - alpha[..., 1:] / 255
    return str(tmp_path / "icons"), np.rint(colour * (1 - behind) + 255 * behind).astype(np.uint8)


def test_background_size_and_channels_are_those_of_the_model(tmp_path, icons):
    source, over_white = icons
    image = spec(background="#ffffff")
    np.testing.assert_array_equal(read([source], reading_for(image)).pixels, over_white)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "large.png")
    with pytest.raises(DataError, match="--resize crop"):
        read([str(tmp_path / "large.png")], reading_for(image))
    image = spec(size=(8, 8), resize="fit", channels=1)
    fitted = read([str(tmp_path / "large.png")], reading_for(image)).pixels[0]
    assert (fitted[0].max(), fitted[4].min()) == (0, 76)  # black above, red's luma in the middle
    filled = read([str(tmp_path / "large.png")], reading_for(image, Asked("crop"))).pixels[0]
    assert filled.min() == 76


def test_ranges_and_layouts_are_those_of_the_model_or_as_asked(tmp_path):
    path = str(tmp_path / "a.npy")
    signed = RANDOM.random((6, 8, 8)).astype(np.float32)  # no less than 0, as it happens
    np.save(path, signed)
    ours = np.rint((signed + 1) * 127.5).astype(int)
    found = read([path], reading_for(spec(floats="-1..1"))).pixels[..., 0]
    assert np.abs(found - ours).max() <= 1
    found = read([path], reading_for(spec(floats="-1..1"), Asked(value_range="0..1"))).pixels
    np.testing.assert_array_equal(found[..., 0], np.rint(signed * 255))
    np.save(path, np.moveaxis(np.rint(signed * 255).astype(np.uint8), 0, -1))
    for reading in (
        reading_for(spec(layout="HWN")),
        reading_for(spec()),  # the model's shape tells
        reading_for(spec(), Asked(layout="HWN")),
    ):
        np.testing.assert_array_equal(read([path], reading).pixels[..., 0], np.rint(signed * 255))


def test_a_layout_of_the_data_does_not_stand_in_the_way_of_another(tmp_path):
    path = str(tmp_path / "a.npy")
    images = RANDOM.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    for layout, array in {"NCHW": images[:, None], "HWN": np.moveaxis(images, 0, -1)}.items():
        np.save(path, array)
        for rule in ("NHWC", "NHW", layout):
            found = read([path], reading_for(spec(layout=rule))).pixels[..., 0]
            np.testing.assert_array_equal(found, images)


def test_one_page_or_all(tmp_path):
    path = tmp_path / "a.tif"
    first, *rest = [
        Image.fromarray(image) for image in RANDOM.integers(0, 256, (3, 8, 8), np.uint8)
    ]
    first.save(path, save_all=True, append_images=rest)
    assert read([str(path)], reading_for(spec())).names == [f"{path}#{page}" for page in range(3)]
    assert read([str(path)], reading_for(spec(pages="first"))).names == [str(path)]
    both = reading_for(spec(pages="first"), Asked(pages="all"))
    assert len(read([str(path)], both).names) == 3


def test_the_limit_may_be_raised(tmp_path):
    path = str(tmp_path / "a.png")
    edge = 8_200
    assert edge**2 > Limits().max_pixels
    Image.linear_gradient("L").resize((edge, edge)).save(path)
    with pytest.raises(DataError, match=r"If you trust it: --max-pixels\."):
        read([path], reading_for(spec(), Asked("crop")))
    assert len(read([path], reading_for(spec(), Asked("crop", max_pixels=10**8))).names) == 1


@pytest.mark.slow
def test_a_bundle_carries_its_rules_to_score_and_to_the_server(trained, bundle, tmp_path, icons):
    source, over_white = icons
    model = trained(background="#ffffff", integers="0..1", floats="-1..1", size=(8, 8))
    scored = score(Batch((source,), str(bundle), tmp_path / "s.npy"))
    assert scored.count == 6
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), model.score(over_white), rtol=1e-5)

    picture = (tmp_path / "icons" / "0.png").read_bytes()
    np.testing.assert_array_equal(images_of(picture, "image/png", model, 1024)[0], over_white[0])
    masks = RANDOM.integers(0, 2, (3, 8, 8, 1), dtype=np.uint8)
    read_as = images_of(npy(masks), "application/x-npy", model, 1024)
    np.testing.assert_array_equal(read_as, masks * 255)
    floats = RANDOM.random((3, 8, 8, 1)).astype(np.float32) * 2 - 1
    read_as = images_of(npy(floats), "application/x-npy", model, 1024)
    assert np.abs(read_as - np.rint((floats + 1) * 127.5)).max() <= 1
    with pytest.raises(RefusedError, match=r"image 0 has pixels from 0 to 255, outside of 0\.\.1"):
        images_of(npy(masks * 255), "application/x-npy", model, 1024)
    stream = io.BytesIO()
    Image.new("L", (30, 20), 7).save(stream, "PNG")
    assert images_of(stream.getvalue(), "image/png", model, 1024).shape == (1, 8, 8, 1)


@pytest.mark.slow
def test_a_bundle_of_before_is_read_as_ever(bundle, digits):
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["image"]["reading"]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert read_verified(bundle).image.reading is None
    model = vaeflow.load(bundle)
    np.testing.assert_array_equal(
        images_of(npy(digits[:3]), "application/x-npy", model, 1024), digits[:3]
    )


@pytest.mark.slow
def test_what_is_no_image_is_said_by_ending(bundle, tmp_path, icons):
    source, _ = icons
    for name in ("a.docx", "b.docx", "c.tga"):
        (tmp_path / "icons" / name).touch()
    scored = score(Batch((source,), str(bundle), tmp_path / "s.csv"))
    assert "no images, and left alone: 3: .docx (2), .tga (1)" in scored.lines()
