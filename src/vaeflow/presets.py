"""Presets: short files of parameters that replace those in `params.yaml`.

    python -m vaeflow.presets presets/mnist.yaml

(or `make preset NAME=mnist`) writes the preset's values into the workspace's `params.yaml`; keys
that it does not name stay as they are, and so do the comments.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from vaeflow.config import load_parameters
from vaeflow.errors import ConfigError, VaeflowError
from vaeflow.files import atomic_file
from vaeflow.workspace import Workspace


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
    """The names of the presets beside one that does not exist, the most similar first."""
    names = sorted(path.stem for path in absent.parent.glob("*.yaml"))
    nearest = difflib.get_close_matches(absent.stem, names, n=len(names), cutoff=0.0)
    return ", ".join(nearest) or f"none in {absent.parent}"


def main(arguments: list[str]) -> None:
    """Apply the preset that is named, and tell what changed."""
    if len(arguments) != 1:
        raise ConfigError("expected one preset, e.g. python -m vaeflow.presets presets/mnist.yaml")
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
