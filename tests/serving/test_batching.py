"""What becomes of jobs whose batch cannot be run."""

import asyncio
import threading
import time

import numpy as np
import pytest

from vaeflow.serving.batching import Batcher

ROWS = np.zeros((2, 1))


def run_all(batcher, *inputs, function=lambda rows: (rows,)):
    """What some requests at once are answered with, errors too."""

    async def requests():
        deadline = time.monotonic() + 60
        runs = [batcher.run("key", function, rows, deadline) for rows in inputs]
        return await asyncio.gather(*runs, return_exceptions=True)

    return asyncio.run(requests())


def test_what_arrives_while_a_batch_runs_makes_the_next():
    sizes, go_on = [], threading.Event()

    def wait_and_answer(rows):
        assert go_on.wait(60)
        return (rows,)

    async def requests():
        deadline = time.monotonic() + 60
        runs = []
        for index in range(9):
            run = batcher.run("key", wait_and_answer, ROWS + index, deadline)
            runs.append(asyncio.create_task(run))
            while not sizes:  # until the first runs, behind which all others wait
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*runs)

    batcher = Batcher(12, 0.0, 100, lambda rows, waiting: sizes.append((rows, waiting)))
    answers = asyncio.run(requests())
    batcher.close()
    for index, (answer,) in enumerate(answers):
        np.testing.assert_array_equal(answer, ROWS + index)
    # Of two rows each: the first alone, then six at once, then the last two.
    assert sizes == [(2, 0), (12, 4), (4, 0)]


@pytest.fixture
def broken_once():
    """A batcher whose first batch cannot be counted."""
    calls = []

    def on_batch(rows, waiting):
        calls.append(rows)
        if len(calls) == 1:
            raise OSError("no space left")

    batcher = Batcher(8, 0.0, 100, on_batch)
    yield batcher
    batcher.close()


def test_an_error_before_a_batch_runs_is_told_and_the_next_is_answered(broken_once):
    async def one_after_another():
        answers = []
        for _ in range(3):
            run = broken_once.run("key", lambda rows: (rows,), ROWS, time.monotonic() + 60)
            answers += await asyncio.gather(run, return_exceptions=True)
        return answers

    first, second, third = asyncio.run(one_after_another())
    assert isinstance(first, OSError)
    np.testing.assert_array_equal(second[0], ROWS)
    np.testing.assert_array_equal(third[0], ROWS)


def test_rows_that_cannot_be_joined_are_an_error_for_each_who_sent_them():
    batcher = Batcher(8, 0.0, 100, lambda rows, waiting: None)
    together = run_all(batcher, ROWS, np.zeros((2, 3)))
    assert [type(answer) for answer in together] == [ValueError, ValueError]
    (again,) = run_all(batcher, ROWS)
    np.testing.assert_array_equal(again[0], ROWS)
    batcher.close()


def test_a_function_that_ends_the_thread_is_told_too():
    batcher = Batcher(8, 0.0, 100, lambda rows, waiting: None)

    def leave(rows):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_all(batcher, ROWS, function=leave)
    batcher.close()


def test_short_runs_are_made_in_the_loops_own_thread_and_long_ones_are_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vaeflow.serving.batching.time.perf_counter", lambda: now[0])
    batcher = Batcher(8, 0.0, 100, lambda rows, waiting: None)
    where = []

    def run(seconds):
        def function(rows):
            where.append(threading.current_thread() is threading.main_thread())
            now[0] += seconds
            return (rows,)

        run_all(batcher, ROWS, function=function)

    for seconds in (0.0, 0.0, 0.1, 0.0, 0.0):
        run(seconds)
    # By how long the run before took: of the first that is not known.
    assert where == [False, True, True, False, True]
    run_all(batcher, np.zeros((8, 1)), np.zeros((8, 1)))
    batcher.close()
