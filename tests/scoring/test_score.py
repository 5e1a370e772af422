import fcntl
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers import run, worsen
from PIL import Image
from stores import stored, web_server

import vaeflow
from vaeflow.bundle.manifest import MANIFEST, MEASURE, bundle_sha256
from vaeflow.bundle.runtime import Bundle
from vaeflow.data.io import remote, sources
from vaeflow.errors import BadImageError, BundleError, DataError, VaeflowError
from vaeflow.registry.pull import pull
from vaeflow.registry.register import register
from vaeflow.scoring import engines
from vaeflow.scoring import score as module
from vaeflow.scoring.score import Batch, score
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first

# Of ten shards of 195, the last was never whole, and two were being computed.
KEPT = 7 * 195


@pytest.fixture
def small_shards(monkeypatch):
    """Ten shards of the sample images instead of one, two ahead of what is written."""
    monkeypatch.setattr(module, "BLOCKS_PER_SHARD", 1)
    monkeypatch.setattr(engines, "cores", lambda: 2)


@pytest.fixture
def model(finished):
    return str(finished / "outputs" / "bundle")


@pytest.fixture
def interrupted(tmp_path, digits, model, small_shards):
    """A run that a bad file stopped at the end: the source, the batch, and what it should give."""
    source = tmp_path / "images"
    source.mkdir()
    np.save(source / "a.npy", digits)
    batch = Batch((str(source),), model, tmp_path / "out" / "scores.parquet", latents=True)
    score(batch)
    expected = batch.out.read_bytes()
    batch.out.unlink()
    (source / "b.png").write_bytes(b"no picture")
    with pytest.raises(BadImageError, match=r"b\.png"):
        score(batch)
    assert not batch.out.exists()
    (source / "b.png").unlink()
    return source, batch, expected


def test_a_row_an_image_with_what_the_model_answers(tmp_path, digits, model, small_shards):
    np.save(tmp_path / "some.npy", digits[:400])
    out = tmp_path / "scores.parquet"
    scored = score(Batch((str(tmp_path / "some.npy"), "digits"), model, out, latents=True))
    assert scored.count == 400 + 1797
    assert not scored.resumed

    images = np.concatenate([digits[:400], digits])
    table = pyarrow.parquet.read_table(out)
    assert table["id"][399].as_py() == f"{tmp_path}/some.npy#399"
    assert table["id"][400].as_py() == "digits#0"
    bundle = vaeflow.load(model)
    scores = bundle.score(images)
    np.testing.assert_allclose(table["score"], scores, rtol=1e-5)
    np.testing.assert_allclose(table["percentile"], 100 * bundle.score_rank(scores), atol=0.01)
    means = bundle.encode(images).mean
    for unit in range(8):
        np.testing.assert_allclose(table[f"mean_{unit}"], means[:, unit], atol=1e-5)
    found = bundle.detect(images)
    np.testing.assert_allclose(table["anomaly"], found.anomaly, rtol=1e-3)
    np.testing.assert_array_equal(
        table["p_value"], bundle.measure.calibration.p_value(np.array(table["anomaly"]))
    )
    assert table["anomalous"].to_pylist() == (
        [value > bundle.threshold() for value in table["anomaly"].to_pylist()]
    )
    assert scored.alarms == sum(table["anomalous"].to_pylist())
    assert table.num_columns == 6 + 8

    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata == {
        "model_name": "digits-vae",
        "model_version": bundle_sha256(Path(model))[:12],
        "bundle_sha256": bundle_sha256(Path(model)),
        "data_md5": bundle.manifest.lineage["data_md5"],
    }
    assert [path.name for path in tmp_path.iterdir() if "scores" in path.name] == [out.name]


def test_all_endings_hold_the_same_numbers(tmp_path, model):
    for ending in ("parquet", "csv", "npy"):
        score(Batch(("digits",), model, tmp_path / f"s.{ending}"))
    table = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    scores = np.load(tmp_path / "s.npy")
    np.testing.assert_array_equal(table["score"], scores)
    rows = np.genfromtxt(
        tmp_path / "s.csv", delimiter=",", names=True, dtype=None, encoding="utf-8", comments=None
    )
    assert rows["id"].tolist() == table["id"].to_pylist()
    np.testing.assert_array_equal(rows["score"].astype(np.float32), scores)
    np.testing.assert_allclose(rows["percentile"], table["percentile"])
    with pytest.raises(VaeflowError, match="scores alone"):
        score(Batch(("digits",), model, tmp_path / "s.npy", latents=True))
    with pytest.raises(VaeflowError, match=r"expected \.csv, \.parquet, \.npy"):
        score(Batch(("digits",), model, tmp_path / "s.txt"))


def test_a_run_that_was_stopped_goes_on_where_it_was(interrupted):
    _, batch, expected = interrupted
    scored = score(batch)
    assert scored.resumed == KEPT
    assert batch.out.read_bytes() == expected
    assert [path.name for path in batch.out.parent.iterdir()] == [batch.out.name]


def test_nothing_is_taken_from_a_run_on_other_images(interrupted, digits):
    source, batch, _ = interrupted
    changed = digits.copy()
    changed[200] = 255 - changed[200]  # in the second shard
    np.save(source / "a.npy", changed)
    scored = score(batch)
    assert scored.resumed == KEPT - 195
    scores = pyarrow.parquet.read_table(batch.out)["score"].to_numpy()
    np.testing.assert_allclose(scores, vaeflow.load(batch.model).score(changed), rtol=1e-5)


def test_nothing_is_taken_from_a_run_of_another_model_or_with_other_options(interrupted, tmp_path):
    _, batch, _ = interrupted
    other = shutil.copytree(batch.model, tmp_path / "other")
    content = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps({**content, "name": "other"}))
    for how in ({"model": str(other)}, {"latents": False}):
        with_another = Batch(**{**vars(batch), **how})
        shutil.copytree(  # the run before removed them
            batch.out.parent / ".scores.parquet.parts", tmp_path / "parts", dirs_exist_ok=True
        )
        assert score(with_another).resumed == 0
        shutil.copytree(tmp_path / "parts", batch.out.parent / ".scores.parquet.parts")


def test_damaged_parts_are_computed_again(interrupted):
    _, batch, expected = interrupted
    first, second, third, *_ = sorted((batch.out.parent / ".scores.parquet.parts").glob("*.npy"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    np.save(third, np.zeros((3, 1)))
    assert score(batch).resumed == KEPT - 3 * 195
    assert batch.out.read_bytes() == expected


def test_the_same_output_twice_at_once_is_refused(tmp_path, model):
    parts = tmp_path / ".s.csv.parts"
    parts.mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(VaeflowError, match="another process is writing"):
            score(Batch(("digits",), model, tmp_path / "s.csv"))
    assert score(Batch(("digits",), model, tmp_path / "s.csv")).count == 1797


def test_bad_images_are_named_and_left_out_on_demand(tmp_path, digits, model):
    (tmp_path / "a.png").write_bytes(b"no picture")
    sources = (str(tmp_path / "a.png"), str(tmp_path / "b.npy"))
    np.save(tmp_path / "b.npy", digits[:5])
    scored = score(Batch(sources, model, tmp_path / "s.npy", skip_bad=True))
    assert scored.count == 5
    assert any("a.png: not a readable image" in line for line in scored.lines())
    with pytest.raises(DataError, match=r"no images that can be scored.\n.*1\n.*a\.png"):
        score(Batch(sources[:1], model, tmp_path / "t.npy", skip_bad=True))
    assert not (tmp_path / "t.npy").exists()


def test_without_quantiles_and_measure_there_is_the_score_alone(tmp_path, bundle):
    content = json.loads((bundle / MANIFEST).read_text())
    del content["files"][MEASURE]
    (bundle / MEASURE).unlink()
    content |= {"score_quantiles": {}, "anomaly": None}
    (bundle / MANIFEST).write_text(json.dumps(content))
    out = tmp_path / "s.parquet"
    scored = score(Batch(("digits",), str(bundle), out))
    assert pyarrow.parquet.read_schema(out).names == ["id", "score"]
    assert "anomalous" not in "".join(scored.lines())
    with pytest.raises(BundleError, match="no anomaly measure"):
        score(Batch(("digits",), str(bundle), out, false_alarm_rate=0.1))


def test_the_rate_of_false_alarms_can_be_changed(tmp_path, model):
    out = tmp_path / "s.parquet"
    few, many = (
        score(Batch(("digits",), model, out, false_alarm_rate=rate)).alarms for rate in (0.02, 0.5)
    )
    assert few < 0.2 * 1797 < many
    scored = score(Batch(("digits",), model, out, false_alarm_rate=0.02, a_day=86_400))
    assert "of 86,400 usual images a day 1,728 are" in scored.lines()[2]
    with pytest.raises(DataError, match=r"cannot vouch for .* the smallest .* is 0\.0055"):
        score(Batch(("digits",), model, out, false_alarm_rate=0.001))


def test_the_champion_is_the_one_that_it_was_at_the_start(bundled, tmp_path, digits, small_shards):
    address, out = "models:/digits-vae@champion", tmp_path / "s.parquet"
    np.save(tmp_path / "a.npy", digits)
    (tmp_path / "b.png").write_bytes(b"no picture")
    batch = Batch((str(tmp_path / "a.npy"), str(tmp_path / "b.png")), address, out)
    client = connect(bundled)
    for expected in ("1", "2"):  # the second in place of the first, whose run was stopped
        version = register(bundled)
        assert version.number == expected
        client.set_registered_model_alias("digits-vae", "champion", expected)
        with pytest.raises(BadImageError):
            score(batch)
        worsen(bundled.bundle, 0.5)
    worse = Bundle(pull(address)).score(digits)
    assert not np.allclose(worse, Bundle(pull("models:/digits-vae/1")).score(digits), rtol=1e-3)

    Image.fromarray(digits[0, ..., 0]).save(tmp_path / "b.png")
    assert score(batch).resumed == KEPT
    table = pyarrow.parquet.read_table(out)
    assert table.schema.metadata[b"model_version"] == b"2"
    assert table.schema.metadata[b"bundle_sha256"].decode() == bundle_sha256(pull(address))
    np.testing.assert_allclose(table["score"][: len(digits)], worse, rtol=1e-5)


LIGHT = """
import sys
from pathlib import Path
from vaeflow.scoring.score import Batch, score

images, model, out = sys.argv[1:]
score(Batch((images,), model, Path(out)))
heavy = {"tensorflow", "keras", "mlflow", "dvc", "prefect", "pandas", "pyarrow", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""


def test_scores_of_a_local_bundle_as_csv_need_nothing_heavy(tmp_path, digits, model):
    np.save(tmp_path / "some.npy", digits[:9])
    command = [sys.executable, "-c", LIGHT, "some.npy", model, "s.csv"]
    assert run(tmp_path, *command).stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["http", "memory"])
def test_the_scores_of_a_url_are_those_of_the_folder(kind, digits, model, tmp_path):
    folder = tmp_path / "images"
    (folder / "of a kind").mkdir(parents=True)
    np.save(folder / "some.npy", digits[:300])
    for number, image in enumerate(digits[300:400, ..., 0]):
        Image.fromarray(image).save(folder / "of a kind" / f"{number}.png")

    def scores(source, name):
        out = tmp_path / name
        assert score(Batch((source,), model, out, latents=name != "scores.npy")).count == 400
        return out.read_bytes().replace(f"{source}/".encode(), b"")

    names = ("scores.csv", "scores.npy")
    here = [scores(str(folder), name) for name in names]
    with stored(kind, folder) as url:
        assert [scores(url, name) for name in names] == here


def test_a_batch_goes_on_where_its_server_went_away(digits, model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCKS_PER_SHARD", 1)
    monkeypatch.setattr(engines, "cores", lambda: 2)
    monkeypatch.setattr(remote, "PAUSES", ())
    monkeypatch.setattr(sources, "BYTES_PER_BLOCK", 100 * 64)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(digits[:1000, ..., 0]):
        Image.fromarray(image).save(folder / f"{number:04}.png")
    batch = Batch((str(folder),), model, tmp_path / "here.csv")
    score(batch)
    with web_server(folder) as server:
        there = replace(batch, sources=(server.url,), out=tmp_path / "there.csv", skip_bad=True)
        server.fault = lambda path: 503 if path == "/0990.png" else None
        with pytest.raises(DataError, match=r"0990\.png cannot be fetched .* Run the same command"):
            score(there)
        server.fault = lambda path: None
        scored = score(there)
        expected = batch.out.read_text().replace(str(folder), server.url)
    assert 0 < scored.resumed < 1000
    assert there.out.read_text() == expected


def test_a_url_that_cannot_be_read_is_said_before_the_model_is_asked_for(tmp_path):
    batch = Batch(("memory://none",), "models:/none/1", tmp_path / "scores.csv")
    with pytest.raises(DataError, match="memory://none does not exist"):
        score(batch)
