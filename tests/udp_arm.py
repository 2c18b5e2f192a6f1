"""A robot behind a UDP socket that isn't there: any gymnasium environment, in the clock's time.

A bad network is simulated too: datagrams that come late, in another order or not at all, in both directions,
and an arm that holds still by itself when no commands come.  By hand, until Ctrl-C::

    env = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")
    with SimulatedArm(env, 0, MonotonicClock(), generator=default_rng(0), address=("0.0.0.0", 5005)) as arm:
        arm.run()
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import itertools
import math
import selectors
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np

from paradiffpolicy.clock import Clock, VirtualClock
from paradiffpolicy.errors import InputError, require_positive
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.robots.packets import Kind, Packet, PacketError, require_form, require_room, unpack
from paradiffpolicy.robots.udp import Address, Link

Event = tuple[float, int, Callable[[], None]]
"""Moment, order among events of one moment, and effect."""


class SimulatedArm:
    """Sends an observation every control period to the client that said hello last, and does what that
    client commands.  A new client is sent one at once, and the arm holds still until it commands.

    Every event has its own moment and order, whenever ``pump`` is called; so a run under a
    virtual clock is the same however often that is.  A command counts for the whole control period in
    which it arrives (see ``EnvRobot``).

    Args:
        env: with ``control_hz``, ``hold_action`` and box actions; observations must be vectors.  It
            stays the caller's: ``close`` leaves it open.
        seed: of its reset, which is now.
        clock: whose seconds count.
        generator: which datagrams are lost, and how late the others are.
        address: to wait at; port 0: any that is free, see the attribute.
        delay, jitter: a datagram takes ``delay`` to ``delay + jitter`` seconds, uniformly; so jitter
            lets them overtake each other.
        loss: the probability that it doesn't arrive.
        watchdog: seconds without a command after which the arm holds still by itself.
        ahead: seconds by which its own clock, in its packets, is ahead.
        answers: whether it answers hellos.
        session: see ``Link``.

    Attributes:
        address: where it waits.
        robot: the environment, in time: its ``score``, ``success`` and ``finished``.
        traffic: counts of the socket.
        delay, jitter, loss: as above; may be changed at any time.
        dropped: datagrams that the simulated network lost, in both directions.
        commands, stops: those that were taken.
        holds: how often the watchdog stopped it.
        fallback_active: it holds still, and waits for a command.

    Raises:
        InputError: the environment isn't such a one, a setting is out of range, or the address is taken.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        seed: int,
        clock: Clock,
        *,
        generator: np.random.Generator,
        address: Address = ("127.0.0.1", 0),
        delay: float = 0.0,
        jitter: float = 0.0,
        loss: float = 0.0,
        watchdog: float = 0.5,
        ahead: float = 0.0,
        answers: bool = True,
        session: int | None = None,
    ) -> None:
        require_positive(watchdog=watchdog)
        for name, seconds in {"delay": delay, "jitter": jitter}.items():
            if not 0 <= seconds < math.inf:
                raise InputError(f"{name}={seconds} must be seconds, 0 or more")
        if not 0 <= loss <= 1:
            raise InputError(f"{loss=} must be a probability, 0 to 1")
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"the environment's actions are {space}: they must be a vector")
        for name in ("control_hz", "hold_action"):
            # Not hasattr: before a reset there may be nothing to hold.
            if inspect.getattr_static(env.unwrapped, name, None) is None:
                raise InputError(f"the environment {env} must have {name}")
        self._clock, self._draw = clock, generator
        # The world's own time goes from event to event.
        self._world = VirtualClock(clock.now())
        self.robot = EnvRobot(env, seed, self._world)
        observed = np.shape(self.robot.observe())
        if len(observed) != 1:
            raise InputError(f"the environment's observations are {observed}: they must be a vector")
        (self._action_dim,) = space.shape
        self._low, self._high = space.low, space.high
        require_room(obs_dim=observed[0], action_dim=self._action_dim)
        self._link = Link(local=address, session=session)
        self.address, self.traffic = self._link.address, self._link.traffic
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.ahead, self.answers = ahead, answers
        self.dropped = self.commands = self.stops = self.holds = 0
        self.fallback_active = True
        self._client: Address | None = None
        self._begun, self._periods = clock.now(), 0
        self._watchdog, self._trusted_until = watchdog, math.inf
        self._under_way: list[Event] = []
        self._order = itertools.count()
        self._ended = threading.Event()
        self._thread: Future[None] | None = None

    # ------------------------------------------------------------------------------------ in the clock

    def pump(self) -> float:
        """Does everything that is due, and says when there is something to do again, if no datagram
        comes before: in the clock's seconds."""
        now = self._clock.now()
        for datagram, address in self._link.receive():
            self._carry(now, partial(self._arrive, datagram, address))
        while True:
            moment, _, happen = self._next()
            if moment > now + 1e-9:  # the clock's grid and this one's differ by rounding
                return moment
            self._world.sleep_until(moment)
            happen()

    def _next(self) -> Event:
        # At the same moment: a client that says hello as a period begins isn't sent the same twice, and a
        # command that comes at the last moment keeps the watchdog quiet.
        period = self._begun + self._periods / self.robot.control_hz
        events: list[Event] = [(period, 0, self._begin_period), (self._trusted_until, 2, self._hold)]
        if self._under_way:
            moment, _, arrive = self._under_way[0]
            events.append((moment, 1, partial(self._deliver, arrive)))
        return min(events, key=lambda event: event[:2])

    def _carry(self, moment: float, arrive: Callable[[], None]) -> None:
        """Over the simulated network."""
        fate, slowness = self._draw.random(2)
        if fate < self.loss:
            self.dropped += 1
            return
        arrival = moment + self.delay + self.jitter * slowness
        heapq.heappush(self._under_way, (arrival, next(self._order), arrive))

    def _deliver(self, arrive: Callable[[], None]) -> None:
        heapq.heappop(self._under_way)
        arrive()

    def _begin_period(self) -> None:
        self._periods += 1
        self._send_observation()

    def _send_observation(self) -> None:
        observation = self.robot.observe()
        if self._client is not None:
            moment = self._world.now()
            datagram = self._link.packet(Kind.OBSERVATION, moment + self.ahead, observation)
            self._carry(moment, partial(self._link.send, datagram, self._client))

    def _hold(self) -> None:
        self.holds += 1
        self._stop()

    def _stop(self) -> None:
        self._trusted_until, self.fallback_active = math.inf, True
        self.robot.stop()

    # ---------------------------------------------------------------------------------- received datagrams

    def _arrive(self, datagram: bytes, address: Address) -> None:
        try:
            packet = unpack(datagram)
            self._check(packet)
        except PacketError as reason:
            self._link.refuse(reason, address)
            return
        before = self._link.peer
        if not self._link.is_news(packet):
            return
        if packet.kind == Kind.HELLO:
            self._client = address
            self._answer(packet)
            if packet.session != before:
                self._welcome()
        elif packet.kind == Kind.STOP:
            self.stops += 1
            self._stop()
        else:
            self.commands += 1
            self._trusted_until, self.fallback_active = self._world.now() + self._watchdog, False
            self.robot.apply(packet.numbers)

    def _answer(self, hello: Packet) -> None:
        """Says when a hello came, and so what time it is here."""
        if self.answers and self._client is not None:
            came = self._world.now() + self.ahead
            answer = Packet(Kind.HELLO, self._link.session, hello.sequence, came, np.array([came])).pack()
            self._carry(self._world.now(), partial(self._link.send, answer, self._client))

    def _welcome(self) -> None:
        """A new client needn't wait for the next period, and doesn't inherit the last one's command."""
        if not self.fallback_active:
            self._stop()
        self._send_observation()

    def _check(self, packet: Packet) -> None:
        """Raises ``PacketError`` unless it may be taken."""
        if packet.kind != Kind.COMMAND:
            kind = Kind.STOP if packet.kind == Kind.STOP else Kind.HELLO
            require_form(packet, kind, 0)
        else:
            require_form(packet, Kind.COMMAND, self._action_dim)
            action = packet.numbers
            # Limits may be infinite.
            if not (np.isfinite(action) & (self._low <= action) & (action <= self._high)).all():
                raise PacketError(f"a command of {action}: not finite, or beyond {self._low} to {self._high}")
        if packet.kind != Kind.HELLO and packet.session != self._link.peer:
            raise PacketError("its sender hasn't said hello, or another did since then")

    # ------------------------------------------------------------------------------ by itself, and the end

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Pumps until ``until`` says so, which is asked every period at least.  For clocks that go on by
        themselves; waits to the millisecond."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ)
            while not until():
                selector.select(max(0.0, self.pump() - self._clock.now()))

    @contextlib.contextmanager
    def running(self) -> Iterator[SimulatedArm]:
        """Pumps in a thread meanwhile.  Its exceptions are raised at the end."""
        self._ended.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="arm") as threads:
            self._thread = threads.submit(self.run, self._ended.is_set)
            try:
                yield self
            finally:
                self._ended.set()
            self._thread.result()

    def close(self) -> None:
        """Ends the thread, if there is one, and gives the socket back."""
        self._ended.set()
        if self._thread is not None:
            wait([self._thread])
        self._link.close()

    def __enter__(self) -> SimulatedArm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
