"""Counts a server's requests, errors and times, in Prometheus' text format; a registry per server."""

from __future__ import annotations

from collections.abc import Callable

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
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "paradiffpolicy_requests", "Messages by what they ask for.", ["kind"], registry=registry
        )
        self.errors = Counter("paradiffpolicy_errors", "Error answers.", ["kind"], registry=registry)
        self.batch_size = Histogram(
            "paradiffpolicy_batch_size", "Robots planned for at once.", buckets=BATCHES, registry=registry
        )
        self.inference = Histogram(
            "paradiffpolicy_inference_seconds", "Planning a batch.", buckets=SECONDS, registry=registry
        )
        self.request = Histogram(
            "paradiffpolicy_request_seconds",
            "From a message's receipt until its answer was sent.",
            buckets=SECONDS,
            registry=registry,
        )
        queue = Gauge("paradiffpolicy_queue_length", "Requests that wait.", registry=registry)
        queue.set_function(queue_length)
        gauge = Gauge("paradiffpolicy_sessions", "Open connections.", registry=registry)
        gauge.set_function(sessions)
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """The present values in Prometheus' text format."""
        return generate_latest(self._registry)
