"""Networks of the user's own: functions of the workspace's folder `src/networks`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras import layers

from vaeflow.common.code import OWN_NETWORKS, own_networks
from vaeflow.errors import ConfigError
from vaeflow.model.objective import Tensor


def apply(address: str, inputs: Tensor, outputs: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Call a function of the user's, and check what it gives.

    Args:
        address: `networks.module:function`.
        inputs: symbolic images or latents.
        outputs: names and shapes, without the batch, of what it must give.

    Returns:
        A float32 tensor, `(batch, *shape)`, for each name.

    Raises:
        ConfigError: there is no such function, it fails, or it gives something else.
    """
    function = _find(address)
    try:
        given = function(inputs, dict(outputs))
    except Exception as error:  # whatever it raises is the user's to mend
        raise ConfigError(
            f"train.network {address} failed: {type(error).__name__}: {error}"
        ) from error
    wanted = {name: (None, *shape) for name, shape in outputs.items()}
    found: object = type(given).__name__
    if isinstance(given, Mapping):
        found = {key: getattr(value, "shape", None) for key, value in given.items()}
    if found != wanted:
        raise ConfigError(
            f"train.network {address} must return tensors by name, of shapes {wanted}; it returned "
            f"{found}."
        )
    # What follows is computed in full precision, whatever the layers compute in.
    return {
        name: layers.Activation("linear", dtype="float32", name=name)(given[name])
        for name in outputs
    }


def _find(address: str) -> Any:
    module_name, _, name = address.partition(":")
    folder = own_networks()
    if folder is None:
        raise ConfigError(
            f"train.network is {address}, a function of a workspace's {OWN_NETWORKS}, and this is "
            "no workspace. Run the command inside of it."
        )
    try:
        _import_package(folder)
        module = importlib.import_module(module_name)
    except Exception as error:  # a fault of the file's, of whatever kind
        raise ConfigError(
            f"train.network {address}: {folder} cannot be imported as {module_name} "
            f"({type(error).__name__}: {error})."
        ) from error
    if not str(getattr(module, "__file__", "")).startswith(f"{folder}/"):
        raise ConfigError(
            f"train.network {address}: {module_name} was found in {module.__file__}, not in "
            f"{folder}. Only what lies there is watched for changes."
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"train.network {address}: {module.__file__} has no function {name}.")
    return function


def _import_package(folder: Path) -> None:
    """Import the workspace's package, not another of its name that Python might find first."""
    if folder.name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[folder.name]
        raise
