import os
import signal
import subprocess
import sys

import pytest
from helpers import SAMPLE

from vaeflow.common.workspace import Workspace
from vaeflow.config.edit import override_parameters, parse, restore_parameters
from vaeflow.config.schema import load_parameters
from vaeflow.errors import ConfigError

KILLED = """
import os, signal
from vaeflow.config.edit import override_parameters
from vaeflow.common.workspace import Workspace
with override_parameters(Workspace.find(), {"train.epochs": 7}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_bytes((SAMPLE / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def test_values_hold_inside_and_the_file_is_the_same_after(place):
    before = place.parameters.read_bytes()
    overrides = {"train.epochs": 7, "train.filters": [4, 8], "export.name": "mine"}
    with override_parameters(place, overrides):
        inside = load_parameters(place.parameters)
        assert inside.train.epochs == 7
        assert inside.train.filters == (4, 8)
        assert inside.export.name == "mine"
        assert inside.train.seed == 0
        assert "# draws of t per image and step" in place.parameters.read_text()
    assert place.parameters.read_bytes() == before


def test_nothing_to_override_leaves_the_file_alone(place):
    before = place.parameters.stat()
    with override_parameters(place, {}):
        assert place.parameters.stat() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_put_back_when_the_run_fails(place, error):
    before = place.parameters.read_bytes()
    with pytest.raises(error), override_parameters(place, {"train.epochs": 7}):
        raise error
    assert place.parameters.read_bytes() == before


def test_wrong_keys_are_refused_with_the_nearest(place):
    before = place.parameters.read_bytes()
    expected = pytest.raises(ConfigError, match=r"did you mean train\.epochs")
    with expected, override_parameters(place, {"train.epoch": 7}):
        raise AssertionError
    assert place.parameters.read_bytes() == before


def test_a_killed_run_is_undone_by_the_next_unless_people_edited_since(place):
    before = place.parameters.read_bytes()
    for edit in (b"", b"# mine\n"):
        killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ)
        assert killed.returncode == -signal.SIGKILL
        assert load_parameters(place.parameters).train.epochs == 7
        during = place.parameters.read_bytes()
        place.parameters.write_bytes(during + edit)
        restore_parameters(place)
        assert place.parameters.read_bytes() == (during + edit if edit else before)


def test_settings_are_read_as_yaml():
    assert parse(["train.epochs=5", "train.filters=[4, 8]", "export.name=mine"]) == {
        "train.epochs": 5,
        "train.filters": [4, 8],
        "export.name": "mine",
    }
    for wrong in ("epochs=5", "train.epochs", "train.filters=[4"):
        with pytest.raises(ConfigError, match=r"expected section\.key=value"):
            parse([wrong])
