"""What can go wrong that a person can mend.

A message says what was wrong, where (file, key, index), and what would be right. The command line
prints it as one paragraph and exits with 2; anything else that is raised is a bug and shows its
traceback. Messages often name an address, or hold what a library said of one: the passwords in them
are hidden here, before anything is printed, logged or kept.
"""

from __future__ import annotations

import re

USER = re.compile(r"(?<=://)[^/\s'\"]*@")
SECRET = re.compile(
    r"(?i)([?&;][^=&;\s]*(?:password|passwd|pwd|token|secret|key|sig|signature)=)[^&;\s'\"]+"
)


def hide_secrets(text: str) -> str:
    """Hide user, password and keys of every address in a text behind `***`."""
    return SECRET.sub(r"\1***", USER.sub("***@", text))


class VaeflowError(Exception):
    """Base of every error a user can cause and mend."""

    def __init__(self, message: str = ""):
        super().__init__(hide_secrets(message))


class WorkspaceError(VaeflowError):
    """A command was called outside a workspace, or an earlier stage has not run."""


class ConfigError(VaeflowError):
    """`params.yaml` has a key or a value that is not allowed."""


class DataError(VaeflowError):
    """Images are missing, unreadable, or not what the model takes."""


class BadImageError(DataError):
    """One file, or one row of an array, that cannot be used; others beside it may be sound.

    Args:
        name: the file, or `file#row`.
        reason: what is wrong, and what would be right.
    """

    def __init__(self, name: object, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = str(name)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        """Come whole out of another process: from the message alone it cannot be made again."""
        return type(self), (self.name, self.reason)


class TrainingError(VaeflowError):
    """Training or the trained model gave numbers that are not finite."""


class BundleError(VaeflowError):
    """A bundle is missing, incomplete or changed, or differs from the model it came from."""


class RegistryError(VaeflowError):
    """The tracking store or registry cannot be reached, or has no such model."""


class StageError(VaeflowError):
    """A DVC stage ended with an error."""


class BusyError(VaeflowError):
    """Another flow is at work in the workspace."""


class ServingError(VaeflowError):
    """The server cannot start, or its settings are wrong."""
