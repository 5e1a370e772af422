"""One promoter at a time, among all that use a registry.

MLflow has no locks. What it has is numbers: of two who make a version of a model at once each gets
a number of its own, the later the higher, and no number is given again after its version was
deleted. So who wants to be alone draws a ticket, a version of the model `NAME.promoting`, and is
alone when all lower tickets are gone: the ticket lock of Reed and Kanodia 1979. A ticket whose
process has died is deleted by those behind it. That is safe however slow they are, for the number
stands for that one process for ever.

`turn` is the whole rule, apart from the registry: a test goes through every order in which two and
three processes can follow it, die and stand still.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from vaeflow.common.processes import is_gone, this_process
from vaeflow.errors import RegistryError
from vaeflow.registry.versions import create_model, ignore_missing
from vaeflow.tracking.runs import PROCESS_TAG, all_pages

if TYPE_CHECKING:
    from mlflow import MlflowClient


# After the name of a model: of the one whose versions are the tickets. It stays; without any
# version, when nobody promotes.
SUFFIX = ".promoting"
DESCRIPTION = (
    "No model: processes that move an alias of the model of this name draw a version here, so that "
    "one does it at a time. Leave it; deleted while nobody promotes, it is made again."
)
# Goes with every ticket, as MLflow wants one: nothing is there.
SOURCE = "vaeflow-lock:/none"
# Changed by a process that waits, every so often, to show that it lives.
BEAT_TAG = "beat"
BEAT_SECONDS = 20.0
# A process of another machine that shows no life for so long is taken for dead. What is done under
# the lock is a few requests to the registry.
LEASE_SECONDS = 600.0
POLL_SECONDS = 0.2
ATTEMPTS = 20

Action = Literal["hold", "wait", "lost"]


def next_action(own: int, tickets: Collection[int], is_dead: Callable[[int], bool]) -> Action | int:
    """Decide what a process with a ticket does next, as far as it can see.

    Args:
        own: its number.
        tickets: the numbers of all that there are.
        is_dead: whether a ticket's process is known to have ended, or taken for dead.

    Returns:
        `hold`: it is alone. `wait`: look again later. `lost`: others took it for dead; it needs a
        new ticket. A number: delete this ticket, and look again.
    """
    if own not in tickets:
        return "lost"
    before = sorted(number for number in tickets if number < own)
    return next(filter(is_dead, before), "wait" if before else "hold")


class HeldLock:
    """The right to move a model's aliases, as long as nobody took its holder for dead."""

    def __init__(self, client: MlflowClient, lock: str, ticket: int) -> None:
        self.client, self.lock, self.ticket = client, lock, ticket

    def confirm(self) -> None:
        """Check, right before a change, that the lock is still held.

        A process that stood still for long, with its whole machine perhaps, may have been taken for
        dead meanwhile, and another have promoted.

        Raises:
            RegistryError: it is lost; nothing must be changed any more.
        """
        owner, _ = _tickets(self.client, self.lock).get(self.ticket, ("", ""))
        if owner != this_process():
            raise RegistryError(
                f"{self.lock}: this process stood still for so long that another took its turn. "
                "Nothing was changed; run this again."
            )


@contextmanager
def hold_lock(client: MlflowClient, name: str) -> Iterator[HeldLock]:
    """Keep every other process, on whatever machine, from moving an alias of the model.

    What is compared and what is changed belong together: two at once would each find the champion
    before, and the worse of the two could be left. Inside belongs what takes a moment; models are
    compared before, and whether the champion is still the same is looked up inside.

    Raises:
        RegistryError: no ticket can be had.
    """
    lock = f"{name}{SUFFIX}"
    held = HeldLock(client, lock, _draw(client, lock))
    try:
        _wait(held)
        yield held
    finally:
        _delete(client, lock, held.ticket)


def _wait(held: HeldLock) -> None:
    """Wait until its ticket, or a new one where that is lost, is the lowest."""
    client, lock, lives = held.client, held.lock, Heartbeats()
    told, beaten = False, time.monotonic()
    while True:
        tickets = _tickets(client, lock)
        match next_action(held.ticket, tickets, lives.of(tickets)):
            case "hold":
                return
            case "lost":
                held.ticket = _draw(client, lock)
            case "wait":
                if not told:
                    first = tickets[min(tickets)][0]
                    print(
                        f"waiting for {first.split()[0].split('/')[0]} to leave {lock}",
                        file=sys.stderr,
                    )
                told = True
                if time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    with ignore_missing():
                        client.set_model_version_tag(lock, str(held.ticket), BEAT_TAG, str(beaten))
                time.sleep(POLL_SECONDS)
            case dead:
                _delete(client, lock, dead)


class Heartbeats:
    """Which tickets' processes show no life any more, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}

    def of(self, tickets: Mapping[int, tuple[str, str]]) -> Callable[[int], bool]:
        """Note the beat of each ticket; return a function that tells which is dead."""
        now = time.monotonic()
        for number, (_, beat) in tickets.items():
            if number not in self._seen or self._seen[number][0] != beat:
                self._seen[number] = beat, now
        return lambda number: (
            is_gone(tickets[number][0]) or now - self._seen[number][1] > LEASE_SECONDS
        )


def _draw(client: MlflowClient, lock: str) -> int:
    """Draw a ticket. Of many who draw at once, the database turns some away: they try again."""
    from mlflow.exceptions import MlflowException

    tags = {PROCESS_TAG: this_process()}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return int(client.create_model_version(lock, SOURCE, tags=tags).version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                create_model(client, lock, description=DESCRIPTION)
            elif error.error_code != "INTERNAL_ERROR" or attempt == ATTEMPTS:
                raise
            else:
                time.sleep(random.uniform(0, POLL_SECONDS))
    raise RegistryError(f"{lock} is deleted as often as it is made.")


def _delete(client: MlflowClient, lock: str, ticket: int) -> None:
    with ignore_missing():  # others may have deleted it
        client.delete_model_version(lock, str(ticket))


def _tickets(client: MlflowClient, lock: str) -> dict[int, tuple[str, str]]:
    """Return all tickets by number: whose, and its beat."""
    return {
        int(version.version): (
            version.tags.get(PROCESS_TAG, "somebody 0 0"),
            version.tags.get(BEAT_TAG, ""),
        )
        for version in all_pages(client.search_model_versions, f"name = '{lock}'")
    }
