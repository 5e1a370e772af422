"""Adding images for real: DVC at work, files damaged on purpose, processes killed."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_workspace, run
from PIL import Image
from pyarrow import parquet

from vaeflow.common.versioning import data_is_versioned, data_md5
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.sources import read_images
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import load_split, read_labels
from vaeflow.errors import DataError, WorkspaceError

pytestmark = pytest.mark.slow

# Every split has some of a few dozen images.
THIRDS = Prepare(validation_fraction=0.3, test_fraction=0.3)


@pytest.fixture
def place(tmp_path):
    """A workspace with the sample images, versioned."""
    return Workspace(make_workspace(tmp_path / "workspace"))


def pictures(folder, count, shape=(8, 8), seed=1):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return images


def contents(place):
    """Every file of `data/` and `data.dvc`, byte by byte."""
    files = [path for path in place.data.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in [*files, place.data_pointer]}


def add_to(place, source, **how):
    return add(place, THIRDS, Addition(str(source), **how))


def refused(place, source, expected, **how):
    """The addition is refused, and nothing was changed."""
    before = contents(place)
    with pytest.raises(DataError, match=expected):
        add_to(place, source, **how)
    assert contents(place) == before
    assert not (place.root / ".dvc" / "tmp" / "vaeflow-data").exists()


def test_a_folder_becomes_data_and_a_version(place, tmp_path):
    images = pictures(tmp_path / "my photos!", 40)
    before = data_md5(place)
    added = add_to(place, tmp_path / "my photos!")
    assert sorted(path.name for path in place.data.iterdir()) == ["my-photos"]
    np.testing.assert_array_equal(read_images(place.data).pixels[..., 0], images)
    assert (added.count, added.before, added.after) == (40, before, data_md5(place))
    assert added.after != before
    assert data_is_versioned(place)
    assert "data.dvc" in run(place.root, "git", "status", "--short").stdout
    with (place.data / "my-photos" / "index.csv").open(newline="") as file:
        assert list(csv.reader(file))[:2] == [["source", "label"], ["000.png", ""]]


def test_what_was_replaced_can_be_had_again(place, tmp_path):
    before = contents(place)
    pictures(tmp_path / "new", 40)
    add_to(place, tmp_path / "new")
    run(place.root, "git", "checkout", "--quiet", "data.dvc")
    run(place.root, "dvc", "checkout", "--quiet", "data.dvc")
    assert contents(place) == before


def test_appending_keeps_every_image_and_its_split(place, tmp_path):
    def splits():
        prepare(place, Prepare())
        index = parquet.read_table(place.prepared / "index.parquet").to_pydict()
        return dict(zip(index["sha256"], index["split"], strict=True)), index

    before, _ = splits()
    pictures(tmp_path / "more" / "odd", 60)
    added = add_to(place, tmp_path / "more", append=True, labels="folders")
    after, index = splits()
    assert before.items() <= after.items()
    assert len(after) == len(before) + 60
    assert added.report.survey.count == len(after)
    assert index["label"][-1] == "odd"
    assert index["source"][-1] == "more/odd/059.png"
    assert index["source"][0] == "digits/digits#0"
    assert index["label"][0] == "0"


def test_appending_again_takes_another_folder_but_not_a_chosen_one(place, tmp_path):
    pictures(tmp_path / "more", 5, seed=1)
    add_to(place, tmp_path / "more", append=True)
    pictures(tmp_path / "more", 5, seed=2)
    add_to(place, tmp_path / "more", append=True)
    assert sorted(p.name for p in place.data.iterdir()) == ["digits", "more", "more-2"]
    refused(place, tmp_path / "more", "data/more is there already", append=True, name="more")


def test_copies_are_counted_or_left_out(place, tmp_path, digits):
    np.save(tmp_path / "some.npy", np.concatenate([digits[:20], digits[:5], 255 - digits[:30]]))
    assert add_to(place, tmp_path / "some.npy", append=True).report.survey.duplicates == 25
    run(place.root, "git", "checkout", "--quiet", "data.dvc")
    run(place.root, "dvc", "checkout", "--quiet", "--force", "data.dvc")
    added = add_to(place, tmp_path / "some.npy", append=True, drop_duplicates=True)
    assert (added.count, added.dropped, added.report.survey.duplicates) == (30, 25, 0)
    refused(place, tmp_path / "some.npy", "in data/ already", append=True, drop_duplicates=True)


def test_one_bad_file_stops_it_or_is_listed(place, tmp_path):
    source = tmp_path / "mixed"
    for seed, name in enumerate(("a", "b/c")):
        pictures(source / name, 20, seed=seed)
    (source / "a" / "bad.png").write_bytes(b"no image")
    (source / "b" / "cut.jpg").write_bytes((source / "a" / "000.png").read_bytes()[:40])
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(source / "blank.png")
    (source / "notes.txt").touch()
    refused(place, source, r"bad\.png: not a readable image .* with --skip-bad the rest is added")
    added = add_to(place, source, skip_bad=True)
    assert added.count == 40
    with (place.data / "mixed" / "rejected.csv").open(newline="") as file:
        rejected = dict(csv.reader(file))
    assert list(rejected) == ["path", "a/bad.png", "b/cut.jpg", "blank.png"]
    assert rejected["blank.png"] == "every pixel is 7."
    text = "\n".join(added.lines())
    for expected in ("40 images added", "rejected: 3", "left alone: 1", "mixed/rejected.csv"):
        assert expected in text


def test_photographs_of_any_size_become_one_size(place, tmp_path):
    folder = tmp_path / "photos"
    for number, shape in enumerate([(30, 50, 3), (64, 20, 3), (40, 40)] * 10):
        pictures(folder / str(number), 1, shape, seed=number)
    refused(place, folder, r"two shapes .* --size WIDTHxHEIGHT --channels 1\|3")
    add_to(place, folder, conversion=Conversion((12, 10), "crop", 3))
    assert read_images(place.data).pixels.shape == (30, 10, 12, 3)
    pictures(tmp_path / "grey", 3, (9, 9))
    grey = "this is .9, 9, 1., what is there is .10, 12, 3."
    refused(place, tmp_path / "grey", grey, append=True)
    refused(place, "digits", "do not go with those of", append=True)
    add_to(place, tmp_path / "grey", append=True, conversion=Conversion((12, 10), "exact", 3))
    assert read_images(place.data).pixels.shape == (33, 10, 12, 3)


def test_idx_files_bring_their_labels(place, tmp_path, digits):
    import struct

    (tmp_path / "x-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + struct.pack(">3I", 50, 8, 8) + digits[:50].tobytes()
    )
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + struct.pack(">I", 50) + bytes(i % 3 for i in range(50))
    )
    added = add_to(place, tmp_path / "x-images-idx3-ubyte")
    assert added.part.name == "x-images-idx3-ubyte"
    assert added.report.survey.labels == {"0": 17, "1": 17, "2": 16}
    read = read_images(place.data)
    assert read.names[7] == f"{place.data}/x-images-idx3-ubyte/x-images-idx3-ubyte#7"
    assert read.labels[7] == "1"


def test_an_array_of_an_npz_is_chosen(place, tmp_path, digits):
    np.savez(tmp_path / "a.npz", x=digits[:50], z=digits[50:90])
    refused(place, tmp_path / "a.npz", r"several arrays; name one \(--key\)")
    assert add_to(place, tmp_path / "a.npz", key="x").count == 50


def test_what_is_not_versioned_is_never_lost(place, tmp_path):
    pictures(tmp_path / "new", 30)
    Image.new("L", (8, 8)).save(place.data / "mine.png")
    for append in (False, True):
        refused(place, tmp_path / "new", "no version stands for", append=append)


def test_wrong_options_are_refused_with_the_valid_ones(place, tmp_path):
    pictures(tmp_path / "new", 30)
    new = tmp_path / "new"
    refused(place, tmp_path / "absent", "absent does not exist, and no known set .* fashion-mnist")
    refused(place, new, "expected files or folders", labels="names")
    refused(place, "", "the source is empty")
    refused(place, new, "--from is for the known sets: digits, mnist", copies=tmp_path)
    refused(place, new, "expected letters, digits", name="../outside")
    refused(place, new, "expected letters, digits", name=".hidden")


def test_too_few_images_are_refused(place, tmp_path):
    pictures(tmp_path / "few", 2)
    refused(place, tmp_path / "few", "too few images: of 2 none is in")
    (tmp_path / "none").mkdir()
    refused(place, tmp_path / "none", "no images in this folder")
    (tmp_path / "none" / "bad.png").touch()
    refused(place, tmp_path / "none", "no images in it that can be used", skip_bad=True)


def test_without_data_the_first_images_are_added(place, tmp_path):
    pictures(tmp_path / "new", 40)
    shutil.rmtree(place.data)
    with pytest.raises(DataError, match="dvc pull"):
        add_to(place, tmp_path / "new", append=True)
    place.data_pointer.unlink()
    added = add_to(place, tmp_path / "new", append=True)
    assert added.before is None
    assert data_is_versioned(place)


def test_outside_dvc_it_says_so(place, tmp_path):
    pictures(tmp_path / "new", 40)
    shutil.rmtree(place.root / ".dvc")
    shutil.rmtree(place.data)
    with pytest.raises(WorkspaceError, match="not under DVC"):
        add_to(place, tmp_path / "new")


def test_a_second_command_meanwhile_is_refused(place, tmp_path):
    from filelock import FileLock

    pictures(tmp_path / "new", 40)
    with (
        FileLock(place.root / ".dvc" / "tmp" / "vaeflow-data.lock"),
        pytest.raises(DataError, match="another vaeflow command"),
    ):
        add_to(place, tmp_path / "new")


# Runs an addition, and stops for good where it is told to: at the nth call of a function.
STOPPED = """
import sys, time
from pathlib import Path
from vaeflow.config.schema import Prepare
from vaeflow.data import add
from vaeflow.common.workspace import Workspace

root, source, where, append = sys.argv[1:]

def stop(function):
    def stopped(*arguments, **options):
        if where.startswith("before"):
            print("here", flush=True)
            time.sleep(600)
        result = function(*arguments, **options)
        print("here", flush=True)
        time.sleep(600)
        return result
    return stopped

name = where.split()[1]
setattr(add, name, stop(getattr(add, name)))
addition = add.Addition(source, append=bool(append))
thirds = Prepare(validation_fraction=0.3, test_fraction=0.3)
add.add(Workspace(Path(root)), thirds, addition)
"""

MOMENTS = [
    "after link_tree",
    "after write_part",
    "before _swap",
    "after _swap",
    "before run_dvc",
    "after run_dvc",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_step_the_next_command_finds_data_whole(place, tmp_path, moment):
    pictures(tmp_path / "new", 40)
    before = contents(place)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, place.root, tmp_path / "new", moment, "append"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.communicate()
    done = moment == "after run_dvc"
    if done:
        assert data_is_versioned(place)
    # What is refused for another reason puts things right all the same.
    with pytest.raises(DataError):
        add_to(place, tmp_path / "absent")
    assert (contents(place) == before) != done
    assert data_is_versioned(place)
    added = add_to(place, tmp_path / "new", append=True, name="again")
    assert added.count == 40
    assert added.report.survey.duplicates == (40 if done else 0)


def test_what_was_changed_after_a_kill_is_not_undone(place, tmp_path):
    pictures(tmp_path / "new", 40)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, place.root, tmp_path / "new", "before run_dvc", ""],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.communicate()
    (place.data / "mine.png").write_bytes(b"precious")
    with pytest.raises(DataError, match="files in data/ were changed since"):
        add_to(place, tmp_path / "new")
    assert (place.data / "mine.png").read_bytes() == b"precious"
    run(place.root, "dvc", "add", "--quiet", "data")
    with pytest.raises(DataError, match=r"mine\.png: not a readable image"):
        add_to(place, tmp_path / "new", append=True)
    assert (place.data / "mine.png").read_bytes() == b"precious"


def test_a_link_in_the_place_of_data_is_left_alone(place, tmp_path):
    pictures(tmp_path / "new", 40)
    place.data.rename(tmp_path / "elsewhere")
    place.data.symlink_to(tmp_path / "elsewhere")
    refused(place, tmp_path / "new", "data/ is a link")
    assert place.data.is_symlink()


def test_killed_between_the_two_renames_the_earlier_data_come_back(place, tmp_path):
    before = contents(place)
    scratch = place.root / ".dvc" / "tmp" / "vaeflow-data"
    scratch.mkdir(parents=True)
    (scratch / "placed.json").write_text("{}")
    place.data.rename(scratch / "old")
    with pytest.raises(DataError, match="does not exist"):
        add_to(place, tmp_path / "absent")
    assert contents(place) == before


def test_killed_at_random_moments_nothing_is_lost(place, tmp_path):
    pictures(tmp_path / "new", 300, (64, 64))
    before = contents(place)
    command = [str(Path(sys.executable).parent / "vaeflow"), "data", "add", str(tmp_path / "new")]
    chance = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            command, cwd=place.root, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(chance.uniform(0.2, 3))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            break
    run(place.root, *command)
    assert data_is_versioned(place)
    assert len(read_images(place.data).pixels) == 300
    run(place.root, "git", "checkout", "--quiet", "data.dvc")
    run(place.root, "dvc", "checkout", "--quiet", "--force", "data.dvc")
    assert contents(place) == before


def test_a_signal_leaves_data_as_they_were(place, tmp_path):
    pictures(tmp_path / "new", 40)
    before = contents(place)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, place.root, tmp_path / "new", "before run_dvc", ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert contents(place) == before


# === Anomalies ===


def test_anomalies_are_kept_apart_from_every_split(place, tmp_path):
    before = prepare(place, Prepare())
    odd = pictures(tmp_path / "odd" / "torn", 12)
    more = pictures(tmp_path / "odd" / "burnt", 8, seed=2)
    how = {"anomalies": True, "labels": "folders"}
    added = add(place, Prepare(), Addition(str(tmp_path / "odd"), **how))
    assert added.count == 20
    assert "anomalies, kept apart: 20" in added.lines()
    after = prepare(place, Prepare())
    assert after.images == {**before.images, "anomaly": 20}
    kept = load_split(place.prepared, "anomaly")[..., 0]
    expected = np.concatenate([more, odd])  # burnt before torn
    np.testing.assert_array_equal(kept, expected)
    assert read_labels(place.prepared, "anomaly").tolist() == ["burnt"] * 8 + ["torn"] * 12
    # What auto goes by is said of the others alone: the sample has 17 levels, noise has 256.
    assert json.loads((place.prepared / "dataset.json").read_text())["levels"] == 17
    # And they stay so whatever decides the splits of the others.
    assert prepare(place, Prepare(seed=5)).images["anomaly"] == 20


@pytest.mark.parametrize("first", ["anomalies", "others"])
def test_an_anomaly_among_the_other_images_is_named(place, tmp_path, first):
    pictures(tmp_path / "a", 12)
    pictures(tmp_path / "b", 3, seed=2)
    shutil.copy(tmp_path / "a" / "007.png", tmp_path / "b" / "same.png")
    how = [{"append": True}, {"anomalies": True}]
    one, two = how[::-1] if first == "anomalies" else how
    add(place, Prepare(), Addition(str(tmp_path / "a"), **one))
    before = contents(place)
    with pytest.raises(DataError, match=r"same\.png: .* both among the anomalies and .* others"):
        add(place, Prepare(), Addition(str(tmp_path / "b"), **two))
    assert contents(place) == before


def test_what_is_like_an_anomaly_goes_by_its_own_content(place, tmp_path):
    """Near-duplicates join a split; they do not join the anomalies, nor take them with them."""
    odd = pictures(tmp_path / "odd", 5, (32, 32))
    base = np.kron(np.random.default_rng(3).integers(0, 256, (60, 4, 4)), np.ones((8, 8)))
    (tmp_path / "usual").mkdir()
    for number, image in enumerate(base.astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / "usual" / f"{number:03}.png")
    near = np.clip(base[:5] + 1, 0, 255).astype(np.uint8)
    for number, image in enumerate(near):
        Image.fromarray(image).save(tmp_path / "odd" / f"near{number}.png")
    add(place, THIRDS, Addition(str(tmp_path / "usual")))
    add(place, THIRDS, Addition(str(tmp_path / "odd"), anomalies=True))
    counts = prepare(place, THIRDS).images
    assert counts["anomaly"] == len(odd) + 5
    assert sum(counts.values()) == 60 + len(odd) + 5
