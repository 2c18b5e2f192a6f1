r"""How long a plan takes over the network, and how many a server makes.

A round trip is a client's time from sending a request to having its answer; the server says how long
the policy itself took.  What is between is the network, two encodings and the server's loop:

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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table
from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import connect

from ..clock import Clock
from ..errors import InputError
from ..serving.messages import pack, unpack
from .timing import WARM_UPS, percentiles


@contextlib.contextmanager
def served(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """A server's address while it runs in a process of its own; ended by SIGTERM.

    Args:
        command: prints a line that ends in the address once it listens.
        environment: of the process.

    Raises:
        InputError: it ended before it listened, or with an error.
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
    """The server's metrics by name, summed over labels."""
    with urllib.request.urlopen(uri.replace("ws", "http", 1) + "/metrics") as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def observation(windows: Sequence[NDArray[Any]], k: int) -> bytes:
    """The k-th request; they go round."""
    return pack({"observation": np.asarray(windows[k % len(windows)], np.float32)})


@dataclass(frozen=True)
class Alone:
    """One client by itself; times in milliseconds.

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
    """Requests one after the other, each as soon as the last is answered.

    Args:
        windows: ``[To, O]``, sent in turn.
    """
    trips, inferences = [], []
    with connect(uri, compression=None, proxy=None) as connection:
        connection.recv()  # the metadata
        for k in range(-WARM_UPS, requests):
            message = observation(windows, k)
            begun = clock.now()
            connection.send(message)
            answer = connection.recv()
            seconds = clock.now() - begun
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
    """Many clients side by side; times in milliseconds.

    Attributes:
        answers, errors: how many of each there were.
        per_second: answers.
        batch: robots planned for at once, mean.
        memory, growth: megabytes of the server at the end, and by how much more than after the first
            tenth; None where the system doesn't tell.
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


def many_clients(
    uri: str,
    windows: Sequence[NDArray[Any]],
    clients: int,
    seconds: float,
    rate_hz: float | None,
    clock: Clock,
    on_seconds: Callable[[float], object] = lambda amount: None,
) -> Crowd:
    """Clients that all ask for ``seconds``.

    Args:
        windows: ``[To, O]``, sent in turn.
        rate_hz: requests per second of each; None: each as soon as its last is answered.
    """
    trips: list[tuple[float, float, float]] = []
    errors, before = 0, measured(uri)
    begun = clock.now()

    async def client(number: int) -> None:
        nonlocal errors
        async with connect_async(uri, compression=None, proxy=None) as connection:
            await connection.recv()
            asked, due = number, begun + (0.0 if rate_hz is None else number / clients / rate_hz)
            while max(due, clock.now()) < begun + seconds:
                if rate_hz is not None:
                    await asyncio.sleep(max(0.0, due - clock.now()))
                    due += 1 / rate_hz
                message = observation(windows, asked)
                sent = clock.now()
                await connection.send(message)
                answer = await connection.recv()
                trip = (clock.now() - sent) * 1e3
                asked += 1
                if isinstance(answer, str):
                    errors += 1
                    continue
                timing = unpack(answer)["server_timing"]
                trips.append((trip, timing["infer_ms"], timing["queue_ms"]))

    async def resident_early() -> float | None:
        await asyncio.sleep(seconds / 10)
        values = await asyncio.to_thread(measured, uri)
        return values.get("process_resident_memory_bytes")

    async def shown() -> None:
        last = begun
        while (now := clock.now()) < begun + seconds:
            on_seconds(round(now - last, 1))
            last = now
            await asyncio.sleep(min(1.0, seconds / 10))

    async def all_together() -> float | None:
        early, *_ = await asyncio.gather(resident_early(), shown(), *map(client, range(clients)))
        return early

    early = asyncio.run(all_together())
    elapsed, after = clock.now() - begun, measured(uri)
    if not trips:
        raise InputError(f"no answer in {seconds:g} s, but {errors} errors: more seconds, or fewer clients")
    batches = after["paradiffpolicy_batch_size_count"] - before["paradiffpolicy_batch_size_count"]
    robots = after["paradiffpolicy_batch_size_sum"] - before["paradiffpolicy_batch_size_sum"]
    late = after.get("process_resident_memory_bytes")
    trip, inference, queue = (percentiles(values, 50, 99) for values in zip(*trips, strict=True))
    return Crowd(
        clients,
        elapsed,
        rate_hz,
        answers=len(trips),
        errors=errors,
        per_second=len(trips) / elapsed,
        round_trip_p50=trip[0],
        round_trip_p99=trip[1],
        inference_p50=inference[0],
        inference_p99=inference[1],
        queue_p50=queue[0],
        queue_p99=queue[1],
        batch=robots / batches,
        memory=None if late is None else late / 2**20,
        growth=None if late is None or early is None else (late - early) / 2**20,
    )


def alone_table(alone: Alone, title: str) -> Table:
    view = Table(title=f"{title}: one client, {alone.requests} requests", title_justify="left")
    for heading in ("", "ms p50", "ms p99"):
        view.add_column(heading, justify="right" if heading else "left")
    view.add_row("round trip", f"{alone.round_trip_p50:.2f}", f"{alone.round_trip_p99:.2f}")
    view.add_row("inference", f"{alone.inference_p50:.2f}", f"{alone.inference_p99:.2f}")
    view.add_row("round trip - inference", f"{alone.between_p50:.2f}", f"{alone.between_p99:.2f}")
    return view


def crowd_table(crowd: Crowd, title: str) -> Table:
    rate = "as fast as answers come" if crowd.rate_hz is None else f"{crowd.rate_hz:g} Hz each"
    view = Table(
        title=f"{title}: {crowd.clients} clients, {rate}, {crowd.seconds:.0f} s", title_justify="left"
    )
    headings = ("answers", "per second", "errors", "batch", "round trip\nms p50", "p99", "inference\nms p50")
    for heading in (*headings, "queue\nms p50", "server\nMB", "grown by\nMB"):
        view.add_column(heading, justify="right")
    view.add_row(
        str(crowd.answers),
        f"{crowd.per_second:.1f}",
        str(crowd.errors),
        f"{crowd.batch:.1f}",
        f"{crowd.round_trip_p50:.1f}",
        f"{crowd.round_trip_p99:.1f}",
        f"{crowd.inference_p50:.1f}",
        f"{crowd.queue_p50:.1f}",
        "?" if crowd.memory is None else f"{crowd.memory:.0f}",
        "?" if crowd.growth is None else f"{crowd.growth:+.1f}",
    )
    return view
