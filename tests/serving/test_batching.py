"""What becomes of jobs whose batch cannot be run."""

import asyncio
import time

import numpy as np
import pytest

from vaeflow.serving.batching import Batcher

ROWS = np.zeros((2, 1))


def run_all(batcher, *inputs, function=lambda rows: (rows,)):
    """What some requests at once are answered with, errors too."""

    async def requests():
        deadline = time.monotonic() + 5
        runs = [batcher.run("key", function, rows, deadline) for rows in inputs]
        return await asyncio.gather(*runs, return_exceptions=True)

    return asyncio.run(requests())


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
            run = broken_once.run("key", lambda rows: (rows,), ROWS, time.monotonic() + 5)
            answers += await asyncio.gather(run, return_exceptions=True)
        return answers

    first, second, third = asyncio.run(one_after_another())
    assert isinstance(first, OSError)
    np.testing.assert_array_equal(second[0], ROWS)
    np.testing.assert_array_equal(third[0], ROWS)


def test_rows_that_cannot_be_joined_are_an_error_for_each_who_sent_them():
    batcher = Batcher(8, 0.0, 100, lambda rows, waiting: None)
    alone, *together = run_all(batcher, ROWS, ROWS, np.zeros((2, 3)))
    np.testing.assert_array_equal(alone[0], ROWS)  # was running when the others came
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
