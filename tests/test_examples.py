"""The examples run: in virtual time, against a stand-in of rclpy, and on messages that LeRobot 0.4.4 sent."""

from __future__ import annotations

import base64
import importlib.util
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradiffpolicy as pdp
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.errors import InputError

from .conftest import ROOT
from .test_control import scripted, shared_policy

SHIPPED = str(ROOT / "checkpoints" / "pusht_keypoints")


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_how_it_is_run(path):
    docstring = path.read_text().split('"""')[1]
    assert f"examples/{path.name}" in docstring or f"plugins={path.stem}" in docstring


# ---------------------------------------------------------------------------------- ros2_control_loop.py


def test_the_500_hz_loop_moves_the_setpoint_in_every_tick_and_never_far(monkeypatch):
    policy = pdp.load_policy(SHIPPED, sampler="rti", capture="eager", warm_up=False)
    monkeypatch.setattr(pdp, "load_policy", lambda path, sampler: policy)
    run = load("ros2_control_loop").run
    record, score = run(1.5, clock=VirtualClock(), planner="inline")
    assert record.missed == 0 and record.n_ticks == 750 and 0 <= score <= 1
    assert record.faults() == {}
    moved = np.linalg.norm(np.diff(record.ticks["action"], axis=0), axis=1)
    held, _ = run(1.5, interpolation="hold", clock=VirtualClock(), planner="inline")
    steps = np.linalg.norm(np.diff(held.ticks["action"], axis=0), axis=1)
    assert np.quantile(moved, 0.9) < 3 and (moved > 0).mean() > 0.9
    assert np.count_nonzero(steps) <= 20 and steps.max() > 10 * np.quantile(moved, 0.9)


# --------------------------------------------------------------------------------------------- ros2_node.py


class Publisher:
    def __init__(self, topic, qos):
        self.topic, self.qos, self.sent = topic, qos, []

    def publish(self, message):
        self.sent.append(message)


class StandInNode:
    """The part of ``rclpy.node.Node`` that the example uses."""

    parameters: dict[str, object] = {}

    def __init__(self, name):
        self.publishers, self.callbacks, self.timers, self.destroyed = {}, {}, [], False

    def declare_parameter(self, name, default):
        return SimpleNamespace(value=self.parameters.get(name, default))

    def create_publisher(self, kind, topic, qos):
        return self.publishers.setdefault(topic, Publisher(topic, qos))

    def create_subscription(self, kind, topic, callback, qos):
        self.callbacks[topic] = callback, qos

    def create_service(self, kind, name, callback):
        self.callbacks[name] = callback, None

    def create_timer(self, period, callback):
        self.timers.append((period, callback))

    def get_clock(self):
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=round(1e9 * self.ros_time)))

    def destroy_node(self):
        self.destroyed = True


def message(name):
    return type(name, (SimpleNamespace,), {})


@pytest.fixture
def ros(monkeypatch):
    """The example, with stand-ins for ROS's modules."""

    def module(name, **members):
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    policies = {
        "DurabilityPolicy": SimpleNamespace(TRANSIENT_LOCAL="transient local"),
        "ReliabilityPolicy": SimpleNamespace(BEST_EFFORT="best effort", RELIABLE="reliable"),
        "QoSProfile": lambda **settings: settings,
    }
    module("rclpy")
    module("rclpy.node", Node=StandInNode)
    module("rclpy.qos", **policies)
    module("rclpy.signals", SignalHandlerOptions=SimpleNamespace(NO="no"))
    for package, names in {
        "sensor_msgs.msg": ["JointState"],
        "std_msgs.msg": ["Bool", "Float64MultiArray", "String"],
        "std_srvs.srv": ["SetBool"],
    }.items():
        module(package.split(".")[0])
        module(package, **{name: message(name) for name in names})
    return load("ros2_node")


JOINTS = [f"joint{k}" for k in range(20)]


@pytest.fixture
def node(ros, monkeypatch):
    """A node that isn't spun: the test calls its callbacks."""
    clock = VirtualClock(100.0)
    settings = {"checkpoint": SHIPPED, "rate": 25.0, "joints": JOINTS}
    monkeypatch.setattr(StandInNode, "parameters", settings)
    monkeypatch.setattr(ros.pdp, "load_policy", lambda path, sampler: shared_policy())
    made = ros.PolicyNode(clock, planner=scripted(0.05))
    made.ros_time = 1e6
    yield made, clock
    made.close()


def joints_of(node, clock, *, age=0.0, names=JOINTS):
    seconds, rest = divmod(node.ros_time + clock.now() - 100.0 - age, 1)
    stamp = SimpleNamespace(sec=int(seconds), nanosec=round(1e9 * rest))
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), name=list(names), position=[0.5] * len(names))


def spin(node, clock, n, observe=True):
    """``n`` periods of the timer."""
    for _ in range(n):
        if observe:
            node.callbacks["joint_states"][0](joints_of(node, clock))
        ((_, timer),) = node.timers
        timer()
        clock.advance(1 / 25)


def asked(node, data):
    return node.callbacks["~/arm"][0](SimpleNamespace(data=data), SimpleNamespace())


def test_the_node_moves_nothing_until_it_is_asked_and_then_at_the_rate(node):
    node, clock = node
    commands = node.publishers["~/commands"]
    assert node.timers[0][0] == 1 / 25
    assert not asked(node, True).success  # there is no observation yet
    spin(node, clock, 20)
    assert commands.sent == [] and node.commander.controller.record.n_ticks == 0
    assert asked(node, True).success
    spin(node, clock, 10)
    # Two ticks until the plan is there; then from its first action on, 2.5 ticks to a step.
    np.testing.assert_allclose([sent.data[1] for sent in commands.sent], 1 + np.arange(8) / 2.5)
    assert [each.data for each in node.publishers["~/stop"].sent] == [True, True, True, False]
    asked(node, False)
    spin(node, clock, 5)
    assert len(commands.sent) == 8 and node.publishers["~/stop"].sent[-1].data is True


def test_a_stop_is_latched_until_the_node_is_armed_again(node):
    node, clock = node
    spin(node, clock, 1)
    asked(node, True)
    spin(node, clock, 10)
    sent = len(node.publishers["~/commands"].sent)
    spin(node, clock, 100, observe=False)  # the sensors are gone: the plan, the fallback, then the stop
    assert node.commander.state == "stopped"
    assert node.publishers["~/stop"].sent[-1].data is True
    assert "FALLBACK_TIMEOUT" in node.publishers["~/status"].sent[-1].data
    silent = len(node.publishers["~/commands"].sent)
    assert sent < silent < sent + 100
    spin(node, clock, 20)
    assert len(node.publishers["~/commands"].sent) == silent
    assert asked(node, True).success
    spin(node, clock, 10)
    assert node.commander.state == "armed" and len(node.publishers["~/commands"].sent) > silent


def test_the_topics_have_the_qualities_of_their_kind(node):
    node, _ = node
    assert node.callbacks["joint_states"][1] == {"depth": 1, "reliability": "best effort"}
    assert node.publishers["~/commands"].qos == {"depth": 1, "reliability": "reliable"}
    latched = {"depth": 1, "reliability": "reliable", "durability": "transient local"}
    assert node.publishers["~/stop"].qos == node.publishers["~/status"].qos == latched


def test_shutting_down_stops_the_robot_and_then_the_planner(node):
    node, clock = node
    spin(node, clock, 1)
    asked(node, True)
    spin(node, clock, 10)
    node.close()
    assert node.publishers["~/stop"].sent[-1].data is True and node.destroyed
    assert not node.commander.controller.started


def test_a_message_in_pieces_or_without_a_first_plan_moves_nothing(node):
    node, clock = node
    node.callbacks["joint_states"][0](joints_of(node, clock, names=JOINTS[:7]))
    assert not asked(node, True).success
    spin(node, clock, 1)
    node.commander.controller._planner._latency = lambda: 1e9
    assert asked(node, True).success
    spin(node, clock, 260)
    assert node.commander.state == "stopped" and node.publishers["~/commands"].sent == []


# ------------------------------------------------------------------------------------------ lerobot_robot.py


class SimulatedLeRobot:
    """The members of LeRobot's ``Robot`` that the adapter uses."""

    observation_features = {"a.pos": float, "b.pos": float, "wrist": (8, 8, 3)}
    action_features = {"b.pos": float, "a.pos": float}

    def __init__(self):
        self.values, self.sent, self.connected = {"a.pos": 1.0, "b.pos": 2.0}, [], True

    def get_observation(self):
        return {**self.values, "wrist": np.zeros((8, 8, 3))}

    def send_action(self, action):
        self.sent.append(action)
        self.values.update(action)
        return action

    def disconnect(self):
        self.connected = False


@pytest.fixture
def lerobot_robot(monkeypatch):
    monkeypatch.setattr(pdp.ROBOTS, "register", lambda name, build: build)
    return load("lerobot_robot")


def test_a_lerobot_arm_is_observed_and_commanded_by_key_and_stopped_where_it_is(lerobot_robot):
    clock, robot = VirtualClock(), SimulatedLeRobot()
    arm = lerobot_robot.LeRobotArm(robot, clock)
    assert arm.observe() is None
    clock.advance(3.0)
    arm.pump()
    assert arm.observe().tolist() == [1.0, 2.0] and arm.observed_at == 3.0 and arm.observe() is None
    arm.apply(np.array([7.0, 8.0]))
    arm.apply(np.array([5.0, 6.0]))
    arm.pump()
    assert robot.sent == [{"b.pos": 5.0, "a.pos": 6.0}]
    arm.pump()
    assert len(robot.sent) == 1
    arm.apply(np.array([0.0, 0.0]))
    arm.stop()
    robot.values["a.pos"] = 6.25
    arm.pump()
    assert robot.sent[1:] == [{"b.pos": 5.0, "a.pos": 6.25}]


def test_the_lerobot_arms_thread_ends_with_the_stop_and_its_errors_come_out(lerobot_robot):
    robot = SimulatedLeRobot()
    arm = lerobot_robot.LeRobotArm(robot, VirtualClock()).start()
    arm.stop()
    arm.close()
    assert robot.sent == [{"b.pos": 2.0, "a.pos": 1.0}] and not robot.connected
    robot.get_observation = lambda: 1 / 0
    arm = lerobot_robot.LeRobotArm(robot, VirtualClock()).start()
    arm._thread.join(5.0)
    with pytest.raises(ZeroDivisionError):
        arm.observe()
    with pytest.raises(InputError, match=r"observed=\['c'\]"):
        lerobot_robot.LeRobotArm(robot, VirtualClock(), ["c"])


def test_a_lerobot_arm_is_a_robot_of_the_loop(lerobot_robot):
    """With 20 joints, of which two are commanded; in turns with the loop."""
    clock, robot = VirtualClock(), SimulatedLeRobot()
    robot.values = dict.fromkeys(JOINTS, 100.0)
    robot.observation_features = dict.fromkeys(JOINTS, float)
    robot.action_features = dict.fromkeys(JOINTS[18:], float)
    arm = lerobot_robot.LeRobotArm(robot, clock)
    arm.pump()
    clock.advance(0.01)
    controller = Controller(shared_policy(), 25, planner="inline", clock=clock)
    record = ControlLoop(controller, arm, observers=[lambda tick: arm.pump()]).run(30)
    assert record.faults() == {} and len(robot.sent) == 30
    sent = np.array([[each[name] for name in JOINTS[18:]] for each in robot.sent])
    np.testing.assert_array_equal(sent, record.ticks["action"])


# ----------------------------------------------------------------------------------------- lerobot_server.py

INSTRUCTIONS = base64.b85decode(
    "fCQBy0ssI20001tA8ciEZ(?tBE@5+dZew3*Zf0e2Wo~0-E@)+JaAk6Hl#CKmWo>VCWl(QyX=8aqZ*FF3XOxqaDS?!Ilqie~aBpmB"
    "V|ib6d2nTvj0t3EW@dGBX>V?nj2CcnWpr|3X>Mg?Uv6P-WnXV{UvOb`Xq1c(bZBKQb7gXNWpZ;ZZ+C8#j1X*Pa&Ka9bYEs=VRUtJ"
    "Wpk8$l#CH?VsmA3c42gBZ*DGgbYXO5lzo&aj0I$Ld2nTvj0a|HZ((#ZGL(!3b7*03Wt2-4g_Mj1ZeeX@bCg|_D2xhfZ)t9HFfMR!"
    "bCiq<YHw+7bTKY)Z*!E43Tkg@Zges(aBp*zj0$RRX>N2gE^u#il#B{$Z)t9HG%j#&bCiq<YHw+7bTuw;Z*!E43Tkg@Zge&-aBp*z"
    "j0$RRX>N2kE^u#il#B{$Z)t9HI4*E+bCiq<YHw+7bU7|?Z*!E43u<p^Zgep)E^u#il#B~%Z)t9HF)=Q1Z*!E43u<p^Zgep+E^u#i"
    "l#B~%Z)t9HF*7c3Z*!E43u<p^Zgep;E^u#il#B~%Z)t9HF*Po5Z*!E43u<p^Zgep=E^u#il#B~%Z)t9HF*h!7Z*!E43u<p^Zgep?"
    "E^u#il#B~%Z)t9HF*z=9Z*!Dob#sgnVPkY@Z*Fs6aAk5|V`z15Ym`d}j0R+7c4=c}l#ByoaCMZ73UXy`VQpn!ZDDYfeUx=#E&"
)
OBSERVATION = base64.b85decode(
    "fCQCK0ssI20001tA8ciEZ(?tBE@5+dZew3*Zf0e2Wo~0-E@)+JaAk6Hl#CEmX>Da>PhxXra&}>KX>V?nlawielzo&aj0tpUZDn(G"
    "VQp}fM?u=cH&`=%>Wm0<X>Db5bY*aqO8|@uZ(?(0a&}>KX>V?neUvDS3Tkg@Zgem%aBp*zM?hHs000000E`N1Z)t9HF)na#bCgFw"
    "TcNKgYswpp3Tkg@Zges(aBp*zM?hXfUQpMRHjD~tZ)t9HGcIs%bCgFwU~-1Mp|2>63Tkg@Zgey*aBp*zM?hi2UQpMRHjD~tZ)t9H"
    "H7;;(bCgFwV-z*z4S7V23Tkg@Zge&-aBp*zM?hp{4S7ReQH%;|Z)t9HH!g5*bCgFwWwqrEc|%@|3Tkg@Zge;<aBp*zM?hx=yrHis"
    "Y>WzOZ)t9HIWBN-bCgFwXjhaq<qdj_3u<p^Zgep)E^u#ilt(~msB6j^@`sEIYHw+7bTKh5aBp*zM?h-%LtaqVl#B~%Z)t9HF)}W2"
    "Z*!DKKx|4H@`k*kj0<XSX>N2eGcIs%bCgFwZJP3iyrHm+3u<p^Zgep;E^u#ilt(~r>&hDPhP{jnYHw+7bTKt9aBp*zM?i2MP}h_-"
    "<%|nzZ)t9HF*Yu6Z*!DKKyb#qp|2=xj0<XSX>N2eH!g5*bCgFwac?MV${O>G3u<p^Zgep?E^u#ilt(~v7nC*S4SI|VYHw+7bTK(D"
    "aBp*zM?iAG000000E`55VRLJgj0A9Xb7+)xj0bIXb97&4Z<L62VlD"
)
"""Messages of LeRobot 0.4.4's ``RobotClient``, for a robot of 20 joints."""


@pytest.fixture(scope="module")
def server():
    return load("lerobot_server")


def test_messages_of_lerobots_client_are_read_and_planned_on(server):
    planning = server.Planning(shared_policy())
    planning.set_up(INSTRUCTIONS)
    assert planning.plan() is None
    planning.observe(OBSERVATION)
    step, time, actions = planning.plan()
    assert step == 0 and time > 1.7e9 and actions.shape == (8, 2)
    assert planning.plan() is None  # of an observation one plan
    vector = np.linspace(100.0, 300.0, 20)
    plan = shared_policy().plan(vector, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(actions, plan.actions[0, 1:9], rtol=1e-6)
    planning.observe(OBSERVATION)  # "must go": the client has run out of actions
    assert planning.plan()[0] == 0


def test_numbers_of_numpy_are_read_too(server, monkeypatch):
    class Named:
        """Pickled under the client's name."""

    observation = {"x": np.float64(1.5), "y": np.float32(2.5), "z": np.int64(3), "w": 4}
    module = ModuleType(server.HELPERS)
    Named.__module__, Named.__qualname__ = server.HELPERS, "TimedObservation"
    module.TimedObservation = Named
    record = Named()
    record.observation = observation
    for parent in ("lerobot", "lerobot.async_inference"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, server.HELPERS, module)
    data = pickle.dumps(record)
    assert server.read(data, "observation") == [{"x": 1.5, "y": 2.5, "z": 3.0, "w": 4}]


class Runs:
    """Pickled, it would run a function where it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_what_a_message_names_is_not_run(server, tmp_path):
    import os

    for hostile in (
        Runs(os.mkdir, str(tmp_path / "made")),
        Runs(eval, "1 / 0"),
        [Runs(np.load, "x")],
        torch.zeros(2),
        np.zeros(3),
        VirtualClock(),
        "text",
    ):
        with pytest.raises(InputError, match="a message can't be read: ") as refused:
            server.read(pickle.dumps(hostile), "observation")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "pickle exhausted"),
        (b"\x80\x04", "pickle exhausted"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "the opcodes LONG_BINPUT"),  # a memo of 2^31 places
        (b"\x80\x05\x96" + b"\0" * 8 + b".", "the opcodes BYTEARRAY8"),  # which may declare 2^63 bytes
        (b"\x80\x04X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
        (b"0" * (2**16 + 1), "65537 bytes are more than 65536"),
        (b"\x80\x04" + b"(" * 60_000, "pickle exhausted"),
        (b"\x80\x04]" + b"]\x85" * 30_000 + b".", "it holds a tuple"),
    ],
    ids=lambda value: repr(value[:8]),
)
def test_a_message_takes_no_more_memory_than_it_is_long(server, data, words):
    with pytest.raises(InputError, match=f"a message can't be read: .*{words}"):
        server.read(data, "observation")


@given(st.data())
def test_no_damaged_message_is_more_than_refused(data):
    server = load("lerobot_server")
    message = bytearray(data.draw(st.sampled_from([INSTRUCTIONS, OBSERVATION])))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    planning = server.Planning(shared_policy())
    planning.set_up(INSTRUCTIONS)
    for take in (planning.set_up, planning.observe):
        try:
            take(bytes(message))
        except InputError as error:
            assert "\n" not in str(error)


def test_a_client_with_other_joints_or_pictures_is_refused(server):
    spec = shared_policy().spec
    assert spec.obs_dim == 20
    for before, after, words in (
        (b"joint19.pos", b"joint18.pos", None),
        (b"observation.state", b"observation.image", "can't be read"),
    ):
        planning = server.Planning(shared_policy())
        data = INSTRUCTIONS.replace(before, after)
        assert data != INSTRUCTIONS
        if words is None:
            planning.set_up(data)
        else:
            with pytest.raises(InputError, match=words):
                planning.set_up(data)
    with pytest.raises(InputError, match="before the instructions"):
        server.Planning(shared_policy()).observe(OBSERVATION)
