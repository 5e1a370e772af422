"""One promoter at a time, among all that use a registry."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vaeflow.processes import is_gone, this_process
from vaeflow.registry.versions import create_model, if_there
from vaeflow.training.tracking import PROCESS_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

# After the name of a model: of one without versions, that is there while its aliases are moved.
SUFFIX = ".promoting"
# A promotion takes seconds, or minutes on many test images. What is older was left by a machine
# that is gone.
LEASE_SECONDS = 900
POLL_SECONDS = 0.2


@contextmanager
def alone_with(client: MlflowClient, name: str) -> Iterator[None]:
    """Inside, no other process, on whatever machine, moves an alias of the model.

    A verdict on the present champion and the move that follows from it belong together: two at once
    would each compare with the champion before, and the worse of the two could be left.

    MLflow has no locks, but of two who register a model of one name it refuses one.
    """
    owner, lock = this_process(), f"{name}{SUFFIX}"
    _take(client, lock, owner)
    try:
        yield
    finally:
        held = _find(client, lock)
        if held and held.tags.get(PROCESS_TAG) == owner:
            client.delete_registered_model(lock)


def _take(client: MlflowClient, lock: str, owner: str) -> None:
    told = False
    while not create_model(client, lock, {PROCESS_TAG: owner}):
        held = _find(client, lock)
        if held is None:
            continue  # it was just given back
        holder = held.tags.get(PROCESS_TAG, "somebody 0 0")
        if is_gone(holder) or time.time() - held.creation_timestamp / 1000 > LEASE_SECONDS:
            with if_there():  # another who waits may be faster
                client.delete_registered_model(lock)
            continue
        if not told:
            print(f"waiting for {holder.split()[0]} to leave {lock}", file=sys.stderr)
        told = True
        time.sleep(POLL_SECONDS)


def _find(client: MlflowClient, lock: str) -> RegisteredModel | None:
    with if_there():
        return client.get_registered_model(lock)
    return None
