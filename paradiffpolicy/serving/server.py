"""Serves a policy: openpi's protocol and pure requests on websockets; ``http`` has the rest of the port.

One event loop reads and writes, one thread plans (``batching``).  Everything that a client could make
grow is bounded: bytes per message, connections, requests that wait, and the time to send an answer;
``connection`` bounds the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from ..clock import Clock
from ..errors import InputError
from ..policy import Policy
from ..types import Plan
from .batching import Batcher
from .connection import BoundedConnection
from .http import HttpAnswers
from .messages import MessageError, pack, read
from .metrics import Metrics
from .protocol import Metadata, PlanFormat, error_map, job_of, kind_of
from .session import ClientSession, answer_map
from .settings import ServerSettings

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class PolicyServer:
    """Serves one policy.

    Start it with ``await start()``, end it with ``await stop()``; ``warm_up`` before makes the first
    answers as fast as the later ones.

    Args:
        policy: to serve.
        sampler: its sampler's name, for clients.
        settings: address and bounds.
        clock: measures the reported times.
    """

    def __init__(self, policy: Policy, sampler: str, settings: ServerSettings, clock: Clock) -> None:
        self._policy, self._settings, self._clock = policy, settings, clock
        self._metrics = Metrics(lambda: len(self._batcher), lambda: self._n_sessions)
        self._batcher = Batcher(policy, settings.max_batch, settings.max_queue, clock, self._on_batch)
        self._form = PlanFormat.of(policy)
        self._metadata = Metadata(self._form, sampler, settings.max_batch, settings.max_message)
        self._server: Server | None = None
        self._closable: set[ServerConnection] = set()
        self._stopping = False
        self._connections, self._told = 0, False

    @property
    def warm_up_sizes(self) -> int:
        """Times that ``warm_up`` calls ``on_size``."""
        return len(self._batcher.sizes)

    async def warm_up(self, on_size: Callable[[], object] = lambda: None) -> None:
        """Compiles the programs of every batch size, calling ``on_size`` after each."""
        await self._batcher.warm_up(on_size)

    async def start(self) -> None:
        """Starts to listen.

        Raises:
            InputError: the address or the certificate can't be used.
        """
        settings, tls = self._settings, self._settings.tls()
        try:
            self._server = await serve(
                self._connected,
                settings.host,
                settings.port,
                ssl=tls,
                ssl_handshake_timeout=settings.send_timeout if tls else None,
                process_request=HttpAnswers(settings, self._metrics, lambda: self._n_sessions),
                create_connection=functools.partial(  # type: ignore[arg-type]  # any callable will do
                    BoundedConnection, settings=settings, alive={}, on_cut=self._count_error
                ),
                compression=None,  # noise and float32 numbers don't get smaller
                max_size=settings.max_message,
                max_queue=1,  # messages read ahead of the one that is being answered
                open_timeout=settings.send_timeout,
                close_timeout=settings.send_timeout,
                logger=logging.Logger("websockets", logging.CRITICAL),  # clients' errors are in the metrics
            )
        except OSError as error:
            code = error.errno or 0
            reason = os.strerror(code) if code > 0 else error.strerror  # asyncio's tells the address again
            raise InputError(
                f"can't listen on {settings.host}:{settings.port} ({reason}): another port, as port=8001, or "
                "port=0 for any"
            )
        if settings.host not in LOOPBACK and (tls is None or settings.api_key is None):
            log.warning(
                "listening on %s without %s: every machine that reaches it can use the policy",
                settings.host,
                "TLS" if settings.api_key else "an API key",
            )

    @property
    def uri(self) -> str:
        """The address that clients connect to, once started."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        scheme = "ws" if self._settings.certificate is None else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Accepts no more requests, answers those received, closes all connections (1001: going away)."""
        self._stopping = True
        if self._server is not None:
            self._server.close(close_connections=False)
            await asyncio.gather(*map(self._go_away, list(self._closable)))
            await self._server.wait_closed()
        self._batcher.stop()

    @property
    def _n_sessions(self) -> int:
        # A connection counts from the moment that it was let in: nothing is awaited between.
        return 0 if self._server is None else len(self._server.connections)

    async def _connected(self, connection: ServerConnection) -> None:
        """Answers a connection's messages, one after the other."""
        assert isinstance(connection, BoundedConnection)
        self._connections += 1
        seed = np.random.SeedSequence([self._settings.seed, self._connections]).generate_state(1, np.uint64)
        session, previous_seconds = ClientSession(self._policy, int(seed[0] >> 1)), None
        try:
            await self._send(connection, pack(self._metadata.to_map()))
            while not self._stopping:
                with self._idle(connection):
                    message = await connection.recv()
                started = self._clock.now()
                spare = not connection.needed(self._policy.spec.control_hz)
                answer, good = await self._answer(session, message, previous_seconds, spare)
                await self._send(connection, answer)
                previous_seconds = self._clock.now() - started
                self._metrics.request.observe(previous_seconds)
                with self._idle(connection):
                    await connection.settle(message, error=not good)
            await self._go_away(connection)
        except ConnectionClosed:
            pass
        except TimeoutError:
            self._count_error("slow_client")
            connection.transport.abort()
        except Exception:
            log.exception("a connection failed")
            await connection.close(CloseCode.INTERNAL_ERROR)

    @contextlib.contextmanager
    def _idle(self, connection: ServerConnection) -> Iterator[None]:
        """Lets ``stop`` close a connection that has no request to answer."""
        self._closable.add(connection)
        try:
            yield
        finally:
            self._closable.discard(connection)

    async def _go_away(self, connection: ServerConnection) -> None:
        await connection.close(CloseCode.GOING_AWAY, "the server stops")

    async def _send(self, connection: ServerConnection, answer: bytes | str) -> None:
        async with asyncio.timeout(self._settings.send_timeout):
            await connection.send(answer)

    async def _answer(
        self, session: ClientSession, message: str | bytes, previous_seconds: float | None, spare: bool
    ) -> tuple[bytes | str, bool]:
        """Answers one message, and says whether it is a plan; an answer in text is an error."""
        try:
            if isinstance(message, str):
                raise MessageError("the message is text: send a packed map as a binary message")
            request, encode = read(message)
        except MessageError as error:
            self._metrics.requests.labels("unknown").inc()
            return self._failed(error)["message"], False
        pure = isinstance(request, dict) and "plan" in request
        self._metrics.requests.labels("plan" if pure else "session").inc()
        try:
            job = job_of(request, self._policy, self._settings.max_batch) if pure else session.job(request)
            result = await self._batcher.plan(job, spare=spare)
        except InputError as error:
            failed = self._failed(error)
            return pack(failed) if pure else failed["message"], False
        if not pure:
            session.remember(result.plan, result.states[0])
        answer: dict[str, Any] = {"generator": list(result.states)} if pure else {}
        if not isinstance(result.plan, Plan):
            failed = self._failed(result.plan)
            return pack(answer | failed) if pure else failed["message"], False
        plan = result.plan
        answer |= {"plan": self._form.plan_map(plan)} if pure else answer_map(plan, result.infer_seconds)
        timing = {"infer_ms": result.infer_seconds * 1e3, "queue_ms": result.queue_seconds * 1e3}
        if previous_seconds is not None:  # of the answer before, which was not known then
            timing["prev_total_ms"] = previous_seconds * 1e3
        if not pure and (ignored := session.ignored()):
            answer["ignored"] = ignored
            if not self._told:
                log.warning("clients send %s, which this policy doesn't use: ignored", ", ".join(ignored))
            self._told = True
        return pack(answer | {"server_timing": timing}, encode), True

    def _failed(self, error: Exception) -> dict[str, str]:
        self._count_error(kind_of(error))
        return error_map(error)

    def _count_error(self, kind: str) -> None:
        self._metrics.errors.labels(kind).inc()

    def _on_batch(self, size: int, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.inference.observe(seconds)
