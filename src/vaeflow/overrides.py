"""Parameters that hold for one run: `params.yaml` is changed for it, and then as it was again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vaeflow.config import Parameters, read_parameters, validate
from vaeflow.errors import ConfigError
from vaeflow.files import atomic_file, write_json
from vaeflow.workspace import Workspace


@contextmanager
def overridden(workspace: Workspace, overrides: Mapping[str, object]) -> Iterator[None]:
    """Inside, `params.yaml` has other values; its layout and comments stay.

    A run that is killed inside leaves a note, by which the next one puts the file back, unless
    somebody has edited it since.

    Args:
        workspace: whose file.
        overrides: `{"section.key": value}`.

    Raises:
        ConfigError: a key or a value is not allowed; the file is as it was.
    """
    put_back(workspace)
    if not overrides:
        yield
        return
    check(workspace, overrides)
    before = workspace.parameters.read_text(encoding="utf-8")
    during = _changed(workspace, overrides)
    _note(workspace).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(_note(workspace)) as fresh:
        write_json(fresh, {"before": before, "during": during})
    try:
        _write(workspace, during)
        yield
    finally:
        put_back(workspace)


def check(workspace: Workspace, overrides: Mapping[str, object]) -> Parameters:
    """The parameters of a run with overrides; nothing is written.

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


def put_back(workspace: Workspace) -> None:
    """Undo what a run that was killed left in `params.yaml`."""
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


def _changed(workspace: Workspace, overrides: Mapping[str, object]) -> str:
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
