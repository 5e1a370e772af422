"""Changes of `params.yaml`: values that hold for one run, and presets that stay.

A preset is a short file of parameters that replace those in `params.yaml`:

    python -m vaeflow.config.edit presets/mnist.yaml

(or `make preset NAME=mnist`) writes its values into the workspace's `params.yaml`; keys that
it does not name stay as they are, and so do the comments.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vaeflow.common.files import atomic_file, write_json
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Parameters, load_parameters, read_parameters, validate
from vaeflow.errors import ConfigError, VaeflowError


@contextmanager
def override_parameters(workspace: Workspace, overrides: Mapping[str, object]) -> Iterator[None]:
    """Change values in `params.yaml` for the block; its layout and comments stay.

    A run that is killed inside leaves a note, by which the next one puts the file back, unless
    somebody has edited it since.

    Args:
        workspace: whose file.
        overrides: `{"section.key": value}`.

    Raises:
        ConfigError: a key or a value is not allowed; the file is as it was.
    """
    restore_parameters(workspace)
    if not overrides:
        yield
        return
    check(workspace, overrides)
    before = workspace.parameters.read_text(encoding="utf-8")
    during = changed_text(workspace, overrides)
    _note(workspace).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(_note(workspace)) as fresh:
        write_json(fresh, {"before": before, "during": during})
    try:
        _write(workspace, during)
        yield
    finally:
        restore_parameters(workspace)


def check(workspace: Workspace, overrides: Mapping[str, object]) -> Parameters:
    """Return the parameters of a run with overrides; nothing is written.

    Args:
        workspace: whose.
        overrides: `{"section.key": value}`.

    Raises:
        ConfigError: a key or a value is not allowed, in `params.yaml` or in the overrides.
    """
    content = read_parameters(workspace.parameters)
    parameters = validate(content, str(workspace.parameters))
    if not overrides:
        return parameters
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: value}
    return validate(content, "overrides (--set) that are not allowed")


def restore_parameters(workspace: Workspace) -> None:
    """Restore `params.yaml` from what a killed run left."""
    note = _note(workspace)
    if not note.is_file():
        return
    noted = json.loads(note.read_text())
    if workspace.parameters.read_text(encoding="utf-8") == noted["during"]:
        _write(workspace, noted["before"])
    note.unlink()


def parse(settings: list[str]) -> dict[str, object]:
    """Read `section.key=value` as the command line gives it; the value is YAML.

    Raises:
        ConfigError: one is of another form.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            overrides[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            equals = ""
        if not equals or "." not in key:
            raise ConfigError(f"{setting!r}: expected section.key=value, as train.epochs=5.")
    return overrides


def changed_text(workspace: Workspace, overrides: Mapping[str, object]) -> str:
    """Return the text of `params.yaml` with other values, its comments and layout as they are."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096  # long lines stay lines
    content = yaml.load(workspace.parameters)
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = value
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def _write(workspace: Workspace, text: str) -> None:
    with atomic_file(workspace.parameters) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _note(workspace: Workspace) -> Path:
    return workspace.root / ".dvc" / "tmp" / "vaeflow-overrides.json"


def apply_preset(parameters: Path, preset: Path) -> dict[str, tuple[object, object]]:
    """Write a preset's values into a parameter file; nothing is written unless all are valid.

    Args:
        parameters: `params.yaml`.
        preset: a file of the same form, with some of its keys.

    Returns:
        What changed: dotted key to the old and the new value.

    Raises:
        ConfigError: a file is missing, or a key or a value is not allowed.
    """
    from ruamel.yaml import YAML

    if not preset.is_file():
        raise ConfigError(f"{preset}: no such preset. There are: {_listed(preset)}.")
    load_parameters(preset)  # the preset's own faults are named under its own name
    before = load_parameters(parameters).flat()
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    content = yaml.load(parameters)
    for section, values in YAML(typ="safe", pure=True).load(preset).items():
        content.setdefault(section, {}).update(values)
    with atomic_file(parameters) as fresh:
        yaml.dump(content, fresh)
        try:
            after = load_parameters(fresh).flat()
        except ConfigError as error:
            faults = str(error).removeprefix(f"{fresh}:")  # a path that is gone by then
            raise ConfigError(f"{preset} does not go with {parameters}:{faults}") from None
    return {key: (before[key], value) for key, value in after.items() if before[key] != value}


def _listed(absent: Path) -> str:
    """List the presets beside one that does not exist, the most similar first."""
    names = sorted(path.stem for path in absent.parent.glob("*.yaml"))
    nearest = difflib.get_close_matches(absent.stem, names, n=len(names), cutoff=0.0)
    return ", ".join(nearest) or f"none in {absent.parent}"


def main(arguments: list[str]) -> None:
    """Apply the preset that is named, and print what changed."""
    if len(arguments) != 1:
        raise ConfigError(
            "expected one preset, e.g. python -m vaeflow.config.edit presets/mnist.yaml"
        )
    changes = apply_preset(Workspace.find().parameters, Path(arguments[0]))
    for key, (old, new) in changes.items():
        print(f"{key}: {old} -> {new}")
    if not changes:
        print("params.yaml has these values already")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VaeflowError as error:
        print(f"vaeflow: {error}", file=sys.stderr)
        sys.exit(2)
