"""Versions of registered models, and the addresses that lead to them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


SCHEME = "models:/"
CHAMPION = "champion"
CHALLENGER = "challenger"
ATTEMPTS = 5
# On every version that vaeflow registers: the bundle it is.
SHA256_TAG = "bundle_sha256"
# Where the bundle lies in it.
BUNDLE_PATH = "artifacts/bundle"
URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>[0-9]+))$")
# What the registry answers with when it has no such model, version or alias.
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}


@contextmanager
def ignore_missing() -> Iterator[None]:
    """Leave the block without an error where the registry has no such model or version (any more).

    Another process may have deleted it a moment before.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise


def create_model(client: MlflowClient, name: str, description: str | None = None) -> bool:
    """Create a registered model without versions; False where one of that name is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


class UnreachableError(RegistryError):
    """The registry does not answer."""


class Version(NamedTuple):
    """A version of a registered model; its number as text."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        """The address that always means this version."""
        return f"{SCHEME}{self.name}/{self.number}"


class Located(NamedTuple):
    """Where a bundle lies.

    Attributes:
        folder: of the bundle.
        version: its number in the registry; None where it was addressed as a folder.
        sha256: of the bundle, as the registry has it.
    """

    folder: Path
    version: str | None
    sha256: str | None = None


class Address(NamedTuple):
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION`: one of the last two is None."""

    name: str
    alias: str | None
    number: str | None

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Parse an address.

        Raises:
            RegistryError: it is none.
        """
        if not (match := URI.match(uri)):
            raise RegistryError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
        return cls(match["name"], match["alias"], match["number"])

    def __str__(self) -> str:
        end = f"@{self.alias}" if self.alias else f"/{self.number}"
        return f"{SCHEME}{self.name}{end}"

    def resolve(self, client: MlflowClient) -> ModelVersion:
        """Look up the version it stands for now.

        Raises:
            RegistryError: there is none.
            UnreachableError: the registry does not answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            if self.alias:
                return client.get_model_version_by_alias(self.name, self.alias)
            return client.get_model_version(self.name, str(self.number))
        except MlflowException as error:
            if error.error_code in ABSENT:
                raise RegistryError(
                    f"{self}: {error.message} (registry {client.tracking_uri}). "
                    "Make a champion with `vaeflow retrain`, or set MLFLOW_TRACKING_URI."
                ) from None
            raise UnreachableError(
                f"{self}: the registry {client.tracking_uri} cannot be reached "
                f"({error.message}). Is it running? --offline-ok takes a copy pulled earlier."
            ) from None


def alias_version(client: MlflowClient, name: str, alias: str) -> str | None:
    """Return the number of the version that an alias points to."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)  # some stores answer with a number


def alias_of(client: MlflowClient, version: Version) -> str | None:
    """Return the alias that points to a version."""
    aliases = (CHAMPION, CHALLENGER)
    return next(
        (a for a in aliases if alias_version(client, version.name, a) == version.number), None
    )


def set_alias(client: MlflowClient, alias: str, version: Version) -> None:
    """Point an alias to a version.

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
