import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vaeflow.data.checks import LARGEST_AREA, LARGEST_EDGE, check_images
from vaeflow.data.sources import read_images
from vaeflow.errors import DataError


def save(folder, name, shape, value=7):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


def test_an_array_keeps_its_pixels_and_gets_channels(tmp_path):
    pixels = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    np.save(tmp_path / "a.npy", pixels)
    images = read_images(tmp_path / "a.npy")
    np.testing.assert_array_equal(images.pixels[..., 0], pixels)
    assert images.names == [f"{tmp_path}/a.npy#0", f"{tmp_path}/a.npy#1"]


def test_a_folder_is_read_with_its_subfolders_in_order(tmp_path):
    for value, name in enumerate(["b/1.png", "a/2.bmp", "c.PNG"]):
        save(tmp_path, name, (4, 6), value)
    (tmp_path / "notes.txt").write_text("not an image")
    images = read_images(tmp_path)
    assert [os.path.relpath(n, tmp_path) for n in images.names] == ["a/2.bmp", "b/1.png", "c.PNG"]
    assert images.pixels.shape == (3, 4, 6, 1)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 0, 2]


def test_colour_stays_colour_and_transparency_goes(tmp_path):
    rgb = save(tmp_path, "rgb.png", (4, 4, 3), 9)
    rgba = save(tmp_path, "rgba.png", (4, 4, 4), 9)
    assert read_images(rgb, rgba).pixels.shape == (2, 4, 4, 3)


def test_two_shapes_are_both_named(tmp_path):
    save(tmp_path, "a.png", (4, 4))
    save(tmp_path, "b.png", (4, 5))
    with pytest.raises(DataError, match=r"a\.png is \(4, 4, 1\).*b\.png is \(4, 5, 1\)"):
        read_images(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    damaged = save(tmp_path, "damaged.png", (32, 32))
    damaged.write_bytes(damaged.read_bytes()[:60])
    text = tmp_path / "text.png"
    text.write_text("hello")
    cut = tmp_path / "cut.npy"
    np.save(cut, np.zeros((2, 8, 8), np.uint8))
    cut.write_bytes(cut.read_bytes()[:150])
    other = tmp_path / "other.xyz"
    other.touch()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (damaged, text, cut, other, deep, empty, tmp_path / "absent.png"):
        with pytest.raises(DataError, match=path.name):
            read_images(path)


def test_endings_are_read_in_any_case_and_kinds_do_not_mix(tmp_path):
    with (tmp_path / "UPPER.NPY").open("wb") as file:
        np.save(file, np.zeros((2, 8, 8), np.uint8))
    assert read_images(tmp_path / "UPPER.NPY").pixels.shape == (2, 8, 8, 1)
    with pytest.raises(DataError, match=r"expected images\.npy, or files ending in"):
        read_images(tmp_path)
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8), np.uint8))
    save(tmp_path, "one.png", (8, 8))
    with pytest.raises(DataError, match=r"both images\.npy and one\.png"):
        read_images(tmp_path)


def test_a_picture_beyond_the_limits_is_refused_from_its_header(tmp_path):
    """Two megabytes of file at most, hundreds of decoded ones: nothing near that is allocated."""
    Image.new("1", (LARGEST_EDGE + 1, 1)).save(tmp_path / "long.png")
    Image.new("1", (LARGEST_EDGE, LARGEST_AREA // LARGEST_EDGE + 1)).save(tmp_path / "large.png")
    for name, expected in (("long", "every edge must be 1"), ("large", "more than 67108864")):
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"{name}\.png: .*{expected}"):
            read_images(tmp_path / f"{name}.png")
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest < 1 << 20


def nan_at_three():
    images = np.full((5, 4, 4), 0.5, np.float32)
    images[3, 1, 2] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (nan_at_three(), "image 3 has NaN or infinite pixels"),
        (np.full((2, 4, 4), np.inf), "image 0 has NaN or infinite pixels"),
        (np.full((2, 4, 4), 200.0), "floating-point pixels from 200 to 200"),
        (np.full((2, 4, 4), -0.1), "from -0.1 to -0.1"),
        (np.zeros((2, 4, 4), np.int64), "dtype int64"),
        (np.zeros((2, 4, 4), bool), "dtype bool"),
        (np.zeros((2, 4, 4), complex), "dtype complex128"),
        (np.zeros((4, 4), np.uint8), "shape (4, 4)"),
        (np.zeros((2, 4, 4, 1, 1), np.uint8), "shape (2, 4, 4, 1, 1)"),
        (np.zeros((0, 4, 4), np.uint8), "no images"),
        (np.zeros((3, 0, 4), np.uint8), "every edge"),
        (np.broadcast_to(np.uint8(0), (1, 8193, 8192)), "no image may have more than"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images, expected):
    with pytest.raises(DataError) as raised:
        check_images(images, "here.npy")
    assert expected in str(raised.value)
    assert str(raised.value).startswith("here.npy")


def test_floating_point_is_rounded_to_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(check_images(levels.astype(dtype) / 255, "")[..., 0], levels)
