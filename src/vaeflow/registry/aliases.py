"""Which version is the champion, with a note of the one before."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vaeflow.errors import RegistryError
from vaeflow.registry.versions import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
# On a version that is or was champion: the number of the one before, empty for none; when; why.
BEFORE_TAG = "champion_before"
PROMOTED_TAG = "promoted"
REASON_TAG = "promoted_because"
ROLLED_BACK_TAG = "rolled_back"
ATTEMPTS = 5


def holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The number of the version that holds an alias."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)  # some stores answer with a number


def held_by(client: MlflowClient, version: Version) -> str | None:
    """The alias that a version holds."""
    aliases = (CHAMPION, CHALLENGER)
    return next((a for a in aliases if holder(client, version.name, a) == version.number), None)


def point(client: MlflowClient, alias: str, version: Version) -> None:
    """Have an alias stand for a version.

    Of two processes that make a new alias at once, one is refused by the database; it tries again.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(1, ATTEMPTS + 1):
        try:
            client.set_registered_model_alias(version.name, alias, version.number)
            return
        except MlflowException as error:
            if attempt == ATTEMPTS or "UNIQUE" not in str(error).upper():
                raise
            time.sleep(0.1 * attempt)


def crown(client: MlflowClient, version: Version, reason: str, confirm: Callable[[], None]) -> None:
    """Make a version the champion. What it takes the place of is noted first.

    Args:
        client: of the registry.
        version: the new champion.
        reason: kept with it.
        confirm: called right before the alias moves; raises where it must not.
    """
    name, number = version
    before = holder(client, name, CHAMPION)
    if before != number:
        client.set_model_version_tag(name, number, BEFORE_TAG, before or "")
    client.set_model_version_tag(name, number, PROMOTED_TAG, now())
    client.set_model_version_tag(name, number, REASON_TAG, reason)
    confirm()
    point(client, CHAMPION, version)
    if holder(client, name, CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)


def champion_before(client: MlflowClient, name: str) -> tuple[Version, Version]:
    """The champion, and the version whose place it took.

    Raises:
        RegistryError: there is no champion, or none was before it.
    """
    present = holder(client, name, CHAMPION)
    if present is None:
        raise RegistryError(f"{name} has no champion. Make one: vaeflow promote models:/{name}/1")
    before = client.get_model_version(name, present).tags.get(BEFORE_TAG)
    if not before:
        raise RegistryError(
            f"{name}: there was no champion before version {present}. "
            f"See what there is: vaeflow models {name}"
        )
    return Version(name, present), Version(name, before)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
