"""Real array files: sound ones come back as they were, damaged ones are one clear error."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaeflow.data.io import arrays, sources
from vaeflow.data.io.arrays import BYTES_PER_BLOCK
from vaeflow.data.io.rows import is_array, open_arrays
from vaeflow.data.io.sources import image_blocks, read_images
from vaeflow.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)


def idx(images):
    kind = {value: key for key, value in arrays.IDX_TYPES.items()}[images.dtype.str.lstrip("|<")]
    start = bytes([0, 0, kind, images.ndim]) + struct.pack(f">{images.ndim}I", *images.shape)
    return start + images.tobytes()


def write(folder, kind, images=IMAGES):
    path = folder / {"npy": "a.npy", "npz": "a.npz", "idx": "a-idx3-ubyte", "gz": "a-idx3.gz"}[kind]
    if kind == "npy":
        np.save(path, images)
    elif kind == "npz":
        np.savez_compressed(path, images=images)
    else:
        path.write_bytes(idx(images) if kind == "idx" else gzip.compress(idx(images), mtime=0))
    return path


NPY_START = b"\x93NUMPY\x01\x00"
KINDS = ["npy", "npz", "idx", "gz"]


def read(path, key=None):
    with open_arrays(path, key) as (array,):
        return np.concatenate(list(array.blocks()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(tmp_path, kind):
    path = write(tmp_path, kind)
    assert is_array(path)
    np.testing.assert_array_equal(read(path), IMAGES)
    np.testing.assert_array_equal(read_images(path).pixels[..., 0], IMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_follow_each_other(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_PER_BLOCK", 75)
    monkeypatch.setattr(sources, "BYTES_PER_BLOCK", 75)
    path = write(tmp_path, kind)
    blocks = list(image_blocks(path))
    assert [len(block.pixels) for block in blocks] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in blocks])[..., 0], IMAGES)
    assert blocks[1].names == [f"{path}#2", f"{path}#3"]


def test_a_fault_in_a_later_block_is_named_by_its_index_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_PER_BLOCK", 75)
    monkeypatch.setattr(sources, "BYTES_PER_BLOCK", 75)
    images = np.full((6, 5, 7), 0.5, np.float32)
    images[4, 0, 0] = np.nan
    with pytest.raises(DataError, match="#4: NaN"):
        read_images(write(tmp_path, "npy", images))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte.gz", "a.idx"])
def test_idx_files_are_known_by_their_names(tmp_path, name):
    assert is_array(tmp_path / name)
    assert not is_array(tmp_path / name.replace("idx", "xid"))


def test_idx_floating_point_is_big_endian(tmp_path):
    images = np.linspace(0, 1, 40).reshape(2, 5, 4).astype(">f4")
    path = tmp_path / "a.idx"
    path.write_bytes(idx(images))
    np.testing.assert_allclose(read(path), images)
    levels = np.rint(images * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_images(path).pixels[..., 0], levels)


def test_one_array_of_several_is_chosen_by_key(tmp_path):
    path = tmp_path / "two.npz"
    np.savez(path, x=IMAGES, z=IMAGES + 1, y=np.arange(6))
    np.testing.assert_array_equal(read(path, "x"), IMAGES)
    has = r"It has: x \(6, 5, 7\), y \(6,\), z \(6, 5, 7\)"
    with pytest.raises(DataError, match=rf"several arrays; name one .* {has}"):
        read(path)
    with pytest.raises(DataError, match=rf"no array 'w' in it\. {has}"):
        read(path, "w")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_truncation_is_a_clear_error(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("cut")
    path = write(folder, kind)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(DataError, match=path.name):
        read(path)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_byte_is_an_error_or_changes_that_pixel_alone(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("flip")
    path = write(folder, kind)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    tracemalloc.start()
    try:
        values = read(path)
    except DataError as error:
        assert path.name in str(error)
    else:
        # Neither form has a checksum of its pixels; gzip and zip do.
        checked = kind in {"npz", "gz"}
        assert values.size == IMAGES.size
        assert np.count_nonzero(values.view(np.uint8).ravel() != IMAGES.ravel()) <= (not checked)
    finally:
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest < 2 * BYTES_PER_BLOCK


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for name, start in (("any.npy", NPY_START), ("any.npz", b"PK"), ("any.idx", b"\0\0")):
        path = folder / name
        path.write_bytes(start + content)
        try:
            read_images(path)
        except DataError as error:
            assert name in str(error)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npy", b"", "does not begin as an .npy file"),
        ("a.npy", b"PK\x03\x04 junk", "does not begin as an .npy file"),
        ("a.npy", b"\x93NUMPY\x09\x00\x00\x00", r"version \(9, 0\)"),
        ("a.npy", NPY_START + b"\x10\x00{'descr': (((((((", "not a readable array"),
        ("a.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "a header of 2147483647 bytes"),
        (
            "a.npy",
            NPY_START + b"\x50\x00"
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000000000000, 8, 8)}",
            "but holds 0",
        ),
        ("a.npz", b"hello", "not a zip file"),
        ("a.idx", b"\0\0", "wrong magic number 0000"),
        ("a.idx", b"\x89PNG....", "wrong magic number 89504e47"),
        ("a.idx", b"\0\0\x07\x03" + bytes(12), "wrong magic number"),
        ("a.idx", b"\0\0\x08\x03" + b"\xff" * 12, "but holds 0"),
        ("a.idx", b"\0\0\x08\x03\0\0", "not a readable array"),
        ("a.idx.gz", b"\x1f\x8bjunk", "not a readable array"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read(tmp_path / name)


def test_an_archive_under_the_name_of_an_array_is_refused(tmp_path):
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"archive\.npy: not a readable"):
        read_images(tmp_path / "archive.npy")


@pytest.mark.parametrize("kind", ["npy", "idx", "gz"])
def test_a_file_that_goes_on_is_refused(tmp_path, kind):
    path = write(tmp_path, kind)
    more = gzip.compress(b"more") if kind == "gz" else b"more"
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(DataError, match=r"goes on after the 6 rows|but holds 214"):
        read(path)


def test_bombs_are_refused_from_the_header(tmp_path):
    """A few kilobytes that would unpack to 64 MB: nothing near that is allocated."""
    size = 64 << 20
    declared = bytes([0, 0, 8, 3]) + struct.pack(">3I", size >> 20, 1024, 1024)
    (tmp_path / "bomb.idx.gz").write_bytes(gzip.compress(declared + bytes(size)))
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((size >> 20, 1024, 1024), np.uint8))
    for name in ("bomb.idx.gz", "bomb.npz"):
        tracemalloc.start()
        with pytest.raises(DataError, match="decompression bomb"):
            read_images(tmp_path / name)
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest < 1 << 20


def test_an_array_stored_by_columns_is_read_as_it_is(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(IMAGES))
    np.savez(tmp_path / "a.npz", images=np.asfortranarray(IMAGES))
    for name in ("a.npy", "a.npz"):
        np.testing.assert_array_equal(read(tmp_path / name), IMAGES)


@pytest.mark.parametrize("name", ["bomb.npy", "bomb.npz"])
def test_a_pickle_is_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    save = np.save if name.endswith(".npy") else np.savez
    save(tmp_path / name, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=rf"{name}: holds pickled Python objects"):
        read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
