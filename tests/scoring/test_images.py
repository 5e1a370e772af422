import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vaeflow.bundle.manifest import ImageSpec
from vaeflow.data.io.reading import Images
from vaeflow.data.splits import pixel_digests
from vaeflow.errors import BadImageError, DataError
from vaeflow.scoring.images import Asked, blocks, count, in_shards, read, reading_for

SHAPE = (8, 8, 1)
SPEC = ImageSpec(height=8, width=8, channels=1)


def numbered(start, stop):
    pixels = np.zeros((stop - start, 2, 2, 1), np.uint8)
    pixels += np.arange(start, stop, dtype=np.uint8)[:, None, None, None]
    names = [str(row) for row in range(start, stop)]
    digests = pixel_digests(pixels)
    return Images(pixels, digests, names, *[[None] * len(names)] * 2, digests)


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 9))
def test_shards_are_the_same_images_whatever_the_blocks(lengths, size):
    ends = np.cumsum(lengths).tolist()
    parts = [numbered(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    shards = list(in_shards(iter(parts), size))
    total = sum(lengths)
    assert [name for shard in shards for name in shard.names] == [str(row) for row in range(total)]
    assert all(len(shard.names) == size for shard in shards[:-1])
    for shard in shards:
        assert shard.pixels[:, 0, 0, 0].tolist() == [int(name) for name in shard.names]
        np.testing.assert_array_equal(shard.digests, pixel_digests(shard.pixels))


def test_known_sets_and_files_are_counted_and_read_alike(tmp_path, digits):
    np.save(tmp_path / "some.npy", digits[:20])
    Image.fromarray(digits[3, ..., 0]).save(tmp_path / "one.png")
    sources, reading = ["digits", str(tmp_path)], reading_for(SPEC)
    assert count(sources, reading) == 1797 + 20 + 1
    images = read(sources, reading)
    np.testing.assert_array_equal(images.pixels, [*digits, *digits[:20], digits[3]])
    assert images.names[0] == "digits#0"
    assert images.names[-2:] == [f"{tmp_path}/some.npy#19", f"{tmp_path}/one.png"]


def test_images_of_another_shape_are_refused_or_resized(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "large.png")
    np.save(tmp_path / "wide.npy", np.zeros((2, 8, 12), np.uint8))
    for name in ("large.png", "wide.npy"):
        with pytest.raises(DataError, match=r"the model's is \(8, 8, 1\)\. .* --resize crop"):
            read([str(tmp_path / name)], reading_for(SPEC))
        for resize in ("crop", "fit", "exact"):
            images = read([str(tmp_path / name)], reading_for(SPEC, Asked(resize)))
            assert images.pixels.shape[1:] == SHAPE
    with pytest.raises(DataError, match="resize is 'zoom'; expected"):
        reading_for(SPEC, Asked("zoom"))


def test_bad_ones_may_be_left_out(tmp_path, digits):
    (tmp_path / "a.png").write_bytes(b"no picture")
    np.save(tmp_path / "b.npy", digits[:3])
    with pytest.raises(BadImageError, match=r"a\.png"):
        list(blocks([str(tmp_path)], reading_for(SPEC)))
    bad = []
    images = read([str(tmp_path)], reading_for(SPEC, on_bad=bad.append))
    assert len(images.names) == 3
    assert [error.name for error in bad] == [str(tmp_path / "a.png")]


def test_the_array_of_an_archive_is_chosen_by_its_key(tmp_path, digits):
    path = tmp_path / "both.npz"
    np.savez(path, first=digits[:2], second=digits[2:7])
    assert count([str(path)], reading_for(SPEC, Asked(key="second"))) == 5
    images = read([str(path)], reading_for(SPEC, Asked(key="second")))
    np.testing.assert_array_equal(images.pixels, digits[2:7])
