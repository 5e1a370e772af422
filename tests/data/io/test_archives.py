"""Archives, tables and lists of image files: hostile ones, damaged ones, and those of people."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
from helpers import arrow_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from vaeflow.config.schema import Limits
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.sources import count_images, image_blocks, read_images
from vaeflow.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


FILES = {f"set/{label}/{n}.png": png(IMAGES[n]) for n, label in enumerate("aabbcc")}


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, files):
    columns = {"image": list(files.values()), "kind": [name.split("/")[1] for name in files]}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


WRITERS = {"a.zip": write_zip, "a.tar": write_tar, "a.parquet": write_parquet}


def collected(source, **how):
    bad, others = [], []
    reading = Reading(on_bad=bad.append, on_other=others.append, **how)
    blocks = list(image_blocks(source, reading=reading))
    names = [name for block in blocks for name in block.names]
    return names, [(error.name, error.reason) for error in bad], others, blocks


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_read_in_their_order(tmp_path, name):
    images = read_images(WRITERS[name](tmp_path / name, FILES))
    np.testing.assert_array_equal(images.pixels[..., 0], IMAGES)
    inside = range(6) if name.endswith("parquet") else FILES
    joint = "#" if name.endswith("parquet") else "/"
    assert images.names == [f"{tmp_path}/{name}{joint}{file}" for file in inside]


def test_archives_are_counted_where_they_say(tmp_path):
    for name, writer in WRITERS.items():
        writer(tmp_path / name, FILES)
    assert count_images(tmp_path) == 12  # the tar's are known when it was read


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
@pytest.mark.parametrize("root", ["", "dataset/"])
def test_folders_in_archives_are_labels_and_splits(tmp_path, name, root):
    files = {
        f"{root}{split}/{label}/{number}.png": png(IMAGES[number])
        for number, (split, label) in enumerate(
            [
                ("test", "a"),
                ("test", "b"),
                ("train", "a"),
                ("train", "b"),
                ("val", "a"),
                ("val", "b"),
            ]
        )
    }
    path = WRITERS[name](tmp_path / name, {**files, f"{root}README.md": b"hello"})
    (block,) = image_blocks(path, reading=Reading(splits="folders", label_folders=True))
    assert block.splits == ["test"] * 2 + ["train"] * 2 + ["validation"] * 2
    assert block.labels == ["a", "b"] * 3


def test_a_common_folder_is_no_label(tmp_path):
    (block,) = image_blocks(
        write_zip(tmp_path / "a.zip", FILES), reading=Reading(label_folders=True)
    )
    assert block.labels == list("aabbcc")


def test_what_is_no_image_is_left_alone_and_said(tmp_path):
    extra = {"set/readme.txt": b"", "__MACOSX/set/._0.png": b"x", "set/.DS_Store": b"x"}
    for name in ("a.zip", "a.tar"):
        names, bad, others, _ = collected(WRITERS[name](tmp_path / name, {**FILES, **extra}))
        assert len(names) == 6
        assert not bad
        assert [other.removeprefix(f"{tmp_path}/{name}/") for other in others] == list(extra)


@pytest.mark.parametrize("name", ["../out.png", "/abs.png", "a/../../out.png", "..\\out.png"])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    for archive in ("a.zip", "a.tar"):
        path = WRITERS[archive](tmp_path / archive, {**FILES, name: png(IMAGES[0])})
        with pytest.raises(DataError, match="leads out of its archive"):
            read_images(path)
        names, bad, _, _ = collected(path)
        assert (len(names), len(bad)) == (6, 1)


def test_links_and_devices_are_refused(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(IMAGES[0]))
    kinds = {tarfile.SYMTYPE: secret, tarfile.LNKTYPE: "set/a/0.png", tarfile.CHRTYPE: ""}
    for kind, target in kinds.items():
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, str(target)
            archive.addfile(info)
        with pytest.raises(DataError, match="a link or a device in an archive"):
            read_images(path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, str(secret))
    with pytest.raises(DataError, match="a link or a device in an archive"):
        read_images(tmp_path / "a.zip")


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    zeros = bytes(30 << 20)
    path = write_zip(tmp_path / "a.zip", {"a.png": zeros})
    with pytest.raises(DataError, match=r"a\.png: declares 31457280 bytes packed into .* bomb"):
        read_images(path)
    write_tar(tmp_path / "a.tar", {"a.png": bytes(10_000)})
    with pytest.raises(DataError, match="declares 10000 bytes, more than an image may have"):
        read_images(tmp_path / "a.tar", reading=Reading(limits=Limits(max_pixels=1000)))
    path = tmp_path / "a.tgz"
    write_tar(path, {f"{number}.bin": zeros for number in range(4)}, "w:gz")
    with pytest.raises(DataError, match="more than 250 to 1"):
        read_images(path)


def test_a_parquet_table_that_expands_too_far_is_refused(tmp_path):
    table = pyarrow.table({"image": pyarrow.array([bytes(1000 * n) for n in range(2000)])})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DataError, match="more than 250 to 1"):
        read_images(tmp_path / "a.parquet")


def test_an_encrypted_zip_says_what_to_do(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": png(IMAGES[0])})
    content = bytearray(path.read_bytes())
    for start, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(start) + place] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        read_images(path)


@pytest.mark.parametrize("name", [*WRITERS, "a.tar.gz"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_an_error_or_does_not_matter(tmp_path_factory, name, data):
    """Every one of these has a checksum of its content, or holds files that have."""
    folder = tmp_path_factory.mktemp("damaged")
    if name == "a.tar.gz":
        path = write_tar(folder / name, FILES, "w:gz")
    else:
        path = WRITERS[name](folder / name, FILES)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        images = read_images(path)
    except DataError as error:
        assert name in str(error)
    else:
        np.testing.assert_array_equal(images.pixels[..., 0], IMAGES)


def test_what_comes_before_the_damage_may_be_kept(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    path.write_bytes(path.read_bytes()[: 4 * 1024 + 100])
    names, bad, _, _ = collected(path)
    assert 0 < len(names) < 6
    assert len(bad) == 1
    assert bad[0][0].startswith(str(path))


def test_columns_are_named_or_asked_for(tmp_path):
    columns = {
        "front": list(FILES.values()),
        "back": list(FILES.values()),
        "kind": list("aabbcc"),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=r"not clear which is a column of image files; .*--key"):
        read_images(path)
    with pytest.raises(DataError, match=r"no column|'nothing' is not a column of labels"):
        read_images(path, reading=Reading(key="front", label_key="nothing"))
    images = read_images(path, reading=Reading(key="front", label_key="kind"))
    assert images.labels == list("aabbcc")
    np.testing.assert_array_equal(images.pixels[..., 0], IMAGES)


def test_a_large_table_is_read_in_little_memory(tmp_path):
    path, random = tmp_path / "a.parquet", np.random.default_rng(0)
    pictures = [png(random.integers(0, 256, (128, 128), dtype=np.uint8)) for _ in range(2000)]
    parquet.write_table(pyarrow.table({"image": pictures}), path, row_group_size=20)
    with arrow_memory() as pool:
        count = sum(len(images.names) for images in image_blocks(path))
    assert count == 2000
    assert pool.max_memory() < path.stat().st_size / 4


def test_rows_without_bytes_are_bad_ones(tmp_path):
    cells = [{"bytes": None, "path": "elsewhere.png"}, {"bytes": FILES["set/a/0.png"], "path": ""}]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet")
    names, bad, _, _ = collected(tmp_path / "a.parquet")
    assert names == [f"{tmp_path}/a.parquet#1"]
    assert bad == [(f"{tmp_path}/a.parquet#0", "no bytes in the column 'image'.")]


def test_a_list_may_come_on_standard_input(tmp_path):
    for number, image in enumerate(IMAGES):
        (tmp_path / f"{number}.png").write_bytes(png(image))
    os.rename(tmp_path / "5.png", os.fsencode(tmp_path) + b"/\xff.png")  # noqa: PTH104
    script = (
        "from vaeflow.data.io.sources import read_images\n"
        "images = read_images('-'); print(images.pixels.sum(), *images.names)"
    )
    names = b"".join(b"%d.png\n" % number for number in range(5)) + b"\xff.png\n"
    done = subprocess.run(
        [sys.executable, "-c", script], input=names, cwd=tmp_path, capture_output=True, check=True
    )
    total, *read = done.stdout.decode().split()
    assert int(total) == IMAGES.astype(int).sum()
    assert read == [*(f"{number}.png" for number in range(5)), "\\xff.png"]


def test_lines_of_a_list_that_are_no_files_are_named(tmp_path):
    (tmp_path / "0.png").write_bytes(png(IMAGES[0]))
    path = tmp_path / "list.txt"
    path.write_text("0.png\r\nabsent.png\ns3://bucket/1.png\n\n.\n")
    names, bad, others, _ = collected(path)
    assert names == [f"{tmp_path}/0.png"]
    absent, url = bad
    assert absent == (f"{tmp_path}/absent.png", "does not exist.")
    assert url[0] == "s3://bucket/1.png"
    assert "Give the URLs themselves as sources" in url[1]
    assert others == [str(tmp_path)]


def test_a_header_that_asks_for_a_gigabyte_is_refused_unread(tmp_path):
    """A PNG of 40,000 x 40,000 in a zip: its own header tells."""
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    good = png(IMAGES[0])
    path = write_zip(tmp_path / "a.zip", {"a.png": good[:16] + head + good[29:]})
    with pytest.raises(DataError, match=r"not a readable image|no image may have more"):
        read_images(path)
