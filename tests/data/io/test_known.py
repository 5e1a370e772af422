import gzip
import hashlib
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers import MNIST

from vaeflow.data.io import known
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.known import FILES, IDX_SETS, IdxSet, known_blocks
from vaeflow.data.io.reading import Reading
from vaeflow.errors import DataError


def read(name, **how):
    return list(known_blocks(name, Reading(), **how))


@pytest.fixture
def published(tmp_path):
    """A small set as its publisher has it: a folder, and the digests."""
    folder = tmp_path / "published"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    for part in ("train", "t10k"):
        start = bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape)
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 7) + bytes(range(7))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(start + images.tobytes())
        )
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    digests = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES}
    return folder, digests, images


@pytest.fixture
def server(published, monkeypatch, tmp_path):
    """The set as `mnist`, served on this machine."""
    folder, digests, _ = published
    monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        address = f"http://127.0.0.1:{serving.server_port}/"
        monkeypatch.setitem(IDX_SETS, "mnist", IdxSet(address, digests))
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def test_a_set_is_downloaded_once_with_its_labels(server, published):
    _, _, images = published
    for _ in range(2):
        train, test = read("mnist")
        np.testing.assert_array_equal(train.pixels[..., 0], images)
        assert train.labels == [str(label) for label in range(7)]
        assert test.names[3] == "t10k-images-idx3-ubyte.gz#3"
        server.shutdown()  # the second time nobody answers, nor is asked


def test_another_file_than_the_published_one_is_refused_and_not_kept(server, published, tmp_path):
    folder, _, _ = published
    (folder / FILES[0]).write_bytes(b"another")
    with pytest.raises(DataError, match="mnist: a download is not the published file"):
        read("mnist")
    assert not list((tmp_path / "cache" / "datasets" / "mnist").glob("train-images*"))


def test_without_a_network_the_files_and_the_way_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path))
    nowhere = IdxSet("http://127.0.0.1:9/", IDX_SETS["kmnist"].sha256)
    monkeypatch.setitem(IDX_SETS, "kmnist", nowhere)
    with pytest.raises(DataError) as raised:
        read("kmnist")
    for file in FILES:
        assert f"http://127.0.0.1:9/{file}" in str(raised.value)
    assert "vaeflow data add kmnist --from FOLDER" in str(raised.value)


def test_copies_on_disk_must_be_the_published_ones_unless_trusted(published, monkeypatch, capsys):
    folder, digests, images = published
    monkeypatch.setitem(IDX_SETS, "mnist", IdxSet("", digests))
    assert len(read("mnist", folder=folder)) == 2
    altered = images.copy()
    altered[0, 0, 0] ^= 1
    start = bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape)
    (folder / FILES[0]).write_bytes(gzip.compress(start + altered.tobytes()))
    with pytest.raises(DataError, match=r"is not the published file: .* --unverified"):
        read("mnist", folder=folder)
    train, _ = read("mnist", folder=folder, verify=False)
    np.testing.assert_array_equal(train.pixels[..., 0], altered)
    assert "note: " in capsys.readouterr().out
    (folder / FILES[1]).unlink()
    with pytest.raises(DataError, match=f"{FILES[1]} is missing"):
        read("mnist", folder=folder, verify=False)


def test_digits_are_those_of_scikit_learn(digits):
    (block,) = read("digits")
    np.testing.assert_array_equal(block.pixels, digits)
    assert block.labels[:10] == [str(label) for label in range(10)]


def test_digits_too_are_checked():
    bad = []
    reading = Reading(Conversion((1, 1)), allow_constant=False, on_bad=bad.append)
    assert sum(len(block.pixels) for block in known_blocks("digits", reading)) == 0
    assert len(bad) == 1797


def test_every_set_has_four_digests():
    for name in ("mnist", "fashion-mnist", "kmnist"):
        digests = IDX_SETS[name].sha256
        assert tuple(digests) == known.FILES
        assert len({*digests.values()}) == 4
        assert all(len(digest) == 64 and int(digest, 16) for digest in digests.values())


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"{MNIST} is absent: no copy of MNIST")
def test_the_official_files_of_mnist_have_the_digests_on_record():
    found = {file: hashlib.sha256((MNIST / file).read_bytes()).hexdigest() for file in FILES}
    official = IDX_SETS["mnist"].sha256
    # The copy's training images were rebuilt from another format: every other file is the official.
    assert [file for file in FILES if found[file] != official[file]] in ([], [FILES[0]])
