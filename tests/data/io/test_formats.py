"""Each kind of file is added and prepared, and every pixel compared with what was written."""

import shutil
import subprocess

import numpy as np
import pytest
from formats import KINDS, PAGE, table
from pyarrow import parquet

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add
from vaeflow.data.prepare import prepare
from vaeflow.data.splits import CALIBRATION, SPLITS, load_split
from vaeflow.errors import DataError


@pytest.fixture(scope="module")
def empty_workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


ARRAYS = (*SPLITS, CALIBRATION)


def added(tmp_path, kind):
    """The pixels of the prepared splits in the order of the source, and the index."""
    files_in = tmp_path / "files"
    files_in.mkdir()
    source = kind.write(files_in)
    place, rules = Workspace(tmp_path), Prepare(validation_fraction=0.3, test_fraction=0.3)
    add(place, rules, Addition(str(source), **kind.how))
    prepare(place, rules)
    index = parquet.read_table(place.prepared / "index.parquet").to_pydict()
    arrays = {name: iter(load_split(place.prepared, name)) for name in ARRAYS}
    return np.stack([next(arrays[split]) for split in index["split"]]), index


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_pixel_is_as_it_was_written(tmp_path, empty_workspace, kind):
    if not kind.needed():
        pytest.skip(f"what writes {kind.name} is not installed")
    shutil.copytree(empty_workspace, tmp_path, dirs_exist_ok=True)
    if isinstance(kind.expected, str):
        with pytest.raises(DataError, match=kind.expected):
            added(tmp_path, kind)
        return
    pixels, index = added(tmp_path, kind)
    assert pixels.shape == kind.expected.shape
    apart = np.abs(pixels.astype(int) - kind.expected.astype(int)).max()
    assert apart <= kind.within, f"off by {apart}"
    assert index["label"] == (kind.labels or [None] * len(pixels))
    if "MedMNIST" in kind.name:
        given = [split.replace(CALIBRATION, "validation") for split in index["split"]]
        assert given == ["train"] * 24 + ["validation"] * 8 + ["test"] * 8


def test_the_page_has_this_table():
    assert table() in PAGE.read_text(), "make it: python tests/formats.py"
