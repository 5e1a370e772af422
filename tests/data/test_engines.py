"""The same images decoded on a Ray cluster: the same data/, whoever is killed."""

import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import cluster, node
from helpers import make_workspace, run
from PIL import Image
from stores import stored

import vaeflow
from vaeflow.common.versioning import data_is_versioned
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.io import decoding
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.tiles import Tiling
from vaeflow.errors import DataError

pytestmark = pytest.mark.slow

THIRDS = Prepare(validation_fraction=0.3, test_fraction=0.3)
RANDOM = np.random.default_rng(0)


def pictures(folder, count, shape=(60, 50, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(RANDOM.integers(0, 256, shape, np.uint8))
        image.save(folder / f"{number:03}.{('png', 'jpg', 'webp')[number % 3]}")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Image files of several formats and sizes, pages, an archive, and what cannot be used."""
    folder = pictures(tmp_path / "photos" / "a", 80).parent
    pictures(folder / "b", 30, (40, 70))
    pages = [Image.fromarray(RANDOM.integers(0, 256, (64, 64), np.uint8)) for _ in range(30)]
    pages[0].save(folder / "a" / "pages.tif", save_all=True, append_images=pages[1:])
    (folder / "a" / "010x.png").write_bytes(b"no image")
    (folder / "b" / "cut.png").write_bytes((folder / "b" / "000.png").read_bytes()[:900])
    Image.new("L", (50, 50), 7).save(folder / "b" / "one.png")
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        for path in sorted((folder / "b").iterdir()):
            archive.write(path, f"packed/{path.name}")
    return folder


def data_of(root, source, **how):
    """Add to a new workspace; return what is in `data/`, byte by byte, and what was said."""
    place = Workspace(make_workspace(root))
    options = {"skip_bad": True, "labels": "folders", "conversion": Conversion((16, 16), "crop", 1)}
    added = add(place, THIRDS, Addition(str(source), **{**options, **how}))
    files = (path for path in place.data.rglob("*") if path.is_file())
    found = {str(path.relative_to(place.data)): path.read_bytes() for path in files}
    assert len(found) >= 3
    return found, [line for line in added.lines() if "data.dvc" not in line]


@pytest.mark.parametrize("workers", [1, 3])
def test_however_many_workers_the_data_are_the_same(workers, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("vaeflow.common.cluster.cores", lambda: workers)
    # So that pages do not come all at once, and files are many tasks.
    monkeypatch.setattr(decoding, "BYTES_PER_BLOCK", 16 * 16 * 10)
    local, said = data_of(tmp_path / "local", photos)
    assert local["photos/rejected.csv"].count(b"\n") == 1 + 2 + 3
    on_ray, said_on_ray = data_of(tmp_path / "ray", photos, engine="ray")
    assert on_ray == local
    assert [line.replace("/ray/", "/local/") for line in said_on_ray] == said


def test_tiles_and_urls_are_the_same_too(tmp_path):
    folder = pictures(tmp_path / "photos", 20)
    how = {"tiling": Tiling.of(16, None), "labels": "files", "conversion": Conversion()}
    local, _ = data_of(tmp_path / "local", folder, **how)
    with stored("memory", folder) as url:
        on_ray, _ = data_of(tmp_path / "ray", url, engine="ray", **how)
    assert on_ray == local


@pytest.mark.parametrize(
    ("engine", "address", "said"),
    [
        ("spark", None, "expected local or ray"),
        ("local", "auto", "say --engine ray, too"),
        ("ray", "127.0.0.1:1", "no Ray cluster can be joined there .*refused"),
    ],
)
def test_engines_that_are_not_there(tmp_path, engine, address, said):
    place = Workspace(make_workspace(tmp_path / "workspace"))
    with pytest.raises(DataError, match=said):
        add(place, THIRDS, Addition("digits", engine=engine, address=address))
    assert data_is_versioned(place)


def test_a_file_that_one_cannot_use_stops_it_as_here(photos, tmp_path):
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(DataError, match=r"with --skip-bad the rest is added") as error:
            data_of(tmp_path / engine, photos / "a", skip_bad=False, labels="files", engine=engine)
        said.append(str(error.value))
    assert said[0] == said[1]


def command(source, address):
    return (
        "vaeflow", "data", "add", str(source), "--size", "16x16", "--channels", "1",
        "--engine", "ray", "--address", address,
    )  # fmt: skip


@pytest.mark.servers
def test_a_worker_is_killed_and_the_data_are_the_same(tmp_path):
    source = pictures(tmp_path / "photos", 1500, (300, 300, 3))
    local, _ = data_of(tmp_path / "local", source, skip_bad=False, labels="files")
    root = make_workspace(tmp_path / "ray")
    with cluster() as address, node(f"--address={address}"):
        with subprocess.Popen(command(source, address), cwd=root, stdout=subprocess.PIPE) as driver:
            killed = set()
            while driver.poll() is None and len(killed) < 2:
                found = [p for p in psutil.process_iter(["cmdline"]) if is_task(p)]
                if found and found[0].pid not in killed:
                    killed.add(found[0].pid)
                    found[0].kill()
                time.sleep(0.05)
            assert driver.wait(timeout=300) == 0
        assert killed
    files = (path for path in (root / "data").rglob("*") if path.is_file())
    assert {str(path.relative_to(root / "data")): path.read_bytes() for path in files} == local


def is_task(process):
    return " ".join(process.info["cmdline"] or []).startswith("ray::_decode")


@pytest.mark.servers
def test_a_worker_with_another_vaeflow_is_named(tmp_path):
    source = pictures(tmp_path / "photos", 40)
    root = make_workspace(tmp_path / "workspace")
    package = Path(vaeflow.__file__).parent
    other = shutil.copytree(package, tmp_path / "other" / "vaeflow")
    with (other / "data" / "io" / "conversion.py").open("a") as file:
        file.write("# another version\n")
    with cluster(PYTHONPATH=str(other.parent)) as address:
        said = run(root, *command(source, address), status=2).stderr
    assert "has another version of vaeflow than the machine that asked it" in said
    assert data_is_versioned(Workspace(root))
