"""Counts a server's requests, errors and times, in Prometheus' text format; a registry per server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = tuple(m * 10.0**e for e in range(-4, 2) for m in (1, 2, 5))
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms, and gauges that are read on request.

    Args:
        queue_length: requests that wait.
        sessions: open connections.
    """

    def __init__(self, queue_length: Callable[[], float], sessions: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "paradiffpolicy", "registry": self._registry}
        self.requests = Counter("requests", "Messages by what they ask for.", ["kind"], **own)
        self.errors = Counter("errors", "Error answers.", ["kind"], **own)
        self.batch_size = Histogram("batch_size", "Robots planned for at once.", buckets=BATCHES, **own)
        self.inference = Histogram("inference_seconds", "Planning a batch.", buckets=SECONDS, **own)
        self.request = Histogram(
            "request_seconds", "From a message's receipt until its answer was sent.", buckets=SECONDS, **own
        )
        Gauge("queue_length", "Requests that wait.", **own).set_function(queue_length)
        Gauge("sessions", "Open connections.", **own).set_function(sessions)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The present values in Prometheus' text format."""
        return generate_latest(self._registry)
