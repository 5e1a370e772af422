"""Versions of registered models, and the addresses that lead to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SCHEME = "models:/"
# On every version that vaeflow registers: the bundle it is.
SHA256_TAG = "bundle_sha256"
URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>[0-9]+))$")
# What the registry answers with when it has no such model, version or alias.
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}


@contextmanager
def if_there() -> Iterator[None]:
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


class Address(NamedTuple):
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION`: one of the last two is None."""

    name: str
    alias: str | None
    number: str | None

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Read an address.

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
        """The version it stands for now.

        Raises:
            RegistryError: there is none.
            UnreachableError: the registry does not answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            if self.alias:
                return client.get_model_version_by_alias(self.name, self.alias)
            return client.get_model_version(self.name, self.number)
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
