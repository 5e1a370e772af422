"""What is in the registry, as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vaeflow.errors import RegistryError
from vaeflow.registry.gate import BOUND
from vaeflow.registry.lock import SUFFIX
from vaeflow.training.tracking import all_pages, clear_errors, connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

COLUMNS = ("version", "aliases", "bound", "data", "commit", "age", "verdict")
SHORT = 8
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def table(name: str | None) -> list[str]:
    """Every version of a model, or of all, the newest first.

    Args:
        name: of the model.

    Returns:
        Lines: the importance-weighted bound is in nats per test image; data and commit are the
        first digits of the MD5 in `data.dvc` and of the git commit (`+`: with changes to it).

    Raises:
        RegistryError: the registry cannot be reached, or has no such model.
    """
    client = connect()
    with clear_errors(client.tracking_uri):
        models = all_pages(client.search_registered_models, f"name = '{name}'" if name else None)
        models = [model for model in models if not model.name.endswith(SUFFIX)]
        if name and not models:
            raise RegistryError(
                f"{name}: no such model in {client.tracking_uri}. All: vaeflow models"
            )
        lines = []
        for model in models:
            aliases: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                aliases.setdefault(str(number), []).append(f"@{alias}")
            versions = all_pages(client.search_model_versions, f"name = '{model.name}'")
            versions = sorted(versions, key=lambda version: -int(version.version))
            rows = [_row(version, aliases.get(str(version.version), [])) for version in versions]
            lines += [model.name, *_align([COLUMNS, *rows]), ""]
    return lines[:-1] or ["no model is registered yet. Make one: vaeflow retrain"]


def age_of(version: ModelVersion) -> str:
    """How long ago a version was registered, in the largest unit that fits."""
    seconds = max(0, time.time() - version.creation_timestamp / 1000)
    unit, size = next(((u, s) for u, s in UNITS if seconds >= s), UNITS[-1])
    return f"{int(seconds // size)} {unit}"


def _row(version: ModelVersion, aliases: list[str]) -> tuple[str, ...]:
    tags = version.tags
    bound = f"{float(tags[BOUND]):.3f}" if BOUND in tags else "-"
    changed = "+" * (tags.get("git_dirty") == "true")
    return (
        str(version.version),
        " ".join(sorted(aliases)) or "-",
        bound,
        tags.get("data_md5", "-")[:SHORT],
        tags.get("git_commit", "-")[:SHORT] + changed,
        age_of(version),
        _verdict(tags),
    )


def _verdict(tags: dict[str, str]) -> str:
    checks = {k.removeprefix("gate."): v for k, v in tags.items() if k.startswith("gate.")}
    refused = [name for name, text in checks.items() if text.startswith("refused")]
    if "rolled_back" in tags:
        return "rolled back"
    if refused:
        return f"refused: {', '.join(refused)}"
    return "passed" if checks else "-"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
