import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY, SAMPLE
from ruamel.yaml import YAML

from vaeflow.config.edit import apply_preset
from vaeflow.config.schema import load_parameters
from vaeflow.errors import ConfigError

PRESETS = sorted((REPOSITORY / "presets").glob("*.yaml"))


@pytest.fixture
def parameters(tmp_path):
    return shutil.copy(SAMPLE / "params.yaml", tmp_path / "params.yaml")


def keys_of(preset):
    content = YAML(typ="safe", pure=True).load(preset)
    return {(section, key): v for section, values in content.items() for key, v in values.items()}


def test_there_are_those_that_the_readme_names():
    assert {preset.stem for preset in PRESETS} >= {"digits", "mnist", "mnist-residual"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_sets_its_values_and_leaves_the_rest_and_the_comments(parameters, preset):
    before = load_parameters(parameters).flat()
    comments = parameters.read_text().count("#")
    changes = apply_preset(parameters, preset)
    after = load_parameters(parameters).flat()
    assert parameters.read_text().count("#") == comments
    wanted = {f"{section}.{key}": value for (section, key), value in keys_of(preset).items()}
    assert after == {**before, **wanted}
    assert changes == {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def test_the_digits_preset_is_the_file_as_shipped_and_undoes_the_others(parameters):
    assert apply_preset(parameters, REPOSITORY / "presets" / "digits.yaml") == {}
    shipped = load_parameters(parameters)
    for preset in PRESETS:
        apply_preset(parameters, preset)
    apply_preset(parameters, REPOSITORY / "presets" / "digits.yaml")
    assert load_parameters(parameters) == shipped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epoch: 3}", "did you mean train.epochs?"),
        ("train: {binarize: static, likelihood: gaussian}", "binarize must be none"),
        # Valid by itself, but not together with what the file has.
        ("train: {kl_warmup_epochs: 50}", "kl_warmup_epochs must be at most epochs"),
    ],
)
def test_what_is_not_allowed_changes_nothing(parameters, tmp_path, text, expected):
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    parameters.write_text(parameters.read_text().replace(" epochs: auto", " epochs: 20"))
    before = parameters.read_text()
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        apply_preset(parameters, preset)
    assert parameters.read_text() == before


def test_the_documented_command(parameters, tmp_path):
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    command = [sys.executable, "-m", "vaeflow.config.edit"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([*command, REPOSITORY / "presets" / "mnist.yaml"], **options)
    assert done.returncode == 0, done.stderr
    assert "train.binarize: auto -> dynamic" in done.stdout
    done = subprocess.run([*command, "absent.yaml"], **options)
    assert done.returncode == 2
    assert "absent.yaml: no such preset." in done.stderr


def test_a_preset_that_does_not_exist_is_answered_with_those_that_do(parameters, tmp_path):
    with pytest.raises(ConfigError, match="There are: mnist, mnist-flow, mnist-residual, digits"):
        apply_preset(parameters, REPOSITORY / "presets" / "mist.yaml")
