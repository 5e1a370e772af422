"""The operations of the model, run in batches; what all routes share."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from starlette.types import Receive, Scope

from vaeflow.bundle.manifest import OF_ALARMS
from vaeflow.bundle.runtime import NO_MEASURE, SCORE_SAMPLES
from vaeflow.errors import BundleError
from vaeflow.registry.model import Model
from vaeflow.registry.versions import Located
from vaeflow.serving import bodies
from vaeflow.serving.answers import SHOWN_DIGITS
from vaeflow.serving.batching import Batcher, Outputs, late
from vaeflow.serving.metrics import Metrics
from vaeflow.serving.refusals import RefusedError
from vaeflow.serving.settings import Settings

MOST_SAMPLES = 128
MOST_DRAWS = 1024 * SCORE_SAMPLES
MOST_VALUES = 1 << 24  # pixels that one request may ask for, whatever its rows
SLICE = 256  # rows that run without others having their turn
SMALL = 16 << 10  # bytes that are parsed, and numbers that are written, at once


class Operation(NamedTuple):
    """What it takes, `images` or `latents`, and the names of what it gives at the least."""

    takes: str
    gives: tuple[str, ...]


OPERATIONS = {
    "encode": Operation("images", ("mean", "log_variance")),
    "decode": Operation("latents", ("images",)),
    "reconstruct": Operation("images", ("images",)),
    "score": Operation("images", ("score",)),
    "draw_pixels": Operation("latents", ("images",)),
}
HELD = "vaeflow.held"  # in a request's scope: bytes that it takes
Result = TypeVar("Result")
# What a row comes to depends on the rows before it: such requests are not run together.
ALONE = frozenset({"draw_pixels"})


class Service:
    """A model behind a queue.

    Attributes:
        settings: its limits.
        model: what answers new requests; `replace` changes it.
        metrics: what it counts.
        received: requests until now.
        in_flight: those of them that are not answered yet.
        held: bytes of bodies and answers in memory, see `hold`.
        ready: whether to send it more; false as soon as it is told to end.
        draining: whether new requests are refused because it ends.
    """

    def __init__(self, model: Model, settings: Settings):
        self.settings = settings
        self.model = model
        self.metrics = Metrics()
        self._batcher = Batcher(settings.batch, settings.wait, settings.queue, self.metrics.batch)
        self.metrics.describe(model)
        self.received = self.in_flight = 0
        self.held = 0
        self._held_of: Counter[str] = Counter()
        # Long texts and pictures: never more than one at a time, and not in the loop's thread.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.ready = True
        self.draining = False

    def replace(self, model: Model) -> None:
        """Answer new requests with another model; accepted ones are finished by the old."""
        self.model = model
        self.metrics.describe(model)

    def close(self) -> None:
        """Free the inference thread."""
        self._batcher.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def hold(self, scope: Scope, count: int) -> None:
        """Count bytes that a request takes, until `release`.

        Raises:
            RefusedError: 429 when all requests together, or those of one client, take too much.
        """
        client, most = self.client(scope), self.settings.held
        of_client = self._held_of[client] if client else 0
        if self.held + count > most or of_client + count > 3 * most // 4:
            raise RefusedError(429, "too many bytes at once; try again later.", retry_after=1)
        self.held += count
        self._held_of[client] += count
        scope[HELD] = scope.get(HELD, 0) + count

    def release(self, scope: Scope) -> None:
        """Count the bytes of a request no more."""
        if count := scope.pop(HELD, 0):
            self.held -= count
            client = self.client(scope)
            self._held_of[client] -= count
            if not self._held_of[client]:
                del self._held_of[client]

    def client(self, scope: Scope) -> str:
        """Return whose request it is: its address, or nothing where all come from one."""
        address = scope.get("client")
        return address[0] if address and self.settings.connections_of_address else ""

    async def apart(
        self, size: int, deadline: float, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        """Call a function that reads or writes a text; a long one in a thread of its own.

        Args:
            size: bytes or numbers of it.
            deadline: by `time.monotonic()`.
            function: works in short steps, or without the interpreter's lock.
            arguments: of it.

        Raises:
            RefusedError: 504 when the deadline has passed.
        """
        if size <= SMALL:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await loop.run_in_executor(self._reader, function, *arguments)
        except TimeoutError:
            raise late() from None

    async def run(
        self,
        model: Model,
        operation: str,
        rows: np.ndarray,
        deadline: float,
        client: str = "",
        **options: int,
    ) -> dict[str, np.ndarray]:
        """Run one of `OPERATIONS` on rows that the model's bundle has checked.

        Args:
            model: the one that checked them.
            operation: its name.
            rows: images or latents.
            deadline: by `time.monotonic()`.
            client: whose request it is.
            options: of `draw_pixels`: its `seed`. Of `score`: `samples` and `seed` as for
                `Bundle.score`, and `maps`, whether to say where an image is unusual. With other
                draws than the default ones there is the score alone: it is by those that the
                anomaly was calibrated.

        Returns:
            Arrays by name, as many rows each.

        Raises:
            RefusedError: 413 too many rows, 429 the queue is full, 504 too late, 422 when the
                numbers are so large that the answer is not finite, or when there are no maps.
        """
        self.check_rows(model, len(rows))
        if (draws := len(rows) * options.get("samples", 1)) > MOST_DRAWS:
            message = f"{draws} draws of all images; one request may have {MOST_DRAWS}."
            raise RefusedError(413, message, "samples")
        gives = _gives(model, operation, options)
        function = partial(_apply, model, operation, options, self.settings.false_alarm_rate)
        key: Hashable = (id(model), operation, tuple(sorted(options.items())), rows.dtype.str)
        if operation in ALONE:
            given = await self._batcher.run(object(), function, rows, deadline, client)
        else:
            # In slices, between which others have their turn.
            slices = [rows[start : start + SLICE] for start in range(0, len(rows), SLICE)]
            parts = [
                await self._batcher.run(key, function, part, deadline, client) for part in slices
            ]
            given = parts[0]
            if len(parts) > 1:
                given = tuple(map(np.concatenate, zip(*parts, strict=True)))
        finite, *outputs = given
        if not finite.all():
            takes = OPERATIONS[operation].takes
            raise RefusedError(422, f"{takes}: the model's answer to them is not finite.", takes)
        return _named(model, gives, outputs)

    def example(self, operation: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return what the operation may take, `(1, ...)`, and gives: near the prior's mean."""
        bundle = self.model.bundle
        rows = np.zeros((1, bundle.latent_dim), np.float32)
        if OPERATIONS[operation].takes == "images":
            rows = bundle.decode(rows).round(SHOWN_DIGITS)
        _, *outputs = _apply(self.model, operation, {}, self.settings.false_alarm_rate, rows)
        return rows, _named(self.model, _gives(self.model, operation, {}), outputs)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Receive a request's body within the limits; see `vaeflow.serving.bodies.read`."""
        hold = partial(self.hold, scope)
        return await bodies.read(scope, receive, self.settings.body, self.settings.deadline, hold)

    def most_rows(self, model: Model) -> int:
        """Return how many rows one request may have: fewer where images are large."""
        of_memory = MOST_VALUES // math.prod(model.bundle.image_shape)
        return max(1, min(self.settings.rows, of_memory))

    def check_rows(self, model: Model, count: int) -> None:
        """Refuse more rows than one request may ask for."""
        if count > (most := self.most_rows(model)):
            raise RefusedError(413, f"{count} rows; one request may have {most}.", "count")

    def deadline(self) -> float:
        """Return the deadline of a request that arrives now."""
        return time.monotonic() + self.settings.deadline


def _detects(model: Model, options: Mapping[str, int]) -> bool:
    """Return whether an anomaly goes with the scores."""
    usual = {"samples": SCORE_SAMPLES, "seed": 0}
    return model.bundle.detects and all(options.get(k, v) == v for k, v in usual.items())


def _gives(model: Model, operation: str, options: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of what an operation gives.

    Raises:
        RefusedError: 422, maps are asked for, and there are none.
    """
    gives = OPERATIONS[operation].gives
    if operation != "score":
        return gives
    maps = bool(options.get("maps"))
    if _detects(model, options):
        return (*gives, *OF_ALARMS, *(["anomaly_map"] if maps else ()))
    if maps:
        reason = NO_MEASURE if not model.bundle.detects else "it is of the default draws only."
        raise RefusedError(422, f"map: {reason}", "map")
    return gives


def _apply(
    model: Model, operation: str, options: dict[str, int], rate: float | None, rows: np.ndarray
) -> Outputs:
    """Run the operation; return for each row whether its outputs are finite, then the outputs."""
    with np.errstate(all="ignore"):  # what is not finite is refused afterwards
        if operation == "score":
            outputs = _score(model, options, rate, rows)
        else:
            outputs = getattr(model.bundle, operation)(rows, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    finite = [np.isfinite(values).reshape(len(rows), -1).all(axis=1) for values in outputs]
    return np.logical_and.reduce(finite), *outputs


def _score(
    model: Model, options: dict[str, int], rate: float | None, rows: np.ndarray
) -> tuple[np.ndarray, ...]:
    maps = bool(options.get("maps"))
    if _detects(model, options):
        found = model.bundle.detect(rows, rate, maps)
        return tuple(values for values in found if values is not None)
    draws = {name: value for name, value in options.items() if name != "maps"}
    return (model.bundle.score(rows, **draws),)


def _named(
    model: Model, gives: tuple[str, ...], outputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    arrays = dict(zip(gives, outputs, strict=True))
    if "score" in arrays and model.bundle.manifest.score_quantiles:
        arrays["percentile"] = 100 * model.bundle.score_rank(arrays["score"])
    return arrays


def open_model(located: Located, settings: Settings) -> Model:
    """Load a model and run it once: the first run of a session allocates what later ones use again.

    Args:
        located: the bundle.
        settings: the threads of one run, and the rate of false alarms.

    Raises:
        BundleError: it is damaged, or gives numbers that are not finite.
        DataError: its anomaly measure cannot vouch for the rate.
    """
    model = Model.load(located, settings.threads)
    images = np.zeros((1, *model.bundle.image_shape), np.uint8)
    answers = [model.bundle.reconstruct(images), model.bundle.score(images)]
    if model.bundle.detects or settings.false_alarm_rate is not None:
        answers.append(model.bundle.detect(images, settings.false_alarm_rate).anomaly)
    if not all(np.isfinite(values).all() for values in answers):
        raise BundleError(f"{model.name}: its answers are not finite. Train it again.")
    return model
