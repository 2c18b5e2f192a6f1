"""The window that is fastest on a machine, whose clock the network itself moves on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from paradiffpolicy.calibration import WINDOWS, Choice, calibrated, choose, iteration_curve, known_curve
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.picard import UNCALIBRATED
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.types import PolicySpec

SPEC = PolicySpec("one", obs_dim=2, action_dim=2, horizon=4, n_action_steps=2)


class Machine:
    """A clock, and a network that takes ``cost(rows)`` seconds a call."""

    def __init__(self, cost) -> None:
        self.cost, self.time, self.calls = cost, 0.0, 0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        raise AssertionError("nothing waits")

    def __call__(self, x, t, condition):
        self.time += self.cost(len(x))
        self.calls += 1
        return 0.9 * x + 0.01 * condition.sum(dim=-1)[:, None, None]


class Network(torch.nn.Module):
    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def forward(self, x, t, condition):
        return self.machine(x, t, condition)


def policy_on(machine: Machine, **sampler) -> Policy:
    normalizers = [Normalizer.fit(torch.tensor([[-1.0, -1.0], [1.0, 1.0]])) for _ in range(2)]
    settings = {"solver": "ddpm", "n_steps": 40, "driver": "picard", "tolerance": 0.01, **sampler}
    return Policy.from_network(SPEC, Network(machine), *normalizers, **settings)


def test_a_wider_window_is_chosen_where_rows_cost_nothing():
    machine = Machine(lambda rows: 1.0)
    policy = calibrated(policy_on(machine), machine)
    choice = choose(policy_on(machine), machine)
    assert policy.sampler.driver.window == choice.window == 40 and choice.sequential == 40
    assert choice.expected[40] == policy.plan([0.0, 0.0]).solution.iterations[0]


def test_where_rows_cost_as_much_as_calls_plans_are_sequential():
    machine = Machine(float)
    policy = calibrated(policy_on(machine), machine)
    assert policy.sampler.driver == Sequential()
    assert "no window pays" in str(choose(policy_on(machine), machine))


def test_a_window_between_is_chosen_where_a_few_rows_cost_nothing():
    machine = Machine(lambda rows: max(1.0, rows / 8))
    choice = choose(policy_on(machine), machine)
    assert choice.window == 8 and max(choice.expected) < 40  # far wider ones weren't tried
    assert choice.expected[8] < choice.expected[5] and choice.expected[8] < choice.sequential


def test_what_was_measured_is_kept(tmp_path, caplog):
    machine, kept = Machine(lambda rows: 1.0), tmp_path / "windows.json"
    steps = []
    first = choose(policy_on(machine), machine, kept, lambda: steps.append(1))
    assert len(steps) == len(first.expected) + 1
    again, calls = policy_on(machine), machine.calls
    assert choose(again, machine, kept) == first and machine.calls == calls
    # Another sampler is measured, and the first one's entry stays.
    choose(policy_on(machine, tolerance=0.1), machine, kept)
    assert len(json.loads(kept.read_text())) == 2
    (tmp_path / "file").touch()
    assert choose(policy_on(machine), machine, tmp_path / "file" / "windows.json") == first
    assert "can't be kept" in caplog.text
    assert choose(policy_on(machine), machine, tmp_path / "new" / "windows.json") == first
    kept.write_text('{"a": {"5": {"seconds": 1}}}')
    assert choose(policy_on(machine), machine, kept) == first
    assert "is damaged" in caplog.text and len(json.loads(kept.read_text())) == 1


def test_a_checkpoints_iterations_count():
    """They are of recorded observations; without them those of the timed plans stand in."""
    machine = Machine(lambda rows: 1.0)
    policy = policy_on(machine)
    curve = iteration_curve(policy, [torch.zeros(2, 2).numpy(), torch.ones(2, 2).numpy()])
    (entry,) = curve.values()
    assert entry["plans"] == 2 and set(entry["windows"]) == {"5", "8", "12", "20", "40"}
    for window, mean in entry["windows"].items():
        fixed = policy.with_sampler(
            replace(policy.sampler, driver=replace(policy.sampler.driver, window=int(window)))
        )
        plans = [fixed.plan([value] * 2, generator=0) for value in (0.0, 1.0)]
        assert mean == sum(int(plan.solution.iterations[0]) for plan in plans) / 2
    entry["windows"] = {"5": 30, "20": 10, "40": 20}
    told = replace(policy, info={"iterations": curve})
    assert known_curve(told) == {5: 30, 20: 10, 40: 20} and known_curve(policy) is None
    choice = choose(told, machine)
    assert choice.window == 20 and choice.expected[5] == 30 and 10 < choice.expected[12] < 30
    entry["windows"] = {"5": "many"}
    with pytest.raises(InputError, match=r"info\.iterations"):
        choose(told, machine)


def test_other_policies_come_back_as_they_are():
    machine = Machine(float)
    windowed, begun = policy_on(machine), machine.now()
    for settings in ({"driver": "picard", "window": 7}, {"driver": "sequential"}):
        policy = windowed.with_sampler(spec_sampler(SPEC, solver="ddpm", n_steps=10, **settings))
        assert calibrated(policy, machine) is policy
    assert machine.now() == begun


def test_processes_that_share_windows_take_the_whole_table():
    """Each would measure other times, and they must call the network together."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        machine = Machine(float)
        policy, begun = policy_on(machine, evaluate="sharded"), machine.now()
        assert calibrated(policy, machine).sampler.driver.window == 40 and machine.now() == begun
    finally:
        dist.destroy_process_group()


def test_auto_is_twenty_nodes_until_it_is_chosen():
    machine = Machine(lambda rows: 1.0)
    auto, fixed = policy_on(machine), policy_on(machine, window=UNCALIBRATED)
    one, other = (policy.plan([0.3, 0.1], generator=1) for policy in (auto, fixed))
    assert torch.equal(one.actions, other.actions)
    assert torch.equal(one.solution.iterations, other.solution.iterations)
    with pytest.raises(InputError, match="window="):
        policy_on(machine, window="wide")


def test_a_choice_in_words():
    assert (
        str(Choice({5: 0.02, 8: 0.01}, 0.03))
        == "window=8 (a plan in ms by window: 5: 20, 8: 10; sequential: 30)"
    )
    assert min(WINDOWS) > 1
