"""A captured plan is the eager plan, on every backend that runs here; what can't be captured is refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import logging
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections import deque
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from paradiffpolicy.diffusion.denoiser import Denoiser
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.models.matmul_unet1d import MatmulUnet1D, Windows
from paradiffpolicy.models.precision import bfloat16_pays
from paradiffpolicy.models.unet1d import ConditionalUnet1D
from paradiffpolicy.policy import InvalidPlanError, Policy
from paradiffpolicy.provenance import resident_bytes
from paradiffpolicy.sampling.capture import cuda_graph, openvino, openvino_plan
from paradiffpolicy.sampling.capture.backends import CaptureSettings
from paradiffpolicy.sampling.capture.emulated import EmulatedDevice, TapeGraph, captured
from paradiffpolicy.sampling.capture.executor import Executor, padded_size
from paradiffpolicy.sampling.capture.fingerprint import fingerprint
from paradiffpolicy.sampling.capture.fusion import fused
from paradiffpolicy.sampling.capture.graphs import LAUNCH_AHEAD, Graphs
from paradiffpolicy.sampling.capture.network import DenoiserNetwork
from paradiffpolicy.sampling.capture.program import EAGER, Backend, CaptureError, Program
from paradiffpolicy.sampling.capture.tape import record
from paradiffpolicy.sampling.driver import evaluate_all
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.sampler import DRIVERS, make_sampler
from paradiffpolicy.sampling.sequential import Sequential

from .conftest import DISTINCT_SOLVERS, TINY, assert_close, tiny_checkpoint

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
CPU = torch.device("cpu")
LIKE = torch.zeros(())
EMULATED = Backend("emulated", lambda program: Graphs(program, EmulatedDevice()))
NOISY = ("ddpm", "sde_dpm_solver_pp_2m")
PAIRS = [
    (driver, solver)
    for driver, solver in itertools.product(DRIVERS, DISTINCT_SOLVERS)
    if driver != "speculative" or solver in NOISY
]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 6, 16, (8, 16), n_groups=4).eval().requires_grad_(False)
    return Denoiser(network, SCHEDULE)


@pytest.fixture(scope="module")
def flat_denoiser() -> Denoiser:
    """Of a network with one level: fewer calls to record."""
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 6, 8, (8,), n_groups=2).eval().requires_grad_(False)
    return Denoiser(network, SCHEDULE)


def problem(n: int, batch: int, seed: int, warm: bool):
    """Conditions, noise and a first guess for n nodes."""
    noise = noise_for(n, batch, seed, (4, 2), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(batch, 6, generator=generator)
    start = torch.randn(n, batch, 4, 2, generator=generator) if warm else None
    return {"condition": condition}, noise, start


def samplers(denoiser, backend, *, matmul=False, **settings):
    """The same sampler, captured and eager, both calling the network on all rows."""
    sampler = make_sampler(SCHEDULE, **settings)
    driver = sampler.driver
    driver = replace(driver, evaluate=evaluate_all) if hasattr(driver, "evaluate") else driver
    trunk = MatmulUnet1D(denoiser.network) if matmul else None
    network = DenoiserNetwork(denoiser, sampler.tableau, LIKE, trunk)
    n = sampler.tableau.n_nodes
    return n, *(Executor(driver, sampler.tableau, lambda _: network, [each]) for each in (backend, EAGER))


def assert_same(solution, expected, **tolerance):
    for field in ("sample", "x0_hats"):
        assert_close(getattr(solution, field), getattr(expected, field), rtol=0, **tolerance)
    assert_close(solution.noise.z, expected.noise.z, rtol=0, **tolerance)
    assert torch.equal(solution.iterations, expected.iterations)
    assert torch.equal(solution.nfe, expected.nfe)


# ----------------------------------------------------------------------------- an emulated GPU's capture


@pytest.mark.parametrize(("driver", "solver"), PAIRS)
def test_every_driver_and_solver_is_replayed_bit_by_bit(flat_denoiser, driver, solver):
    """Captured on one problem, replayed on others: iterations differ, and nothing is stale."""
    n, executor, eager = samplers(flat_denoiser, EMULATED, driver=driver, solver=solver, n_steps=4)
    for warm in (False, True):
        for seed in range(2):
            given = problem(n, 2, seed, warm)
            assert_same(executor.run(*given), eager.run(*given), atol=0)
    assert len(executor.programs) == 2


@pytest.mark.parametrize("driver", ["picard", "anderson"])
def test_a_plan_tolerance_is_captured(denoiser, driver):
    settings = {"driver": driver, "solver": "ddim", "n_steps": 12, "plan_tolerance": 0.05}
    n, executor, eager = samplers(denoiser, EMULATED, **settings)
    iterations = set()
    for seed in range(6):
        given = problem(n, 1, seed, False)
        assert_same(executor.run(*given), eager.run(*given), atol=0)
        iterations.add(int(eager.run(*given).iterations))
    assert max(iterations) < n


@pytest.mark.parametrize("batch", [1, 3, 5, 9, 17])
def test_batches_are_padded_and_the_padding_cut_off(denoiser, batch):
    n, executor, eager = samplers(denoiser, EMULATED, driver="picard", solver="ddpm", n_steps=6, window=3)
    given = problem(n, batch, 0, False)
    solution = executor.run(*given)
    assert_same(solution, eager.run(*given), atol=1e-5)
    assert len(solution.sample) == batch <= padded_size(batch) <= max(2 * batch - 1, 1)


@pytest.mark.parametrize("batch", [4, 5, 9, 10, 13])
@pytest.mark.parametrize("driver", ["picard", "speculative", "rti"])
def test_large_batches_are_run_in_pieces(denoiser, driver, batch):
    backend = replace(EMULATED, largest_batch=4)
    n, executor, eager = samplers(denoiser, backend, driver=driver, solver="ddpm", n_steps=6)
    given = problem(n, batch, 0, driver == "rti")
    assert_same(executor.run(*given), eager.run(*given), atol=1e-5)
    assert [len(program.inputs["x_T"]) for program in executor.programs] == [4]


def test_results_survive_the_next_call(denoiser):
    n, executor, _ = samplers(denoiser, EMULATED, driver="rti", solver="ddim", n_steps=6)
    first = executor.run(*problem(n, 2, 0, True))
    before = first.sample.clone()
    executor.run(*problem(n, 2, 1, True))
    assert torch.equal(first.sample, before)


X = torch.arange(6.0).view(2, 3)
REFUSED = {
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x.sum()),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: x * x[0].tolist()[0],
    "numpy": lambda x: x * x.numpy()[0, 0],
    "cpu": lambda x: x.cpu(),
    "to a device": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero().sum(),
    "mask": lambda x: x[x > 2].sum(),
    "masked_select": lambda x: x.masked_select(x > 2).sum(),
    "mask set": lambda x: x.clone().index_put_((x > 2,), torch.zeros((), device=x.device)),
    "unique": lambda x: x.unique().sum(),
    "constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "as_tensor": lambda x: x + torch.as_tensor([1.0, 2.0, 3.0]),
    "equal": lambda x: x * torch.equal(x, x),
    "randn": lambda x: x + torch.randn(2, 3),
    "rand_like": lambda x: x + torch.rand_like(x),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "normal_": lambda x: x.clone().normal_(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_capture_refuses_is_refused(name):
    with pytest.raises(CaptureError, match=r"host|random|shape that depends"):
        captured(lambda: {"y": REFUSED[name](X)})


ALLOWED = {
    "where": lambda x: torch.where(x > 2, x, 0.0),
    "index": lambda x: x[torch.zeros_like(x[:, 0], dtype=torch.int64)],
    "to a dtype": lambda x: x.to(torch.float64),
    "arange": lambda x: x + torch.arange(3),
    "full": lambda x: x + torch.full((3,), 2.0),
    "in place": lambda x: x.clone().mul_(2).add_(x),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_replay_makes_the_calls_again(name):
    x = X.clone()
    graph = TapeGraph(captured(lambda: {"y": ALLOWED[name](x)}))
    x.copy_(5 - X)
    graph.replay()
    assert torch.equal(graph.result["y"], ALLOWED[name](5 - X))


def test_a_replay_leaves_new_memory_to_what_fills_it():
    """As in a deep copy, which fills its memory before a tensor is made of it."""
    constant, x = torch.arange(64.0), torch.ones(64)
    graph = TapeGraph(captured(lambda: {"y": x * copy.deepcopy(constant)}))
    spoilt = torch.full((64,), math.nan)
    del spoilt  # the next memory of its size is likely this
    graph.replay()
    assert torch.equal(graph.result["y"], constant)


def counting(step, count=None):
    """A program that adds ``step(state)`` until it has passed the input."""
    return Program(
        init=lambda inputs: {"x": torch.zeros_like(inputs["to"]), "to": inputs["to"] + 0},
        iterate=lambda state: {
            **state,
            "x": torch.where(state["x"] < state["to"], state["x"] + step(), state["x"]),
        },
        done=lambda state: (state["x"] >= state["to"]).all(),
        finish=lambda inputs, state: {"x": state["x"] + 0 * inputs["to"]},
        count=count,
        limit=40,
        inputs={"to": torch.tensor([7.0])},
    )


def run_eagerly(program, inputs):
    state = program.init(inputs)
    while not program.done(state):
        state = program.iterate(state)
    return program.finish(inputs, state)


def test_what_isnt_an_input_comes_out_stale():
    """As on a GPU: a step that the host changes, and one that it counts, stay what they were."""
    steps = itertools.count(1)
    for changing in (lambda: torch.full((1,), 3.0) * next(steps), lambda: next(steps)):
        captured_program = Graphs(counting(changing), EmulatedDevice())
        first = captured_program({"to": torch.tensor([30.0])})["x"].clone()
        again = captured_program({"to": torch.tensor([30.0])})["x"]
        assert torch.equal(first, again)  # the step of the capture, for ever
        assert not torch.equal(again, run_eagerly(counting(changing), {"to": torch.tensor([30.0])})["x"])


class LateDevice(EmulatedDevice):
    """Does its work when the host waits for it, and not before: what reads too early reads the past."""

    def __init__(self) -> None:
        self.queue: deque = deque()
        self.in_flight = 0
        self.most_in_flight = 0

    def capture(self, function):
        return LateGraph(super().capture(function).tape, self)

    def event(self):
        return LateEvent(self)

    def until(self, marker: object) -> None:
        while self.queue:
            work = self.queue.popleft()
            if work is marker:
                return
            if callable(work):
                work()
                self.in_flight -= 1


class LateGraph(TapeGraph):
    def __init__(self, tape, device: LateDevice) -> None:
        super().__init__(tape)
        self.device, self.replays = device, 0

    def replay(self) -> None:
        self.replays += 1
        self.device.queue.append(super().replay)
        self.device.in_flight += 1
        self.device.most_in_flight = max(self.device.most_in_flight, self.device.in_flight)


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self.device, self.marker = device, object()

    def record(self) -> None:
        self.marker = object()
        self.device.queue.append(self.marker)

    def synchronize(self) -> None:
        if self.marker in self.device.queue:
            self.device.until(self.marker)


def test_iterations_are_launched_ahead_and_stop_early():
    device = LateDevice()
    program = counting(lambda: 1)
    captured_program = Graphs(program, device)
    for target in (7.0, 3.0, 20.0, 1.0, 39.0, 40.0):
        before = captured_program.iterate.replays
        outputs = captured_program({"to": torch.tensor([target])})
        launched = captured_program.iterate.replays - before
        device.until(None)  # reading the outputs waits for the device
        assert outputs["x"] == target
        assert launched == min(target + LAUNCH_AHEAD, program.limit)
    # The first graph and the iterations that the host is ahead, while it waits for one.
    assert device.most_in_flight == LAUNCH_AHEAD + 2


class OtherDevice(LateDevice):
    """A device that is current only while it is active: an event that is recorded meanwhile elsewhere has
    nothing of this one's queue to wait for."""

    current = False

    @contextlib.contextmanager
    def active(self):
        before, self.current = self.current, True
        try:
            yield
        finally:
            self.current = before

    def event(self):
        device = self

        class Event(LateEvent):
            def record(self) -> None:
                self.marker = object()
                if device.current:
                    device.queue.append(self.marker)

        return Event(device)


def test_a_device_that_is_not_the_current_one_is_waited_for():
    """Else the flag of the plan before is read, and a plan ends early."""
    device = OtherDevice()
    captured_program = Graphs(counting(lambda: 1), device)
    for target in (3.0, 20.0, 40.0):
        outputs = captured_program({"to": torch.tensor([target])})
        device.until(None)
        assert outputs["x"] == target and not device.current


class LoopingDevice(EmulatedDevice):
    """Has a while node; its graphs call their function."""

    @property
    def while_loop(self):
        def loop(again, body, carried):
            carried = tuple(value.clone() for value in carried)
            while again(*carried):
                for value, new in zip(carried, body(*carried), strict=True):
                    value.copy_(new)
            return carried

        return loop

    def capture(self, function):
        class Called:
            nbytes = 0

            def __init__(self) -> None:
                self.result = function()

            def replay(self) -> None:
                for value, new in zip(self.result.values(), function().values(), strict=True):
                    value.copy_(new)

        return Called()


def test_a_while_node_holds_the_whole_plan(denoiser):
    looping = Backend("looping", lambda program: Graphs(program, LoopingDevice()))
    n, executor, eager = samplers(denoiser, looping, driver="picard", solver="ddpm", n_steps=12, window=4)
    for seed in range(3):
        given = problem(n, 2, seed, False)
        assert_same(executor.run(*given), eager.run(*given), atol=0)
    assert "while node" in executor.programs[0].method


def test_a_while_node_that_fails_falls_back_to_a_graph_per_iteration(denoiser, caplog):
    class Failing(LoopingDevice):
        def capture(self, function):
            if not hasattr(self, "failed"):
                self.failed = True
                raise CaptureError("failed to be captured (out of luck)")
            return EmulatedDevice.capture(self, function)

    failing = Backend("failing", lambda program: Graphs(program, Failing()))
    n, executor, eager = samplers(denoiser, failing, driver="picard", solver="ddpm", n_steps=6, window=4)
    given = problem(n, 2, 0, False)
    assert_same(executor.run(*given), eager.run(*given), atol=0)
    assert executor.programs[0].method == "emulated: a graph per iteration"
    assert "no while node, since it failed to be captured (out of luck)" in caplog.text


# --------------------------------------------------------------------------------------------- openvino


@pytest.fixture
def compiled() -> Backend:
    return openvino.openvino_backend(threads=1)


@pytest.mark.parametrize(
    ("driver", "solver", "options"),
    [
        ("sequential", "ddpm", {}),
        ("sequential", "dpm_solver_pp_3m", {}),
        ("picard", "ddpm", {"window": 4, "plan_tolerance": 0.02}),
        ("picard", "unipc", {"window": 1}),
        ("picard_published", "ddpm", {"window": 4}),
        ("speculative", "ddpm", {"window": 4}),
        ("speculative", "ddpm", {"window": 4, "spread": 0.01}),
        ("rti", "heun", {}),
    ],
)
def test_an_openvino_model_is_the_eager_plan(denoiser, compiled, driver, solver, options):
    settings = {"driver": driver, "solver": solver, "n_steps": 8, **options}
    n, executor, eager = samplers(denoiser, compiled, matmul=True, **settings)
    for warm in (False, True):
        for seed in range(2):
            given = problem(n, 2, seed, warm)
            assert_same(executor.run(*given), eager.run(*given), atol=2e-5)


PLACES = torch.tensor([[0, 2], [1, 0]])
INT8 = torch.tensor([[1, -2, 3]], dtype=torch.int8)
OPERATIONS = {
    "arithmetic": lambda x: (x + 1) * (2 - x) / (x.abs() + 0.5) + x**2 - 3 * x,
    "integers": lambda x: (x > 0).sum(dim=0) + torch.arange(3),
    "comparison": lambda x: (x > 0) & (x <= 1) | ~(x != 2),
    "mixed types": lambda x: x + (x > 0) + (x > 0).to(torch.int64) * 2,
    "unary": lambda x: (
        x.neg().exp().log().sqrt() if False else (x.abs() + 1).log().exp().sqrt().tanh().sigmoid()
    ),
    "mish": functional.mish,
    "gelu": lambda x: functional.gelu(x) + functional.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(dim=0) + x.softmax(dim=-1),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2),
    "where": lambda x: torch.where(x > 0, x, 0.25),
    "views": lambda x: (
        x.view(2, 1, 3).expand(2, 4, 3).transpose(0, 2).permute(1, 0, 2).flatten(1).unsqueeze(0)
    ),
    "slices": lambda x: torch.cat((x[:, ::2], x[:, 1:], x[-1:].expand(2, -1)), dim=-1),
    "select": lambda x: x[1] + x[:, -1].sum() + x.select(-1, 0).sum(),
    "split": lambda x: torch.stack([*x.split([1, 2], dim=1)[1].unbind(1), x.chunk(3, dim=-1)[0][:, 0]]),
    "pad": lambda x: functional.pad(x, (1, 2, 0, 1)) + functional.pad(x[:, :1], (0, 5, 1, 0), value=2.0),
    "sums": lambda x: (
        x.sum() + x.sum(dim=1) + x.mean(dim=(0, 1)) + x.amax(dim=1) - x.amin(dim=0, keepdim=True).sum()
    ),
    "logical": lambda x: torch.stack(((x > 0).all(), (x > 0).any(), (x > -9).all(dim=1)[0])),
    "norm": lambda x: x.norm(dim=-1) + x.norm(),
    "cumsum": lambda x: x.cumsum(dim=0) + (x > 0).cumsum(dim=1),
    "gather": lambda x: x.gather(1, PLACES) + x.index_select(1, PLACES[0]),
    "scatter": lambda x: x.scatter(1, PLACES, x[:, :2] * 2) + x.index_copy(0, PLACES[1, :1], x[:1]),
    "matmul": lambda x: x @ x.T @ x + (x[:, None] @ x.T[None]).sum(),
    "linear": lambda x: functional.linear(x, torch.ones(4, 3), torch.arange(4.0)),
    "layer_norm": lambda x: functional.layer_norm(x, (3,), torch.arange(3.0), torch.ones(3)),
    "filled": lambda x: torch.zeros_like(x) + torch.full_like(x, 2.0) + x.new_zeros(3) + torch.ones_like(x),
    "constants": lambda x: x + torch.arange(3).cumsum(0).float().log1p(),
    "int8": lambda x: x * INT8.to(torch.float32),
}


def model_of(function) -> Program:
    """The function as a program of one iteration."""
    return Program(
        init=lambda inputs: {"x": inputs["x"], "y": function(inputs["x"]) * 0},
        iterate=lambda state: {**state, "y": function(state["x"])},
        done=lambda state: state["x"].sum() < 0,
        finish=lambda inputs, state: {"y": state["y"]},
        count=1,
        limit=1,
        inputs={"x": torch.tensor([[-1.0, 0.3, 2.0], [0.7, -0.2, 0.0]])},
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_translated(name, compiled):
    def function(x):
        y = OPERATIONS[name](x)
        return y.to(torch.float32) if y.dtype == torch.bool else y

    captured_program = compiled.capture_program(model_of(function))
    for x in (captured_program.inputs["x"].clone(), torch.tensor([[0.1, -3.0, 0.0], [1.0, 2.0, 0.5]])):
        y = captured_program({"x": x})["y"]
        assert_close(y, function(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [lambda x: x.cumprod(0), lambda x: torch.linalg.inv(x @ x.T)])
def test_an_unknown_operation_is_named(function, compiled):
    with pytest.raises(CaptureError, match="isn't translated to OpenVINO \\(aten"):
        compiled.capture_program(model_of(function))


def test_a_failed_capture_leaves_nothing(denoiser, compiled):
    n, executor, _ = samplers(denoiser, compiled, driver="anderson", solver="ddim", n_steps=6)
    for _ in range(2):
        with pytest.raises(CaptureError, match="isn't translated"):
            executor.run(*problem(n, 2, 0, False))
        assert not executor.programs and not executor.nbytes


FLAT = replace(TINY, down_dims=(8,), n_groups=4, diffusion_step_embed_dim=8)
"""One level, hence soon compiled."""


def policy_with(**sampler) -> Policy:
    return Policy.from_checkpoint(tiny_checkpoint(FLAT), make_sampler(SCHEDULE, **sampler))


WINDOW = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(0)) * 512


def planned(policy: Policy, n: int = 3):
    """Plans that continue one another."""
    generator, plan, plans = torch.Generator().manual_seed(0), None, []
    for k in range(n):
        plan = policy.plan(WINDOW + k, plan, generator=generator)
        plans.append(plan.actions)
    return torch.stack(plans)


def test_a_compiled_model_is_found_again(tmp_path, monkeypatch, caplog):
    policy = policy_with(solver="ddim", n_steps=4, driver="rti")
    first = planned(policy.captured("openvino", precision="f32", cache=tmp_path))
    (kept,) = tmp_path.iterdir()

    def unreachable(program):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(openvino_plan, "plan_model", unreachable)
        assert torch.equal(planned(policy.captured("openvino", precision="f32", cache=tmp_path)), first)
        with pytest.raises(AssertionError, match="compiled again"):  # other settings, another model
            planned(policy.captured("openvino", precision="f32", cache=tmp_path, threads=1))
    content = kept.read_bytes()
    weights = content[:1000] + bytes(1000) + content[2000:]  # which OpenVINO itself would take
    for damaged in (b"", content[:100], content[:-1], content + b"more", weights, content[:-40] + bytes(40)):
        kept.unlink()  # the old one is still in use
        kept.write_bytes(damaged)
        assert torch.equal(planned(policy.captured("openvino", precision="f32", cache=tmp_path)), first)
        assert kept.read_bytes() != damaged and [*tmp_path.iterdir()] == [kept]
    assert caplog.text.count("is damaged") == 6


def test_programs_are_kept_where_nobody_else_can_put_one(tmp_path, monkeypatch, caplog):
    policy, folder = policy_with(solver="ddim", n_steps=2), tmp_path / "a" / "cache"
    before = os.umask(0)
    try:
        planned(policy.captured("openvino", precision="f32", cache=folder), 1)
    finally:
        os.umask(before)
    (kept,) = folder.glob("*.blob")
    assert folder.stat().st_mode & 0o777 == 0o700 and kept.stat().st_mode & 0o777 == 0o600
    kept.chmod(0o666)
    planned(policy.captured("openvino", precision="f32", cache=folder), 1)
    assert caplog.text.count("others can write to it") == 1 and kept.stat().st_mode & 0o777 == 0o600
    kept.unlink()
    os.mkfifo(kept)
    planned(policy.captured("openvino", precision="f32", cache=folder), 1)
    assert caplog.text.count("isn't a regular file") == 1 and kept.is_file()
    monkeypatch.setattr(openvino, "kept_plan", lambda path, options: pytest.fail("a kept program was used"))
    with monkeypatch.context() as patch:
        patch.setattr(openvino.os, "getuid", lambda: folder.stat().st_uid + 1)
        planned(policy.captured("openvino", precision="f32", cache=folder), 1)
    folder.chmod(0o777)
    planned(policy.captured("openvino", precision="f32", cache=folder), 1)
    assert caplog.text.count(f"others can write to {folder}") == 2


def test_other_weights_are_another_model(tmp_path):
    for seed in (0, 1):
        policy = Policy.from_checkpoint(
            tiny_checkpoint(FLAT, seed), make_sampler(SCHEDULE, solver="ddim", n_steps=3)
        )
        expected = planned(policy, 1)
        actual = planned(policy.captured("openvino", precision="f32", cache=tmp_path), 1)
        assert_close(actual, expected, atol=0.02, rtol=0)
    assert len(list(tmp_path.glob("*.blob"))) == 2


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "KEPT_MODELS", 2)
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}.blob"
        path.touch()
        os.utime(path, (age, age))
    openvino.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.blob", "d.blob"]


def test_fingerprints_hold_in_other_processes():
    """Neither does a policy import scipy's integrators there."""
    code = (
        "import sys, torch, paradiffpolicy.policy\n"
        "from paradiffpolicy.diffusion.schedule import NoiseSchedule\n"
        "from paradiffpolicy.sampling.capture.fingerprint import fingerprint\n"
        "from paradiffpolicy.sampling.sampler import make_sampler\n"
        "s = make_sampler(NoiseSchedule.named('squared_cosine', 100), n_steps=5, driver='picard')\n"
        "print(fingerprint(s.driver, s.tableau, [('a', torch.ones(2)), {'b': 1}]))\n"
        "print('scipy.integrate' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sampler = make_sampler(SCHEDULE, n_steps=5, driver="picard")
    here = fingerprint(sampler.driver, sampler.tableau, [("a", torch.ones(2)), {"b": 1}])
    assert done.stdout.split() == [here, "False"] and len(here) == 64
    others = [
        fingerprint(sampler.driver, sampler.tableau),
        fingerprint(replace(sampler.driver, window=3), sampler.tableau),
        fingerprint(sampler.driver, make_sampler(SCHEDULE, n_steps=6).tableau),
    ]
    assert len(set(others)) == 3


# -------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("backend", "driver"),
    [*itertools.product(("emulated", "openvino"), ("sequential", "picard", "rti")), ("auto", "rti")],
)
def test_captured_policies_plan_the_same(backend, driver):
    policy = policy_with(solver="ddim", n_steps=6, driver=driver)
    assert_close(planned(policy.captured(backend, precision="f32")), planned(policy), atol=0.02, rtol=0)


@pytest.mark.parametrize("backend", ["emulated", "openvino"])
def test_guided_policies_are_captured(backend):
    spec = replace(FLAT, condition_dropout=0.1)
    policy = Policy.from_checkpoint(tiny_checkpoint(spec), make_sampler(SCHEDULE, solver="ddim", n_steps=4))
    for scale in (2.0, torch.tensor([3.0])):
        guided = policy.with_guidance(scale)
        assert_close(planned(guided.captured(backend, precision="f32")), planned(guided), atol=0.02, rtol=0)
    assert (planned(guided) - planned(policy)).abs().max() > 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("backend", "threshold"), [("eager", None), ("eager", 0.9), ("emulated", None), ("openvino", None)]
)
def test_what_isnt_finite_in_a_network_is_no_plan(backend, threshold, value):
    """Bounds would make numbers of it."""
    policy = policy_with(solver="ddim", n_steps=4, driver="rti").with_guidance(None, threshold)
    policy.network.final_conv[1].bias[0] = value
    with pytest.raises(InvalidPlanError):
        planned(policy.captured(backend, precision="f32"))


def test_warming_up_makes_what_plans_need():
    policy = policy_with(solver="ddim", n_steps=4, driver="rti").captured("emulated")
    assert policy.warm_up().programs == policy.programs
    made = policy.programs
    planned(policy)
    assert len(made) == 2 and set(policy.programs) == set(made)
    assert all(program.nbytes > 0 for program in made)


def test_the_program_that_was_used_longest_ago_goes_first(denoiser):
    n, executor, _ = samplers(denoiser, EMULATED, driver="sequential", solver="ddim", n_steps=3)
    for batch in (1, 2, 4):
        executor.run(*problem(n, batch, 0, False))
    one, two, four = (program.nbytes for program in executor.programs)
    _, executor, _ = samplers(denoiser, EMULATED, driver="sequential", solver="ddim", n_steps=3)
    executor.budget = one + four + two // 2
    for batch in (1, 2, 1, 4):  # all three are too many, and 2 was used longest ago
        executor.run(*problem(n, batch, 0, False))
    assert [len(program.inputs["x_T"]) for program in executor.programs] == [1, 4]
    assert executor.nbytes == one + four


def test_a_budget_below_one_program_is_said_in_a_line(denoiser, caplog):
    n, executor, _ = samplers(denoiser, EMULATED, driver="sequential", solver="ddim", n_steps=3)
    executor.budget = 1
    for batch in (1, 2, 2):
        executor.run(*problem(n, batch, 0, False))
    assert [len(program.inputs["x_T"]) for program in executor.programs] == [2]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("over the budget of 0.0 MB" in line for line in lines)


def test_plans_leave_nothing_behind():
    policy = (
        policy_with(solver="ddim", n_steps=2, driver="rti")
        .captured("openvino", precision="f32", threads=1)
        .warm_up()
    )
    planned(policy, 20)
    tracemalloc.start()
    try:
        planned(policy, 20)
        before = tracemalloc.get_traced_memory()[0]
        planned(policy, 200)
        assert tracemalloc.get_traced_memory()[0] - before < 50_000  # a plan is more than 250 bytes
    finally:
        tracemalloc.stop()


def test_several_threads_may_plan_at_once():
    policy = policy_with(solver="ddim", n_steps=6, driver="rti")
    expected = planned(policy)
    shared, other = policy.captured("emulated"), policy.captured("openvino", precision="f32", threads=1)
    results: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        results[k] = planned(shared if k % 2 else other)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(6):
        assert_close(results[k], expected, atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------- bad input


class BackAndForth:
    """A driver of one's own, without iterations: the sequential solution."""

    def __call__(self, denoise, tableau, noise, guess=None):
        return Sequential()(denoise, tableau, noise)


def test_a_driver_that_cant_be_captured_runs_eagerly(caplog):
    policy = policy_with(solver="ddim", n_steps=4, driver=BackAndForth)
    expected = planned(policy, 1)
    sequential = planned(policy_with(solver="ddim", n_steps=4), 1)
    assert_close(expected, sequential, atol=0.01, rtol=0)
    for backend in ("emulated", "openvino"):
        with pytest.raises(InputError, match=r"driver BackAndForth can't be captured.*capture=eager"):
            policy.captured(backend, precision="f32")
    auto = policy.captured("auto", precision="f32")
    assert torch.equal(planned(auto, 1), expected)
    assert "BackAndForth can't be captured" in caplog.text
    assert [program.method for program in auto.programs] == ["eager"]


def test_processes_that_talk_cant_be_captured(denoiser):
    class Talking:
        def __call__(self, denoise, x, node, active):
            return evaluate_all(denoise, x, node, active)

    sampler = make_sampler(SCHEDULE, driver="picard", solver="ddim", n_steps=4)
    driver = replace(sampler.driver, evaluate=Talking())
    network = DenoiserNetwork(denoiser, sampler.tableau, LIKE)
    with pytest.raises(
        CaptureError, match=r"evaluate=talking can't be captured \(evaluate=all can\): capture=eager"
    ):
        Executor(driver, sampler.tableau, lambda _: network, [EMULATED])
    n, batch = 4, problem(4, 2, 0, False)
    assert n == sampler.tableau.n_nodes
    Executor(driver, sampler.tableau, lambda _: network, [EAGER]).run(*batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(InputError, match="capture=cuda_graph needs device=cuda"):
        policy_with(n_steps=2).captured("cuda_graph")
    with pytest.raises(InputError, match="needs a CUDA device"):
        cuda_graph.cuda_graph_backend()
    assert "while nodes need PyTorch" in cuda_graph.while_node()


def test_openvino_that_isnt_installed_is_refused_and_auto_goes_on(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino.core.cache_clear()
    try:
        with pytest.raises(InputError, match=r"pip install 'paradiffpolicy\[openvino\]'"):
            policy_with(n_steps=2).captured("openvino", precision="f32")
        with caplog.at_level(logging.WARNING):
            policy = policy_with(solver="ddim", n_steps=4)
            assert torch.equal(planned(policy.captured("auto", precision="f32")), planned(policy))
        assert "needs OpenVINO" in caplog.text and "eager instead" in caplog.text
    finally:
        openvino.core.cache_clear()


def test_auto_falls_back_when_a_plan_cant_be_captured(caplog):
    """Anderson's linear systems aren't translated: the plan is eager, and says so."""
    policy = policy_with(solver="ddim", n_steps=6, driver="anderson")
    auto = policy.captured("auto", precision="f32")
    assert_close(planned(auto, 2), planned(policy, 2), atol=0.02, rtol=0)
    assert "isn't translated to OpenVINO" in caplog.text and "trying the next backend" in caplog.text
    assert [program.method for program in auto.programs] == ["eager"]


def test_auto_falls_back_when_openvino_fails(monkeypatch, caplog):
    class Fails:
        def compile_model(self, *arguments):
            raise RuntimeError("there is no such kernel\nat line 3")

    policy = policy_with(solver="ddim", n_steps=3)
    captured = policy.captured("openvino", precision="f32")
    auto = policy.captured("auto", precision="f32")
    monkeypatch.setattr(openvino, "core", Fails)
    with pytest.raises(CaptureError, match=r"can't be compiled by OpenVINO \(there is no such kernel\)$"):
        planned(captured)
    assert torch.equal(planned(auto), planned(policy)) and "trying the next backend" in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_cant_be_captured_keeps_its_precision(precision):
    policy = policy_with(solver="ddim", n_steps=4, driver="anderson")
    auto = planned(policy.captured("auto", precision=precision), 1)
    assert torch.equal(auto, planned(policy.captured("eager", precision=precision), 1))
    assert not torch.equal(auto, planned(policy, 1))


def test_a_programs_memory_is_what_the_process_grew_by():
    """Of a batch of 64 most is memory that OpenVINO computes in, and tells nothing of."""
    policy = Policy.from_checkpoint(tiny_checkpoint(), make_sampler(SCHEDULE, solver="ddim", n_steps=3))
    policy = policy.captured("openvino", precision="f32", threads=1)
    policy.warm_up()
    gc.collect()
    before = resident_bytes()
    policy.plan(WINDOW.expand(64, -1, -1), generator=0)
    grown, (_, program) = resident_bytes() - before, policy.programs
    assert program.nbytes > 0.7 * grown


@pytest.mark.parametrize("settings", [{"driver": "rti"}, {"driver": "picard", "start": "warm", "window": 2}])
def test_cold_and_warm_plans_are_one_program(settings):
    policy = policy_with(n_steps=4, **settings)
    captured = policy.captured("openvino", precision="f32")
    assert_close(planned(captured), planned(policy), atol=0.02, rtol=0)
    assert len(captured.programs) == 1
    first, again = planned(captured, 1), planned(captured, 1)  # a warm plan's guess isn't used by a cold one
    assert torch.equal(first, again)


def test_a_kept_program_leaves_its_constants_on_disk(tmp_path):
    """The network's form for the backend is as large as the network; no program runs it any more."""
    shared, alone = (
        policy_with(driver="rti", n_steps=4).captured("openvino", precision="f32", cache=cache)
        for cache in (tmp_path / "cache", None)
    )
    assert torch.equal(planned(shared, 2), planned(alone, 2))
    gc.collect()
    assert not shared.model._made and len(alone.model._made) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "opnvino"}, "unknown capture 'opnvino'.*openvino"),
        ({"precision": "bf61"}, "unknown precision 'bf61'.*bf16"),
        ({"threads": 0}, "threads"),
        ({"budget": 0}, "budget"),
        ({"precision": None}, "unknown precision None"),
        ({"pinning": 1}, "pinning=1 must be true or false"),
        ({"tf32": None}, "tf32=None must be true or false"),
        ({"fuse": 1}, "fuse=1 must be true or false"),
        ({"cache": 3}, "cache=3 must be a folder"),
        ({"thread": 2}, "no setting 'thread'; did you mean 'threads'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        policy_with(n_steps=2).captured(**settings)


def test_a_precision_that_the_cpu_lacks_is_refused():
    capabilities = openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, needed in openvino.PRECISIONS.items():
        if needed in capabilities:
            CaptureSettings("openvino", precision).backends(CPU)
        else:
            with pytest.raises(CaptureError, match=f"doesn't compute in {precision}"):
                CaptureSettings("openvino", precision).backends(CPU)


def test_other_shapes_are_named(denoiser):
    n, executor, _ = samplers(denoiser, EMULATED, driver="rti", solver="ddim", n_steps=6)
    inputs, noise, start = problem(n, 2, 0, True)
    with pytest.raises(InputError, match=r"condition \(3, 6\) must begin with the batch, 2"):
        executor.run({"condition": torch.zeros(3, 6)}, noise, start)
    with pytest.raises(InputError, match=r"guess \(5, 2, 4, 2\) must begin with nodes and batch, \(6, 2\)"):
        executor.run(inputs, noise, start[:5])


def test_recording_leaves_the_result_alone():
    tape = record(lambda: {"y": (X * 2).sum(dim=0)})
    assert torch.equal(tape.result["y"], (X * 2).sum(dim=0)) and len(tape.calls) == 2


# --------------------------------------------------------------------------------------- precisions


class Unsplit(torch.nn.Module):
    """A network without a trunk."""

    def forward(self, x, t, condition):
        return 0.9 * x


def test_auto_is_the_precision_that_programs_compute_in_fastest():
    policy = policy_with(n_steps=2)
    assert policy.capture.precision == policy.captured("eager").capture.precision == "f32"
    quick = Backend("quick", Plain, fastest="f16")
    assert policy.captured(lambda settings, device: [quick, EAGER]).capture.precision == "f16"
    assert policy.captured(lambda settings, device: [EAGER, quick]).capture.precision == "f32"
    here = policy.captured("auto")
    assert here.capture.precision == ("bf16" if bfloat16_pays(CPU) else "f32")
    assert f", {here.capture.precision}, " in repr(here)
    own = policy.with_network(Unsplit())
    assert own.captured(lambda settings, device: [quick]).capture.precision == "f32"


def test_a_tolerance_is_one_that_the_precision_reaches(caplog):
    policy = policy_with(driver="picard", solver="ddpm", n_steps=20, tolerance=0.002)
    caplog.set_level(logging.INFO)
    half = policy.captured("emulated", precision="bf16")
    assert half.driver.tolerance == 0.05 and "tolerance=0.05, since bf16 rounds" in caplog.text
    coarse = policy_with(driver="picard", solver="ddpm", n_steps=20, tolerance=0.05)
    coarse = coarse.captured("emulated", precision="bf16")
    assert torch.equal(planned(half), planned(coarse))
    assert half.captured("eager").driver.tolerance == policy.driver.tolerance == 0.002
    assert coarse.captured("eager", precision="f16").driver.tolerance == 0.05


# ------------------------------------------------------------------------------------- fused kernels


class Plain:
    """A program, run as it is."""

    method, nbytes = "plain", 0

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, inputs):
        program, count = self.program, 0
        state = program.init(inputs)
        while count != program.count and not (program.count is None and program.done(state)):
            state, count = program.iterate(state), count + 1
        return program.finish(inputs, state)


@pytest.mark.parametrize("settings", [
    {"driver": "sequential", "solver": "ddpm", "n_steps": 4},
    {"driver": "picard", "solver": "ddpm", "n_steps": 8, "window": 3},
    {"driver": "rti", "solver": "ddim", "n_steps": 5},
])  # fmt: skip
def test_a_fused_plan_is_the_eager_one(settings):
    """Traced and lowered by PyTorch's compiler, without its last step, which writes kernels for a device."""
    backend = Backend("fused", lambda program: Plain(fused(program, "aot_eager")), make_convolution=Windows)
    policy = policy_with(**settings)
    captured_policy = policy.captured(lambda settings, device: [backend])
    assert_close(planned(captured_policy), planned(policy), atol=1e-2, rtol=0)
    assert {type(program) for program in captured_policy.programs} == {Plain}


def test_what_cant_be_traced_isnt_fused():
    program = Program(
        init=lambda inputs: inputs,
        iterate=lambda state: state if state["x"].sum() > 0 else {},
        done=lambda state: state["x"].isnan().all(),
        finish=lambda inputs, state: state,
        count=1,
        limit=1,
        inputs={"x": X},
    )
    with pytest.raises(CaptureError, match="can't be compiled"):
        fused(program)


def test_tensor_cores_are_switched_for_plans_alone():
    """PyTorch's switch is the process's, and on in its convolutions by default."""
    cudnn, seen = torch.backends.cudnn, []

    def looked(denoise, *args):
        seen.append((cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return evaluate_all(denoise, *args)

    before = cudnn.allow_tf32
    policy = policy_with(driver="picard", solver="ddpm", n_steps=4)
    policy = policy.with_sampler(
        replace(policy.sampler, driver=replace(policy.sampler.driver, evaluate=looked))
    )
    for tf32 in (False, True):
        eager = replace(EAGER, arithmetic=functools.partial(cuda_graph.tensor_cores, tf32))
        planned(policy.captured(lambda settings, device, eager=eager: [eager]), n=1)
        assert set(seen) == {(tf32, tf32)} and cudnn.allow_tf32 == before
        seen.clear()


# ------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("driver", "solver"), [(d, s) for d, s in PAIRS if d in ("sequential", "picard", "rti")]
)
def test_a_cuda_graph_is_the_eager_plan(driver, solver):
    sampler = make_sampler(SCHEDULE, driver=driver, solver=solver, n_steps=8)
    policy = Policy.from_checkpoint(tiny_checkpoint(), sampler, "cuda")
    captured_policy = policy.captured("cuda_graph", fuse=False)
    assert_close(planned(captured_policy), planned(policy.captured("eager")), atol=0.05, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [
    {"driver": "picard", "solver": "ddpm", "n_steps": 20, "window": 5},
    {"driver": "rti", "solver": "ddim", "n_steps": 8},
])  # fmt: skip
def test_a_fused_cuda_graph_is_the_eager_plan(settings, caplog):
    policy = Policy.from_checkpoint(tiny_checkpoint(), make_sampler(SCHEDULE, **settings), "cuda")
    assert_close(planned(policy.captured("cuda_graph")), planned(policy), atol=0.05, rtol=0)
    assert "aren't fused" not in caplog.text


@pytest.mark.cuda
def test_a_policy_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    sampler = make_sampler(SCHEDULE, driver="picard", solver="ddpm", n_steps=20)
    policy = Policy.from_checkpoint(tiny_checkpoint(), sampler, "cuda:1")
    with torch.cuda.device(0):
        captured_policy = policy.captured("cuda_graph", fuse=False)
        assert_close(planned(captured_policy), planned(policy), atol=0.05, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_cuda_graph_in_half(precision):
    """As far from float32 as eager plans in that precision, whose products are added in another order."""
    sampler = make_sampler(SCHEDULE, driver="rti", solver="ddim", n_steps=8)
    policy = Policy.from_checkpoint(tiny_checkpoint(), sampler, "cuda")
    exact = planned(policy)
    captured_policy, eager = (
        planned(policy.captured(backend, precision=precision, fuse=False))
        for backend in ("cuda_graph", "eager")
    )
    errors = [float((plans - exact).square().mean().sqrt()) for plans in (captured_policy, eager)]
    assert 0 < errors[0] < 3 * errors[1]


@pytest.mark.cuda
def test_a_planner_thread_may_capture_and_plan():
    policy = Policy.from_checkpoint(
        tiny_checkpoint(), make_sampler(SCHEDULE, driver="picard", solver="ddpm", n_steps=20), "cuda"
    )
    expected, results = planned(policy), []
    one, two = (policy.captured("cuda_graph", fuse=False) for _ in range(2))
    thread = threading.Thread(target=lambda: results.append(planned(one)))
    thread.start()
    results.append(planned(two))
    thread.join()
    for result in results:
        assert_close(result, expected, atol=0.05, rtol=0)
