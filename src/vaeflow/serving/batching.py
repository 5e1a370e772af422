"""Requests that arrive together are run together, in one thread.

Runs that are known to be short are made in the event loop's own, which waits no longer for them.

A request that comes alone runs at once. What arrives while a batch runs makes the next one. It
waits a moment longer only where the last batch says that more is to be expected: clients that
were answered together ask again together.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaeflow.serving.refusals import RefusedError

SHORT = 0.0005  # seconds of a run that is made in the loop's own thread
MOST_KEYS = 64
Outputs = tuple[np.ndarray, ...]
# Called with rows joined along the first axis; its outputs have as many.
Function = Callable[[np.ndarray], Outputs]


def late() -> RefusedError:
    """Return the refusal of what was not answered in time."""
    return RefusedError(504, "not answered within the deadline; send less at once.")


@dataclass(slots=True)
class _Job:
    key: Hashable
    function: Function
    inputs: np.ndarray
    answer: asyncio.Future[Any]

    def give_up(self) -> None:
        """Refuse the job: its deadline has passed."""
        if not self.answer.done():
            self.answer.set_exception(late())


class Batcher:
    """A bounded queue before one thread.

    Args:
        batch: rows that are run together at most; a larger request runs alone.
        wait: seconds that jobs wait for others where some are expected.
        queue: rows that may wait.
        on_batch: called before a batch runs, with its rows and those that are left waiting.
    """

    def __init__(self, batch: int, wait: float, queue: int, on_batch: Callable[[int, int], None]):
        self._batch, self._wait, self._queue, self._on_batch = batch, wait, queue, on_batch
        self._waiting: dict[str, deque[_Job]] = {}  # by client, in the order of their turns
        self._rows = 0
        # The event loop itself keeps no task from being collected.
        self._running: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False  # a batch starts at the end of this turn of the loop
        self._expected = 1  # jobs in the last batch
        # Rows and seconds of the last run of each key.
        self._took: dict[Hashable, tuple[int, float]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def run(
        self,
        key: Hashable,
        function: Function,
        inputs: np.ndarray,
        deadline: float,
        client: str = "",
    ) -> Outputs:
        """Run a function on some rows, perhaps together with others of the same key.

        Args:
            key: of what may run together.
            function: see `Function`.
            inputs: the rows.
            deadline: by `time.monotonic()`.
            client: whose they are; clients take turns. Empty where that is not known.

        Raises:
            RefusedError: 429 when the queue is full, 504 when the deadline has passed.
        """
        own = sum(len(job.inputs) for job in self._waiting.get(client, ()))
        # An eighth of the queue is for the others, where it is known who they are.
        shared = client and own and own + len(inputs) > self._queue - self._queue // 8
        if shared or self._rows + len(inputs) > self._queue:
            raise RefusedError(
                429, "too many requests are waiting; try again later.", retry_after=1
            )
        loop = asyncio.get_running_loop()
        job = _Job(key, function, inputs, loop.create_future())
        # Lighter than asyncio.timeout, and there is one for every request.
        timer = loop.call_later(deadline - time.monotonic(), job.give_up)
        self._waiting.setdefault(client, deque()).append(job)
        self._rows += len(inputs)
        self._consider()
        try:
            return await job.answer
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the thread when it has finished what it runs."""
        self._thread.shutdown(wait=True)

    def _consider(self) -> None:
        """Start a batch now, or when the wait is over."""
        if self._running or not self._waiting:
            return
        waiting = sum(map(len, self._waiting.values()))
        enough = waiting >= self._expected or self._rows >= self._batch
        if enough or not self._wait:
            if not self._soon:  # with what arrives in the same turn of the loop
                self._soon = True
                asyncio.get_running_loop().call_soon(self._start)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._wait, self._start)

    def _start(self) -> None:
        self._soon = False
        if self._running:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        jobs = self._take()
        if not jobs:
            self._expected = 1
            return
        self._expected = len(jobs)
        if self._is_short(jobs):
            self._run_here(jobs)
            return
        self._running = asyncio.get_running_loop().create_task(self._run(jobs))

    def _take(self) -> list[_Job]:
        """Take the first job, and those of its key that fit in; others keep their place.

        The first is of the client that was served longest ago: one with many jobs is no faster.
        """
        jobs: list[_Job] = []
        rows = 0
        for client in list(self._waiting):
            queue, kept = self._waiting[client], deque[_Job]()
            before = len(jobs)
            while queue and rows < self._batch:
                job = queue.popleft()
                if job.answer.done():  # nobody waits for it any more
                    self._rows -= len(job.inputs)
                elif not jobs or (job.key == jobs[0].key and rows + len(job.inputs) <= self._batch):
                    jobs.append(job)
                    rows += len(job.inputs)
                    self._rows -= len(job.inputs)
                else:
                    kept.append(job)
            queue.extendleft(reversed(kept))
            if not queue:
                del self._waiting[client]
            elif len(jobs) > before:
                self._waiting[client] = self._waiting.pop(client)  # to the end
            if rows >= self._batch:
                break
        return jobs

    def _is_short(self, jobs: list[_Job]) -> bool:
        """Return whether to run jobs in the loop's own thread: handing over takes as long."""
        rows, seconds = self._took.get(jobs[0].key, (1, SHORT))
        here = sum(len(job.inputs) for job in jobs)
        return seconds * max(1, here / rows) < SHORT

    def _run_here(self, jobs: list[_Job]) -> None:
        try:
            outputs = self._call(jobs)
        except Exception as error:
            _refuse(jobs, error)
        else:
            _answer(jobs, outputs)
        finally:
            self._consider()

    async def _run(self, jobs: list[_Job]) -> None:
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._call, jobs
            )
        except BaseException as error:  # told to each who waits for it
            _refuse(jobs, error)
            if not isinstance(error, Exception):
                raise
        else:
            _answer(jobs, outputs)
        finally:
            self._running = None
            self._consider()

    def _call(self, jobs: list[_Job]) -> Outputs:
        """Run the jobs' function on all their rows, and note how long it took."""
        inputs = jobs[0].inputs
        if len(jobs) > 1:
            inputs = np.concatenate([job.inputs for job in jobs])
        self._on_batch(len(inputs), self._rows)
        start = time.perf_counter()
        outputs = jobs[0].function(inputs)
        if len(self._took) >= MOST_KEYS:
            self._took.clear()
        self._took[jobs[0].key] = len(inputs), time.perf_counter() - start
        return outputs


def _answer(jobs: list[_Job], outputs: Outputs) -> None:
    """Give each job its rows of the outputs."""
    start = 0
    for job in jobs:
        end = start + len(job.inputs)
        if not job.answer.done():
            job.answer.set_result(tuple(values[start:end] for values in outputs))
        start = end


def _refuse(jobs: list[_Job], error: BaseException) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_exception(error)
