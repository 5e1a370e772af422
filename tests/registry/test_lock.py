import threading
import time
from collections import deque
from typing import NamedTuple

import pytest
from helpers import take_turns_while_killed

from vaeflow.common.processes import is_gone, this_process
from vaeflow.errors import RegistryError
from vaeflow.registry import lock
from vaeflow.registry.inspect import table
from vaeflow.registry.lock import hold_lock, next_action
from vaeflow.tracking.runs import PROCESS_TAG, connect

LOCK = "digits-vae.promoting"
ELSEWHERE = "another-machine/7 4711 1795620000.00"
GONE = this_process().rpartition(" ")[0] + " 1000000000.00"  # of before this process began


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return connect()


def owners(client):
    return [version.tags[PROCESS_TAG] for version in client.search_model_versions(f"name='{LOCK}'")]


def draw(client, owner):
    """A ticket of another process."""
    with hold_lock(client, "digits-vae"):
        pass  # the lock is made
    return client.create_model_version(LOCK, lock.SOURCE, tags={PROCESS_TAG: owner}).version


# === With the registry ===


def test_it_is_there_inside_only_and_nobody_takes_it_for_a_model(client):
    with pytest.raises(ZeroDivisionError), hold_lock(client, "digits-vae"):
        assert owners(client) == [this_process()]
        assert table(None) == ["no model is registered yet. Make one: vaeflow retrain"]
        1 / 0  # noqa: B018
    assert not owners(client)


def test_one_held_on_another_machine_is_waited_for(client, capsys, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.0)
    held = draw(client, ELSEWHERE)
    entered = threading.Event()

    def enter():
        with hold_lock(client, "digits-vae"):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    deadline = time.monotonic() + 60
    while "beat" not in str([v.tags for v in client.search_model_versions(f"name='{LOCK}'")]):
        assert time.monotonic() < deadline  # it waits, and shows that it lives
    assert not entered.is_set()
    client.delete_model_version(LOCK, held)
    waiting.join(60)
    assert entered.is_set()
    assert capsys.readouterr().err == f"waiting for another-machine to leave {LOCK}\n"
    assert not owners(client)


def test_one_left_by_a_process_of_this_machine_that_is_gone_is_taken_over(client):
    draw(client, GONE)
    with hold_lock(client, "digits-vae"):
        assert owners(client) == [this_process()]


def test_of_a_container_with_the_name_of_its_host_nobody_outside_can_tell():
    host, number, _ = this_process().split()
    assert is_gone(f"{host} {number} 1000000000.00")
    assert not is_gone(f"{host}7 {number} 1000000000.00")  # another space of process ids


def test_one_left_by_a_machine_that_shows_no_life_is_taken_over(client, monkeypatch):
    draw(client, ELSEWHERE)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    with hold_lock(client, "digits-vae"):
        assert owners(client) == [this_process()]


def test_one_that_shows_life_is_not_taken_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now[0])
    lives = lock.Heartbeats()
    for beat in range(5):
        is_dead = lives.of({1: (ELSEWHERE, str(beat)), 2: (ELSEWHERE, "")})
        assert not is_dead(1)
        assert is_dead(2) == (now[0] > lock.LEASE_SECONDS)
        now[0] += lock.LEASE_SECONDS / 2 + 1
    assert not lives.of({1: (ELSEWHERE, "9")})(1)
    now[0] += lock.LEASE_SECONDS + 1
    assert lives.of({1: (ELSEWHERE, "9")})(1)


def test_who_was_taken_for_dead_is_told_before_it_changes_anything(client):
    with hold_lock(client, "digits-vae") as held:
        held.confirm()
        client.delete_model_version(LOCK, str(held.ticket))
        with pytest.raises(RegistryError, match="stood still for so long"):
            held.confirm()


def test_who_was_taken_for_dead_while_it_waited_draws_again(client):
    held = draw(client, ELSEWHERE)
    entered = threading.Event()

    def enter():
        with hold_lock(client, "digits-vae"):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    deadline = time.monotonic() + 60
    while this_process() not in owners(client):
        assert time.monotonic() < deadline
    (own,) = (
        version.version
        for version in client.search_model_versions(f"name='{LOCK}'")
        if version.tags[PROCESS_TAG] == this_process()
    )
    client.delete_model_version(LOCK, own)
    client.delete_model_version(LOCK, held)
    waiting.join(60)
    assert entered.is_set()


def test_a_lock_that_was_deleted_is_made_again(client):
    for _ in range(2):
        with hold_lock(client, "digits-vae") as held:
            assert held.ticket == 1
        client.delete_registered_model(LOCK)


# === All orders of events, on a model of the processes ===


class Process(NamedTuple):
    """One that wants to be alone some times, and what it knows.

    `at` is what it does next: draw, look, act, delete, read (it is alone: reads who is champion),
    confirm, write (makes another champion), leave; or done, or dead.
    """

    at: str
    rounds: int
    ticket: int = 0
    seen: frozenset = frozenset()  # tickets as they were looked up
    dead: int = 0  # the ticket to delete
    read: int = 0  # how many writes there had been


class World(NamedTuple):
    """Processes, tickets `(number, whose)`, the next number, who stands still, and events left."""

    processes: tuple[Process, ...]
    tickets: frozenset = frozenset()
    next: int = 1
    still: frozenset = frozenset()  # tickets that others take for dead
    writes: int = 0
    deaths: int = 0
    stalls: int = 0


class BrokenError(Exception):
    """Two were alone at once, or one wrote over what it had not read."""


def successors(world, step):
    """Every world one step on."""
    for index, process in enumerate(world.processes):
        if process.at in {"done", "dead"}:
            continue

        def after(changed, index=index, **others):
            processes = list(world.processes)
            processes[index] = changed
            return world._replace(processes=tuple(processes), **others)

        yield step(world, index, process, after)
        if world.deaths:
            yield after(Process("dead", 0), deaths=world.deaths - 1)
        if world.stalls and (process.ticket, index) in world.tickets:
            yield world._replace(still=world.still | {process.ticket}, stalls=world.stalls - 1)


def by_tickets(world, index, process, after):
    """What a process does next: one request to the registry, or a decision on what it knows."""
    own = (process.ticket, index)
    match process.at:
        case "draw":
            drawn = process._replace(at="look", ticket=world.next)
            return after(drawn, tickets=world.tickets | {(world.next, index)}, next=world.next + 1)
        case "look":
            return after(process._replace(at="act", seen=world.tickets))
        case "act":
            whose = dict(process.seen)

            def is_dead(number):
                return world.processes[whose[number]].at == "dead" or number in world.still

            decided = next_action(process.ticket, list(whose), is_dead)
            forgetting = process._replace(seen=frozenset())
            if isinstance(decided, int):
                return after(forgetting._replace(at="delete", dead=decided))
            goes_on = {"hold": "read", "wait": "look", "lost": "draw"}
            return after(forgetting._replace(at=goes_on[decided]))
        case "delete":
            left = frozenset(t for t in world.tickets if t[0] != process.dead)
            return after(process._replace(at="look", dead=0), tickets=left)
        case "read":
            return after(process._replace(at="confirm", read=world.writes))
        case "confirm":
            return after(process._replace(at="write" if own in world.tickets else "leave"))
        case "write":
            if world.writes != process.read:
                raise BrokenError
            return after(process._replace(at="leave", read=0), writes=world.writes + 1)
        case "leave":
            left = world.tickets - {own}
            rounds = process.rounds - 1
            return after(Process("draw" if rounds else "done", rounds), tickets=left)


def by_name(world, index, process, after):
    """The lock before this one: one name, which who finds its holder dead deletes, and takes."""
    match process.at:
        case "draw" if not world.tickets:
            return after(process._replace(at="read", ticket=1), tickets=frozenset({(1, index)}))
        case "draw":
            return after(process._replace(at="act", seen=world.tickets))
        case "act":
            ((_, whose),) = process.seen
            dead = world.processes[whose].at == "dead"
            at = "delete" if dead else "draw"
            return after(process._replace(at=at, seen=frozenset(), dead=1))
        case "delete":
            return after(process._replace(at="draw", dead=0), tickets=frozenset())
    return by_tickets(world, index, process, after)


def confirming_at_once(world, index, process, after):
    """As it is, but for who stands still between confirming and writing: it does not."""
    if process.at == "confirm" and (process.ticket, index) in world.tickets:
        process = process._replace(at="write")
    return by_tickets(world, index, process, after)


def explore(processes, rounds, deaths=0, stalls=0, step=by_tickets):
    """Go through all worlds; returns how many, after checking that each can come to a good end."""
    start = World(tuple(Process("draw", rounds) for _ in range(processes)))
    start = start._replace(deaths=deaths, stalls=stalls)
    before, queue = {start: []}, deque([start])
    while queue:
        world = queue.popleft()
        for found in successors(world, step):
            alone = [p for p in found.processes if p.at in {"read", "confirm", "write"}]
            if len(alone) > 1 and stalls == 0:
                raise BrokenError
            if found not in before:
                before[found] = []
                queue.append(found)
            before[found].append(world)
    ends = [world for world in before if all(p.at in {"done", "dead"} for p in world.processes)]
    good, queue = set(ends), deque(ends)
    while queue:
        for world in before[queue.popleft()]:
            if world not in good:
                good.add(world)
                queue.append(world)
    assert len(good) == len(before)  # from everywhere, all who live come to their turns
    return len(before)


@pytest.mark.parametrize(
    ("processes", "rounds", "deaths"), [(2, 1, 0), (2, 2, 1), (2, 3, 1), (3, 1, 2), (3, 2, 1)]
)
def test_in_every_order_one_is_alone_whoever_dies(processes, rounds, deaths):
    assert explore(processes, rounds, deaths) > 50


def test_with_one_name_instead_two_would_be_alone():
    with pytest.raises(BrokenError):
        explore(3, 1, deaths=1, step=by_name)


@pytest.mark.parametrize("processes", [2, 3])
def test_who_stands_still_before_it_confirms_writes_over_nothing(processes):
    """However long, and whoever else dies.

    Left is who stands still between confirming and writing: MLflow cannot be asked to move an alias
    on a condition.
    """
    deaths = processes - 2
    assert explore(processes, 1, deaths, stalls=1, step=confirming_at_once) > 50
    with pytest.raises(BrokenError):
        explore(processes, 1, deaths, stalls=1)


# === Processes that are killed ===


@pytest.mark.kills
def test_of_eight_processes_that_are_killed_one_is_alone_on_sqlite(client, tmp_path):
    with hold_lock(client, "digits-vae"):
        pass  # the database and the lock are made
    saw, kills = take_turns_while_killed(tmp_path / "turns", turns=40)
    assert set(saw) == {"alone"}
    assert kills > 12
