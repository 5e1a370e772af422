"""Pictures that are cut into tiles: where, and that these stay together."""

import csv
import itertools
from collections import defaultdict

import numpy as np
import pyarrow.parquet
import pytest
from helpers import make_workspace
from PIL import Image

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.sources import image_blocks, read_images
from vaeflow.data.io.tiles import Canvas, Place, Tiling, stitched
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import ANOMALY, CALIBRATION, load_split, read_pictures
from vaeflow.errors import BadImageError, DataError

SIZES = ((20, 33), (16, 16), (17, 40), (25, 16))  # height and width of pictures


@pytest.fixture
def pictures(tmp_path):
    """Pictures of several sizes, a part of each of one colour, and one that is there twice."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = {}
    for number, (height, width) in zip(range(60), itertools.cycle(SIZES), strict=False):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture[:8, :8] = 7
        made[f"{number:02}.png"] = picture
    made["copy.png"] = made["03.png"]
    for name, picture in made.items():
        Image.fromarray(picture).save(folder / name)
    return folder, made


@pytest.mark.parametrize(("edge", "stride"), [(4, 4), (4, 1), (7, 3), (8, 5)])
def test_tiles_cover_every_pixel_and_no_other(edge, stride):
    tiling = Tiling.of(edge, stride)
    for length in range(edge, 40):
        starts = tiling.starts(length)
        assert starts == sorted(set(starts))
        covered = {start + offset for start in starts for offset in range(edge)}
        assert covered == set(range(length))


def test_what_would_leave_gaps_is_refused():
    assert Tiling.of(8) == Tiling(8, 8)
    for edge, stride, message in (
        (3, None, "tile is 3; expected 4"),
        (8, 9, "stride is 9; expected 1 to 8"),
        (8, 0, "stride is 0"),
    ):
        with pytest.raises(DataError, match=message):
            Tiling.of(edge, stride)


@pytest.mark.parametrize("tiling", [Tiling(8, 8), Tiling(8, 5)])
def test_tiles_are_parts_of_their_pictures(pictures, tiling):
    folder, made = pictures
    images = read_images(folder, reading=Reading(tiling=tiling))
    parts = defaultdict(Canvas)
    for name, pixels in zip(images.names, images.pixels, strict=True):
        file, top, left = Place.of(name)
        picture = made[file.removeprefix(f"{folder}/")]
        np.testing.assert_array_equal(pixels, picture[top : top + 8, left : left + 8])
        parts[file].add(pixels, top, left)
    assert len(parts) == len(made)
    for file, canvas in parts.items():
        np.testing.assert_array_equal(canvas.picture(), made[file.removeprefix(f"{folder}/")])
    assert len(np.unique(images.origins, axis=0)) == len(made) - 1  # one is there twice


def test_arrays_are_cut_like_files(pictures):
    folder, made = pictures
    equal = np.stack([picture for picture in made.values() if picture.shape == (20, 33, 3)])
    np.save(folder.parent / "some.npy", equal)
    tiling = Tiling(8, 5)
    images = read_images(folder.parent / "some.npy", reading=Reading(tiling=tiling))
    rows = [tiling.row(picture, top) for picture in equal for top in tiling.starts(20)]
    np.testing.assert_array_equal(images.pixels, np.concatenate(rows))
    assert images.names[1] == f"{folder.parent}/some.npy#0@0,5"


def test_maps_are_stitched_by_their_mean():
    tiling = Tiling(4, 3)
    whole = np.arange(9 * 11, dtype=np.float32).reshape(9, 11)
    rows = [tiling.row(whole[..., None], top)[..., 0] for top in tiling.starts(9)]
    np.testing.assert_allclose(stitched(tiling, (9, 11, 1), iter(rows)), whole)
    rows = [[np.full((4, 4), float(left)) for left in tiling.starts(11)] for _ in tiling.starts(9)]
    found = stitched(tiling, (9, 11), iter(rows))
    assert (found[0, 0], found[0, 3], found[0, 4]) == (0, 1.5, 3)


def test_no_tile_is_in_another_split_than_its_picture(pictures, tmp_path):
    folder, made = pictures
    root = make_workspace(tmp_path / "workspace")
    place = Workspace(root)
    parameters = Prepare(validation_fraction=0.3, test_fraction=0.3)
    added = add(place, parameters, Addition(str(folder), tiling=Tiling(8, 5)))
    assert "pictures cut into tiles of 8x8, one every 5 pixels: 61" in "\n".join(added.lines())
    with (added.part / "index.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["source", "label", "split", "picture"]
    prepare(place, parameters)
    index = pyarrow.parquet.read_table(place.prepared / "index.parquet").to_pydict()
    splits = defaultdict(set)
    for source, split in zip(index["source"], index["split"], strict=True):
        splits[Place.of(source).picture.removeprefix("pictures/")].add(split)
    assert set(splits) == set(made)
    assert all(len(of) == 1 for of in splits.values())
    assert splits["copy.png"] == splits["03.png"]
    assert {CALIBRATION, "validation"} <= set.union(*splits.values())
    for split in ("train", "validation", CALIBRATION, "test"):
        numbers = read_pictures(place.prepared, split)
        assert len(numbers) == len(load_split(place.prepared, split))
        names = {name for name, of in splits.items() if of == {split}} - {"copy.png"}
        assert len(set(numbers)) == len(names)
    # The parts of one colour are among them: of a picture, they are as good as others.
    assert any(not np.ptp(tile) for tile in load_split(place.prepared, "train"))
    rules = (added.part / "rules.json").read_text()
    assert '"tile": 8' in rules
    assert '"stride": 5' in rules


def test_an_anomaly_may_have_tiles_that_others_have(pictures, tmp_path):
    """A clear sky is in both; but no whole picture may be."""
    folder, made = pictures
    place = Workspace(make_workspace(tmp_path / "workspace"))
    tiles = Tiling(8, 8)
    add(place, Prepare(), Addition(str(folder), tiling=tiles))
    odd = tmp_path / "odd"
    odd.mkdir()
    picture = made["00.png"].copy()
    picture[10:14, 10:14] = 255
    Image.fromarray(picture).save(odd / "scratched.png")
    add(place, Prepare(), Addition(str(odd), tiling=tiles, anomalies=True))
    prepare(place, Prepare())
    assert len(load_split(place.prepared, ANOMALY)) == 3 * 5
    Image.fromarray(made["00.png"]).save(odd / "same.png")
    with pytest.raises(DataError, match=r"same\.png@0,0 and 14 more: an image that is both"):
        add(place, Prepare(), Addition(str(odd), name="again", tiling=tiles, anomalies=True))


def test_bad_pictures_are_named(pictures, tmp_path):
    folder, _ = pictures
    with pytest.raises(BadImageError, match=r"01\.png: 16x16 pixels, and a tile has 17x17"):
        list(image_blocks(folder / "01.png", reading=Reading(tiling=Tiling(17, 17))))
    place = Workspace(make_workspace(tmp_path / "workspace"))
    with pytest.raises(DataError, match="digits is a known set"):
        add(place, Prepare(), Addition("digits", tiling=Tiling(8, 8)))
    refused = Addition(str(folder), tiling=Tiling(17, 17), skip_bad=True)
    assert len(add(place, Prepare(), refused).report.rejected) == 31
    # A damaged index is one clear error.
    index = place.data / "pictures" / "index.csv"
    index.chmod(0o644)
    index.write_text(index.read_text().rstrip() + "x\n")
    with pytest.raises(DataError, match="no SHA-256"):
        read_images(place.data)
