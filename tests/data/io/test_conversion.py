import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaeflow.data.io.conversion import Conversion, parse_size
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.sources import image_blocks
from vaeflow.errors import DataError


def halves(height, width, left=40, right=200):
    """A picture whose left and right half have two values."""
    pixels = np.full((height, width), right, np.uint8)
    pixels[:, : width // 2] = left
    return pixels


def near(pixels, value):
    """Whether all have that value, but for what Lanczos's kernel overshoots at an edge."""
    return np.abs(pixels.astype(int) - value).max() <= 5


def of_picture(pixels, **how):
    return Conversion(**how).of_picture(Image.fromarray(pixels))


def test_as_it_stands_only_the_pixels_are_taken():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(of_picture(pixels), pixels)
    np.testing.assert_array_equal(of_picture(pixels[..., 0]), pixels[..., :1])


def test_crop_fills_the_size_and_cuts_evenly():
    pixels = halves(20, 60)
    pixels[:, :15] = pixels[:, 45:] = 0  # stands over
    cropped = of_picture(pixels, size=(10, 10), resize="crop")[..., 0]
    assert cropped.shape == (10, 10)
    assert near(cropped[:, 1:4], 40)
    assert near(cropped[:, 6:9], 200)


@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(1, 100))
@example(width=29, height=32, size=28)
@settings(deadline=None)
def test_any_picture_can_be_cropped_and_fitted(width, height, size):
    picture = Image.new("L", (width, height))
    for resize in ("crop", "fit", "exact"):
        assert Conversion((size, size), resize).of_picture(picture).shape == (size, size, 1)


def test_fit_shows_all_on_black():
    fitted = of_picture(halves(20, 60), size=(12, 12), resize="fit")[..., 0]
    assert near(fitted[4:8, 1:5], 40)
    assert near(fitted[4:8, 7:11], 200)
    assert not fitted[:4].any()
    assert not fitted[8:].any()


def test_exact_stretches():
    stretched = of_picture(halves(20, 60), size=(10, 15), resize="exact")[..., 0]
    assert stretched.shape == (15, 10)
    assert near(stretched[:, :4], 40)
    assert near(stretched[:, 6:], 200)


def test_grey_is_luma_and_colour_repeats_grey():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    assert of_picture(red, channels=1).tolist() == [[[76]] * 2] * 2  # 0.299 * 255
    grey = np.full((2, 2), 9, np.uint8)
    assert of_picture(grey, channels=3).tolist() == [[[9] * 3] * 2] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_the_shape_is_known_from_the_header(mode, channels):
    conversion = Conversion(size=(6, 5), channels=channels)
    picture = Image.new("RGB", (9, 9), (10, 100, 200)).convert(mode)
    shape = conversion.shape_of(*picture.size, picture.mode)
    assert conversion.of_picture(picture).shape == shape


def test_arrays_become_what_the_same_pictures_become(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 31, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    reading = Reading(conversion=Conversion(size=(8, 8), channels=1))
    array, pictures = image_blocks(tmp_path, reading=reading)
    np.testing.assert_array_equal(array.pixels, pictures.pixels)
    assert array.pixels.shape == (4, 8, 8, 1)


def test_a_large_jpeg_is_read_at_less_than_full_size_to_nearly_the_same_pixels(tmp_path):
    ramp = np.linspace(0, 255, 800)
    pixels = (ramp[:, None] * 0.5 + ramp * 0.5).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    reading = Reading(conversion=Conversion(size=(16, 16)))
    (both,) = image_blocks(tmp_path, reading=reading)
    jpeg, png = both.pixels.astype(int)
    assert np.abs(jpeg - png).max() <= 2


def test_a_large_picture_comes_out_nearly_as_filtered_whole():
    from sklearn.datasets import load_sample_images

    picture = Image.fromarray(load_sample_images().images[0])
    for size in ((64, 43), (32, 21)):
        whole = np.asarray(picture.resize(size, Image.Resampling.LANCZOS)).astype(int)
        differences = np.abs(Conversion(size, "exact").of_picture(picture) - whole)
        assert differences.mean() < 1


def test_other_numbers_of_channels_stay_as_they_are_or_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (2, 9, 9, 5), np.uint8))
    (block,) = image_blocks(tmp_path, reading=Reading(layout="NHWC"))
    assert block.pixels.shape == (2, 9, 9, 5)
    for how in ({"size": (4, 4)}, {"channels": 1}):
        reading = Reading(layout="NHWC", conversion=Conversion(**how))
        with pytest.raises(DataError, match="images of 5 channels can be neither"):
            list(image_blocks(tmp_path, reading=reading))


@pytest.mark.parametrize("text", ["", "32", "32x", "x32", "0x8", "8x0", "-1x8", "8x8x8", "5000x8"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(DataError, match="expected WIDTHxHEIGHT"):
        parse_size(text)


def test_a_size_is_width_and_height():
    assert parse_size("32x24") == parse_size("32X24") == (32, 24)


@pytest.mark.parametrize(("key", "value"), [("resize", "stretch"), ("channels", 2)])
def test_other_conversions_are_refused_with_the_valid_ones(key, value):
    with pytest.raises(DataError, match=rf"{key} is .*{value}.*; expected"):
        Conversion(**{key: value})
