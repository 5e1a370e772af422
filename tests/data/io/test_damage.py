"""Damaged files of the newer kinds: any truncation or change of a byte is an error, or harmless."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from formats import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st

from vaeflow.data.io.sources import read_images
from vaeflow.errors import DataError

# Their content has a checksum; of what has none, a changed byte is a changed pixel.
CHECKED = ["HDF5", "MATLAB 5 `.mat`, images last", "`.npz` of MedMNIST"]
UNCHECKED = [
    "MATLAB 7.3 `.mat`, images last",
    "CIFAR-10 `.bin`",
    "CSV, a label and pixels",
    "CSV with a column `pixels`",
    "GIF, animated",
    "WebP, animated",
    "TIFF of several pages",
    "PGM of 16 bits",
]


@functools.cache
def written(name):
    """One file of a kind: its name and its content."""
    (kind,) = (kind for kind in KINDS if kind.name == name)
    with tempfile.TemporaryDirectory() as folder:
        source = kind.write(Path(folder))
        if source.is_dir():
            source = min(source.iterdir())
        return source.name, source.read_bytes()


@functools.cache
def pixels_of(name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, written(name)[0])
        path.write_bytes(written(name)[1])
        return read_images(path).pixels


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("name", CHECKED + UNCHECKED)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_an_error_or_does_not_matter(tmp_path_factory, name, data):
    file, content = written(name)
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(content) - 1))]
    else:
        near = data.draw(st.sampled_from([64, 1024, len(content)]))  # headers more often
        place = data.draw(st.integers(0, min(near, len(content)) - 1))
        damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / file
    path.write_bytes(damaged)
    try:
        pixels = read_images(path).pixels
    except DataError as error:
        assert file in str(error)
        return
    if name in CHECKED:
        np.testing.assert_array_equal(pixels, pixels_of(name))
