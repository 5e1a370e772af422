import threading
import time

import pytest

from vaeflow.processes import this_process
from vaeflow.registry.listing import table
from vaeflow.registry.lock import LEASE_SECONDS, alone_with
from vaeflow.training.tracking import PROCESS_TAG, connect

LOCK = "digits-vae.promoting"
ELSEWHERE = "another-machine 4711 1795620000.00"
GONE = this_process().rpartition(" ")[0] + " 1000000000.00"  # of before this process began


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return connect()


def owners(client):
    return [model.tags[PROCESS_TAG] for model in client.search_registered_models()]


def test_it_is_there_inside_only_and_nobody_takes_it_for_a_model(client):
    with pytest.raises(ZeroDivisionError), alone_with(client, "digits-vae"):
        assert owners(client) == [this_process()]
        assert table(None) == ["no model is registered yet. Make one: vaeflow retrain"]
        1 / 0  # noqa: B018
    assert not owners(client)


def test_one_held_on_another_machine_is_waited_for(client, capsys):
    client.create_registered_model(LOCK, tags={PROCESS_TAG: ELSEWHERE})
    entered = threading.Event()

    def enter():
        with alone_with(client, "digits-vae"):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(1)
    client.delete_registered_model(LOCK)
    waiting.join(30)
    assert entered.is_set()
    assert capsys.readouterr().err == f"waiting for another-machine to leave {LOCK}\n"
    assert not owners(client)


def test_one_left_by_a_process_of_this_machine_that_is_gone_is_taken_over(client):
    client.create_registered_model(LOCK, tags={PROCESS_TAG: GONE})
    with alone_with(client, "digits-vae"):
        assert owners(client) == [this_process()]


def test_one_left_by_a_machine_that_is_gone_is_taken_over_when_it_is_old(client, monkeypatch):
    client.create_registered_model(LOCK, tags={PROCESS_TAG: ELSEWHERE})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
    with alone_with(client, "digits-vae"):
        assert owners(client) == [this_process()]


def test_one_that_another_took_over_meanwhile_is_left_to_it(client):
    with alone_with(client, "digits-vae"):
        client.delete_registered_model(LOCK)
        client.create_registered_model(LOCK, tags={PROCESS_TAG: ELSEWHERE})
    assert owners(client) == [ELSEWHERE]
