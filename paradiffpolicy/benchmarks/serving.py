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
import itertools
import math
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from ..clock import Clock
from ..errors import InputError
from ..serving.messages import pack, unpack
from ..tables import quantiles, table, tail
from .timing import WARM_UPS

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
    """Reads the server's metrics that have no labels, by name."""
    with urllib.request.urlopen(uri.replace("ws", "http", 1) + "/metrics") as response:
        text = response.read().decode()
    families = text_string_to_metric_families(text)
    return {
        sample.name: sample.value for family in families for sample in family.samples if not sample.labels
    }


MEMORY = "process_resident_memory_bytes"
"""The metric of a server's memory."""

BATCHES = "paradiffpolicy_batch_size"


def requests_of(windows: Sequence[NDArray[Any]], first: int = 0) -> Iterator[bytes]:
    """Encodes requests for plans from windows ``[To, O]`` in turn, for ever."""
    messages = [pack({"observation": np.asarray(window, np.float32)}) for window in windows]
    return itertools.islice(itertools.cycle(messages), first, None)


Trip = tuple[float, float, float]
"""Milliseconds of a request: round trip, inference, queue."""


def trip(seconds: float, answer: bytes) -> Trip:
    """Reads an answer that came after ``seconds``."""
    timing = unpack(answer)["server_timing"]
    return seconds * 1e3, timing["infer_ms"], timing["queue_ms"]


@dataclass
class Answers:
    """Answers that clients got, and those that were errors."""

    trips: list[Trip] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


async def ask(
    uri: str, messages: Iterable[bytes], clock: Clock, due: float, end: float, period: float, got: Answers
) -> None:
    """Sends requests from the moment ``due`` until ``end``, one every ``period`` seconds, but none before
    the last is answered."""
    try:
        async with connect(uri, compression=None, proxy=None) as connection:
            await connection.recv()
            for message in messages:
                if max(due, clock.now()) >= end:
                    break
                if period:
                    await asyncio.sleep(max(0.0, due - clock.now()))
                    due += period
                sent = clock.now()
                await connection.send(message)
                answer = await connection.recv()
                seconds = clock.now() - sent
                if isinstance(answer, str):
                    got.errors.append(answer)
                else:
                    got.trips.append(trip(seconds, answer))
    except (OSError, WebSocketException) as error:
        got.errors.append(f"{type(error).__name__}: {error}")


def one_client(
    uri: str,
    windows: Sequence[NDArray[Any]],
    requests: int,
    clock: Clock,
    on_request: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Sends requests one after the other, each as soon as the last is answered.

    Args:
        windows: ``[To, O]``, sent in turn.

    Returns:
        ``requests``, and ``quantiles`` of milliseconds: ``round_trip_ms``, ``inference_ms`` and
        ``between_ms``, round trip minus inference, request by request.
    """

    def messages() -> Iterator[bytes]:
        for k, message in zip(range(-WARM_UPS, requests), requests_of(windows), strict=False):
            yield message
            if k >= 0:
                on_request()

    got = Answers()
    asyncio.run(ask(uri, messages(), clock, clock.now(), math.inf, 0.0, got))
    if got.errors:
        raise InputError(got.errors[0])
    total, inference, _ = np.transpose(got.trips[WARM_UPS:])
    times = {"round_trip_ms": total, "inference_ms": inference, "between_ms": total - inference}
    return {"requests": requests, **{name: quantiles(values) for name, values in times.items()}}


async def watched(
    asking: Sequence[Coroutine[Any, Any, None]],
    uri: str,
    seconds: float,
    clock: Clock,
    on_seconds: Callable[[float], object],
) -> float | None:
    """Runs clients; returns the server's memory after a tenth of the time, in bytes, if the system tells."""

    async def watch() -> float | None:
        early, started = None, clock.now()
        last = started
        while (now := clock.now()) < started + seconds:
            if early is None and now >= started + seconds / 10:
                early = (await asyncio.to_thread(measured, uri)).get(MEMORY)
            on_seconds(round(now - last, 3))
            last = now
            await asyncio.sleep(min(1.0, seconds / 10))
        return early

    early, *_ = await asyncio.gather(watch(), *asking)
    return early


def many_clients(
    uri: str,
    windows: Sequence[NDArray[Any]],
    clients: int,
    rate_hz: float | None,
    clock: Clock,
    seconds: float,
    on_seconds: Callable[[float], object] = lambda amount: None,
) -> dict[str, Any]:
    """Sends requests from many clients for ``seconds``.

    Args:
        windows: ``[To, O]``, sent in turn.
        rate_hz: requests per second of each; None: each as soon as its last is answered.

    Returns:
        ``clients``, ``seconds``, ``rate_hz``, ``answers``, ``errors``, ``per_second``; ``quantiles`` of
        milliseconds: ``round_trip_ms``, ``inference_ms`` and ``queue_ms``; ``batch``, robots planned for at
        once, mean; ``memory`` and ``growth``, the server's MiB at the end, and their difference to the
        first tenth's end; None where the system doesn't tell.

    Raises:
        InputError: there was no answer.
    """
    before, got, started = measured(uri), Answers(), clock.now()
    end, period = started + seconds, 1 / rate_hz if rate_hz else 0.0
    asking = [
        ask(uri, requests_of(windows, k), clock, started + period * k / clients, end, period, got)
        for k in range(clients)
    ]
    early = asyncio.run(watched(asking, uri, seconds, clock, on_seconds))
    elapsed, after = clock.now() - started, measured(uri)
    if not got.trips:
        raise InputError(
            f"no answer in {seconds:g} s, but {len(got.errors)} errors: more seconds, or fewer clients"
        )
    batches, robots = (after[name] - before[name] for name in (f"{BATCHES}_count", f"{BATCHES}_sum"))
    late, answers = after.get(MEMORY), len(got.trips)
    times = dict(zip(("round_trip_ms", "inference_ms", "queue_ms"), np.transpose(got.trips), strict=True))
    return {
        "clients": clients,
        "seconds": elapsed,
        "rate_hz": rate_hz,
        "answers": answers,
        "errors": len(got.errors),
        "per_second": answers / elapsed,
        **{name: quantiles(values) for name, values in times.items()},
        "batch": robots / batches,
        "memory": None if late is None else late / 2**20,
        "growth": None if late is None or early is None else (late - early) / 2**20,
    }


def alone_table(alone: Mapping[str, Any], title: str) -> Table:
    """Tabulates the results of one client."""
    names = {
        "round trip": "round_trip_ms",
        "inference": "inference_ms",
        "round trip - inference": "between_ms",
    }
    rows = [{"": shown, "ms": tail(alone[name], 2)} for shown, name in names.items()]
    return table(f"{title}: one client, {alone['requests']} requests", rows)


def crowd_table(crowds: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Tabulates the results of many clients, in named situations."""
    rows = [
        {
            "": name,
            "seconds": f"{crowd['seconds']:.0f}",
            "answers": crowd["answers"],
            "per second": f"{crowd['per_second']:.1f}",
            "errors": crowd["errors"],
            "batch": f"{crowd['batch']:.1f}",
            "round trip, ms": tail(crowd["round_trip_ms"]),
            "inference\nms p50": f"{crowd['inference_ms']['p50']:.1f}",
            "queue\nms p50": f"{crowd['queue_ms']['p50']:.1f}",
            "server\nMB": "?" if crowd["memory"] is None else f"{crowd['memory']:.0f}",
            "grown by\nMB": "?" if crowd["growth"] is None else f"{crowd['growth']:+.1f}",
        }
        for name, crowd in crowds.items()
    ]
    crowd = next(iter(crowds.values()))
    rate = "as fast as answers come" if crowd["rate_hz"] is None else f"{crowd['rate_hz']:g} Hz each"
    return table(f"{title}: {crowd['clients']} clients, {rate}", rows)
