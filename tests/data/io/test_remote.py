"""Sources at URLs, on real servers and real file systems: as if the files lay here."""

import csv
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import free_port, make_workspace
from PIL import Image
from stores import stored, web_server

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Limits, Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.io import remote as module
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.decoding import Picture
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.remote import AHEAD, Remote
from vaeflow.data.io.sources import count_images, reach, read_images
from vaeflow.errors import BadImageError, DataError

KINDS = ("http", "memory")
THIRDS = Prepare(validation_fraction=0.3, test_fraction=0.3)
RANDOM = np.random.default_rng(0)
# In an order that differs between paths as text and folders in their turn, with all that URLs mean.
NAMES = ("a.png", "a/b c.png", "a/d/e%20.png", "a-1.png", "ü#1.png", "z?.png", "Z&a=b.png")


def grey(count=1):
    return RANDOM.integers(0, 256, (count, 8, 8), np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def save(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(grey()[0]))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Image files below each other."""
    return save(tmp_path / "my photos", NAMES)


@pytest.fixture
def everything(photos):
    """Beside them arrays with labels, a part of `data/`, archives, a table."""
    np.save(photos / "x_train.npy", grey(20))
    np.save(photos / "y_train.npy", np.arange(20) % 3)
    part = photos / "part"
    part.mkdir()
    np.save(part / "images.npy", grey(5)[..., None])
    rows = "".join(f"s{row}.png,l{row}\n" for row in range(5))
    (part / "index.csv").write_text(f"source,label\n{rows}")
    with zipfile.ZipFile(photos / "some.zip", "w") as archive:
        archive.writestr("in/1.png", png(grey()[0]))
    with tarfile.open(photos / "some.tar.gz", "w:gz") as archive:
        content = png(grey()[0])
        info = tarfile.TarInfo("2.png")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    table = pyarrow.table({"image": [png(grey()[0])], "label": ["of the table"]})
    pyarrow.parquet.write_table(table, photos / "some.parquet")
    (photos / ".hidden.png").touch()
    (photos / "notes.txt").touch()
    return photos


def below(images, source):
    assert all(name.startswith(f"{source}/") for name in images.names), images.names
    return [name.removeprefix(f"{source}/") for name in images.names]


def same_as_here(url, folder, **options):
    ignored = {}
    here, there = (
        read_images(source, reading=Reading(on_other=ignored.setdefault(source, []).append))
        for source in (folder, url)
    )
    assert here.names
    np.testing.assert_array_equal(there.pixels, here.pixels)
    np.testing.assert_array_equal(there.digests, here.digests)
    assert below(there, url) == below(here, folder)
    assert (there.labels, there.splits) == (here.labels, here.splits)
    left = [[name.removeprefix(f"{source}/") for name in ignored[source]] for source in ignored]
    assert left[0] == left[1]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_read_as_from_a_folder_here(kind, everything):
    with stored(kind, everything) as url:
        same_as_here(url, everything)
        assert count_images(url) == len(NAMES)


def test_a_slash_at_the_end_makes_no_difference(photos):
    with stored("http", photos) as url:
        assert read_images(f"{url}/").names == read_images(url).names


def test_an_archive_is_a_folder_where_a_chain_of_urls_says_so(everything, tmp_path):
    packed = Path(shutil.make_archive(str(tmp_path / "all"), "zip", everything))
    same_as_here(f"zip://::file://{packed}", everything)
    (tmp_path / "packed").mkdir()
    shutil.copy(packed, tmp_path / "packed")
    with stored("memory", tmp_path / "packed") as url:
        same_as_here(f"zip://::{url}/all.zip", everything)


def test_a_file_url_is_the_path_that_it_names(everything):
    there, here = read_images(f"file://{everything}"), read_images(everything)
    assert there.names == here.names
    np.testing.assert_array_equal(there.pixels, here.pixels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["a/b c.png", "x_train.npy", "part/images.npy", "some.zip", "some.parquet"]
)
def test_one_file_is_read_with_what_lies_beside_it(kind, name, everything):
    path = everything / name
    with stored(kind, everything) as url:
        url = f"{url}/{name}" if kind == "memory" else f"{url}/{name.replace(' ', '%20')}"
        here, there = read_images(path), read_images(url)
        np.testing.assert_array_equal(there.pixels, here.pixels)
        assert there.labels == here.labels
        assert below(there, url.rpartition("/")[0]) == below(here, path.parent)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_pixels_and_a_list_of_paths(kind, photos):
    pixels = RANDOM.integers(0, 256, (3, 64))
    rows = [",".join(map(str, row)) for row in pixels.tolist()]
    names = ",".join(f"pixel{number}" for number in range(64))
    (photos / "pixels.csv").write_text("\n".join([names, *rows]))
    (photos / "list.txt").write_text(
        "a-1.png\n\na/b c.png\n../beside.png\ngone.png\nhttp://x/y.png\n"
    )
    with stored(kind, photos) as url:
        np.testing.assert_array_equal(
            read_images(f"{url}/pixels.csv").pixels.reshape(3, 64), pixels
        )
        bad = []
        listed = read_images(f"{url}/list.txt", reading=Reading(on_bad=bad.append))
        assert below(listed, url) == ["a-1.png", "a/b c.png"]
        assert [str(error) for error in bad] == [
            "../beside.png: a list at a URL names files beside it, by their paths from there.",
            "http://x/y.png: a list at a URL names files beside it, by their paths from there.",
            f"{url}/gone.png: does not exist.",
        ]


def test_each_file_is_fetched_once_and_nothing_stays(everything, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(module, "TemporaryDirectory", lambda prefix: _Scratch(scratch))
    with web_server(everything) as server:
        count_images(server.url)
        assert set(server.gets()) == {"/", "/a/", "/a/d/", "/part/"}
        read_images(server.url)
    files = {path: count for path, count in server.gets().items() if not path.endswith("/")}
    assert set(files.values()) == {1}
    assert len(files) == len(NAMES) + 2 + 2 + 3
    # Archives and tables are gone when they were read, arrays with the source.
    assert sorted(path.name for path in scratch.rglob("*.*")) == [
        "images.npy", "index.csv", "x_train.npy", "y_train.npy",
    ]  # fmt: skip


class _Scratch:
    """A temporary folder that is left as it is."""

    def __init__(self, folder):
        self.name = str(folder)

    def cleanup(self):
        pass


def test_few_files_are_fetched_before_they_are_asked_for(tmp_path):
    folder = save(tmp_path / "many", [f"{number:03}.png" for number in range(200)])
    with web_server(folder) as server, Remote(server.url) as remote:
        reading = Reading()
        names = (f"{remote.folder}/{name.name}" for name in sorted(folder.iterdir()))
        fetched = remote.read((Picture(name, None, name) for name in names), reading)
        first = next(fetched)
        assert first.content == (folder / "000.png").read_bytes()
        fetched.close()
    assert 1 <= len(server.gets(".png")) <= AHEAD


def test_large_files_wait_for_the_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "USUAL_BYTES", 10)
    monkeypatch.setattr(module, "BYTES_AHEAD", 1000)
    folder = save(tmp_path / "many", [f"{number:03}.png" for number in range(40)])
    size = (folder / "000.png").stat().st_size
    with stored("memory", folder) as url, Remote(url) as remote:
        reading = Reading()
        contents = remote.contents(reading)
        asked = []
        pictures = (asked.append(path) or Picture(path, None, path) for path in contents.pictures)
        next(fetched := remote.read(pictures, reading))
        assert len(asked) <= 1000 // size + 1
        fetched.close()


def test_a_file_beyond_the_limits_is_refused(photos):
    (photos / "large.png").write_bytes(bytes(2 << 20))
    reading = Reading(limits=Limits(max_pixels=1000))
    refused = r"large\.png: has more than 8,000 bytes, .* \(--max-pixels\)\.$"
    for kind in KINDS:  # the one lists sizes, the other does not
        with stored(kind, photos) as url:
            for place in (url, f"{url}/large.png"):
                with pytest.raises(BadImageError, match=refused):
                    read_images(place, reading=reading)


# === Names that lead elsewhere, and secrets ===


def test_names_that_lead_out_of_the_folder_are_refused(photos, tmp_path):
    page = "".join(f'<a href="{link}">x</a>' for link in ("..%2Fevil.npy", "%2e%2e/a.png", "a.png"))
    folder = save(tmp_path / "web" / "pages", ["a.png"])
    (folder / "index.html").write_text(page)
    np.save(folder.parent / "evil.npy", grey(2))
    bad = []
    with web_server(folder.parent) as server:
        images = read_images(f"{server.url}/pages", reading=Reading(on_bad=bad.append))
        assert images.names == [f"{server.url}/pages/a.png"]
        assert [str(error) for error in bad] == [
            f"{server.url}/pages/../{name}: a name that is none in a folder."
            for name in ("a.png", "evil.npy")
        ]
        assert not server.gets("evil.npy")


def test_a_signed_url_is_used_and_not_kept(everything):
    with web_server(everything) as server:
        signed = f"{server.url}/some.zip?X-Amz-Credential=me&X-Amz-Signature=abcdef"
        assert read_images(signed).names == [f"{server.url}/some.zip/in/1.png"]
        assert ("GET", "/some.zip?X-Amz-Credential=me&X-Amz-Signature=abcdef") in server.asked
        with pytest.raises(DataError) as error:
            read_images(f"{server.url}/none.zip?X-Amz-Signature=abcdef")
        assert "abcdef" not in str(error.value)
        address = server.url.replace("://", "://me:password@")
        assert read_images(f"{address}/a.png").names == [
            f"{server.url.replace('://', '://***@')}/a.png"
        ]


# === What cannot be read ===


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("foo://bucket/x", r"foo:// is no protocol that is known; expected .* s3://, gs://"),
        ("memory://none/x", r"memory://none/x does not exist\."),
        ("zip://::file:///none.zip", r"none\.zip does not exist\."),
        ("http://127.0.0.1:{port}/x.zip", r"x\.zip cannot be reached \(Cannot connect .* network"),
        ("http://127.0.0.1:{port}/x", r"/x cannot be reached \(.*\)\. Look at .* network"),
        ("{web}/none.png", r"/none\.png does not exist\."),
        ("{web}/none", r"/none does not exist\."),
        ("{web}/secret/", r"/secret may not be read \(403.*\)\. Log in"),
        ("{web}/secret/a.png", r"/secret/a\.png may not be read \(403.*\)\. Log in"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(url, said, photos):
    with web_server(photos) as server:
        server.fault = lambda path: 403 if path.startswith("/secret") else None
        url = url.format(port=free_port(), web=server.url)
        for call in (reach, read_images, count_images):
            with pytest.raises(DataError, match=said) as error:
                call(url)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", ["s3", "gs", "abfs", "sftp", "smb"])
def test_a_package_that_is_missing_is_named(protocol):
    packages = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "sftp": "paramiko", "smb": "smbprot"}
    try:
        __import__(packages[protocol])
    except ImportError:
        with pytest.raises(DataError, match=f"is missing.*: pip install {packages[protocol]}"):
            reach(f"{protocol}://place/photos")


def test_an_unknown_kind_and_an_empty_folder(photos):
    (photos / "empty").mkdir()
    (photos / "notes.doc").write_text("text")
    with web_server(photos) as server:
        for name in ("empty", "notes.doc"):
            with pytest.raises(DataError, match=f"{server.url}/{name}: unknown kind of file"):
                read_images(f"{server.url}/{name}")


def test_what_is_gone_since_it_was_listed_is_one_bad_file(photos):
    with web_server(photos) as server:
        server.fault = {"/a-1.png": 404, "/a.png": 403}.get
        bad = []
        images = read_images(server.url, reading=Reading(on_bad=bad.append))
        assert len(images.names) == len(NAMES) - 2
    assert [str(error) for error in bad] == [
        f"{server.url}/a-1.png: does not exist.",
        f"{server.url}/a.png: may not be read (403, message='Forbidden', "
        f"url='{server.url}/a.png').",
    ]


def test_a_server_that_is_busy_is_asked_again(photos, monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0.01,) * 3)
    np.save(photos / "some.npy", grey(5))
    with web_server(photos) as server:
        server.fault = lambda path: 503 if server.asked["GET", path] in (1, 2) else None
        server.asked["GET", "/"] += 2  # a server is asked again when it was reached once
        images = read_images(server.url)
    assert below(images, server.url) == below(read_images(photos), photos)


def test_what_is_cut_off_on_its_way_is_fetched_again_whole(everything, monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0.01,) * 3)
    with web_server(everything) as server:
        server.cuts = lambda path: path[-1] != "/" and server.asked["GET", path] == 1
        same_as_here(server.url, everything)
    assert set(server.gets(".png").values()) == {2}


def test_a_server_that_stays_away_is_no_bad_file(photos, monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0.01,) * 3)
    bad = []
    with web_server(photos) as server:
        server.fault = lambda path: 503 if path == "/a-1.png" else None
        with pytest.raises(DataError, match=r"/a-1\.png cannot be fetched \(503.* tried 4 times"):
            read_images(server.url, reading=Reading(on_bad=bad.append))
    assert server.gets()["/a-1.png"] == 4
    assert not bad


# === Adding ===


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_data_are_those_of_the_folder_byte_by_byte(kind, tmp_path):
    folder = tmp_path / "my photos!"
    for label in ("cats", "dogs"):
        save(folder / label, [f"{number:02} é.png" for number in range(20)])
    (folder / "cats" / "bad.png").write_bytes(b"no image")
    Image.new("L", (8, 8), 7).save(folder / "dogs" / "one.png")
    np.save(folder / "dogs" / "some.npy", grey(10))
    options = {"labels": "folders", "skip_bad": True, "conversion": Conversion((6, 6), "crop", 1)}
    found = []
    for source in ("local", kind):
        place = Workspace(make_workspace(tmp_path / source))
        if source == "local":
            added = add(place, THIRDS, Addition(str(folder), **options))
        else:
            with stored(kind, folder) as url:
                added = add(place, THIRDS, Addition(url, **options))
        assert added.count == 50
        files = (path for path in place.data.rglob("*") if path.is_file())
        found.append({str(path.relative_to(place.data)): path.read_bytes() for path in files})
    assert set(found[0]) == {
        f"my-photos/{name}" for name in ("images.npy", "index.csv", "rejected.csv", "rules.json")
    }
    assert found[0] == found[1]
    rejected = list(csv.reader(io.StringIO(found[1]["my-photos/rejected.csv"].decode())))
    assert [row[0] for row in rejected] == ["path", "cats/bad.png", "dogs/one.png"]
