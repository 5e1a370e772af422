"""What can go wrong that a person can mend.

A message says what was wrong, where (file, key, index), and what would be right. The command line
prints it as one paragraph and exits with 2; anything else that is raised is a bug and shows its
traceback.
"""


class VaeflowError(Exception):
    """Base of every error a user can cause and mend."""


class WorkspaceError(VaeflowError):
    """A command was called outside a workspace, or an earlier stage has not run."""


class ConfigError(VaeflowError):
    """`params.yaml` has a key or a value that is not allowed."""


class DataError(VaeflowError):
    """Images are missing, unreadable, or not what the model takes."""


class TrainingError(VaeflowError):
    """Training or the trained model gave numbers that are not finite."""


class BundleError(VaeflowError):
    """A bundle is missing, incomplete or changed, or differs from the model it came from."""


class RegistryError(VaeflowError):
    """The tracking store or registry cannot be reached, or has no such model."""


class StageError(VaeflowError):
    """A DVC stage ended with an error."""
