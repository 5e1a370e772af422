"""Pictures larger than the model's images: calibrated and scored as a whole, by their tiles."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from helpers import run
from PIL import Image

import vaeflow
from vaeflow.bundle.export import export
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Evaluate, load_parameters
from vaeflow.data.add import Addition, add
from vaeflow.data.io.tiles import Tiling
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import CALIBRATION, load_split, read_pictures
from vaeflow.errors import DataError
from vaeflow.evaluation.evaluate import evaluate
from vaeflow.scoring.images import Asked
from vaeflow.scoring.score import Batch, score

pytestmark = pytest.mark.slow

ROWS, COLUMNS = 2, 3  # of digits in a picture


@pytest.fixture(scope="module")
def place(finished, digits, tmp_path_factory):
    """A workspace whose model of digits was calibrated with pictures of six digits each."""
    folder = tmp_path_factory.mktemp("pictures")
    root = shutil.copytree(finished, folder / "workspace", symlinks=True)
    place = Workspace(root)
    (folder / "usual").mkdir()
    for number, six in enumerate(digits[: 1797 // 6 * 6].reshape(-1, 6, 8, 8)):
        Image.fromarray(joined(six)).save(folder / "usual" / f"{number:03}.png")
    (folder / "odd").mkdir()
    for number, six in enumerate(digits[:60].reshape(-1, 6, 8, 8)):
        Image.fromarray(joined([255 - six[0], *six[1:]])).save(folder / "odd" / f"{number}.png")
    tiles = Tiling(8, 8)
    parameters = load_parameters(place.parameters)
    add(place, parameters.prepare, Addition(str(folder / "usual"), tiling=tiles))
    add(place, parameters.prepare, Addition(str(folder / "odd"), tiling=tiles, anomalies=True))
    prepare(place, parameters.prepare)
    evaluate(place, Evaluate(importance_samples=2, false_alarm_rate=0.05))
    export(place, load_parameters(place.parameters).export)
    return place


def joined(six):
    """A picture of six images, from left to right and then from above."""
    rows = [np.concatenate(six[start : start + COLUMNS], axis=1) for start in (0, COLUMNS)]
    return np.concatenate(rows)


def test_pictures_are_calibrated_by_their_oddest_tiles(place):
    bundle = vaeflow.load(str(place.bundle))
    numbers = read_pictures(place.prepared, CALIBRATION)
    found = bundle.detect(load_split(place.prepared, CALIBRATION)).anomaly
    expected = sorted(found[numbers == number].max() for number in np.unique(numbers))
    np.testing.assert_allclose(bundle.measure.pictures.anomalies, expected, rtol=1e-3)
    assert len(bundle.measure.calibration.anomalies) == 6 * len(expected)
    alarm = bundle.manifest.anomaly
    assert alarm.of_pictures.images == len(expected)
    assert alarm.of_pictures.threshold == bundle.threshold(of_pictures=True)
    assert alarm.of_pictures.threshold > alarm.threshold
    # What is odd in a picture is one of its six tiles.
    labelled = json.loads((place.evaluation / "anomalies.json").read_text())
    assert labelled["images"] == 10
    assert labelled["auroc"] > 0.95


def test_a_row_a_picture_with_the_place_of_what_is_odd(place, digits, tmp_path):
    source = tmp_path / "new"
    source.mkdir()
    spoilt = digits[600:606].reshape(6, 8, 8).copy()
    spoilt[4] = np.random.default_rng(0).integers(0, 256, (8, 8))
    Image.fromarray(joined(digits[606:612].reshape(6, 8, 8))).save(source / "a@1,2.png")
    Image.fromarray(joined(spoilt)).save(source / "b.png")
    Image.fromarray(joined(digits[612:618].reshape(6, 8, 8))[:, :16]).save(source / "c.png")
    maps = tmp_path / "maps"
    out = tmp_path / "scores.parquet"
    batch = Batch((str(source), str(source / "b.png")), str(place.bundle), out, maps=maps)
    scored = score(batch)
    assert scored.lines()[0].startswith(f"{out}: 4 pictures, scored by")
    table = pyarrow.parquet.read_table(out).to_pydict()
    files = ["a@1,2.png", "b.png", "c.png", "b.png"]
    assert table["id"] == [f"{source}/{name}" for name in files]
    assert table["tiles"] == [6, 6, 4, 6]
    assert list(zip(table["top"], table["left"], strict=True))[1] == (8, 8)
    assert table["anomalous"][1]
    assert table["anomaly"][1] > 2 * max(table["anomaly"][0], table["anomaly"][2])
    bundle = vaeflow.load(str(place.bundle))
    tiles = [bundle.detect(spoilt[..., None]), bundle.score(spoilt[..., None])]
    assert table["anomaly"][1] == pytest.approx(tiles[0].anomaly.max(), rel=1e-3)
    assert table["score"][1] == pytest.approx(tiles[1].max(), rel=1e-4)
    assert table["p_value"][1] == pytest.approx(1 / (len(bundle.measure.pictures.anomalies) + 1))
    assert scored.alarms == sum(table["anomalous"])
    # Red is where the noise is.
    drawn = np.asarray(Image.open(next(maps.glob("*b.png.png"))).convert("RGB")).astype(int)
    red = (drawn[..., 0] - drawn[..., 2])[:, drawn.shape[1] // 2 :]  # ten times as large
    assert red[90:150, 90:150].mean() > 3 * red[10:70].mean()
    # With the latents a row is a tile, as drift compares them.
    score(Batch((str(source),), str(place.bundle), out, latents=True))
    table = pyarrow.parquet.read_table(out).to_pydict()
    assert table["id"][7] == f"{source}/b.png@0,8"
    assert len(table["mean_0"]) == 16


def test_pictures_are_calibrated_for_one_way_to_cut_them(place, finished, digits, tmp_path):
    Image.fromarray(joined(digits[:6].reshape(6, 8, 8))).save(tmp_path / "a.png")
    out = tmp_path / "scores.csv"
    batch = Batch((str(tmp_path / "a.png"),), str(place.bundle), out)
    otherwise = Asked(tiling=Tiling(8, 4))
    scored = score(Batch(batch.sources, batch.model, out, asked=otherwise))
    assert scored.alarms is None
    assert "calibrated with tiles of 8x8, one every 8 pixels, and these are" in scored.lines()[1]
    header, row = out.read_text().splitlines()
    assert header == "id,tiles,score,anomaly,top,left"
    assert row.startswith(f"{tmp_path}/a.png,15,")
    with pytest.raises(DataError, match="calibrated with tiles of 8x8"):
        score(Batch(batch.sources, batch.model, out, asked=otherwise, false_alarm_rate=0.1))
    with pytest.raises(DataError, match="tile is 16; the model takes images of 8x8"):
        score(Batch(batch.sources, batch.model, out, asked=Asked(tiling=Tiling(16, 8))))
    # A model of whole images scores pictures, too, and says what it does not know.
    scored = score(Batch(batch.sources, str(finished / "outputs" / "bundle"), out, asked=otherwise))
    assert "calibrated with whole images" in scored.lines()[1]


def test_the_command_cuts_like_the_models_data(place, digits, tmp_path):
    Image.fromarray(joined(digits[:6].reshape(6, 8, 8))).save(tmp_path / "a.png")
    model = ("--model", str(place.bundle), "--out", "s.csv")
    printed = run(tmp_path, "vaeflow", "score", "a.png", *model).stdout
    assert "s.csv: 1 pictures" in printed
    error = run(tmp_path, "vaeflow", "score", "a.png", *model, "--stride", "4", status=2).stderr
    assert "--stride is for tiles: say --tile, too." in error
    error = run(place.root, "vaeflow", "data", "add", "x", "--tile", "2", status=2).stderr
    assert "tile is 2; expected 4 pixels or more." in error
