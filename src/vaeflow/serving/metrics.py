"""What the server counts, for Prometheus.

Where several workers share a port, any of them is asked: each writes its counts into files that
all of them read, so that the answer is of all.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
    multiprocess,
)

from vaeflow.registry.model import Model

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def forget(process: int, folder: Path) -> None:
    """Drop a dead worker's gauges; its totals stay."""
    multiprocess.mark_process_dead(process, str(folder))


class Metrics:
    """Counters of a server."""

    def __init__(self) -> None:
        self._counts = counts = CollectorRegistry()
        self._requests = Counter(
            "vaeflow_requests", "Answered requests.", ["route", "status"], registry=counts
        )
        self._seconds = Histogram(
            "vaeflow_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=counts,
        )
        self._of: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._batch = Histogram(
            "vaeflow_batch_rows", "Rows run together.", buckets=ROWS, registry=counts
        )
        self._queue = Gauge(
            "vaeflow_queue_rows",
            "Rows that waited on when the last batch began.",
            multiprocess_mode="livesum",
            registry=counts,
        )
        self._refused = Counter(
            "vaeflow_refused_models", "New versions that were not taken.", registry=counts
        )
        self._own = CollectorRegistry()
        self._model = Info("vaeflow_model", "The model that answers this.", registry=self._own)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        key = route, status
        if key not in self._of:  # they are few, and Prometheus's own way to them is slow
            self._of[key] = self._requests.labels(route, str(status)), self._seconds.labels(route)
        count, duration = self._of[key]
        count.inc()
        duration.observe(seconds)

    def batch(self, rows: int, waiting: int) -> None:
        """Count a batch, and what it leaves in the queue."""
        self._batch.observe(rows)
        self._queue.set(waiting)

    def describe(self, model: Model) -> None:
        """Record which model answers from now on."""
        self._model.info(
            {
                "name": model.name,
                "version": model.version,
                "sha256": model.sha256,
                "data_md5": model.data_md5,
            }
        )

    def refused_model(self) -> None:
        """Count a version that was refused."""
        self._refused.inc()

    def text(self) -> bytes:
        """Write all metrics in Prometheus's text format."""
        counts = self._counts
        if SHARED in os.environ:
            counts = CollectorRegistry()
            multiprocess.MultiProcessCollector(counts)
        return generate_latest(counts) + generate_latest(self._own)
