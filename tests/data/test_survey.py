import shutil

import numpy as np
import pytest
from helpers import run
from PIL import Image

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.io.reading import Images
from vaeflow.data.splits import pixel_digests
from vaeflow.data.survey import PixelLevels, Report, Survey, check, show
from vaeflow.errors import BadImageError, DataError


def images_of(pixels, labels=None):
    names = [f"#{row}" for row in range(len(pixels))]
    nothing = [None] * len(pixels)
    digests = pixel_digests(pixels)
    return Images(pixels, digests, names, labels or nothing, nothing, digests)


def test_a_survey_counts_over_blocks(digits):
    survey = Survey(Prepare())
    survey.add(images_of(digits[:1000], ["a"] * 400 + [None] * 600))
    survey.add(images_of(np.maximum(digits[800:], 3), ["a"] * 997))
    assert survey.count == sum(survey.splits.values()) == 1997
    assert (survey.smallest, survey.largest) == (0, 255)
    assert survey.labels == {"a": 1397}
    assert survey.image_shape == (8, 8, 1)


def test_another_shape_is_refused(digits):
    survey = Survey(Prepare())
    survey.add(images_of(digits))
    with pytest.raises(DataError, match=r"#0: images of shape \(7, 8, 1\)"):
        survey.add(images_of(digits[:, 1:]))


def test_a_report_says_what_there_is(digits):
    survey = Survey(Prepare())
    survey.add(images_of(digits, [str(row % 20) for row in range(len(digits))]))
    report = Report(
        survey, [BadImageError(f"{n}.png", "bad.") for n in range(7)], ["x.txt", "y.TXT", "LICENSE"]
    )
    assert report.lines() == [
        "1,797 images of 8 x 8 (height x width), channels: 1, values 0..255",
        "split: 1,269 train, 370 validation, 158 test",
        "exact copies of other images: 0",
        "labels: 20 different ones, of 89 to 90 images each",
        "no images, and left alone: 3: .txt (2), no ending (1)",
        "rejected: 7",
        *[f"  {n}.png: bad." for n in range(5)],
        "  and 2 more",
    ]


@pytest.mark.slow
def test_check_finds_what_is_wrong(workspace, digits):
    place = Workspace(workspace)
    report, wrong = check(place, Prepare())
    assert (report.survey.count, wrong) == (1797, [])
    Image.fromarray(digits[0, ..., 0]).save(place.data / "again.png")
    (place.data / "bad.png").touch()
    report, wrong = check(place, Prepare())
    assert report.survey.duplicates == 1
    assert [error.name for error in report.rejected] == [f"{place.data}/bad.png"]
    assert len(wrong) == 2
    assert "--skip-bad" in wrong[0]
    assert "differs from data.dvc" in wrong[1]
    done = run(workspace, "vaeflow", "data", "check", status=1)
    assert "1,798 images" in done.stdout
    assert "wrong: " in done.stderr
    shutil.rmtree(place.data)
    assert "dvc pull" in run(workspace, "vaeflow", "data", "check", status=1).stderr
    assert "dvc pull" in run(workspace, "vaeflow", "data", "show", status=2).stderr


@pytest.mark.slow
def test_check_tells_of_a_damaged_index_and_a_damaged_pointer(workspace):
    index = workspace / "data" / "digits" / "index.csv"
    rows = index.read_text().splitlines(keepends=True)
    index.unlink()
    index.write_text("".join(rows[:-3]))
    pointer = workspace / "data.dvc"
    pointer.write_text(f"<<<<<<< ours\n{pointer.read_text()}=======\n>>>>>>> theirs\n")
    wrong = run(workspace, "vaeflow", "data", "check", status=1).stderr
    assert "index.csv has not as many rows" in wrong
    assert "data.dvc" in wrong
    again = run(workspace, "vaeflow", "data", "add", "digits", status=2).stderr
    assert "data.dvc is no DVC file" in again


@pytest.mark.slow
def test_prepare_stops_at_what_check_finds(workspace):
    Image.new("L", (8, 8), 9).save(workspace / "data" / "blank.png")
    assert "every pixel is 9" in run(workspace, "vaeflow", "prepare", status=2).stderr
    assert not (workspace / "outputs" / "prepared").exists()


def test_show_draws_every_split_and_its_statistics(tmp_path):
    """Statistics against NumPy's own, and images that are really there."""
    place = Workspace(tmp_path)
    place.data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (500, 6, 5, 3), dtype=np.uint8)
    pixels[..., 1] //= 2
    np.save(place.data / "images.npy", pixels)
    rule = Prepare(validation_fraction=0.3, test_fraction=0.3)
    table = show(place, rule, tmp_path / "out" / "sheet.png", shown=9, seed=0)
    survey = Survey(rule)
    splits = survey.add(images_of(pixels))
    rows = [line.split() for line in table[1:]]
    assert [(row[0], row[2]) for row in rows[:4]] == [
        *[("train", "0"), ("train", "1"), ("train", "2")],
        ("validation", "0"),
    ]
    for row in rows:
        values = pixels[splits == row[0]][..., int(row[2])]
        assert row[1] == str(np.count_nonzero(splits == row[0]))
        assert row[3:5] == [str(values.min()), str(values.max())]
        assert float(row[5]) == pytest.approx(values.mean(), abs=0.01)
        assert float(row[6]) == pytest.approx(values.std(), abs=0.01)
        assert row[7] == f"{(values == 0).mean():.1%}"
    with Image.open(tmp_path / "out" / "sheet.png") as picture:
        sheet = np.asarray(picture)
    # The first tile of the sheet is some training image, enlarged: found again among them.
    tile = sheet[34 : 34 + 48 : 8, 2 : 2 + 40 : 8]
    train = pixels[splits == "train"]
    assert (train == tile).all(axis=(1, 2, 3)).sum() == 1


def test_the_choice_of_shown_images_follows_the_seed(tmp_path, digits):
    place = Workspace(tmp_path)
    place.data.mkdir()
    np.save(place.data / "images.npy", digits)

    def drawn(seed):
        show(place, Prepare(), tmp_path / "s.png", shown=16, seed=seed)
        return (tmp_path / "s.png").read_bytes()

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 17, 33, 64])
def test_evenly_spaced_levels_are_counted_however_they_were_rounded(levels):
    exact = np.arange(levels) * 255 / (levels - 1)
    for rounded in (np.floor(exact + 0.5), np.ceil(exact - 0.5)):
        found = PixelLevels()
        for block in np.array_split(np.uint8(rounded), 3):
            found.add(block)
        assert found.count == levels


def test_other_bytes_have_as_many_levels_as_a_byte():
    found = PixelLevels()
    found.add(np.uint8([0, 255, 128]))
    assert found.count == 3
    found.add(np.uint8([1]))
    assert found.count == 256
    found.add(np.uint8([0]))
    assert found.count == 256
    dark = PixelLevels()
    dark.add(np.zeros(9, np.uint8))
    assert dark.count == 2
