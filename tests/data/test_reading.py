"""What is understood of people's files: said, kept with the data, and asked for where unknown."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import MNIST, make_workspace, run
from PIL import Image
from pyarrow import parquet

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Limits, Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.rules import Rules, find_layout, parse_layout, parse_range, shared_rules
from vaeflow.data.io.sources import read_images
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import CALIBRATION, SplitRule, given_splits
from vaeflow.data.survey import data_rules
from vaeflow.errors import DataError

THIRDS = Prepare(validation_fraction=0.3, test_fraction=0.3)
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (60, 8, 8), dtype=np.uint8)


@pytest.fixture
def place(tmp_path):
    return Workspace(make_workspace(tmp_path / "workspace"))


def save(folder, images, ending="png"):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.{ending}")
    return folder


def index_of(place):
    return parquet.read_table(place.prepared / "index.parquet").to_pydict()


# === Axes ===


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((60, 32, 32, 3), "NHWC"),
        ((60, 32, 32, 1), "NHWC"),
        ((60, 32, 32, 4), "NHWC"),
        ((60, 3, 32, 32), "NCHW"),
        ((60, 1, 28, 28), "NCHW"),
        ((60, 4, 32, 32), "NCHW"),
        ((32, 32, 3, 60), "HWCN"),
        ((32, 32, 3, 3), "HWCN"),
        ((32, 32, 1, 60), "HWCN"),
        ((3, 32, 32, 60), "CHWN"),
        ((3, 32, 32, 3), "NHWC"),
        ((1, 3, 32, 32), "NCHW"),
        ((2, 4, 4, 3), "NHWC"),
        ((60, 28, 28), "NHW"),
        ((60, 28, 20), "NHW"),
        ((1, 28, 28), "NHW"),
        ((28, 28, 28), "NHW"),
        ((32, 24, 3), "HWC"),
        ((32, 24, 1), "HWC"),
        ((32, 24, 4), "HWC"),
        ((3, 32, 32), None),
        ((28, 28, 500), None),
        ((60, 32, 32, 7), None),
        ((60, 2, 32, 32), None),
        ((60, 784), None),
        ((2, 3, 4, 5, 6), None),
    ],
)
def test_axes_are_told_apart_by_what_can_be_known(shape, layout):
    assert find_layout(shape) == layout


def test_among_equals_each_is_an_image():
    assert find_layout((3, 32, 32), among_equals=True) == "CHW"
    assert find_layout((32, 32), among_equals=True) == "HW"
    assert find_layout((60, 32, 32), among_equals=True) == "NHW"


def test_a_model_says_what_an_array_must_be():
    assert find_layout((3, 32, 32), like=(32, 32, 1)) == "NHW"
    assert find_layout((3, 32, 32), like=(32, 32, 3)) == "CHW"
    assert find_layout((28, 28, 500), like=(28, 28, 1)) == "HWN"
    assert find_layout((28, 28), like=(28, 28, 1)) == "HW"
    assert find_layout((60, 7, 32, 32), like=(32, 32, 7)) == "NCHW"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "HWCN", "CHWN", "NHW", "HWN", "HW", "chw"])
def test_any_layout_may_be_named(tmp_path, layout):
    images = RANDOM.integers(0, 256, (7, 5, 6, 2), dtype=np.uint8)
    letters = parse_layout(layout)
    picked = images[tuple(slice(None) if axis in letters else 0 for axis in "NHWC")]
    order = [[axis for axis in "NHWC" if axis in letters].index(axis) for axis in letters]
    np.save(tmp_path / "a.npy", picked.transpose(order))
    read = read_images(tmp_path / "a.npy", reading=Reading(layout=letters)).pixels
    rows = images if "N" in letters else images[:1]
    np.testing.assert_array_equal(read, rows if "C" in letters else rows[..., :1])


@pytest.mark.parametrize("text", ["", "N", "NHWW", "NHX", "HWCNN", "NC"])
def test_a_layout_that_is_none_is_refused(text):
    with pytest.raises(DataError, match="expected an order of N"):
        parse_layout(text)


def test_rows_of_numbers_are_images_where_that_is_said(tmp_path):
    images = RANDOM.integers(0, 256, (20, 6, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images.reshape(20, -1))
    with pytest.raises(DataError, match="--pixels HEIGHTxWIDTH"):
        read_images(tmp_path / "a.npy")
    read = read_images(tmp_path / "a.npy", reading=Reading(row_shape=(6, 4, 3)))
    np.testing.assert_array_equal(read.pixels, images)
    np.save(tmp_path / "a.npy", images.transpose(0, 3, 1, 2).reshape(20, -1))
    reading = Reading(row_shape=(6, 4, 3), layout="NCHW")
    np.testing.assert_array_equal(read_images(tmp_path / "a.npy", reading=reading).pixels, images)
    with pytest.raises(DataError, match="rows of 72 numbers"):
        read_images(tmp_path / "a.npy", reading=Reading(row_shape=(6, 4, 1)))


def test_labels_that_are_not_as_many_as_the_images_are_refused(tmp_path):
    """Not even where there are as many as another axis has."""
    np.savez(tmp_path / "a.npz", x=GREY, y=np.arange(8))
    with pytest.raises(DataError, match=r"a\.npz#x: has 8 labels for 60 images"):
        read_images(tmp_path / "a.npz")


def test_labels_of_which_there_are_several_an_image_are_left_out_and_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.zeros((60, 14), np.uint8))
    reading = Reading()
    assert read_images(tmp_path / "a.npz", reading=reading).labels == [None] * 60
    assert "without labels, for labels has several an image: 60" in reading.seen.lines()[0]


def test_several_arrays_among_files_of_one_image_are_read_as_well(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", GREY[number])
    np.savez(tmp_path / "more.npz", x_train=GREY[3:40], x_test=GREY[40:])
    images = read_images(tmp_path)
    np.testing.assert_array_equal(images.pixels[..., 0], GREY)
    assert images.splits == [None] * 3 + ["train or validation"] * 37 + ["test"] * 20


# === Ranges ===


def test_a_dark_one_among_files_of_one_image_is_read_as_the_others(tmp_path):
    """By itself its zeros and ones would be black and white."""
    for number, image in enumerate([GREY[0] % 2, *GREY[1:4]]):
        np.save(tmp_path / f"{number}.npy", image)
    np.testing.assert_array_equal(read_images(tmp_path).pixels[..., 0], [GREY[0] % 2, *GREY[1:4]])


def test_one_that_is_beyond_the_range_of_the_others_is_a_bad_one(tmp_path):
    images = RANDOM.random((10, 8, 8)).astype(np.float32)
    images[3, 0, 0] = 1.5
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(DataError, match=r"a\.npy#3: pixels from .* to 1\.5, outside of 0\.\.1"):
        read_images(tmp_path / "a.npy")
    masks = (GREY > 128).astype(np.uint8)
    masks[7, 0, 0] = 255
    np.save(tmp_path / "a.npy", masks)
    with pytest.raises(DataError, match=r"a\.npy#7: pixels from 0 to 255, outside of 0\.\.1"):
        read_images(tmp_path / "a.npy")


def test_black_frames_before_the_others_do_not_hide_their_range(tmp_path):
    images = np.concatenate([np.zeros((3000, 8, 8), np.uint8), GREY])
    np.save(tmp_path / "a.npy", images)
    np.testing.assert_array_equal(read_images(tmp_path / "a.npy").pixels[..., 0], images)


@pytest.mark.parametrize("text", ["", "1", "1..0", "0..0", "a..b", "0-255", "0..1..2"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(DataError, match="expected BLACK"):
        parse_range(text)


def test_a_named_range_is_taken_as_it_is(tmp_path):
    hounsfield = RANDOM.integers(-1000, 3000, (6, 8, 8)).astype(np.int16)
    np.save(tmp_path / "a.npy", hounsfield)
    with pytest.raises(DataError, match="Say so: --range"):
        read_images(tmp_path / "a.npy")
    of = parse_range("-1024..3071")
    read = read_images(tmp_path / "a.npy", reading=Reading(conversion=Conversion(integers=of)))
    expected = np.rint((hounsfield.astype(float) + 1024) * 255 / 4095)
    np.testing.assert_array_equal(read.pixels[..., 0], expected)


# === What is said, and kept ===


def test_what_was_understood_is_said_and_kept(place, tmp_path):
    masks = (GREY > 128).astype(np.uint8)
    np.savez_compressed(tmp_path / "masks.npz", imgs=masks.reshape(60, 1, 8, 8))
    added = add(place, THIRDS, Addition(str(tmp_path / "masks.npz")))
    assert added.lines()[1] == "understood: axes NCHW; black and white are 0..1"
    kept = Rules.model_validate_json((place.data / "masks" / "rules.json").read_text())
    assert kept == Rules(layout="NCHW", integers="0..1")
    prepare(place, THIRDS)
    about = json.loads((place.prepared / "dataset.json").read_text())
    assert Rules.model_validate(about["reading"]) == kept


def test_transparency_pages_and_depth_are_said(place, tmp_path):
    alpha = RANDOM.integers(0, 256, (60, 8, 8, 4), dtype=np.uint8)
    added = add(place, THIRDS, Addition(str(save(tmp_path / "icons", alpha))))
    assert added.lines()[1] == "understood: with transparency: 60"
    white = Conversion(background="#ffffff", size=(4, 6), resize="fit", channels=1)
    add(place, THIRDS, Addition(str(tmp_path / "icons"), conversion=white))
    kept = Rules(background="#ffffff", size=(4, 6), resize="fit", channels=1)
    assert data_rules(place) == kept
    first, *rest = [Image.fromarray(image) for image in GREY]
    first.save(tmp_path / "stack.tif", save_all=True, append_images=rest)
    added = add(place, THIRDS, Addition(str(tmp_path / "stack.tif")))
    assert added.lines()[1] == "understood: one of several pages: 60"
    with pytest.raises(DataError, match="too few images: of 1 none"):
        add(place, THIRDS, Addition(str(tmp_path / "stack.tif"), pages="first"))


def test_icons_that_are_black_say_what_to_do(place, tmp_path):
    icons = np.zeros((60, 8, 8, 4), np.uint8)
    icons[..., 3] = GREY
    source = save(tmp_path / "icons", icons)
    with pytest.raises(DataError, match=r"transparent pixels: .*--background white"):
        add(place, THIRDS, Addition(str(source)))
    white = Conversion(background="#ffffff", channels=1)
    add(place, THIRDS, Addition(str(source), conversion=white))
    np.testing.assert_array_equal(read_images(place.data).pixels[..., 0], 255 - GREY)


def test_rules_that_differ_lay_nothing_down():
    rules = [Rules(layout="NHW", integers="0..1"), Rules(layout="NCHW", integers="0..1")]
    assert shared_rules(rules) == Rules(integers="0..1")
    assert shared_rules([]) == Rules()


def test_damaged_rules_are_named(place):
    (place.data / "digits" / "rules.json").write_text('{"layout": "XY"}')
    with pytest.raises(DataError, match=r"rules\.json is not what .* dvc checkout"):
        data_rules(place)


# === Splits ===


def test_folders_may_be_the_splits(place, tmp_path):
    source = tmp_path / "set"
    for split, part in (("train", slice(20)), ("val", slice(20, 40)), ("test", slice(40, 60))):
        save(source / split / "cats", GREY[part][:10])
        save(source / split / "dogs", GREY[part][10:])
    addition = Addition(str(source), splits="folders", labels="folders")
    added = add(place, THIRDS, addition)
    assert dict(added.report.survey.splits) == dict.fromkeys(["train", "validation", "test"], 20)
    prepare(place, THIRDS)
    index = index_of(place)
    assert {
        (
            source.split("/")[1],
            source.split("/")[2],
            split.replace(CALIBRATION, "validation"),
            label,
        )
        for source, split, label in zip(
            index["source"], index["split"], index["label"], strict=True
        )
    } == {
        (folder, label, split, label)
        for folder, split in (("train", "train"), ("val", "validation"), ("test", "test"))
        for label in ("cats", "dogs")
    }
    assert set(index["given"]) == {"set"}
    # For ever: another seed moves none of them.
    before = index["split"]
    prepare(place, Prepare(seed=9))
    assert index_of(place)["split"] == before


def test_without_a_folder_for_it_a_split_comes_out_of_train(place, tmp_path):
    source = tmp_path / "set"
    save(source / "train", GREY[:40])
    save(source / "test", GREY[40:])
    survey = add(place, THIRDS, Addition(str(source), splits="folders")).report.survey
    assert survey.splits["test"] == 20
    assert 4 < survey.splits["validation"] < 22
    with (place.data / "set" / "index.csv").open(newline="") as file:
        splits = {row["split"] for row in csv.DictReader(file)}
    assert splits == {"test", "train or validation"}


def test_an_image_outside_such_folders_is_refused(place, tmp_path):
    save(tmp_path / "set" / "train", GREY[:40])
    save(tmp_path / "set" / "other", GREY[40:])
    with pytest.raises(DataError, match=r"lies in no folder train/, val/ or test/"):
        add(place, THIRDS, Addition(str(tmp_path / "set"), splits="folders"))


def test_splits_that_leave_one_empty_say_so(place, tmp_path):
    save(tmp_path / "set" / "test", GREY)
    with pytest.raises(DataError, match=r"none is in train or validation.*--splits content"):
        add(place, THIRDS, Addition(str(tmp_path / "set"), splits="folders"))


def test_the_rule_that_is_recorded_tells_which_were_given(place, tmp_path):
    source = tmp_path / "set"
    for split in ("train", "val", "test"):
        save(source / split, RANDOM.integers(0, 256, (20, 8, 8), dtype=np.uint8))
    add(place, Prepare(), Addition(str(source), splits="folders", append=True))
    prepare(place, Prepare())
    (digest,) = given_splits(place.prepared).values()
    rule = SplitRule.of(Prepare(), [digest])
    assert str(rule) == f"content, seed 0, validation 0.2, test 0.1; given {digest}"
    assert SplitRule.parse(str(rule)) == rule


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not here")
@pytest.mark.slow
def test_mnist_keeps_its_test_images(place):
    addition = Addition("mnist", copies=MNIST, verify=False)
    survey = add(place, Prepare(), addition).report.survey
    assert survey.splits["test"] == 10_000
    assert survey.splits["train"] + survey.splits["validation"] == 60_000
    assert 11_600 < survey.splits["validation"] < 12_400
    survey = add(place, Prepare(), replace(addition, splits="content")).report.survey
    assert (survey.splits["train"], survey.splits["test"]) == (49_094, 6_948)


# === Right for its size ===


def test_ten_images_say_how_many_are_useful(place, tmp_path):
    with pytest.raises(DataError, match=r"of 10 none is in .* has some 100 different images"):
        add(place, Prepare(), Addition(str(save(tmp_path / "ten", GREY[:10]))))


def test_forty_identical_ones_are_one_image(place, tmp_path):
    source = save(tmp_path / "same", np.repeat(GREY[:1], 40, axis=0))
    with pytest.raises(DataError, match=r"of 40 \(1 different\) none is in"):
        add(place, Prepare(), Addition(str(source)))


def test_one_label_only_is_said(place, tmp_path):
    save(tmp_path / "set" / "cats", GREY)
    added = add(place, THIRDS, Addition(str(tmp_path / "set"), labels="folders"))
    assert "note: all images have one label, so it tells nothing of any" in added.lines()


def test_nearly_black_images_are_said(place, tmp_path):
    added = add(place, THIRDS, Addition(str(save(tmp_path / "dark", GREY // 16))))
    (note,) = [line for line in added.lines() if line.startswith("note: no pixel")]
    assert "brighter than 15 of 255" in note


def test_only_bad_rows_in_a_block_are_passed_over(place, tmp_path):
    np.save(tmp_path / "x.npy", np.full((40, 8, 8, 1), np.nan, np.float32))
    with pytest.raises(DataError, match="no images in it that can be used"):
        add(place, THIRDS, Addition(str(tmp_path / "x.npy"), skip_bad=True))


def test_a_larger_picture_may_be_asked_for(place, tmp_path):
    with pytest.raises(
        DataError, match=r"may have more than 50\. If you trust it: --max-pixels, or"
    ):
        tight = THIRDS.model_copy(update={"max_pixels": 50})
        add(place, tight, Addition(str(save(tmp_path / "a", GREY))))
    assert add(place, tight, Addition(str(tmp_path / "a"), max_pixels=64)).count == 60


def test_more_than_the_memory_holds_is_refused_from_the_header(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    content[18:26] = (65_000).to_bytes(4, "little") * 2
    (tmp_path / "a.bmp").write_bytes(content)
    with pytest.raises(DataError, match=r"to decode one takes .* MB, more than half"):
        reading = Reading(limits=Limits(max_pixels=2**32))
        read_images(tmp_path / "a.bmp", reading=reading)


# === Workspaces of before ===


def test_a_workspace_of_before_keeps_its_splits(place, digits):
    """The sample was added before there were rules and given splits."""
    assert not (place.data / "digits" / "rules.json").exists()
    prepare(place, Prepare())
    index = index_of(place)
    expected = SplitRule(0, 0.2, 0.1).assign(
        np.array([list(bytes.fromhex(text)) for text in index["sha256"]], np.uint8)
    )
    assert [split.replace(CALIBRATION, "validation") for split in index["split"]] == (
        expected.tolist()
    )
    assert set(index["given"]) == {None}


def test_four_channels_of_before_stay_as_they_are(place):
    """`data/` is what `add` wrote: nothing in it is understood anew."""
    images = RANDOM.integers(0, 2, (60, 8, 8, 4), dtype=np.uint8)
    np.save(place.data / "digits" / "images.npy", images)
    (place.data / "digits" / "index.csv").write_text("source,label\n" + "x,\n" * 60)
    np.testing.assert_array_equal(read_images(place.data).pixels, images)


def test_the_command_line_takes_all_of_it(place, tmp_path):
    np.save(tmp_path / "a.npy", RANDOM.integers(0, 4096, (6, 8, 60, 3), dtype=np.uint16))
    done = run(
        place.root,
        *["vaeflow", "data", "add", str(tmp_path / "a.npy")],
        *["--layout", "hwnc", "--range", "0..4095", "--background", "white", "--pages", "first"],
    )
    assert "understood: axes HWNC; black and white are 0..4095" in done.stdout
    assert "60 images of 6 x 8" in done.stdout
    assert json.loads((place.data / "a" / "rules.json").read_text())["pages"] == "first"
