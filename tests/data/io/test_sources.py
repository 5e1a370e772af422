import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of
from PIL import Image

from vaeflow.config.schema import Limits
from vaeflow.data.io import arrays, decoding
from vaeflow.data.io.conversion import LARGEST_EDGE, Conversion, constant
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.sources import image_blocks, read_images
from vaeflow.errors import DataError

LARGEST = Limits().max_pixels


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
    with pytest.raises(DataError, match=r"b\.png: .*this is \(4, 5, 1\), .*a\.png is \(4, 4, 1\)"):
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
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (damaged, text, cut, other, empty, tmp_path / "absent.png"):
        with pytest.raises(DataError, match=path.name):
            read_images(path)


def test_endings_are_read_in_any_case_and_arrays_come_before_pictures(tmp_path):
    with (tmp_path / "UPPER.NPY").open("wb") as file:
        np.save(file, np.zeros((2, 8, 8), np.uint8))
    assert read_images(tmp_path / "UPPER.NPY").pixels.shape == (2, 8, 8, 1)
    save(tmp_path, "a.png", (8, 8), 7)
    assert read_images(tmp_path).pixels[:, 0, 0, 0].tolist() == [0, 0, 7]


def test_a_picture_beyond_the_limits_is_refused_from_its_header(tmp_path):
    """There is nothing after the header: only one that was not decoded gets this answer."""
    Image.new("1", (LARGEST_EDGE + 1, 1)).save(tmp_path / "long.png")
    Image.new("1", (LARGEST_EDGE, LARGEST // LARGEST_EDGE + 1)).save(tmp_path / "large.png")
    for name, expected in (("long", "every edge must be 1"), ("large", "more than 67108864")):
        path = tmp_path / f"{name}.png"
        path.write_bytes(path.read_bytes()[:45])
        with pytest.raises(DataError, match=rf"{name}\.png: .*{expected}"):
            read_images(path)


def nan_at_three():
    images = np.full((5, 4, 4), 0.5, np.float32)
    images[3, 1, 2] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (nan_at_three(), "here.npy#3: NaN or infinite pixels"),
        (np.full((2, 4, 4), np.inf), "here.npy#0: NaN or infinite pixels"),
        (np.full((2, 4, 4), 200_000.0), "from 200000 to 200000, and which of them are black"),
        (np.full((2, 4, 4), -1.1), "from -1.1 to -1.1, and which"),
        (np.full((2, 4, 4), 1023, np.uint16), "from 1023 to 1023, and which"),
        (np.zeros((2, 4, 4), complex), "numbers of type complex128"),
        (np.zeros((4, 4), np.uint8), "shape (4, 4), of which it is not known which axis is which"),
        (np.zeros((2, 4, 4, 1, 1), np.uint8), "shape (2, 4, 4, 1, 1)"),
        (np.zeros((0, 4, 4), np.uint8), "no images"),
        (np.zeros((3, 0, 4), np.uint8), "every edge"),
        (np.zeros((3, 8, 8), np.uint8), "--layout"),
        (np.zeros((8, 8, 500), np.uint8), "--layout"),
        (np.zeros((2, 8, 8, 7), np.uint8), "--layout"),
        (np.zeros((1, 40, 30), np.uint8), "no image may have more than 1000"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, images, expected):
    np.save(tmp_path / "here.npy", images)
    reading = Reading(limits=Limits(max_pixels=1000))
    with pytest.raises(DataError) as raised:
        list(image_blocks(tmp_path / "here.npy", reading=reading))
    assert expected in str(raised.value)
    assert str(raised.value).startswith(f"{tmp_path}/here.npy")


def test_floating_point_is_rounded_to_the_nearest_level(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for dtype in (np.float32, np.float64):
        np.save(tmp_path / "a.npy", levels.astype(dtype) / 255)
        np.testing.assert_array_equal(read_images(tmp_path / "a.npy").pixels[..., 0], levels)


def collected(source, **how):
    """What is read when bad files are passed over: the images, and the bad ones by name."""
    bad = []
    blocks = list(image_blocks(source, reading=Reading(on_bad=bad.append, **how)))
    return blocks, {error.name.removeprefix(f"{source}/"): error.reason for error in bad}


def test_bad_files_are_passed_over_and_named_with_their_reasons(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        save(tmp_path, name, (16, 16))
    cut = save(tmp_path, "0-cut.png", (100, 100))
    cut.write_bytes(cut.read_bytes()[:50])
    save(tmp_path, "other.png", (16, 17))
    (tmp_path / "text.jpg").write_text("hello")
    np.save(tmp_path / "short.npy", np.zeros((2, 16, 16), np.uint8))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-1])
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    blocks, bad = collected(tmp_path)
    # A file that cannot be read does not set the shape of the others, though it comes first.
    assert [len(block.pixels) for block in blocks] == [3]
    assert blocks[0].pixels.shape[1:] == (16, 16, 1)
    expected = {
        "0-cut.png": "not a readable image",
        "other.png": "two shapes",
        "text.jpg": "not a readable image",
        "short.npy": "It is cut off or damaged",
        "pipe.png": "not a file",
        "pipe.npy": "not a file",
    }
    assert bad.keys() == expected.keys()
    assert all(reason in bad[name] for name, reason in expected.items())


def test_bad_rows_are_passed_over_one_by_one(tmp_path):
    images = np.random.default_rng(0).random((6, 4, 4)).astype(np.float32)
    images[1, 0, 0] = np.nan
    images[4] = 3
    images[5] = 0.25
    np.save(tmp_path / "a.npy", images)
    blocks, bad = collected(tmp_path, allow_constant=False)
    assert [name for block in blocks for name in block.names] == [
        f"{tmp_path}/a.npy#{row}" for row in (0, 2, 3)
    ]
    np.testing.assert_array_equal(blocks[0].pixels[..., 0], np.rint(images[[0, 2, 3]] * 255))
    assert bad == {
        "a.npy#1": "NaN or infinite pixels.",
        "a.npy#4": "pixels from 3 to 3, outside of 0..1; scale them, "
        "or name the range of all (--range).",
        "a.npy#5": "every pixel is 64.",
    }


def test_a_block_of_bad_rows_alone_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_PER_BLOCK", 2 * 4 * 4 * 4)
    images = np.random.default_rng(0).random((6, 4, 4)).astype(np.float32)
    images[:4] = np.nan
    np.save(tmp_path / "a.npy", images)
    blocks, bad = collected(tmp_path, conversion=Conversion(size=(3, 2)))
    assert [block.pixels.shape for block in blocks] == [(2, 2, 3, 1)]
    assert len(bad) == 4


def test_a_packed_array_damaged_after_its_header_is_passed_over_whole(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 9, 9), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    np.save(tmp_path / "b.npy", images)
    blocks, bad = collected(tmp_path)
    assert sum(len(block.pixels) for block in blocks) == 50
    assert list(bad) == ["a.npz"]
    assert "not a readable array" in bad["a.npz"]
    with pytest.raises(DataError, match=r"a\.npz: not a readable array"):
        list(image_blocks(tmp_path))


def test_an_image_of_one_value_is_refused_where_that_is_asked(tmp_path):
    save(tmp_path, "a.png", (4, 4, 3), 9)
    assert len(read_images(tmp_path).pixels) == 1
    with pytest.raises(DataError, match=r"a\.png: every pixel is 9, 9, 9"):
        list(image_blocks(tmp_path, reading=Reading(allow_constant=False)))


@given(
    images=arrays_of(np.uint8, (3, 5, 7, 2), elements=st.integers(0, 1)),
    values=st.lists(st.integers(0, 255), max_size=2),
)
def test_images_of_one_value_are_found_wherever_they_differ(images, values):
    for row, value in enumerate(values):
        images[row] = (value, 255 - value)
    assert constant(images).tolist() == [
        row
        for row, image in enumerate(images)
        if len(set(map(tuple, image.reshape(-1, 2).tolist()))) == 1
    ]


def test_an_image_of_one_colour_does_not_set_the_shape(tmp_path):
    save(tmp_path, "a-blank.png", (5, 5))
    np.save(tmp_path / "blank.npy", np.zeros((2, 6, 6), np.uint8))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    blocks, bad = collected(tmp_path, allow_constant=False)
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in blocks])[..., 0], images)
    assert list(bad) == ["blank.npy#0", "blank.npy#1", "a-blank.png"]


def test_links_that_lead_out_of_the_folder_are_refused_where_that_is_asked(tmp_path):
    outside = tmp_path / "outside"
    save(outside, "secret.png", (4, 4), 1)
    inside = tmp_path / "inside"
    save(inside, "a/mine.png", (4, 4), 2)
    (inside / "again.png").symlink_to(inside / "a" / "mine.png")
    (inside / "secret.png").symlink_to(outside / "secret.png")
    (inside / "all").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "circle.png").symlink_to(inside / "circle.png")
    blocks, bad = collected(inside, follow_links=False)
    assert [os.path.relpath(name, inside) for name in blocks[0].names] == [
        "a/mine.png",
        "again.png",
    ]
    assert set(bad) == {"secret.png", "all", "circle.png"}
    assert set(bad.values()) == {"a link that leads out of the folder."}


def test_hidden_files_and_other_kinds_are_left_alone(tmp_path):
    save(tmp_path, "a.png", (4, 4))
    (tmp_path / "._a.png").write_bytes(b"what a file manager keeps")
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "class_idx.json").touch()
    others = []
    blocks = list(image_blocks(tmp_path, reading=Reading(on_other=others.append)))
    assert len(blocks[0].names) == 1
    assert sorted(Path(name).name for name in others) == [
        "._a.png",
        ".git",
        "class_idx.json",
        "notes.txt",
    ]


@pytest.mark.parametrize("name", [b"\xff.png", b"a\rb.png", b"a\nb.png"])
@pytest.mark.parametrize("ending", ["png", "npy"])
def test_names_that_are_no_text_are_read_and_written_by_escapes(tmp_path, name, ending):
    path = tmp_path / os.fsdecode(name.replace(b"png", ending.encode()))
    save(tmp_path, "a.png", (8, 8))
    np.save(tmp_path / "a.npy", np.full((2, 8, 8), 7, np.uint8))
    (tmp_path / f"a.{ending}").rename(path)
    for source in (tmp_path, path):
        images = read_images(source)
        assert np.unique(images.pixels).tolist() == [7]
        names = [text for text in images.names if f".{ending}" in text]
        escapes = {b"\xff": "\\xff", b"a\rb": "a\\x0db", b"a\nb": "a\\x0ab"}
        assert escapes[name.removesuffix(b".png")] in names[0]
        "\n".join(images.names).encode()


def test_another_format_under_the_name_of_one_that_is_read_is_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.tga")
    (tmp_path / "a.tga").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="of no known format"):
        read_images(tmp_path)


def test_folders_can_be_labels(tmp_path):
    for name in ("cats/tabby/1.png", "cats/2.png", "dogs/3.png", "stray.png"):
        save(tmp_path, name, (4, 4))
    np.save(tmp_path / "dogs" / "more.npy", np.zeros((2, 4, 4), np.uint8))
    blocks, bad = collected(tmp_path, label_folders=True)
    assert [label for block in blocks for label in block.labels] == [
        *["dogs", "dogs"],
        *["cats", "cats", "dogs"],
    ]
    assert list(bad) == ["stray.png"]


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_photographs_are_turned_upright(tmp_path, ending):
    pixels = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 16, 0), 16, 1)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        how = {"webp": {"lossless": True}, "tif": {"compression": "tiff_lzw"}}.get(ending, {})
        Image.fromarray(pixels).save(tmp_path / f"{orientation}.{ending}", exif=exif, **how)
    upright = {  # Exif 2.32, section 4.6.4: where the stored rows and columns belong
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels[::-1].T,
        7: pixels[::-1, ::-1].T,
        8: pixels.T[::-1],
    }
    for shape in (pixels.shape, pixels.T.shape):
        # Files of one shape once they are upright go together.
        of_shape = [number for number, expected in upright.items() if expected.shape == shape]
        files = [tmp_path / f"{number}.{ending}" for number in of_shape]
        read = read_images(*files).pixels[..., 0].astype(int)
        expected = np.stack([upright[number] for number in of_shape])
        assert np.abs(read - expected).max() <= (6 if ending == "jpg" else 0)


def test_an_uncompressed_tiff_on_its_side_is_refused_rather_than_scrambled(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(tmp_path / "a.tif", exif=exif)
    with pytest.raises(DataError, match="an uncompressed TIFF that lies on its side"):
        read_images(tmp_path)


def test_files_read_on_all_cores_keep_their_order_and_their_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FILES_PER_TASK", 3)
    monkeypatch.setattr(decoding, "cores", lambda: 4)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    for number in (0, 7, 39):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    blocks, bad = collected(tmp_path)
    assert list(bad) == ["00.png", "07.png", "39.png"]
    read = np.concatenate([block.pixels for block in blocks])
    np.testing.assert_array_equal(read, np.delete(images, [0, 7, 39], axis=0))
