"""A robot behind UDP: real sockets on the loopback, where a datagram is there as soon as it was sent, and a
clock that goes on only when it is told."""

from __future__ import annotations

import functools
import json
import math
import socket
import struct
import threading
import zlib
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import ClockOffset, MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.record import Fault
from paradiffpolicy.envs.pusht import PushTEnv
from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import Policy
from paradiffpolicy.robots import ROBOTS
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.robots.packets import MAX_NUMBERS, Kind, Packet, PacketError, unpack
from paradiffpolicy.robots.robot import RobotSettings
from paradiffpolicy.robots.udp import Link, UdpRobot
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule

from .conftest import SHIPPED, TINY, tiny_checkpoint
from .udp_arm import SimulatedArm


class Cart(gymnasium.Env):
    """Moves by its action every period, and says where it is and how many periods went by."""

    control_hz = 100.0
    hold_action = np.zeros(1)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        self.place = np.zeros(2)
        return self.place.copy(), {}

    def step(self, action):
        self.place += [action[0], 1]
        return self.place.copy(), 0.0, False, False, {}


def sockets():
    """Of this process."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link.readlink()).startswith("socket") for link in links)


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def opened():
    """Closes what is put in."""
    things = []
    yield lambda thing: things.append(thing) or thing
    for thing in things:
        thing.close()


@pytest.fixture
def far(opened):
    """The other end, by hand."""
    return opened(Link(local=("127.0.0.1", 0), session=1))


# ------------------------------------------------------------------------------------------------ packets

WHOLE = st.integers(0, 2**64 - 1)
PACKETS = st.builds(
    Packet,
    st.sampled_from(Kind),
    st.integers(0, 2**32 - 1),
    WHOLE,
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(width=64), max_size=30).map(np.array),
)


def packed(values, magic=b"PDPR", numbers=b"", checksum=None):
    """What ``Packet.pack`` wouldn't."""
    rest = struct.pack("<BBHIQd", *values) + numbers
    return struct.pack("<4sI", magic, zlib.crc32(rest) if checksum is None else checksum) + rest


@given(PACKETS)
def test_a_packet_comes_as_it_went(packet):
    there = unpack(packet.pack())
    assert (there.kind, there.session, there.sequence) == (packet.kind, packet.session, packet.sequence)
    assert struct.pack("d", there.time) == struct.pack("d", packet.time)
    assert there.numbers.tobytes() == np.asarray(packet.numbers, float).tobytes()
    there.numbers[:] = 0  # its own, and writable


@given(st.binary(max_size=400) | PACKETS.map(Packet.pack))
@example(b"")
@example(b"PDPR")
def test_any_bytes_are_refused_or_are_a_packet_to_the_byte(datagram):
    try:
        packet = unpack(datagram)
    except PacketError:
        return
    assert packet.pack() == datagram


@given(PACKETS, st.data())
def test_no_damaged_packet_is_taken(packet, data):
    whole = packet.pack()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    long = whole + data.draw(st.binary(min_size=1, max_size=20))
    for damaged in (bytes(flipped), cut, long):
        with pytest.raises(PacketError):
            unpack(damaged)


GOOD = (1, 3, 1, 7, 8, 0.5)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (packed(GOOD, numbers=bytes(8))[:31], "31 bytes, fewer than a header's 32"),
        (packed(GOOD, b"PDPX", bytes(8)), "begins with b'PDPX'"),
        (packed((2, *GOOD[1:]), numbers=bytes(8)), "of version 2, not of version 1"),
        (packed((1, 5, *GOOD[2:]), numbers=bytes(8)), "of kind 5"),
        (packed((1, 0, *GOOD[2:]), numbers=bytes(8)), "of kind 0"),
        (packed(GOOD, numbers=bytes(16)), "48 bytes, not 32 and 8 for each of 1"),
        (packed((1, 3, 65535, *GOOD[3:]), numbers=bytes(8)), "for each of 65535"),
        (packed(GOOD, numbers=bytes(8), checksum=1), "checksum"),
        (packed((*GOOD[:5], np.nan), numbers=bytes(8)), "time is nan"),
        (packed((*GOOD[:5], np.inf), numbers=bytes(8)), "time is inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_packet_is_explained(datagram, reason):
    with pytest.raises(PacketError, match=reason):
        unpack(datagram)
    assert unpack(packed(GOOD, numbers=bytes(8))).kind == Kind.COMMAND


def test_the_largest_packet_fits_into_a_datagram(opened):
    """And one number more into none."""
    a = opened(Link(local=("127.0.0.1", 0)))
    b = opened(Link(remote=a.address))
    for n in (MAX_NUMBERS, MAX_NUMBERS + 1):
        b.send(b.packet(Kind.COMMAND, 0.0, np.ones(n)))
    ((datagram, _),) = a.receive()
    assert len(unpack(datagram).numbers) == MAX_NUMBERS
    assert b.traffic.errors == {"EMSGSIZE": 1} and b.traffic.sent == 1


# ------------------------------------------------------------------------------------------------- driver


def heard(link):
    """What has come, as (kind, sequence)."""
    return [(unpack(datagram).kind, unpack(datagram).sequence) for datagram, _ in link.receive()]


def tell(link, to, sequence, value, session=1, kind=Kind.OBSERVATION, n=2):
    link.send(Packet(kind, session, sequence, float(value), np.full(n, float(value))).pack(), to)


@pytest.fixture
def near(far, clock, opened):
    return opened(UdpRobot(far.address, 2, 1, clock=clock, session=2))


def where(robot):
    return robot._link.address


def test_it_says_hello_until_observations_come_and_when_they_stay_away(near, far, clock):
    for moment, hellos in [(0, [0]), (0.05, []), (0.1, [1]), (0.19, []), (0.2, [2])]:
        clock.sleep_until(moment)
        assert near.observe() is None
        assert heard(far) == [(Kind.HELLO, n) for n in hellos]
    clock.sleep_until(0.35)
    tell(far, where(near), 0, 5)
    assert near.observe().tolist() == [5, 5] and near.observed == 5.0
    assert near.observe() is None and heard(far) == []
    clock.sleep_until(0.46)
    assert near.observe() is None and heard(far) == [(Kind.HELLO, 3)]


def test_the_newest_observation_wins_and_what_is_old_or_comes_twice_is_dropped(near, far):
    for n in (10, 13, 12, 13):
        tell(far, where(near), n, n)
    assert near.observe()[0] == 13
    for n in (11, 13, 9):
        tell(far, where(near), n, n)
    assert near.observe() is None
    tell(far, where(near), 14, 14)
    assert near.observe()[0] == 14
    traffic = near.traffic
    assert (traffic.received, traffic.lost, traffic.stale, traffic.restarts) == (3, 2, 5, 0)


def test_a_robot_that_was_started_again_is_recognised_and_stays_so(near, far):
    tell(far, where(near), 900, 1, session=1)
    tell(far, where(near), 0, 2, session=5)
    tell(far, where(near), 901, 3, session=1)  # late, of the one that is gone
    assert near.observe()[0] == 2
    tell(far, where(near), 1, 4, session=5)
    assert near.observe()[0] == 4
    assert near.traffic.restarts == 1 and near.traffic.lost == 0 and near.traffic.stale == 1


def test_packets_that_are_no_observation_of_this_robot_are_refused(near, far, caplog):
    tell(far, where(near), 0, 1, n=3)
    tell(far, where(near), 1, 1, n=20)
    tell(far, where(near), 2, 1, kind=Kind.COMMAND)
    far.send(b"\xff" * 50, where(near))
    far.send(b"", where(near))
    tell(far, where(near), 3, np.nan)
    assert near.observe() is None and near.traffic.refused == 6
    (line,) = caplog.messages
    assert "3 numbers, not 2" in line


def test_nan_is_for_the_controller_to_refuse(near, far):
    far.send(Packet(Kind.OBSERVATION, 1, 0, 0.0, np.array([np.nan, 1])).pack(), where(near))
    assert np.isnan(near.observe()[0])


def test_a_stranger_is_not_heard(near, opened):
    stranger = opened(Link(local=("127.0.0.1", 0), session=3))
    tell(stranger, where(near), 0, 1)
    assert near.observe() is None and near.traffic.received == 0 and near.traffic.refused == 0


def test_a_flood_does_not_keep_the_loop_busy(near, far, opened, monkeypatch):
    monkeypatch.setattr("paradiffpolicy.robots.udp.DRAIN", 10)
    for n in range(15):
        tell(far, where(near), n, n)
    assert near.observe()[0] == 9 and near.observe()[0] == 14


def test_commands_and_stops_are_numbered(near, far):
    near.apply(np.array([0.5]))
    near.stop()
    near.apply(np.array([1]))
    expected = [(Kind.HELLO, 0), (Kind.COMMAND, 1), *[(Kind.STOP, 2)] * 5, (Kind.COMMAND, 3)]
    assert heard(far) == expected and near.traffic.sent == len(expected)


@pytest.mark.parametrize("action", [[0, 0], [np.nan], [np.inf], [[0]], 0.0])
def test_a_wrong_action_is_an_error_before_it_is_sent(near, far, action):
    heard(far)
    with pytest.raises(InputError, match="must be 1 finite numbers"):
        near.apply(action)
    assert heard(far) == []


def answer(link, to, sequence, came, time=None, session=1):
    numbers = np.array([came], dtype=float)
    link.send(Packet(Kind.HELLO, session, sequence, came if time is None else time, numbers).pack(), to)


def test_an_observations_moment_is_known_from_round_trips(near, far, clock):
    """The robot's clock is 100 s ahead.  A hello takes 20 ms to it, its answer and observations take 10."""
    tell(far, where(near), 0, 100.01)
    clock.sleep_until(0.02)
    assert near.observe() is not None and near.observed_at is None  # no hello was answered
    clock.sleep_until(0.03)
    answer(far, where(near), 0, 100.02)
    tell(far, where(near), 1, 100.02)
    assert near.observe() is not None and near.observed == 100.02
    # Of the round trip, 30 ms, the half is taken for each way.
    assert near.observed_at == pytest.approx(0.015)
    for k in range(2, 9):
        clock.sleep_until(k / 100 + 0.02)
        tell(far, where(near), k, 100 + k / 100)  # some come later than others
        near.observe()
    assert near.observed_at == pytest.approx(0.075)
    assert near.observe() is None and near.traffic.refused == 0


def test_answers_to_no_hello_are_dropped_and_malformed_ones_refused(near, far, clock):
    clock.sleep_until(0.05)
    answer(far, where(near), 7, 100.0)
    answer(far, where(near), 0, np.nan, time=100.0)
    far.send(Packet(Kind.HELLO, 1, 0, 100.0, np.zeros(0)).pack(), where(near))
    tell(far, where(near), 0, 100.0)
    assert near.observe() is not None and near.observed_at is None
    assert near.traffic.stale == 1 and near.traffic.refused == 2
    answer(far, where(near), 0, 100.0)
    answer(far, where(near), 0, 900.0)  # again
    tell(far, where(near), 1, 100.01)
    assert near.observe() is not None and near.observed_at == pytest.approx(0.03)
    assert near.traffic.stale == 2


def test_hellos_go_on_so_that_clocks_are_compared_again(near, far, clock):
    for k in range(1, 250):
        clock.sleep_until(k / 100)
        tell(far, where(near), k, k / 100)
        near.observe()
    assert heard(far) == [(Kind.HELLO, 0), (Kind.HELLO, 1), (Kind.HELLO, 2)]


def test_a_robot_that_was_started_again_has_another_clock(near, far, clock):
    answer(far, where(near), 0, 100.0)
    tell(far, where(near), 0, 100.0)
    near.observe()
    assert near.observed_at == 0.0
    clock.sleep_until(0.1)
    assert near.observe() is None  # says hello, which both robots answer
    clock.sleep_until(0.2)
    tell(far, where(near), 0, 7.2, session=5)
    assert near.observe() is not None and near.observed_at is None
    clock.sleep_until(0.3)
    assert near.observe() is None
    answer(far, where(near), 2, 7.3, session=5)
    tell(far, where(near), 1, 7.3, session=5)
    assert near.observe() is not None and near.observed_at == pytest.approx(0.3)
    answer(far, where(near), 1, 100.1, session=1)  # late, of the one that is gone
    clock.sleep_until(0.35)
    tell(far, where(near), 2, 7.35, session=5)
    assert near.observe() is not None and near.observed_at == pytest.approx(0.35)


def test_a_sensor_that_sends_the_same_moment_again_has_not_measured(near, far, clock):
    answer(far, where(near), 0, 100.0)
    for k, moment in enumerate([100.0, 100.1, 100.1, 100.1, 100.3]):
        clock.sleep_until(k / 10)
        tell(far, where(near), k, moment)
        assert near.observe() is not None
        assert near.observed_at == pytest.approx(moment - 100)


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.booleans(), st.floats(0, 10), st.floats(0, 0.5)), min_size=2, max_size=40),
)
@settings(max_examples=50)
def test_the_offset_of_a_clock_is_right_to_half_the_shortest_round_trip(ahead, messages):
    offset, least = ClockOffset(), [[math.inf], [math.inf]]
    for there, left, took in messages[:16]:
        least[there].append(took)
        if there:
            offset.sent(left, left + took + ahead)
        else:
            offset.received(left + ahead, left + took)
    bound = (min(least[0]) + min(least[1])) / 2
    assert math.isnan(offset.seconds) if math.isinf(bound) else abs(offset.seconds - ahead) <= bound + 1e-6


def test_a_clock_that_is_set_is_noticed():
    offset = ClockOffset()
    for ahead in (50.0, 20.0):
        offset.sent(0.0, 0.01 + ahead)
        offset.received(1.0 + ahead, 1.01)
        assert math.isnan(offset.seconds) == (ahead == 20.0)
    offset.sent(0.0, 0.01 + ahead)
    offset.received(1.0 + ahead, 1.01)
    assert offset.seconds == pytest.approx(20.0)


def test_an_absent_robot_is_counted_and_gets_the_next_command_when_it_is_back(clock, opened):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        address = gone.getsockname()
    robot = opened(UdpRobot(address, 2, 1, clock=clock))
    for _ in range(3):
        robot.apply(np.zeros(1))
        assert robot.observe() is None
        robot.stop()
    assert robot.traffic.errors["ECONNREFUSED"] > 3
    back = opened(Link(local=address))
    robot.apply(np.ones(1))
    assert [kind for kind, _ in heard(back)] == [Kind.COMMAND]


def test_a_network_that_is_gone_altogether_is_counted(near):
    """The system says something else then; this is what it is without a network at hand."""
    near._link._socket.shutdown(socket.SHUT_WR)
    near.apply(np.zeros(1))
    near.stop()
    assert near.traffic.errors == {"EPIPE": 6} and near.traffic.sent == 1
    near.close()
    near.apply(np.zeros(1))
    assert near.observe() is None and near.traffic.errors["EBADF"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"address": ("no.such.host.invalid", 1)}, "no.such.host.invalid"),
        ({"address": ("a" * 70, 1)}, "aaa"),
        ({"address": ("127.0.0.1", 70000)}, "the port 1 to 65535"),
        ({"address": ("127.0.0.1", 0)}, "the port 1 to 65535"),
        ({"address": ("127.0.0.1", "9")}, "must be"),
        ({"address": "127.0.0.1"}, "address='127.0.0.1' must be"),
        ({"address": None}, "must be"),
        ({"session": -1}, "session=-1"),
        ({"session": 2**32}, "session=4294967296"),
        ({"address": ("255.255.255.255", 9)}, "Permission denied"),
        ({"obs_dim": 0}, "obs_dim=0"),
        ({"action_dim": 2.5}, "action_dim=2.5"),
        ({"obs_dim": 9000}, "obs_dim=9000 numbers don't fit"),
        ({"hello_every": 0}, "hello_every=0"),
        ({"sync_every": 0}, "sync_every=0"),
        ({"stops": 0}, "stops=0"),
    ],
)
def test_a_bad_setting_of_the_driver_is_named(changed, message):
    with pytest.raises(InputError, match=message):
        UdpRobot(**{"address": ("127.0.0.1", 9), "obs_dim": 2, "action_dim": 1, **changed})


# ------------------------------------------------------------------------------------------------- the arm


@pytest.fixture
def cart(clock, opened):
    def make(seed=0, **settings):
        return opened(SimulatedArm(Cart(), seed, clock, **{"generator": draw(), **settings}))

    return make


@pytest.fixture
def driver(clock, opened):
    return lambda arm, **settings: opened(UdpRobot(arm.address, 2, 1, clock=clock, **settings))


def pass_time(clock, arm, until):
    """Pumps whenever something is due."""
    while (due := arm.pump()) <= until + 1e-9:
        clock.sleep_until(due)
    clock.sleep_until(until)


def test_hello_is_answered_at_once_and_then_every_period(cart, driver, clock):
    arm = cart()
    pass_time(clock, arm, 0.055)
    assert arm.traffic.errors == {} and arm.dropped == 0  # there is no client yet
    robot = driver(arm)
    assert arm.pump() == pytest.approx(0.06)
    assert robot.observe().tolist() == [0, 5] and robot.observed == pytest.approx(0.055)
    for n in (6, 7, 8):
        assert clock.now() < arm.pump() == pytest.approx(n / 100)
        assert robot.observe() is None
        clock.sleep_until(n / 100)
        arm.pump()
        assert robot.observe().tolist() == [0, n] and robot.observed == pytest.approx(n / 100)


@pytest.mark.parametrize("rate", [10.0, 30.0, 50.0, 700.0])
def test_rounding_makes_no_observation_late(rate, clock, opened):
    """A loop at the arm's rate multiplies by the period where the arm divides by the rate."""
    cart = Cart()
    cart.control_hz = rate
    arm = opened(SimulatedArm(cart, 0, clock, generator=draw()))
    robot = opened(UdpRobot(arm.address, 2, 1, clock=clock))
    for n in range(300):
        clock.sleep_until(n * (1 / rate))
        arm.pump()
        assert robot.observe()[1] == n


def test_commands_move_it_from_the_period_in_which_they_arrive(cart, driver, clock):
    arm = cart(delay=0.014)
    robot = driver(arm)
    arm.pump()
    robot.apply(np.array([0.25]))
    places = []
    for n in range(6):
        clock.sleep_until(n / 100)
        arm.pump()
        places.append(arm.robot.observe()[0])
    assert places == [0, 0, 0.25, 0.5, 0.75, 1.0]
    assert arm.commands == 1 and not arm.fallback_active


@pytest.mark.parametrize("late", [1, 3, 7])
def test_the_arm_does_not_depend_on_when_it_is_pumped(late, cart, driver, clock):
    """A world that was left alone for some periods is where it would have been; its observations too."""
    arm = cart(delay=0.001, jitter=0.004, watchdog=0.05)
    robot = driver(arm)
    pass_time(clock, arm, 0.1)
    robot.apply(np.array([1.0]))
    arm.pump()
    while clock.now() < 0.3:
        clock.sleep_until(clock.now() + late / 100)
        arm.pump()
    # It arrives in the tenth period, and holds 0.05 s later, in the fifteenth.
    assert arm.robot.observe()[0] == 5 and arm.holds == 1
    seen = robot.observe()
    assert seen[1] == round(robot.observed * 100)


def test_the_newest_command_wins(cart, clock, opened):
    arm = cart()
    client = opened(Link(remote=arm.address, session=7))
    for sequence, kind, value in [
        *[(0, Kind.HELLO, None), (3, Kind.COMMAND, 0.5), (2, Kind.COMMAND, 0.1), (3, Kind.COMMAND, 0.5)],
        *[(1, Kind.STOP, None)],
    ]:
        tell(client, None, sequence, value or 0, session=7, kind=kind, n=0 if value is None else 1)
    arm.pump()
    clock.sleep_until(0.01)
    arm.pump()
    assert arm.robot.observe()[0] == 0.5
    assert arm.commands == 1 and arm.stops == 0 and arm.traffic.stale == 3 and arm.traffic.lost == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, 1e300])
def test_a_command_beyond_the_limits_is_refused(value, cart, clock, opened):
    arm = cart()
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.HELLO, 0.0))
    client.send(client.packet(Kind.COMMAND, 0.0, np.array([value])))
    arm.pump()
    assert arm.commands == 0 and arm.fallback_active and arm.traffic.refused == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_where_there_are_no_limits_a_command_is_finite_still(value, clock, opened):
    env = Cart()
    env.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    arm = opened(SimulatedArm(env, 0, clock, generator=draw()))
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.HELLO, 0.0))
    client.send(client.packet(Kind.COMMAND, 0.0, [1e9]))
    client.send(client.packet(Kind.COMMAND, 0.0, [value]))
    arm.pump()
    assert arm.commands == 1 and arm.traffic.refused == 1


def test_packets_that_come_at_the_same_moment(cart, clock, opened):
    """Hello as a period begins: one observation.  A command as the watchdog would hold: no hold."""
    arm = cart(watchdog=0.125)  # exact in binary
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.HELLO, 0.0))
    arm.pump()
    assert [kind for kind, _ in heard(client)] == [Kind.HELLO, Kind.OBSERVATION]
    for n in range(5):
        clock.sleep_until(n * 0.125)
        client.send(client.packet(Kind.COMMAND, 0.0, [1.0]))
        arm.pump()
    assert arm.holds == 0 and arm.commands == 5


def test_hello_again_stops_nothing(cart, clock, opened):
    """It is said whenever observations stay away, also in the middle of a movement."""
    arm = cart()
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.HELLO, 0.0))
    client.send(client.packet(Kind.COMMAND, 0.0, [1.0]))
    arm.pump()
    list(client.receive())
    client.send(client.packet(Kind.HELLO, 0.0))
    arm.pump()
    assert not arm.fallback_active and heard(client) == [(Kind.HELLO, 2)]  # its answer


def test_packets_that_are_no_command_for_this_arm_are_refused(cart, opened):
    arm = cart()
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.COMMAND, 0.0, np.zeros(1)))  # before hello
    client.send(client.packet(Kind.HELLO, 0.0))
    client.send(client.packet(Kind.HELLO, 0.0, np.zeros(1)))
    client.send(client.packet(Kind.STOP, 0.0, np.zeros(1)))
    client.send(client.packet(Kind.OBSERVATION, 0.0, np.zeros(2)))
    client.send(client.packet(Kind.COMMAND, 0.0, np.zeros(2)))
    client.send(client.packet(Kind.COMMAND, 0.0, np.zeros(0)))
    client.send(client.packet(Kind.COMMAND, 0.0, np.zeros(500)))
    client.send(b"PDPR")
    arm.pump()
    assert arm.traffic.refused == 8 and arm.traffic.received == 1 and arm.commands == 0


def test_the_last_client_that_said_hello_is_obeyed(cart, driver, clock):
    arm = cart()
    first = driver(arm)
    arm.pump()
    first.apply(np.array([1.0]))
    arm.pump()
    assert not arm.fallback_active
    clock.sleep_until(0.01)
    second = driver(arm)
    arm.pump()
    assert arm.fallback_active and arm.traffic.restarts == 1
    assert second.observe() is not None
    first.apply(np.array([1.0]))
    # The replaced driver says hello again in vain: two drivers don't take the arm from each other in turns.
    first.observe()
    clock.sleep_until(0.5)
    assert first.observe() is None
    arm.pump()
    assert arm.commands == 1 and arm.traffic.refused == 1 and arm.traffic.stale == 1
    assert first.observe() is None and second.observe() is not None


def test_the_watchdog_holds_until_the_next_command(cart, driver, clock):
    arm = cart(watchdog=0.1)
    robot = driver(arm)
    pass_time(clock, arm, 1.0)
    assert arm.holds == 0  # nothing to stop before the first command
    for _ in range(10):
        robot.apply(np.array([1.0]))
        pass_time(clock, arm, clock.now() + 0.09)
    assert arm.holds == 0 and arm.robot.observe()[0] == 90
    pass_time(clock, arm, clock.now() + 1)
    assert arm.holds == 1 and arm.fallback_active and arm.robot.observe()[0] == 91
    robot.apply(np.array([1.0]))
    pass_time(clock, arm, clock.now() + 0.05)
    assert not arm.fallback_active and arm.robot.observe()[0] == 96
    robot.stop()
    pass_time(clock, arm, clock.now() + 1)
    assert arm.stops == 1 and arm.fallback_active and arm.holds == 1 and arm.robot.observe()[0] == 96


@pytest.mark.parametrize(("delay", "jitter", "loss"), [(0.0, 0.0, 0.0), (0.02, 0.0, 0.1), (0.003, 0.05, 0.3)])
def test_loss_and_delay_are_as_wanted(delay, jitter, loss, cart, clock, opened):
    """Both ways, over 1000 periods; bounds are four standard errors."""
    arm = cart(delay=delay, jitter=jitter, loss=0.0)
    client = opened(Link(remote=arm.address))
    client.send(client.packet(Kind.HELLO, 0.0))
    arm.pump()
    pass_time(clock, arm, 0.1)
    list(client.receive())
    arm.loss, arm.delay, n = loss, delay, 1000
    latencies, order = [], []

    def look():
        for datagram, _ in client.receive():
            packet = unpack(datagram)
            latencies.append(clock.now() - packet.time)
            order.append(packet.sequence)

    for _ in range(n):
        client.send(client.packet(Kind.COMMAND, clock.now(), np.zeros(1)))
        until = clock.now() + 0.01
        while (due := arm.pump()) <= until:
            look()
            clock.sleep_until(due)
        look()
        clock.sleep_until(until)
    pass_time(clock, arm, clock.now() + 0.1)
    error = 4 * np.sqrt(loss * (1 - loss) / n)
    assert abs(arm.dropped / (2 * n) - loss) <= error
    assert abs(len(order) / n - (1 - loss)) <= error + 0.01
    # Commands: taken, overtaken, or lost.
    assert abs((arm.commands + arm.traffic.stale) / n - (1 - loss)) <= error + 0.01
    assert min(latencies) >= delay - 1e-9 and max(latencies) <= delay + jitter + 1e-8
    assert abs(np.mean(latencies) - delay - jitter / 2) <= 4 * jitter / np.sqrt(12 * len(latencies)) + 1e-8
    if jitter > 0.02:
        assert np.max(latencies) - np.min(latencies) > 0.95 * jitter
        assert (np.diff(order) < 0).any() and arm.traffic.stale > 50
    else:
        assert (np.diff(order) > 0).all() and arm.traffic.stale == 0


def test_a_driver_behind_a_bad_network_never_goes_back_in_time(cart, driver, clock):
    arm = cart(delay=0.001, jitter=0.08, loss=0.2)
    robot = driver(arm)
    seen = []
    for n in range(1000):
        clock.sleep_until(n / 100)
        arm.pump()
        observation = robot.observe()
        if observation is not None:
            seen.append(observation[1])
    traffic = robot.traffic
    assert (np.diff(seen) > 0).all() and len(seen) > 300
    assert traffic.stale > 100 and traffic.lost > 200
    # Every number up to the newest was taken, or left out and then either came too late or never.
    assert traffic.received + traffic.lost <= arm.traffic.sent + arm.dropped


def test_the_same_seed_is_the_same_run(cart, driver, clock):
    def run():
        begin = clock.now()
        arm = cart(delay=0.001, jitter=0.03, loss=0.2, generator=draw(3))
        robot = driver(arm)
        seen = []
        for n in range(300):
            clock.sleep_until(begin + n / 100)
            arm.pump()
            observation = robot.observe()
            seen.append(None if observation is None else observation.tolist())
            robot.apply(np.array([0.1 * (n % 7)]))
        return seen, arm.dropped, arm.commands

    assert run() == run()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"delay": -1}, "delay=-1"),
        ({"jitter": np.nan}, "jitter=nan"),
        ({"delay": np.inf}, "delay=inf"),
        ({"loss": 1.1}, "loss=1.1"),
        ({"loss": np.nan}, "loss=nan"),
        ({"watchdog": 0}, "watchdog=0"),
        ({"address": ("127.0.0.1", -1)}, "address="),
    ],
)
def test_a_bad_setting_of_the_arm_is_named(cart, changed, message):
    with pytest.raises(InputError, match=message):
        cart(**changed)


def test_an_address_that_is_taken_is_named(cart):
    taken, before = cart().address, sockets()
    with pytest.raises(InputError, match="in use") as caught:
        cart(address=taken)
    # While the traceback keeps alive what failed.
    assert sockets() == before and caught.tb


class Long(Cart):
    def reset(self, *, seed=None, options=None):
        return np.zeros(9000), {}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Long, "obs_dim=9000 numbers don't fit"),
        (lambda: PushTEnv("image"), "observations"),
        (lambda: gymnasium.make("CartPole-v1"), "actions are Discrete"),
        (lambda: gymnasium.make("Pendulum-v1"), "must have control_hz"),
    ],
    ids=["long", "image", "discrete", "timeless"],
)
def test_an_environment_that_can_be_no_arm_is_named(env, message, clock):
    with pytest.raises(InputError, match=message):
        SimulatedArm(env(), 0, clock, generator=draw())


# --------------------------------------------------------------------------------------------- closed loop


class Pumped:
    """The driver, with the arm, where there is one, looked after whenever the loop has to do with it."""

    def __init__(self, arm, robot):
        self.arm, self.robot = arm, robot

    @property
    def observed_at(self):
        return self.robot.observed_at

    def pump(self):
        if self.arm is not None:
            self.arm.pump()

    def observe(self):
        self.pump()
        return self.robot.observe()

    def apply(self, action):
        self.robot.apply(action)
        self.pump()

    def stop(self):
        self.robot.stop()
        self.pump()


@functools.cache
def tiny_policy():
    return Policy.from_checkpoint(tiny_checkpoint(), make_sampler(spec_schedule(TINY), n_steps=3))


def controller(policy, clock, rate_hz=10.0, **settings):
    generator = torch.Generator().manual_seed(0)
    settings = {"planner": "inline", **settings}
    return Controller(policy, rate_hz, generator=generator, clock=clock, **settings)


@pytest.fixture
def pusht(clock, opened):
    """An arm that pushes the T, and its driver."""

    def make(seed=0, **settings):
        env = PushTEnv("keypoints")
        arm = opened(SimulatedArm(env, seed, clock, **{"generator": draw(), **settings}))
        return Pumped(arm, opened(UdpRobot(arm.address, 20, 2, clock=clock)))

    return make


def test_over_a_good_network_it_is_the_environment_itself(pusht, clock):
    """Bit for bit."""
    robot = pusht(seed=5)
    over = ControlLoop(controller(tiny_policy(), clock), robot).run(40)
    score = robot.arm.robot.score, robot.arm.robot.n_steps
    direct = EnvRobot(PushTEnv("keypoints"), 5, clock)
    record = ControlLoop(controller(tiny_policy(), clock), direct).run(40)
    np.testing.assert_array_equal(over.ticks["action"], record.ticks["action"])
    assert over.faults() == record.faults() == {} and not over.ticks["fallback_active"].any()
    assert score == (direct.score, direct.n_steps) and score[1] == 39
    assert robot.robot.traffic.lost == 0 and robot.arm.traffic.lost == 0


@pytest.mark.parametrize("answers", [True, False])
def test_what_was_seen_late_is_acted_on_as_what_it_was(answers, pusht, clock):
    """Over 0.2 s each way, with a clock that is far ahead, plans are for what was seen two ticks ago, where
    the arm lets that be known."""
    robot = pusht(seed=5, delay=0.2, ahead=1e5, answers=answers)
    record = ControlLoop(controller(tiny_policy(), clock), robot).run(40)
    age = 2 if answers else 0
    assert record.plans["delay"][1:].tolist() == [age] * 4 and record.plans["tick"][1] == 12 - age
    steps = record.ticks["plan_index"][16:40]
    assert steps.tolist() == [1 + age + k % 8 for k in range(4, 28)]


def test_a_network_that_loses_a_third_costs_observations_and_no_ticks(pusht, clock):
    robot = pusht(loss=0.3, delay=0.01, jitter=0.02)
    record = ControlLoop(controller(tiny_policy(), clock), robot).run(150)
    assert record.n_ticks == 150 and record.missed == 0
    np.testing.assert_allclose(record.deadline_errors, 0, atol=1e-9)
    missing = record.faults()["observation_missing"]
    assert missing == 150 - (record.ticks["faults"] & Fault.OBSERVATION_MISSING == 0).sum()
    assert 24 < missing < 66
    assert set(record.faults()) <= {"observation_missing", "observation_stale", "plan_late", "plan_missing"}
    assert robot.arm.commands + robot.arm.traffic.stale == pytest.approx(0.7 * 150, abs=23)


def test_the_shipped_policy_pushes_the_t_over_a_network_that_loses_a_third(pusht, clock):
    policy = Policy.load(SHIPPED, solver="ddim", n_steps=10, spacing="trailing", driver="rti", iterations=2)
    robot = pusht(seed=2, loss=0.3, delay=0.01, jitter=0.02)
    record = ControlLoop(controller(policy, clock), robot).run(160, until=lambda: robot.arm.robot.score > 0.5)
    assert robot.arm.robot.score > 0.5
    assert record.faults()["observation_missing"] > 10


def test_two_seconds_of_silence_are_held_through_by_both_sides(pusht, clock):
    robot = pusht(watchdog=0.5)
    places = {}

    def network(tick):
        robot.arm.loss = 1.0 if 30 <= tick.index < 50 else 0.0
        places[tick.index] = robot.arm.robot.env.state

    loop = ControlLoop(controller(tiny_policy(), clock, max_observation_age=0.5), robot, observers=[network])
    ticks = loop.run(80).ticks
    stale = ticks["faults"] & Fault.OBSERVATION_STALE != 0
    # The last observation before the silence is tick 30's; none comes for 20 ticks.
    assert stale.nonzero()[0].tolist() == list(range(36, 51))
    assert (ticks["fallback_active"] == stale).all()
    held = ticks["action"][36:51]
    assert (held == held[0]).all()
    assert robot.arm.holds == 1
    # The arm held where it was, and not where it had been sent.
    np.testing.assert_allclose(places[40][:2], places[50][:2], atol=1.0)
    assert not ticks["fallback_active"][51:].any()
    assert robot.robot.traffic.restarts == 0


def test_without_a_controller_the_arm_holds_by_itself(pusht, clock):
    robot = pusht(watchdog=0.3)
    robot.robot._stops = 0  # the controller is gone, and so couldn't say that it stops
    ControlLoop(controller(tiny_policy(), clock), robot).run(20)
    assert not robot.arm.fallback_active and robot.arm.stops == 0
    clock.advance(1.0)
    robot.arm.pump()
    assert robot.arm.fallback_active and robot.arm.holds == 1
    rest = robot.arm.robot.env.state
    clock.advance(1.0)
    robot.arm.pump()
    np.testing.assert_allclose(robot.arm.robot.env.state[:2], rest[:2], atol=0.5)


def test_an_arm_that_is_started_again_in_the_middle_is_taken_up(pusht, clock, opened):
    robot = pusht(seed=1)

    address = robot.arm.address

    def power(tick):
        if tick.index == 20:
            robot.arm.close()
            robot.arm = None
        if tick.index == 25:
            env = PushTEnv("keypoints")
            robot.arm = opened(SimulatedArm(env, 2, clock, generator=draw(), address=address))

    record = ControlLoop(controller(tiny_policy(), clock), robot, observers=[power]).run(50)
    missing = (record.ticks["faults"] & Fault.OBSERVATION_MISSING != 0).nonzero()[0]
    # Hello is said in tick 26, which so still goes without.
    assert missing.tolist() == list(range(21, 27)) and record.n_ticks == 50
    traffic = robot.robot.traffic
    assert traffic.restarts == 1 and traffic.errors["ECONNREFUSED"] > 0
    # All but tick 26's, which came before hello was said, or after: that tick's hello comes first.
    assert robot.arm.commands == 24 and robot.arm.stops == 1


# ------------------------------------------------------------------------------------------- in real time


def test_a_run_in_real_time_leaves_nothing_behind():
    clock, before, threads = MonotonicClock(), sockets(), threading.active_count()
    arm = SimulatedArm(
        PushTEnv("keypoints", control_hz=50), 0, clock, generator=draw(), loss=0.1, jitter=0.01
    )
    with arm, arm.running(), UdpRobot(arm.address, 20, 2) as robot:
        record = ControlLoop(controller(tiny_policy(), clock, 50.0), robot).run(8)
    assert record.n_ticks + record.missed == record.ticks["index"][-1] + 1 <= 8
    assert robot.traffic.received > 0 and arm.commands > 0
    assert sockets() == before and threading.active_count() == threads


def test_a_run_drives_a_robot_at_an_address(tmp_path, monkeypatch):
    """``paradiffpolicy run robot=udp``, in real time; its report counts the traffic."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint().save(tmp_path / "tiny")
    settings = ["checkpoint=tiny", "planner=inline", "capture=eager", "seconds=0.2", "out=run"]
    arm = SimulatedArm(PushTEnv("keypoints"), 0, MonotonicClock(), generator=draw())
    with arm, arm.running():
        host, port = arm.address
        assert main(["run", "robot=udp", f"robot_address={host}:{port}", "timeline=null", *settings]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["traffic"]["sent"] > 0 and report["traffic"]["errors"] == {} and "score" not in report
    assert arm.commands > 0 and arm.stops == 1


@pytest.mark.parametrize("address", [None, "localhost", ":5005", "localhost:port"])
def test_a_run_without_a_robots_address_is_an_error(address):
    with pytest.raises(InputError, match=f"robot_address={address} must be HOST:PORT"):
        ROBOTS["udp"](RobotSettings(TINY, 10.0, VirtualClock(), address=address))


def test_an_exception_in_the_thread_is_raised(opened):
    class Broken(Cart):
        def step(self, action):
            raise RuntimeError("the motor burns")

    arm = opened(SimulatedArm(Broken(), 0, MonotonicClock(), generator=draw()))
    failed = threading.Event()
    with pytest.raises(RuntimeError, match="burns"), arm.running():
        arm._thread.add_done_callback(lambda thread: failed.set())
        assert failed.wait(10)


def test_close_ends_the_thread():
    arm = SimulatedArm(Cart(), 0, MonotonicClock(), generator=draw())
    with arm.running():
        arm.close()
        assert arm._thread.done()
    arm.close()
