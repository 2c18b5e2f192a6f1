"""Measures latency and throughput of plans over the network.

A round trip is a client's time from sending a request to having its answer; the answer says how long
the policy itself took.  The time between is the network's, two encodings' and the server's loop's:

    round trip = queue + inference + between

Clients speak openpi's protocol and send whole observation windows.  The server is another process,
so that clients don't share an interpreter with it; on a small machine they do share its cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import connect

from ..clock import Clock
from ..errors import InputError
from ..serving.messages import pack, unpack
from ..tables import table
from .timing import WARM_UPS, percentiles

if TYPE_CHECKING:
    from rich.table import Table


@contextlib.contextmanager
def served(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Runs a server in a process of its own, and yields its address; SIGTERM ends it.

    Args:
        command: prints a line that ends in the address once it listens.
        environment: of the process.

    Raises:
        InputError: the server ended before it listened, or with an error.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(environment)) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"listening on (\S+)", process.stdout.readline())
            if found is None:
                raise InputError("the server ended before it listened: its own message is above")
            yield found.group(1)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code:
        raise InputError(f"the server ended with code {code}: its own message is above")


def measured(uri: str) -> dict[str, float]:
    """Reads the server's metrics by name, summed over labels."""
    with urllib.request.urlopen(uri.replace("ws", "http", 1) + "/metrics") as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def observation(windows: Sequence[NDArray[Any]], k: int) -> bytes:
    """Encodes the k-th request; windows are sent in turn."""
    return pack({"observation": np.asarray(windows[k % len(windows)], np.float32)})


@dataclass(frozen=True)
class Alone:
    """Results of one client by itself; times in ms.

    Attributes:
        between_p50, between_p99: of round trip minus inference, request by request.
    """

    requests: int
    round_trip_p50: float
    round_trip_p99: float
    inference_p50: float
    inference_p99: float
    between_p50: float
    between_p99: float


def one_client(
    uri: str,
    windows: Sequence[NDArray[Any]],
    requests: int,
    clock: Clock,
    on_request: Callable[[], object] = lambda: None,
) -> Alone:
    """Sends requests one after the other, each as soon as the last is answered.

    Args:
        windows: ``[To, O]``, sent in turn.
    """
    trips, inferences = [], []
    with connect(uri, compression=None, proxy=None) as connection:
        connection.recv()  # the metadata
        for k in range(-WARM_UPS, requests):
            message = observation(windows, k)
            sent = clock.now()
            connection.send(message)
            answer = connection.recv()
            seconds = clock.now() - sent
            if isinstance(answer, str):
                raise InputError(answer)
            if k >= 0:
                trips.append(seconds * 1e3)
                inferences.append(unpack(answer)["server_timing"]["infer_ms"])
                on_request()
    between = np.subtract(trips, inferences)
    columns = [percentiles(values, 50, 99) for values in (trips, inferences, between)]
    return Alone(requests, *(value for column in columns for value in column))


@dataclass(frozen=True)
class Crowd:
    """Results of many clients side by side; times in ms.

    Attributes:
        answers, errors: their numbers.
        per_second: answers per second.
        batch: robots planned for at once, mean.
        memory, growth: MiB of the server at the end, and the difference to the first tenth's end; None
            where the system doesn't tell.
    """

    clients: int
    seconds: float
    rate_hz: float | None
    answers: int
    errors: int
    per_second: float
    round_trip_p50: float
    round_trip_p99: float
    inference_p50: float
    inference_p99: float
    queue_p50: float
    queue_p99: float
    batch: float
    memory: float | None
    growth: float | None


class _Clients:
    """Clients that send requests until a moment, and what they measured.

    Attributes:
        trips: per answer, round trip, inference and queue in ms.
        errors: answers that are errors.
    """

    def __init__(self, uri: str, windows: Sequence[NDArray[Any]], clock: Clock, seconds: float) -> None:
        self.uri, self.windows, self.clock, self.seconds = uri, windows, clock, seconds
        self.started, self.trips, self.errors = clock.now(), list[tuple[float, float, float]](), 0

    async def run(
        self, clients: int, rate_hz: float | None, on_seconds: Callable[[float], object]
    ) -> float | None:
        """Runs the clients; returns the server's bytes of memory after a tenth of the time."""
        period = None if rate_hz is None else 1 / rate_hz
        asking = (self._client(number, number / clients, period) for number in range(clients))
        early, *_ = await asyncio.gather(self._early_memory(), self._progress(on_seconds), *asking)
        return early

    async def _client(self, number: int, phase: float, period: float | None) -> None:
        clock, end = self.clock, self.started + self.seconds
        async with connect_async(self.uri, compression=None, proxy=None) as connection:
            await connection.recv()
            asked, due = number, self.started + phase * (period or 0.0)
            while max(due, clock.now()) < end:
                if period is not None:
                    await asyncio.sleep(max(0.0, due - clock.now()))
                    due += period
                message = observation(self.windows, asked)
                sent = clock.now()
                await connection.send(message)
                answer = await connection.recv()
                trip = (clock.now() - sent) * 1e3
                asked += 1
                if isinstance(answer, str):
                    self.errors += 1
                    continue
                timing = unpack(answer)["server_timing"]
                self.trips.append((trip, timing["infer_ms"], timing["queue_ms"]))

    async def _early_memory(self) -> float | None:
        await asyncio.sleep(self.seconds / 10)
        return (await asyncio.to_thread(measured, self.uri)).get(MEMORY)

    async def _progress(self, on_seconds: Callable[[float], object]) -> None:
        last = self.started
        while (now := self.clock.now()) < self.started + self.seconds:
            on_seconds(round(now - last, 1))
            last = now
            await asyncio.sleep(min(1.0, self.seconds / 10))


MEMORY = "process_resident_memory_bytes"
"""The metric of a server's memory."""


def many_clients(
    uri: str,
    windows: Sequence[NDArray[Any]],
    clients: int,
    seconds: float,
    rate_hz: float | None,
    clock: Clock,
    on_seconds: Callable[[float], object] = lambda amount: None,
) -> Crowd:
    """Sends requests from many clients for ``seconds``.

    Args:
        windows: ``[To, O]``, sent in turn.
        rate_hz: requests per second of each; None: each as soon as its last is answered.

    Raises:
        InputError: there was no answer.
    """
    before, load = measured(uri), _Clients(uri, windows, clock, seconds)
    early = asyncio.run(load.run(clients, rate_hz, on_seconds))
    elapsed, after = clock.now() - load.started, measured(uri)
    if not load.trips:
        raise InputError(
            f"no answer in {seconds:g} s, but {load.errors} errors: more seconds, or fewer clients"
        )
    batches, robots = (
        after[name] - before[name]
        for name in ("paradiffpolicy_batch_size_count", "paradiffpolicy_batch_size_sum")
    )
    late = after.get(MEMORY)
    numbers: list[Any] = [
        *(
            percentile
            for values in zip(*load.trips, strict=True)
            for percentile in percentiles(values, 50, 99)
        ),
        robots / batches,
        None if late is None else late / 2**20,
        None if late is None or early is None else (late - early) / 2**20,
    ]
    n_answers = len(load.trips)
    return Crowd(clients, elapsed, rate_hz, n_answers, load.errors, n_answers / elapsed, *numbers)


def alone_table(alone: Alone, title: str) -> Table:
    """Tabulates the results of one client."""
    rows = [
        ("round trip", alone.round_trip_p50, alone.round_trip_p99),
        ("inference", alone.inference_p50, alone.inference_p99),
        ("round trip - inference", alone.between_p50, alone.between_p99),
    ]
    shown = [{"": name, "ms p50": f"{p50:.2f}", "ms p99": f"{p99:.2f}"} for name, p50, p99 in rows]
    return table(f"{title}: one client, {alone.requests} requests", shown)


def crowd_table(crowd: Crowd, title: str) -> Table:
    """Tabulates the results of many clients."""
    rate = "as fast as answers come" if crowd.rate_hz is None else f"{crowd.rate_hz:g} Hz each"
    row = {
        "answers": str(crowd.answers),
        "per second": f"{crowd.per_second:.1f}",
        "errors": str(crowd.errors),
        "batch": f"{crowd.batch:.1f}",
        "round trip\nms p50": f"{crowd.round_trip_p50:.1f}",
        "p99": f"{crowd.round_trip_p99:.1f}",
        "inference\nms p50": f"{crowd.inference_p50:.1f}",
        "queue\nms p50": f"{crowd.queue_p50:.1f}",
        "server\nMB": "?" if crowd.memory is None else f"{crowd.memory:.0f}",
        "grown by\nMB": "?" if crowd.growth is None else f"{crowd.growth:+.1f}",
    }
    title = f"{title}: {crowd.clients} clients, {rate}, {crowd.seconds:.0f} s"
    return table(title, [row])
