"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from vaeflow.serving.served import Served

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server process.

    Args:
        waiting: asked for the rows in the queue whenever the metrics are read.
    """

    def __init__(self, waiting: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._of: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._requests = Counter(
            "vaeflow_requests", "Answered requests.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "vaeflow_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "vaeflow_batch_rows", "Rows run together.", buckets=ROWS, registry=self._registry
        )
        queue = Gauge("vaeflow_queue_rows", "Rows that wait.", registry=self._registry)
        queue.set_function(waiting)
        self._model = Info("vaeflow_model", "The model that answers.", registry=self._registry)
        self._refused = Counter(
            "vaeflow_refused_models",
            "New versions that were not taken.",
            registry=self._registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        key = route, status
        if key not in self._of:  # they are few, and Prometheus's own way to them is slow
            self._of[key] = self._requests.labels(route, str(status)), self._seconds.labels(route)
        count, duration = self._of[key]
        count.inc()
        duration.observe(seconds)

    def batch(self, rows: int) -> None:
        """Count a batch."""
        self._batch.observe(rows)

    def model(self, served: Served) -> None:
        """Say which model answers from now on."""
        self._model.info(
            {
                "name": served.name,
                "version": served.version,
                "sha256": served.sha256,
                "data_md5": served.data_md5,
            }
        )

    def refused_model(self) -> None:
        """Count a version that was found bad."""
        self._refused.inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
