"""Served plans equal local ones; no client can stop the server or make it grow."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gymnasium
import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from paradiffpolicy.benchmarks.hostile import (
    ATTACKS,
    PING,
    finish_opening,
    frame,
    half_open,
    mutated,
    raw_client,
)
from paradiffpolicy.benchmarks.timing import resident
from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.errors import InputError
from paradiffpolicy.history import History
from paradiffpolicy.observation import InvalidObservationError
from paradiffpolicy.planning.blending import Latest, RealTimeChunking
from paradiffpolicy.policy import InvalidPlanError, Policy
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.serving.batching import Batcher, planned_together
from paradiffpolicy.serving.connection import ALLOWANCE
from paradiffpolicy.serving.messages import MAX_ITEMS, MessageError, msgpack_numpy, pack, read, unpack
from paradiffpolicy.serving.protocol import (
    STATE,
    BusyError,
    PlanFormat,
    PlanJob,
    ServerError,
    generator_at,
    request_map,
    state_of,
)
from paradiffpolicy.serving.remote import RemotePolicy
from paradiffpolicy.serving.server import PolicyServer
from paradiffpolicy.serving.settings import ServerSettings
from paradiffpolicy.types import Committed, Plan

from .conftest import TINY, tiny_checkpoint

SMALL = replace(TINY, down_dims=(8,))
QUICK = {"solver": "ddim", "n_steps": 4, "driver": "rti", "iterations": 1}


@functools.cache
def tiny_policy(cls=Policy, **sampler):
    """Untrained; tests share it, since planning doesn't change it."""
    return cls.from_checkpoint(tiny_checkpoint(SMALL), spec_sampler(SMALL, **(sampler or QUICK)))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def windows(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 512, (batch, 2, 20)).astype(np.float32)


@contextlib.contextmanager
def running(policy: Policy, port: int = 0, **changes):
    """A server in a thread; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def made() -> PolicyServer:
        return PolicyServer(policy, "tiny", ServerSettings(port=port, **changes), MonotonicClock())

    server = wait(made())
    try:
        wait(server.start())
        yield server.uri
    finally:
        wait(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def get(uri: str, path: str, **headers: str) -> str:
    request = urllib.request.Request(uri.replace("ws", "http", 1) + path, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def metric(uri: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", get(uri, "/metrics"), flags=re.M)
    return float(found.group(1)) if found else 0.0


def until(condition) -> None:
    """Polls until the condition holds, for 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"


@contextlib.contextmanager
def client(uri: str, **options):
    """A plain websocket that has read the metadata."""
    with connect(uri, compression=None, proxy=None, **options) as connection:
        connection.metadata = unpack(connection.recv())
        yield connection


def threads_and_files() -> int:
    """Together: neither may grow."""
    return threading.active_count() + len(list(Path("/dev/fd").iterdir()))


def ask(connection, **request):
    connection.send(pack(request))
    answer = connection.recv(timeout=30)
    return answer if isinstance(answer, str) else unpack(answer)


def equal(one: Plan, other: Plan) -> None:
    for name in ("sample", "x0_hats", "iterations", "nfe"):
        assert torch.equal(getattr(one.solution, name), getattr(other.solution, name)), name
    for name in ("x_T", "z", "u"):
        assert torch.equal(getattr(one.solution.noise, name), getattr(other.solution.noise, name)), name
    assert torch.equal(one.actions, other.actions) and one.executed == other.executed


class Gated(Policy):
    """Plans only once its gate is open; says when it has started."""

    gate: threading.Event
    started: threading.Event

    def plan(self, *args, **kwargs):
        self.started.set()
        assert self.gate.wait(10)
        return super().plan(*args, **kwargs)


def gated() -> Gated:
    policy = tiny_policy.__wrapped__(Gated)
    vars(policy).update(gate=threading.Event(), started=threading.Event())
    return policy


POISON = 13.0


class Poisoned(Policy):
    """Has a plan full of NaN for an observation that starts with 13, and fails altogether for one with 14."""

    def plan(self, window, previous=None, **kwargs):
        plan = super().plan(window, previous, **kwargs)
        if (self.checked(window).numbers[..., 0] == POISON).any():
            raise InvalidPlanError("the plan has NaN or infinity")
        if (self.checked(window).numbers[..., 0] == POISON + 1).any():
            raise RuntimeError("out of memory")
        return plan


class Canned(Policy):
    """Thinks once."""

    def plan(self, window, previous=None, **kwargs):
        plans = self.__dict__.setdefault("plans", {})
        batch = len(self.checked(window))
        if batch not in plans:
            plans[batch] = super().plan(window, **kwargs)
        return plans[batch]


# ---------------------------------------------------------------------------------------- messages


def test_openpis_bytes_are_read_and_written():
    array = np.array([[1.5, -2.0, 3.25]], np.float32)
    by_hand = (
        b"\x82"
        b"\xabobservation\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x0c"
        + array.tobytes()
        + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x01\x03"
        b"\xa1k\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x07\xc4\x05dtype\xa3<i8"
    )
    assert pack({"observation": array, "k": np.int64(7)}) == by_hand
    read = unpack(by_hand)
    np.testing.assert_array_equal(read["observation"], array)
    assert read["observation"].flags.writeable and read["k"] == 7 and read["k"].dtype == np.int64
    assert pack(torch.from_numpy(array)) == pack(array)


numeric = st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(endianness="?"), hnp.floating_dtypes())
numeric = numeric.filter(lambda dtype: dtype.itemsize <= 8)
arrays = hnp.arrays(numeric, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        native = one.astype(one.dtype.newbyteorder("="))
        return native.dtype == other.dtype and native.tobytes() == other.tobytes()
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one == other or one != one)


@settings(max_examples=100, deadline=None)
@given(values)
def test_what_is_packed_is_unpacked(value):
    read = unpack(pack(value))
    assert same(value, read)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data):
    with contextlib.suppress(MessageError):
        unpack(data)


def array_map(**changes):
    entries = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return {key.encode(): value for key, value in entries.items() if value is not None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (array_map(shape=[3]), r"shape \[3\] and dtype float32 can't have 8 bytes"),
        (array_map(shape=[-2]), "whole numbers from 0 on"),
        (array_map(shape=[2.0]), "whole numbers from 0 on"),
        (array_map(shape=[1] * 9), "at most 8"),
        (array_map(shape="2"), "whole numbers from 0 on"),
        (array_map(shape=[0, 2**62], data=b""), "isn't msgpack"),
        (array_map(dtype="|O"), "isn't one of numbers"),
        (array_map(dtype="f4,f4"), "isn't one of numbers"),
        (array_map(dtype="<c8"), "isn't one of numbers"),
        (array_map(dtype="<M8[s]"), "isn't one of numbers"),
        (array_map(dtype=b"<f4"), "isn't one of numbers"),
        (array_map(dtype="|b1", shape=[8], data=b"\2" * 8), "zeros and ones"),
        (array_map(data="text"), "must be bytes, not str"),
        (array_map(data=None), "needs b'data'"),
        (array_map(more=1), "and no more"),
        (array_map(__ndarray__=False), "needs b'data'"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"}, "int8 can't be 300"),
        ({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}, "float32 can't be '1'"),
        ({b"__npgeneric__": True, b"data": True, b"dtype": "<i4"}, "int32 can't be True"),
        ({b"__npgeneric__": True, b"data": 1}, "a scalar in the message needs"),
        ({b"nd": 1, b"type": "<f4", b"data": bytes(8)}, "a scalar of dtype|can't have 8 bytes"),
        ({b"nd": True, b"type": "<f4", b"data": bytes(8)}, "an array in the message needs"),
        ({b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b""}, "isn't one of numbers"),
        ({"deep": msgpack.ExtType(4, b"x")}, "an extension of type 4"),
        ([0] * (MAX_ITEMS + 1), "isn't msgpack"),
        ([[0] * (MAX_ITEMS // 4)] * 5, f"over {MAX_ITEMS} entries"),
    ],
)
def test_malformed_arrays_are_refused(value, message):
    with pytest.raises(MessageError, match=message):
        unpack(msgpack.packb(value))


@pytest.mark.parametrize("value", [object(), np.array(["a"]), np.array([None]), {1j}, 2**70, [{"a": print}]])
def test_what_is_no_message_is_not_packed(value):
    with pytest.raises(MessageError, match="can't be sent"):
        pack(value)


# ---------------------------------------------------------------------------------- remote = local


@pytest.mark.parametrize(
    "sampler",
    [
        {"solver": "ddim", "n_steps": 6, "driver": "rti", "iterations": 2},
        {"solver": "ddpm", "n_steps": 6, "driver": "rti", "iterations": 2},
        {"solver": "ddpm", "n_steps": 12},
        {"solver": "ddpm", "n_steps": 12, "driver": "picard", "window": 5},
        {"solver": "ddpm", "n_steps": 12, "driver": "speculative"},
        {"solver": "ddim", "n_steps": 5, "driver": "picard", "window": 5, "start": "warm"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_remote_plan_is_the_local_one_bit_for_bit(sampler):
    policy = tiny_policy(**sampler)
    with running(policy) as uri, RemotePolicy(uri) as remote:
        assert remote.spec == policy.spec
        here, there = seeded(1, 2), seeded(1, 2)
        local = served = None
        for k in range(4):
            steps = {} if k < 2 else {"executed_steps": 3}
            window = windows(2, seed=k)
            local = policy.plan(window, local, generator=here, **steps)
            served = remote.plan(window, served, generator=there, **steps)
            equal(local, served)
        assert [*map(state_of, here)] == [*map(state_of, there)]
        equal(policy.plan(windows(2), generator=7), remote.plan(windows(2), generator=7))
        equal(policy.plan(windows(1)[0, 0]), remote.plan(windows(1)[0, 0]))  # one vector, the default seed


def test_what_lies_far_from_zero_is_served_with_its_digits():
    """Observations, actions and actions to keep, near 5 million with a range of 0.01."""
    near = torch.linspace(0, 0.01, 16, dtype=torch.float64)[:, None]
    far = {
        f"{name}_normalizer": Normalizer.fit(5e6 + near.expand(16, dim))
        for name, dim in (("observation", SMALL.obs_dim), ("action", SMALL.action_dim))
    }
    policy = Policy.from_checkpoint(replace(tiny_checkpoint(SMALL), **far), spec_sampler(SMALL, **QUICK))
    window, kept = 5e6 + near[:2].expand(2, 20), Committed(5e6 + near.expand(1, 16, 2), torch.ones(1, 16))
    with running(policy) as uri, RemotePolicy(uri) as remote:
        local = policy.plan(window, generator=1, committed=kept)
        served = remote.plan(window, generator=1, committed=kept)
        equal(local, served)
        equal(policy.plan(window, local, generator=2), remote.plan(window, served, generator=2))
    assert served.actions.dtype == torch.float64 and served.actions.std() > 1e-3


def test_a_control_loop_cannot_tell():
    policy = tiny_policy()

    def actions(planned, blending):
        clock, (generator,) = VirtualClock(), seeded(5)
        robot = EnvRobot(gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints"), 3, clock)
        controller = Controller(
            planned, 10, generator=generator, planner="inline", clock=clock, blending=blending
        )
        return ControlLoop(controller, robot).run(20).ticks["action"].tolist()

    with running(policy) as uri, RemotePolicy(uri) as remote:
        for blending in (Latest, RealTimeChunking):
            assert actions(remote, blending) == actions(policy, blending)


def test_requests_that_commit_are_planned_together_and_apart_from_others():
    policy = tiny_policy()
    states = [(state_of(each),) for each in seeded(1, 2)]
    kept = [Committed(torch.full((1, 16, 2), 100.0 * k), torch.linspace(1, 0, 16)[None]) for k in (1, 2)]
    windowed = [policy.checked(windows(1, seed=k)) for k in range(2)]
    jobs_ = [PlanJob(windowed[k], None, states[k], None, kept[k]) for k in range(2)]
    together = planned_together(policy, jobs_)
    for job, result in zip(jobs_, together, strict=True):
        (alone,) = planned_together(policy, [job])
        np.testing.assert_allclose(result.plan.actions, alone.plan.actions, atol=1e-3, rtol=0)
    assert together[0].plan.actions[0, 0].tolist() == pytest.approx([100, 100], abs=1e-3)


def test_errors_come_back_as_what_they_were():
    policy = tiny_policy(Poisoned)
    bad = windows(1)
    bad[0, 1, 4] = np.nan
    poisoned, broken = windows(1), windows(1)
    poisoned[0, 0, 0], broken[0, 0, 0] = POISON, POISON + 1
    with running(policy, max_batch=2) as uri, RemotePolicy(uri) as remote:
        with pytest.raises(InvalidObservationError, match="step 1, column 4"):
            remote.plan(bad, generator=seeded(0))
        with pytest.raises(
            InvalidObservationError, match=r"\(1, 2, 7\) for task .pusht. must be \[obs_dim=20\]"
        ):
            remote.plan(windows(1)[:, :, :7], generator=seeded(0))
        with pytest.raises(InputError, match="2 observation windows need as many generators, got 1"):
            remote.plan(windows(2), generator=seeded(0))
        with pytest.raises(InputError, match="1 to max_batch=2 at a time"):
            remote.plan(windows(3), generator=seeded(0, 1, 2))
        with pytest.raises(InputError, match="executed_steps=17 must be a whole number from 0 to 16"):
            remote.plan(windows(1), generator=seeded(0), executed_steps=17)
        (here,), (there,) = seeded(0), seeded(0)
        for planner, generator in ((policy, here), (remote, there)):
            with pytest.raises(InvalidPlanError, match="NaN"):
                planner.plan(poisoned, generator=generator)
        assert state_of(here) == state_of(there) != state_of(seeded(0)[0])
        with pytest.raises(ServerError, match=r"the server failed \(RuntimeError\): its log"):
            remote.plan(broken, generator=seeded(0))
        equal(remote.plan(windows(1), generator=here), policy.plan(windows(1), generator=there))


def impossible_states() -> list[bytes]:
    """States that no generator can have; torch takes most of them."""
    made = []
    for changes in (
        {"left": 624, "next": 624},
        {"left": 1, "next": 1},
        {"left": 0, "next": 625},
        {"left": 625, "next": 0},
        {"left": 624, "next": 0},
        {"seeded": 0},
        {"words": np.full(624, 2**32, np.uint64)},
        {"has_float": 2},
        {"has_double": 1, "double": np.nan},
        {"has_float": 1, "float": np.inf},
    ):
        fields = np.frombuffer(bytearray(state_of(seeded(0)[0])), STATE)
        for name, value in changes.items():
            fields[name] = value
        made.append(fields.tobytes())
    return made


def test_every_state_of_a_generator_is_taken():
    (generator,) = seeded(3)
    for draws in (0, 1, 622, 1, 1, 1, 5):
        torch.rand(draws, generator=generator)
        state = state_of(generator)
        assert state_of(generator_at(state)) == state
    for dtype in (torch.float32, torch.float64):  # with a normal number drawn in advance
        torch.randn(3, generator=generator, dtype=dtype)
        torch.randn((), generator=generator, dtype=dtype)
        state = state_of(generator)
        assert state_of(generator_at(state)) == state


def test_a_plan_of_another_policy_is_refused():
    policy = tiny_policy()
    good = policy.plan(windows(1), generator=seeded(0))
    form = PlanFormat.of(policy)
    sent = form.plan_map(good)
    cases = [
        ({**sent, "x0_hats": sent["x0_hats"][1:]}, r"previous.x0_hats must be float32 \(4, 1, 16, 2\)"),
        ({**sent, "x_T": sent["x_T"].double()}, "previous.x_T must be float32"),
        ({**sent, "sample": sent["sample"] * float("nan")}, "previous.sample has NaN"),
        ({**sent, "iterations": [1]}, "previous.iterations must be int64"),
        ({**sent, "z": sent["x0_hats"]}, "previous has no place for 'z'"),
        ({k: v for k, v in sent.items() if k != "actions"}, "previous lacks 'actions'"),
        ([], "previous must be a map"),
    ]
    state = state_of(seeded(0)[0])
    with running(policy) as uri, client(uri) as connection:
        for previous, message in cases:
            answer = ask(connection, **request_map(windows(1), previous, [state]))
            assert answer["error"] == "message" and re.search(message, answer["message"]), answer
        for states in (
            *([state] for state in impossible_states()),
            [state[1:]],
            [b""],
            [bytes(len(state))],
            [1],
            state,
            [state, state],
        ):
            answer = ask(connection, **request_map(windows(1), None, states))
            assert answer["error"] == "message" and "state" in answer["message"]
        answer = ask(connection, plan={"window": windows(1), "generater": [state], "generator": [state]})
        assert "no place for 'generater'; did you mean 'generator'?" in answer["message"]
        assert ask(connection, **request_map(windows(1), sent, [state]))["plan"]["iterations"].tolist() == [1]


# ---------------------------------------------------------------------------------------- sessions


def test_the_published_clients_conversation(caplog):
    """Sends and reads what openpi's WebsocketClientPolicy does, with msgpack alone."""
    policy = tiny_policy()
    observation = windows(1)[0, 0]
    packed = {
        b"__ndarray__": True,
        b"data": observation.tobytes(),
        b"dtype": observation.dtype.str,
        b"shape": observation.shape,
    }
    with (
        running(policy, api_key="abc") as uri,
        connect(
            uri,
            compression=None,
            max_size=None,
            proxy=None,
            additional_headers={"Authorization": "Api-Key abc"},
        ) as connection,
    ):
        metadata = msgpack.unpackb(connection.recv())
        assert metadata["task"] == "pusht" and metadata["n_action_steps"] == 8
        connection.send(msgpack.packb({"observation/state": packed}))
        answer = connection.recv()
        assert isinstance(answer, bytes)  # text would be an error
        answer = msgpack.unpackb(answer)
        actions = answer["actions"]
        actions = np.ndarray(actions[b"shape"], np.dtype(actions[b"dtype"]), buffer=actions[b"data"])
        assert actions.shape == (8, 2) and actions.dtype == np.float32
        assert answer["server_timing"]["infer_ms"] > 0 and "prev_total_ms" not in answer["server_timing"]
        assert answer["policy_timing"]["infer_ms"] > 0
        image = {**packed, b"data": bytes(48), b"dtype": "|u1", b"shape": (4, 4, 3)}
        prompt = {b"__npgeneric__": True, b"data": "push", b"dtype": "<U4"}
        for ignored in (["'observation/image'", "'prompt'"], None):  # said once
            connection.send(
                msgpack.packb({"observation": packed, "prompt": prompt, "observation/image": image})
            )
            again = msgpack.unpackb(connection.recv())
            assert again["server_timing"]["prev_total_ms"] > 0 and again["iterations"] == 1
            assert again.get("ignored") == ignored
        connection.send(msgpack.packb({str(k): 0 for k in range(65)}))
        assert connection.recv() == "the request has over 64 entries that the policy doesn't use"
    assert [record.getMessage() for record in caplog.records] == [
        "clients send 'observation/image', 'prompt', which this policy doesn't use: ignored"
    ]


def test_msgpack_numpys_arrays_are_taken_and_answered_in_kind():
    policy, observation = tiny_policy(), windows(1)[0]
    array = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2, 20], b"data": observation.tobytes()}
    seed = {b"nd": False, b"type": "<i8", b"data": (5).to_bytes(8, "little")}
    with running(policy) as uri, client(uri) as connection:
        connection.send(msgpack.packb({b"observation": array, b"seed": seed, b"prompt": b"push"}))
        answer = msgpack.unpackb(connection.recv())
    actions = answer["actions"]
    assert actions[b"nd"] is True and actions[b"kind"] == b"" and actions[b"type"] == "<f4"
    got = np.frombuffer(actions[b"data"], actions[b"type"]).reshape(actions[b"shape"])
    np.testing.assert_array_equal(got, policy.plan(observation, generator=5).executed_actions[0])
    assert answer["ignored"] == ["'prompt'"]
    value = {"a": np.float32([[1, 2]]), "b": np.int64(3)}
    read_back, encode = read(pack(value, msgpack_numpy))
    assert encode is msgpack_numpy and same(value["a"], read_back["a"]) and read_back["b"] == value["b"]


def test_a_session_keeps_history_plan_and_noise():
    policy = tiny_policy()
    observations = windows(5).reshape(-1, 20)
    history, plan, (generator,) = History(2), None, seeded(11)
    with running(policy) as uri, client(uri) as connection:
        for k, observation in enumerate(observations):
            history.push(observation)
            plan = policy.plan(history.window(), plan, generator=generator, executed_steps=1)
            seed = {"seed": 11} if k == 0 else {}
            answer = ask(connection, observation=observation, executed_steps=1, **seed)
            np.testing.assert_array_equal(answer["actions"], plan.executed_actions[0])
            np.testing.assert_array_equal(answer["plan"], plan.actions[0])
            assert answer["iterations"] == (4 if k == 0 else 1)
        # A whole window replaces the history, a list is as good as an array, a reset forgets.
        plan = policy.plan(windows(1, 9), plan, generator=generator)
        answer = ask(connection, observation=windows(1, 9)[0].tolist())
        np.testing.assert_array_equal(answer["plan"], plan.actions[0])
        plan = policy.plan(windows(1, 9)[:, [1, 1]], None, generator=generator)
        answer = ask(connection, observation=windows(1, 9)[0, 1], reset=True)
        np.testing.assert_array_equal(answer["plan"], plan.actions[0])
        assert answer["iterations"] == 4


def test_sessions_have_noise_of_their_own_and_the_same_in_every_run():
    def first_plans(**changes):
        with running(tiny_policy(), **changes) as uri, client(uri) as one, client(uri) as other:
            return [ask(c, observation=windows(1)[0])["plan"].tolist() for c in (one, other)]

    plans = first_plans()
    assert plans[0] != plans[1] and plans == first_plans() and plans[0] != first_plans(seed=1)[0]


def test_a_bad_observation_makes_a_session_begin_anew():
    bad = windows(1)[0, 0]
    bad[7] = np.inf
    cases = [
        ({"observation": bad}, "NaN or infinity at step 1, column 7"),
        ({"observation": bad[:3]}, r"has shape \(3,\), the policy needs \(20,\) or a window \(2, 20\)"),
        ({"observation": ["1"] * 20}, "must be an array or a list of numbers"),
        ({"observation": [[1.0], [2.0, 3.0]]}, "rows differ in length"),
        ({"observation": [1e300] * 20}, "NaN or infinity at step 1, column 0"),
    ]
    with running(tiny_policy()) as uri, client(uri) as connection:
        for request, message in cases:
            assert ask(connection, observation=windows(1)[0])["iterations"] == 4
            assert ask(connection, observation=windows(1)[0, 0])["iterations"] == 1
            answer = ask(connection, **request)
            assert isinstance(answer, str) and re.search(message, answer), answer
            assert "\n" not in answer


def test_a_session_forgets_what_failed_by_the_servers_fault():
    policy, (generator,) = tiny_policy(Poisoned), seeded(3)
    first, broken, second = windows(3)[:, 0]
    broken[0] = POISON + 1
    with running(policy) as uri, client(uri) as connection:
        plan = policy.plan(np.stack((first, first)), generator=generator)
        np.testing.assert_array_equal(ask(connection, observation=first, seed=3)["plan"], plan.actions[0])
        assert ask(connection, observation=broken).startswith("the server failed (RuntimeError)")
        with pytest.raises(RuntimeError):
            policy.plan(np.stack((first, broken)), plan, generator=generator)
        plan = policy.plan(np.stack((first, second)), plan, generator=generator)
        np.testing.assert_array_equal(ask(connection, observation=second)["plan"], plan.actions[0])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "needs one 'observation'"),
        ({"observation": 0, "observation/state": 0}, "needs one 'observation'"),
        ({"observation": 0, "reste": True}, "did you mean 'reset'?"),
        ({"observation": 0, "reset": 1}, "reset=1 must be true or false"),
        ({"observation": 0, "executed_steps": -1}, "executed_steps=-1 must be 0 to 16"),
        ({"observation": 0, "executed_steps": 1.5}, "executed_steps=1.5 must be a whole number"),
        ({"observation": 0, "seed": -1}, "seed=-1 must be"),
        ({"plan": {}, "observation": 0}, "the request has no place for 'observation'"),
        ({"plan": None}, "plan must be a map"),
    ],
)
def test_bad_requests_change_nothing(request_, message):
    with running(tiny_policy()) as uri, client(uri) as connection:
        observation = windows(1)[0]
        assert ask(connection, observation=observation)["iterations"] == 4
        if request_.get("observation") == 0:
            request_ = {**request_, "observation": observation}
        answer = ask(connection, **request_)
        assert message in (answer if isinstance(answer, str) else answer["message"])
        assert ask(connection, observation=observation)["iterations"] == 1


# ---------------------------------------------------------------------------------------- batching


def jobs(policy: Policy, batches: list[int], previous: bool = False, executed_steps=None) -> list[PlanJob]:
    made = []
    for k, batch in enumerate(batches):
        window = policy.checked(windows(batch, seed=k))
        generators = seeded(*range(10 * k, 10 * k + batch))
        last = policy.plan(window, generator=generators) if previous else None
        made.append(PlanJob(window, last, tuple(map(state_of, generators)), executed_steps))
    return made


class Plugged:
    """A policy whose first plan lasts until it is told to go on, so that more can be asked meanwhile."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.started, self.go_on = policy, threading.Event(), threading.Event()

    def plan(self, *args, **kwargs):
        self.started.set()
        assert self.go_on.wait(30)
        return self._policy.plan(*args, **kwargs)


def planned(policy: Policy, asked: list[PlanJob], max_batch: int = 8, max_queue: int = 64):
    """All asked while the thread plans something else; the results (a BusyError where that came), and
    the batches' sizes."""
    sizes, plugged = [], Plugged(policy)

    async def all_at_once():
        batcher = Batcher(plugged, max_batch, max_queue, MonotonicClock(), lambda n, s: sizes.append(n))
        (other,) = jobs(policy, [1])
        plug = asyncio.create_task(batcher.plan(other))
        await asyncio.to_thread(plugged.started.wait, 30)
        tasks = [asyncio.create_task(batcher.plan(job)) for job in asked]
        await asyncio.sleep(0)  # each asks
        plugged.go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await plug
        batcher.stop()
        return results

    return asyncio.run(all_at_once()), sizes[1:]


@pytest.mark.parametrize("previous", [False, True])
def test_together_is_as_one_by_one(previous):
    policy = tiny_policy(solver="ddpm", n_steps=5, driver="rti", iterations=2)
    asked = jobs(policy, [1, 2, 1, 3], previous)
    results, sizes = planned(policy, asked)
    assert sizes == [7]
    for job, result in zip(asked, results, strict=True):
        generators = [generator_at(state) for state in job.generators]
        alone = policy.plan(job.window, job.previous, generator=generators)
        np.testing.assert_allclose(result.plan.solution.sample, alone.solution.sample, atol=1e-5, rtol=0)
        np.testing.assert_allclose(result.plan.solution.x0_hats, alone.solution.x0_hats, atol=1e-5, rtol=0)
        assert torch.equal(result.plan.solution.noise.z, alone.solution.noise.z)
        assert result.states == tuple(map(state_of, generators))


def test_only_what_fits_is_planned_together():
    policy = tiny_policy()
    cold, warm = jobs(policy, [1, 1, 1]), jobs(policy, [1, 1], previous=True)
    stepped = jobs(policy, [1], previous=True, executed_steps=2)
    asked = [cold[0], warm[0], cold[1], stepped[0], warm[1], cold[2]]
    results, sizes = planned(policy, asked)
    assert sizes == [3, 2, 1] and all(isinstance(result.plan, Plan) for result in results)
    assert planned(policy, jobs(policy, [3, 2, 1, 3]), max_batch=4)[1] == [4, 2, 3]
    assert planned(policy, jobs(policy, [1] * 5), max_batch=1)[1] == [1] * 5


def test_spare_jobs_wait_for_those_that_are_needed():
    policy = tiny_policy()
    order, plugged = [], Plugged(policy)

    async def asked_in_turn():
        clock = VirtualClock()
        batcher = Batcher(plugged, 8, 64, clock, lambda n, seconds: order.append(n))
        plug, *needed = [asyncio.create_task(batcher.plan(job)) for job in jobs(policy, [1])]
        await asyncio.to_thread(plugged.started.wait, 30)
        spare = [asyncio.create_task(batcher.plan(job, spare=True)) for job in jobs(policy, [1, 1])]
        needed = [asyncio.create_task(batcher.plan(job)) for job in jobs(policy, [2, 3])]
        await asyncio.sleep(0)
        plugged.go_on.set()
        await asyncio.gather(plug, *spare, *needed)
        clock.advance(60)  # no robot asks any more
        plugged.go_on.clear()
        plugged.started.clear()
        spare = [asyncio.create_task(batcher.plan(job, spare=True)) for job in jobs(policy, [1, 1, 1])]
        await asyncio.to_thread(plugged.started.wait, 30)
        plugged.go_on.set()
        await asyncio.gather(*spare)
        batcher.stop()

    asyncio.run(asked_in_turn())
    assert order[:4] == [1, 5, 1, 1] and order[4:] in ([1, 2], [2, 1], [3])


def test_a_client_that_asks_faster_than_a_robot_makes_way_for_robots():
    policy, order = gated(), []

    class Noted(Gated):
        def plan(self, window, *args, **kwargs):
            order.append(float(window.numbers[0, 0, 0]))
            return super().plan(window, *args, **kwargs)

    policy.__class__ = Noted
    first, greedys, robots = windows(3)
    with running(policy, max_batch=1) as uri, contextlib.ExitStack() as stack:
        other, greedy, robot = (stack.enter_context(client(uri)) for _ in range(3))
        policy.gate.set()
        for _ in range(int(policy.spec.control_hz)):  # a second's worth
            ask(greedy, observation=greedys)
        policy.gate.clear()
        policy.started.clear()
        order.clear()
        other.send(pack({"observation": first}))
        assert policy.started.wait(10)
        for count, connection, window in ((1, greedy, greedys), (2, robot, robots)):
            connection.send(pack({"observation": window}))
            until(lambda count=count: metric(uri, "paradiffpolicy_queue_length") == count)
        policy.gate.set()
        for connection in (other, robot, greedy):
            assert "actions" in unpack(connection.recv(timeout=10))
    assert order == [first[0, 0], robots[0, 0], greedys[0, 0]]


def test_a_bad_request_harms_no_other_in_its_batch():
    policy = tiny_policy(Poisoned)
    asked = jobs(policy, [1] * 4)
    asked[1].window.numbers[0, 0, 0], asked[2].window.numbers[0, 0, 0] = POISON, POISON + 1
    results, sizes = planned(policy, asked)
    assert sizes == [4]
    assert isinstance(results[1].plan, InvalidPlanError) and isinstance(results[2].plan, RuntimeError)
    for k in (0, 3):
        generators = [generator_at(state) for state in asked[k].generators]
        equal(results[k].plan, policy.plan(asked[k].window, generator=generators))
        assert results[k].states == tuple(map(state_of, generators))


def test_a_bad_observation_never_reaches_the_batch():
    policy = gated()
    bad = windows(1)
    bad[0, 0, 0] = np.nan
    state = state_of(seeded(0)[0])
    with running(policy) as uri, client(uri) as one, client(uri) as other, client(uri) as third:
        one.send(pack(request_map(windows(1), None, [state])))
        assert policy.started.wait(10)
        other.send(pack(request_map(windows(1), None, [state])))
        answer = ask(third, **request_map(bad, None, [state]))  # while the others still wait
        assert answer["error"] == "invalid_observation"
        policy.gate.set()
        for connection in (one, other):
            assert "plan" in unpack(connection.recv(timeout=10))


def test_a_full_queue_answers_busy_at_once():
    policy = gated()
    results = []
    state = state_of(seeded(0)[0])
    with running(policy, max_batch=1, max_queue=1) as uri, client(uri) as one, client(uri) as other:
        one.send(pack({"observation": windows(1)[0]}))
        assert policy.started.wait(10)
        other.send(pack({"observation": windows(1)[0]}))
        until(lambda: metric(uri, "paradiffpolicy_queue_length") == 1)
        with client(uri) as third:
            results.append(ask(third, observation=windows(1)[0]))
            results.append(ask(third, **request_map(windows(1), None, [state]))["message"])
        with (
            RemotePolicy(uri, clock=VirtualClock()) as remote,
            pytest.raises(ServerError, match=r"busy for 10 s: busy: max_queue=1"),
        ):
            remote.plan(windows(1), generator=seeded(0))
        assert all(result.startswith("busy: max_queue=1 requests wait already") for result in results)
        policy.gate.set()
        for connection in (one, other):
            assert unpack(connection.recv(timeout=10))["iterations"] == 4
        assert metric(uri, 'paradiffpolicy_errors_total{kind="busy"}') > 2
    asked = jobs(tiny_policy(), [1] * 5)
    results, _ = planned(tiny_policy(), asked, max_batch=1, max_queue=2)
    assert [isinstance(result, BusyError) for result in results] == [False, False, True, True, True]


# -------------------------------------------------------------------------------------- who may, TLS


def test_health_and_metrics():
    with running(tiny_policy()) as uri:
        assert get(uri, "/healthz") == "OK\n"
        with client(uri) as connection:
            ask(connection, observation=windows(1)[0])
            ask(connection, observation=0)
            assert metric(uri, "paradiffpolicy_sessions") == 1
        text = get(uri, "/metrics")
        for line in (
            'paradiffpolicy_requests_total{kind="session"} 2.0',
            'paradiffpolicy_errors_total{kind="invalid_observation"} 1.0',
            'paradiffpolicy_batch_size_bucket{le="1.0"} 1.0',
            "paradiffpolicy_inference_seconds_count 1.0",
            "paradiffpolicy_request_seconds_count 2.0",
            "paradiffpolicy_queue_length 0.0",
        ):
            assert line in text
        with pytest.raises(urllib.error.HTTPError, match="426"):
            get(uri, "/")


def test_an_api_key_is_asked_for():
    with running(tiny_policy(), api_key="right") as uri:
        assert get(uri, "/healthz") == "OK\n"
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "right"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(uri, "/metrics", **headers)
            with pytest.raises(InvalidStatus, match="401"), client(uri, additional_headers=headers):
                pass
        assert "paradiffpolicy_sessions" in get(uri, "/metrics", Authorization="Api-Key right")
        for key in (None, "wrong"):
            with pytest.raises(ServerError, match="status 401: wrong or no API key"):
                RemotePolicy(uri, key)
        with RemotePolicy(uri, "right") as remote:
            remote.warm_up()
        twice = [("Authorization", "Api-Key right"), ("Authorization", "Api-Key right")]
        with pytest.raises(InvalidStatus, match="401"), client(uri, additional_headers=twice):
            pass


def make_certificate(folder, name: str):
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=test",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_tls(tmp_path):
    certificate, key = make_certificate(tmp_path, "one")
    other, _ = make_certificate(tmp_path, "other")
    policy = tiny_policy()
    with running(policy, certificate=certificate, private_key=key) as uri:
        assert uri.startswith("wss://")
        with RemotePolicy(uri, certificate=certificate) as remote:
            equal(remote.plan(windows(1), generator=seeded(0)), policy.plan(windows(1), generator=seeded(0)))
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(uri.replace("wss", "https") + "/healthz", context=context) as response:
            assert response.read() == b"OK\n"
        for trusted in (other, None):
            with pytest.raises(ServerError, match="a certificate that isn't trusted"):
                RemotePolicy(uri, certificate=trusted)
        with pytest.raises(ServerError, match="isn't a policy server"):
            RemotePolicy(uri.replace("wss", "ws"), clock=VirtualClock())
    with pytest.raises(InputError, match="can't be used"):
        ServerSettings(certificate=certificate, private_key=other).tls()


# -------------------------------------------------------------------------------- what clients may do


def test_a_message_that_is_too_large_closes_its_connection_alone():
    with running(tiny_policy(), max_message=10_000) as uri, client(uri) as other:
        with client(uri) as connection:
            connection.send(bytes(10_001))
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=10)
            assert closed.value.rcvd.code == 1009
        assert ask(other, observation=windows(1)[0])["iterations"] == 4
        with RemotePolicy(uri) as remote:
            with pytest.raises(InputError, match="over the server's max_message=10000"):
                remote.plan(windows(2), generator=seeded(0, 1))
            assert remote.plan(windows(1), generator=seeded(0)).solution.iterations.tolist() == [4]


def test_connections_are_bounded():
    with running(tiny_policy(), max_sessions=2) as uri, client(uri), client(uri) as last:
        with pytest.raises(InvalidStatus, match="503"), client(uri):
            pass
        with pytest.raises(ServerError, match=r"within 10 s \(max_sessions=2 connections are open"):
            RemotePolicy(uri, clock=VirtualClock())
        assert get(uri, "/healthz") == "OK\n"
        last.close()
        until(lambda: metric(uri, "paradiffpolicy_sessions") == 1)
        with client(uri) as another:
            assert ask(another, observation=windows(1)[0])["iterations"] == 4


def test_a_client_that_vanishes_in_the_middle_of_a_message():
    message = frame(pack({"observation": windows(1)[0]}))
    with running(tiny_policy()) as uri, client(uri) as other:
        for cut in (1, 9, 13, len(message) // 2, len(message) - 1, len(message)):
            raw = raw_client(uri)
            raw.sendall(message[:cut])
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            raw.close()
        raw_client(uri).close()
        until(lambda: metric(uri, "paradiffpolicy_sessions") == 1)
        assert ask(other, observation=windows(1)[0])["iterations"] == 4


def test_a_client_that_never_reads_is_cut_off():
    policy, state = tiny_policy(Canned), state_of(seeded(0)[0])
    message = frame(pack(request_map(windows(128), None, [state] * 128)))  # its answer has 0.8 MB
    with running(policy, max_batch=128, send_timeout=0.2) as uri, client(uri) as other:
        raw = raw_client(uri, receive_buffer=4096)
        with contextlib.suppress(OSError):  # what it sends is no longer read, or it is cut off
            for _ in range(40):
                raw.sendall(message)
        until(lambda: metric(uri, 'paradiffpolicy_errors_total{kind="slow_client"}') == 1)
        until(lambda: metric(uri, "paradiffpolicy_sessions") == 1)
        raw.close()
        assert "actions" in ask(other, observation=windows(1)[0])


def read_until(raw: socket.socket, mark: bytes, times: int = 1) -> None:
    received = b""
    while received.count(mark) < times:
        received += raw.recv(2**16)
        assert received, "the connection has ended"


def recv_all(raw: socket.socket) -> bytes:
    """Reads until the server closes or cuts the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while more := raw.recv(2**16):
            received += more
    return received


def cut(uri: str, why: str) -> float:
    return metric(uri, f'paradiffpolicy_errors_total{{kind="{why}"}}')


def test_a_client_that_pings_and_never_reads_is_cut_off():
    with running(tiny_policy()) as uri, client(uri) as other:
        raw = raw_client(uri, receive_buffer=4096)
        with contextlib.suppress(OSError):
            for _ in range(100):
                raw.sendall(PING * 1000)
        until(lambda: cut(uri, "flood") == 1)
        assert ask(other, observation=windows(1)[0])["iterations"] == 4
        assert recv_all(raw).count(b"\x8a\x00") <= 2 * ALLOWANCE  # pongs
        raw.close()
        until(lambda: metric(uri, "paradiffpolicy_sessions") == 1)


def fragmented(payload: bytes, n: int) -> bytes:
    """A masked binary message in n frames."""
    parts = [payload[k * len(payload) // n : (k + 1) * len(payload) // n] for k in range(n)]
    frames = [frame(part) for part in parts]
    heads = [0x02, *[0x00] * (n - 2), 0x80]
    return b"".join(bytes([head]) + each[1:] for head, each in zip(heads, frames, strict=True))


def test_messages_may_come_in_parts_but_not_run_ahead():
    policy, message = tiny_policy(Canned), pack({"observation": windows(1)[0]})
    with running(policy) as uri:
        with contextlib.closing(raw_client(uri)) as raw:
            for _ in range(ALLOWANCE // 100 + 2):  # more frames than the allowance, but all answered
                raw.sendall(fragmented(message, 100))
                read_until(raw, b"server_timing")
            raw.sendall(frame(b"\0") * 2 * ALLOWANCE)
            assert b"too many" in recv_all(raw)
        with contextlib.closing(raw_client(uri)) as raw:
            raw.sendall(b"\x02" + frame(b"")[1:] + b"\0\x80\0\0\0\0" * ALLOWANCE)  # empty fragments
            assert b"too many" in recv_all(raw)
        until(lambda: cut(uri, "flood") == 2)


def test_errors_are_answered_no_faster_than_the_allowance_grows(monkeypatch):
    monkeypatch.setattr("paradiffpolicy.serving.connection.PER_SECOND", 1e-3)
    with running(tiny_policy(Canned)) as uri, client(uri) as bad, client(uri) as other:
        answers = 0
        with contextlib.suppress(TimeoutError):
            while True:
                bad.send(b"nonsense")
                bad.recv(timeout=0.2)
                answers += 1
        assert ALLOWANCE / 2 - 1 <= answers <= ALLOWANCE / 2 + 1
        assert "actions" in ask(other, observation=windows(1)[0])
        assert metric(uri, "paradiffpolicy_sessions") == 2


def test_an_unfinished_message_is_not_held_for_ever():
    message = frame(pack({"observation": windows(1)[0]}))
    policy = gated()
    with running(policy, send_timeout=0.2) as uri, contextlib.closing(raw_client(uri)) as patient:
        # A client that the server itself keeps waiting isn't late: its rest comes while another is planned.
        patient.sendall(message * 3 + message[:20])
        assert policy.started.wait(10)
        starts = [message[:1], message[:20], fragmented(message[14:], 3)[:-60]]
        starts.append(b"\x82" + struct.pack("!BQ", 0xFF, 10**6) + bytes(500_000))
        for count, start in enumerate(starts, 1):
            with contextlib.closing(raw_client(uri)) as raw:
                raw.sendall(start)
                recv_all(raw)
            until(lambda count=count: cut(uri, "slow_client") == count)
        policy.gate.set()
        patient.sendall(message[20:])
        read_until(patient, b"server_timing", 4)
        assert cut(uri, "slow_client") == len(starts)


def test_open_handshakes_are_bounded():
    """Each that is one too many cuts off the oldest; a client reads that, and needn't wait for a metric."""
    with running(tiny_policy(), max_sessions=2, send_timeout=30) as uri, contextlib.ExitStack() as stack:
        *oldest, last, newest = (stack.enter_context(half_open(uri)) for _ in range(5))
        assert [recv_all(raw) for raw in oldest] == [b"", b"", b""]
        with client(uri) as connection:
            assert recv_all(last) == b""
            assert ask(connection, observation=windows(1)[0])["iterations"] == 4
            finish_opening(newest)
            assert cut(uri, "opening") == 4


def test_web_pages_need_a_key():
    page = {"origin": "https://example.org"}
    with running(tiny_policy()) as uri:
        with pytest.raises(InvalidStatus, match="403") as refused, client(uri, **page):
            pass
        assert b"without an API key" in refused.value.response.body
        assert cut(uri, "origin") == 1
    key = {"additional_headers": {"Authorization": "Api-Key right"}}
    with running(tiny_policy(), api_key="right") as uri, client(uri, **key, **page) as connection:
        assert ask(connection, observation=windows(1)[0])["iterations"] == 4


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", b"405 Method Not Allowed"),
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET / HTTP/3\r\n\r\n", b"400 Bad Request"),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01\r\n\r\n", b"405 Method Not Allowed"),
    ],
)
def test_every_http_request_is_answered(request_, status):
    with running(tiny_policy()) as uri:
        address = ("127.0.0.1", int(uri.rsplit(":", 1)[1]))
        with socket.create_connection(address, 10) as raw:
            raw.sendall(request_)
            answer = raw.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 " + status) and b"send GET /healthz" in answer


def test_two_thousand_malformed_messages():
    """Half are noise, half are good messages with a few bytes changed."""
    policy, draw = tiny_policy(Canned), np.random.default_rng(0)
    plan = policy.plan(windows(1), generator=seeded(0))
    state = state_of(seeded(0)[0])
    good = [
        pack({"observation": windows(1)[0], "reset": True, "executed_steps": np.int64(4), "seed": 3}),
        pack({"observation": windows(1)[0, 0].tolist()}),
        pack(request_map(windows(1), PlanFormat.of(policy).plan_map(plan), [state], executed_steps=4)),
    ]

    def malformed(k: int) -> bytes:
        if k % 2:
            return draw.bytes(draw.integers(0, 60))
        return mutated(good[k // 2 % len(good)], draw)

    def hundred(uri: str) -> None:
        with client(uri) as connection:
            for first in range(0, 100, 50):
                for k in range(first, first + 50):
                    connection.send(malformed(k))
                answers = [connection.recv(timeout=30) for _ in range(50)]
                assert all("\n" not in answer for answer in answers if isinstance(answer, str))
        until(lambda: metric(uri, "paradiffpolicy_sessions") == 1)

    with running(policy) as uri, client(uri) as other:
        hundred(uri)
        memory, before = resident(), threads_and_files()
        for _ in range(19):
            hundred(uri)
        until(lambda: threads_and_files() <= before)
        assert resident() - memory < 30
        kinds = ("unknown", "plan", "session")
        assert sum(metric(uri, f'paradiffpolicy_requests_total{{kind="{k}"}}') for k in kinds) == 2000
        assert metric(uri, 'paradiffpolicy_errors_total{kind="message"}') > 1000
        assert metric(uri, 'paradiffpolicy_errors_total{kind="server"}') == 0
        assert "actions" in ask(other, observation=windows(1)[0])


def test_text_is_answered_with_what_to_send():
    with running(tiny_policy()) as uri, client(uri) as connection:
        connection.send("hello")
        assert connection.recv() == "the message is text: send a packed map as a binary message"
        assert ask(connection, observation=windows(1)[0])["iterations"] == 4


# ----------------------------------------------------------------------------------- coming and going


def test_nothing_is_left_after_a_server():
    with running(tiny_policy()) as uri, RemotePolicy(uri) as remote:
        remote.warm_up()
    before = threads_and_files()
    for _ in range(3):
        with running(tiny_policy()) as uri, RemotePolicy(uri) as remote, client(uri) as connection:
            remote.warm_up()
            ask(connection, observation=windows(1)[0])
    until(lambda: threads_and_files() <= before)  # a closed connection's thread may end a moment later


def test_stopping_answers_what_was_asked():
    policy = gated()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        uri = server.enter_context(running(policy, max_batch=1))
        asking = [stack.enter_context(client(uri)) for _ in range(3)]
        idle = stack.enter_context(client(uri))
        for connection in asking:
            connection.send(pack({"observation": windows(1)[0]}))
        assert policy.started.wait(10)
        until(lambda: metric(uri, "paradiffpolicy_queue_length") == 2)
        stopping = threading.Thread(target=server.close)
        stopping.start()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=10)
        assert closed.value.rcvd.code == 1001
        with pytest.raises(OSError):
            connect(uri, proxy=None)
        policy.gate.set()
        for connection in asking:
            assert unpack(connection.recv(timeout=10))["iterations"] == 4
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=10)
            assert closed.value.rcvd.code == 1001
        stopping.join()


def test_a_server_that_comes_back_is_used_again():
    """Started again in the middle of a run, at once or later: the plans go on as if nothing was."""
    policy = tiny_policy()
    here, there = seeded(1, 2), seeded(1, 2)
    local = served = None

    class Helped(VirtualClock):
        """Starts the server while the client waits for it."""

        waits = 0

        def sleep_until(self, moment: float) -> None:
            super().sleep_until(moment)
            self.waits += 1
            if self.waits == 3:
                servers.enter_context(running(policy, port))

    clock = Helped()
    with contextlib.ExitStack() as servers, contextlib.ExitStack() as client_:
        uri = servers.enter_context(running(policy))
        port = int(uri.rsplit(":", 1)[1])
        remote = client_.enter_context(RemotePolicy(uri, clock=clock))
        for k in range(6):
            if k == 2:
                servers.close()
                servers.enter_context(running(policy, port))
            if k == 4:
                servers.close()
            local = policy.plan(windows(2, k), local, generator=here)
            served = remote.plan(windows(2, k), served, generator=there)
            equal(local, served)
        assert clock.waits == 3
        servers.close()
        clock.waits = 10
        with pytest.raises(ServerError, match=rf"no answer from {uri} within 10 s .*is the server running"):
            remote.plan(windows(2), served, generator=there)
        assert 14 < clock.waits < 40 and [*map(state_of, here)] == [*map(state_of, there)]


def test_an_answer_that_comes_too_late_is_discarded():
    policy = gated()
    with running(policy, max_batch=1) as uri, RemotePolicy(uri, timeout=0.25) as remote:
        with pytest.raises(ServerError, match=r"no answer from .* within 0\.25 s"):
            remote.plan(windows(1, 1), generator=seeded(1))
        policy.gate.set()
        served = remote.plan(windows(1, 2), generator=seeded(2))
        equal(served, policy.plan(windows(1, 2), generator=seeded(2)))


def test_another_policy_at_the_same_address_is_noticed():
    with contextlib.ExitStack() as servers:
        uri = servers.enter_context(running(tiny_policy()))
        with RemotePolicy(uri) as remote:
            servers.close()
            other = tiny_policy(solver="ddim", n_steps=3)
            servers.enter_context(running(other, int(uri.rsplit(":", 1)[1])))
            with pytest.raises(ServerError, match="serves another policy or sampler now"):
                remote.plan(windows(1), generator=seeded(0))


def test_what_isnt_a_policy_server_is_named():
    with pytest.raises(InputError, match="must be ws://HOST:PORT"):
        RemotePolicy("127.0.0.1:8000")
    with pytest.raises(InputError, match="has no use"):
        RemotePolicy("ws://127.0.0.1:1", certificate="x.pem")
    with pytest.raises(InputError, match=r"certificate=nowhere\.pem can't be used"):
        RemotePolicy("wss://127.0.0.1:1", certificate="nowhere.pem")
    with pytest.raises(InputError, match="timeout=0"):
        RemotePolicy("ws://127.0.0.1:1", timeout=0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def http():
            accepted, _ = listening.accept()
            accepted.recv(4096)
            accepted.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            accepted.close()

        thread = threading.Thread(target=http)
        thread.start()
        with pytest.raises(ServerError, match="answers with status 404"):
            RemotePolicy(f"ws://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_queue": 1.5}, "max_queue=1.5"),
        ({"send_timeout": 0}, "send_timeout=0"),
        ({"port": 70_000}, "port=70000 must be a whole number from 0 to 65535"),
        ({"seed": -1}, "seed=-1"),
        ({"api_key": 5}, "api_key must be printable ASCII text"),
        ({"api_key": ""}, "api_key must be printable ASCII text"),
        ({"api_key": "a\nb"}, "api_key must be printable ASCII text"),
        ({"private_key": "k.pem"}, "go together"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        replace(ServerSettings(), **changes)


# ------------------------------------------------------------------------------------ the commands


def test_sigterm_in_the_middle_of_requests(capsys, monkeypatch, tmp_path):
    tiny_checkpoint(SMALL).save(tmp_path / "tiny")
    monkeypatch.setenv("PARADIFFPOLICY_API_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri, key, ended = f"ws://127.0.0.1:{port}", {"Authorization": "Api-Key secret"}, threading.Event()

    def ready() -> bool:
        with contextlib.suppress(urllib.error.URLError):
            return get(uri, "/healthz") == "OK\n"

    def ask_and_stop() -> None:
        asked = r'requests_total{kind="session"} 2.0'
        try:
            until(lambda: ended.is_set() or ready())
            with client(uri, additional_headers=key) as one, client(uri, additional_headers=key) as other:
                for connection in (one, other):
                    connection.send(pack({"observation": windows(1)[0]}))
                until(lambda: asked in get(uri, "/metrics", **key))
                os.kill(os.getpid(), signal.SIGTERM)
                for connection in (one, other):
                    assert unpack(connection.recv(timeout=30))["iterations"] == 100
                    with pytest.raises(ConnectionClosed) as closed:
                        connection.recv(timeout=30)
                    assert closed.value.rcvd.code == 1001
        finally:
            if not ended.wait(1):
                os.kill(os.getpid(), signal.SIGTERM)

    command = ["serve", f"checkpoint={tmp_path / 'tiny'}", f"port={port}", "sampler_name=ddpm", "threads=1"]
    with ThreadPoolExecutor() as clients:
        done = clients.submit(ask_and_stop)
        code = main([*command, "capture=eager", "max_batch=1"])
        ended.set()
        done.result()
    gc.unfreeze()
    out, err = capsys.readouterr()
    assert code == 0 and f"listening on {uri}" in out and "warming up" in err and "Traceback" not in err
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free again


@pytest.mark.slow
def test_bench_serve_prints_tables_and_a_line_of_json(capsys, tmp_path):
    tiny_checkpoint(SMALL).save(tmp_path / "tiny")
    out = tmp_path / "bench.json"
    arguments = [
        "requests=5",
        "clients=2",
        "seconds=0.6",
        "hostile=6",
        "task.max_steps=16",
        f"out={out}",
        "capture=eager",
    ]
    arguments.append("sampler_name=rti")
    code = main(["bench", "serve", f"checkpoint={tmp_path / 'tiny'}", "threads=1", "max_batch=2", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    line = captured.out.strip().splitlines()[-1]
    content = json.loads(line)
    assert content == json.loads(out.read_text())
    alone, many = content["one_client"], content["many_clients"]
    assert alone["round_trip_ms"]["p50"] > alone["inference_ms"]["p50"] > 0 and alone["between_ms"]["n"] == 5
    beside = content["beside_hostile"]
    assert beside["errors"] == 0 and beside["answers"] > 5
    assert content["attacks"].keys() == {attack.__name__ for attack in ATTACKS}
    assert many["errors"] == 0 and many["answers"] > 5 and 1 <= many["batch"] <= 2
    assert many["per_second"] == pytest.approx(many["answers"] / many["seconds"])
    assert many["memory"] is None or many["memory"] > 50 > many["growth"]
