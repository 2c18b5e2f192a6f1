"""Plans on a server, as a policy that is used like a local one.

A request carries all that a plan depends on (``protocol``), so the plan is the local one bit for
bit, a lost connection loses nothing, and a request may be sent again.
"""

from __future__ import annotations

import random
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from ..clock import Clock, MonotonicClock
from ..errors import InputError, require_positive
from ..files import Closing
from ..observation import Observation, observation_window
from ..sampling.noise import Seed, generators_for
from ..types import Committed, Plan, PolicySpec, check_arguments
from .messages import MessageError, pack, unpack
from .protocol import (
    BusyError,
    Metadata,
    ServerError,
    checked_map,
    generator_at,
    raise_error,
    request_map,
    state_of,
    window_map,
)

RETRY_STATUSES = (502, 503, 504)
"""HTTP statuses that ask for another try later."""

Lost = (OSError, ConnectionClosed, TimeoutError)
"""Errors of a connection that may come back."""


class RemotePolicy(Closing):
    """Plans on a ``PolicyServer``; a context manager that closes the connection.

    A connection that is lost, or a server that is busy, is tried again, at first after
    ``first_delay`` seconds, then after twice as long and so on up to ``max_delay``.

    Args:
        uri: ``ws://HOST:PORT``, or ``wss://…`` for TLS.
        api_key: the key that the server requires.
        certificate: PEM file of the authority that signed the server's; None: the system's.
        timeout: seconds after which a request is given up, retries included.
        first_delay, max_delay: seconds between tries.
        max_message: bytes of an answer.
        clock: for the timeout and the delays.

    Raises:
        ServerError: no server, or another kind of server, answers within the timeout.
        InputError: the arguments, or the API key, are wrong.
    """

    def __init__(
        self,
        uri: str,
        api_key: str | None = None,
        *,
        certificate: str | Path | None = None,
        timeout: float = 10.0,
        first_delay: float = 0.05,
        max_delay: float = 1.0,
        max_message: int = 2**26,
        clock: Clock | None = None,
    ) -> None:
        require_positive(timeout=timeout, first_delay=first_delay, max_delay=max_delay)
        self._uri, self._max_message = uri, max_message
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._tls = _tls(uri, certificate)
        self._timeout, self._delays = timeout, (first_delay, max_delay)
        self._clock = MonotonicClock() if clock is None else clock
        self._connection: ClientConnection | None = None
        self._open = ExitStack()
        self._one_at_a_time = threading.Lock()
        self.metadata: Metadata  # the first connection's, which all others must match
        self._exchange(None)

    @property
    def spec(self) -> PolicySpec:
        """The served policy's shapes."""
        return self.metadata.form.spec

    def close(self) -> None:
        """Closes the connection; the next plan would open another."""
        self._connection = None
        self._open.close()

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> RemotePolicy:
        """Makes a plan of the batch size and one that continues it, and discards both; returns the policy."""
        spec = self.spec
        window = np.zeros((batch, spec.n_obs_steps), spec.observation_dtype)
        actions = torch.zeros(batch, spec.horizon, spec.action_dim)
        kept = Committed(actions, torch.zeros(actions.shape[:2])) if committed else None
        first = self.plan(window, committed=kept)
        self.plan(window, first, committed=kept)
        return self

    def plan(
        self,
        observation: Observation,
        previous: Plan | None = None,
        *,
        generator: Seed | Sequence[Seed] = 0,
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan:
        """Samples a plan as ``Policy.plan`` does, on the server; its tensors are on the CPU.

        Raises:
            InvalidObservationError, InvalidPlanError, InputError: as ``Policy.plan`` does.
            ServerError: the server couldn't be reached within the timeout, or failed.
        """
        window = observation_window(self.spec, observation)
        generators = generators_for(generator, len(window), "observation windows")
        executed = check_arguments(self.spec, len(window), previous, executed_steps, committed)
        if any(each.device.type != "cpu" for each in generators):
            raise InputError("a remote policy's generators must be on the CPU: torch.Generator()")
        form, most = self.metadata.form, self.metadata.max_message
        message = pack(
            request_map(
                window_map(window),
                None if previous is None else form.plan_map(previous),
                [state_of(each) for each in generators],
                executed_steps=executed,
                committed=None if committed is None else form.committed_map(committed),
            )
        )
        if len(message) > most:
            raise InputError(
                f"the request has {len(message)} bytes, over the server's max_message={most}: start the "
                "server with a larger one, or split the batch"
            )
        answer = self._exchange(message)
        for each, state in zip(generators, answer.get("generator", ()), strict=False):
            each.set_state(generator_at(state).get_state())
        raise_error(answer)
        answer = checked_map(answer, "the server's answer", ["plan", "generator"], ["server_timing"])
        return form.plan_of(answer["plan"], "the server's plan", len(generators))

    # ------------------------------------------------------------------------------------ connection

    def _exchange(self, message: bytes | None) -> dict[str, Any]:
        """The answer to a message, over as many connections and tries as the timeout has room for; for
        None, there only is a connection."""
        with self._one_at_a_time:
            deadline = self._clock.now() + self._timeout
            delay, longest = self._delays
            while True:
                try:
                    return self._try(message, deadline)
                except (*Lost, BusyError) as error:
                    now = self._clock.now()
                    if now + delay >= deadline:
                        raise _given_up(self._uri, self._timeout, error)
                    # Not all clients of a server that comes back should ask in the same moment.
                    self._clock.sleep_until(now + delay * random.uniform(0.5, 1.0))
                    delay = min(2 * delay, longest)

    def _try(self, message: bytes | None, deadline: float) -> dict[str, Any]:
        if self._connection is None:
            self._connection = self._connected(deadline)
        if message is None:
            return {}
        try:
            self._connection.send(message)
            answer = self._connection.recv(timeout=max(0.0, deadline - self._clock.now()))
        except BaseException:  # also an interrupt: the answer that is still to come is of no use
            self._drop()
            raise
        if isinstance(answer, str):
            raise InputError(answer)
        unpacked = unpack(answer)
        if not isinstance(unpacked, dict):
            raise MessageError("the server's answer isn't a map: install the same version at both ends")
        if unpacked.get("error") == "busy":
            raise BusyError(str(unpacked.get("message")))
        return unpacked

    def _connected(self, deadline: float) -> ClientConnection:
        remaining = max(0.01, deadline - self._clock.now())
        try:
            connecting = connect(
                self._uri,
                ssl=self._tls,
                additional_headers=self._headers,
                compression=None,
                proxy=None,  # a robot reaches its server directly
                open_timeout=remaining,
                close_timeout=1.0,
                max_size=self._max_message,
            )
            connection = self._open.enter_context(connecting)
        except InvalidStatus as error:
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace")
            if status in RETRY_STATUSES:
                raise ConnectionError(body.strip() or f"status {status}")
            raise ServerError(f"{self._uri} answers with status {status}: {body.strip()}")
        except ssl.SSLCertVerificationError as error:
            raise ServerError(
                f"{self._uri} shows a certificate that isn't trusted ({error.verify_message}): name its "
                "authority's file as certificate"
            )
        except InvalidURI:
            raise InputError(f"uri={self._uri} must be ws://HOST:PORT or wss://HOST:PORT")
        except InvalidHandshake as error:
            raise ServerError(f"{self._uri} isn't a policy server ({error}): check the address")
        try:
            metadata = Metadata.of_map(unpack(connection.recv(timeout=remaining, decode=False)))
            if getattr(self, "metadata", metadata).form != metadata.form:
                raise ServerError(f"{self._uri} serves another policy or sampler now: connect anew")
        except BaseException:
            self._open.close()
            raise
        self.metadata = metadata
        return connection

    def _drop(self) -> None:
        """Ends a connection without waiting for the other end."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.socket.shutdown(socket.SHUT_RDWR)
        self.close()


def _given_up(uri: str, timeout: float, error: BaseException) -> ServerError:
    if isinstance(error, BusyError):
        return ServerError(f"the policy server at {uri} was busy for {timeout:g} s: {error}")
    reason = str(error) or type(error).__name__
    return ServerError(
        f"no answer from {uri} within {timeout:g} s ({reason}): is the server running? "
        "'paradiffpolicy serve' starts one"
    )


def _tls(uri: str, certificate: str | Path | None) -> ssl.SSLContext | None:
    if not uri.startswith("wss://"):
        if certificate is not None:
            raise InputError(f"uri={uri} has no TLS, so certificate={certificate} has no use: wss://…")
        return None
    try:
        return ssl.create_default_context(cafile=None if certificate is None else str(certificate))
    except (ssl.SSLError, OSError) as error:
        raise InputError(f"certificate={certificate} can't be used ({error}): name a PEM file")
