r"""How long a plan takes for one robot, next to the loops that people run today.

A machine's speed drifts, and other processes come and go: everything that is compared takes turns
within one run, and is given as a ratio to another's time in the same turn.

No plan can be faster than its floor.  A network call reads every weight once and multiplies it with
every row, so it takes at least

    max(weight bytes / bandwidth, rows * operations per row / matrix rate)

both rates measured in the same run; a plan's floor is the sum over its rounds.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ..clock import Clock
from ..models.matmul_unet1d import MatmulUnet1D
from ..models.precision import TrunkForms
from ..models.unet1d import ConditionalUnet1D
from ..policy import Policy
from ..sampling.capture.backends import CaptureSettings, with_fallback
from ..sampling.capture.program import CapturedProgram, Program
from ..sampling.driver import State
from ..types import Plan
from .baselines import BASELINES, Loop, baseline_plan

WARM_UPS = 2

Task = Callable[[NDArray[Any]], object]
"""Something to time on an observation window ``[To, O]``."""


class _Continuing:
    """Plans from window to window, each plan continuing the last; keeps their rounds."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._generator = torch.Generator().manual_seed(0)
        self._plan: Plan | None = None
        self.iterations: list[int] = []
        self.nfe: list[int] = []

    def __call__(self, window: NDArray[Any]) -> None:
        self._plan = self._policy.plan(window, self._plan, generator=self._generator)
        self.iterations.append(int(self._plan.solution.iterations[0]))  # waits for the device
        self.nfe.append(int(self._plan.solution.nfe[0]))


class _Baseline:
    """Plans by one of diffusers' loops; keeps their rounds."""

    def __init__(self, loop: Loop, policy: Policy) -> None:
        self._loop, self._policy = loop, policy
        self._generator = torch.Generator().manual_seed(0)
        self.iterations: list[int] = []

    def __call__(self, window: NDArray[Any]) -> None:
        observed = torch.from_numpy(window[None]).float()
        actions, iterations = baseline_plan(self._loop, self._policy, observed, self._generator)
        actions.cpu()  # waits for the device
        self.iterations.append(iterations)


def interleaved(
    tasks: Mapping[str, Task],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
    on_warm: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds that each task took on each window, the tasks taking turns on every window.

    Two first turns of every task are not counted: they warm up, and a continuing sampler's first plan
    is another.
    """
    for name, task in tasks.items():
        for _ in range(WARM_UPS):
            task(windows[0])
        on_warm(name)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for window in windows:
        for name, task in tasks.items():
            begun = clock.now()
            task(window)
            seconds[name].append(clock.now() - begun)
        on_turn()
    return seconds


def plan_latencies(
    policies: Mapping[str, Policy],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per plan of one robot, ``[len(windows)]`` per policy; see ``interleaved``.

    Args:
        windows: consecutive observation windows ``[To, O]`` of an episode.
    """
    return interleaved(
        {name: _Continuing(policy) for name, policy in policies.items()}, windows, clock, on_turn
    )


def percentiles(values: Sequence[float] | NDArray[Any], *which: float) -> list[float]:
    return [float(value) for value in np.percentile(np.asarray(values), which)]


# -------------------------------------------------------------------------------------------- floors


@dataclass(frozen=True)
class Rates:
    """What a device can do at most, measured: bytes and floating-point operations per second."""

    bandwidth: float
    matrix: float


def measured_rates(device: torch.device, clock: Clock, repeats: int = 7) -> Rates:
    """The best of a few reads of a quarter of a gigabyte, and of a few products of large matrices."""
    values, matrix = torch.ones(2**26, device=device), torch.ones(2048, 2048, device=device)

    def best(task: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(repeats):
            begun = clock.now()
            float(task())  # waits for the device
            seconds.append(clock.now() - begun)
        return min(seconds)

    read = best(values.sum)
    product = best(lambda: (matrix @ matrix)[0, 0])
    return Rates(values.nbytes / max(read, 1e-9), 2 * 2048**3 / max(product, 1e-9))


@dataclass(frozen=True)
class Work:
    """Of a network's trunk: bytes of float32 weights, and operations per row."""

    nbytes: int
    operations: int

    def floor(self, rates: Rates, calls: float, rows: float) -> float:
        """Seconds that ``calls`` network calls of ``rows`` rows each take at least."""
        return calls * max(self.nbytes / rates.bandwidth, rows * self.operations / rates.matrix)


def trunk_work(network: ConditionalUnet1D, horizon: int) -> Work:
    """Without taps that fall on padding, and without FiLM layers, which a capture hoists."""
    trunk = MatmulUnet1D(network)
    film = torch.zeros(1, sum(network.film_sizes), device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        trunk(film.new_zeros(1, horizon, network.input_dim), film)
    return Work(sum(buffer.nbytes for buffer in trunk.buffers()), counter.get_total_flops())


# -------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class LatencyRow:
    """One row of the benchmark; times in milliseconds.

    Attributes:
        speedup, speedup_low, speedup_high: the first baseline's time over this one's in the same
            turn: median and quartiles.
        speedup_ddim: the second baseline's, median.
        rounds: network calls in a row, mean per plan.
        floor: of a plan.
        memory: megabytes by which the process grew when this row's first plans were made.
    """

    name: str
    p50: float
    p99: float
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_ddim: float
    iterations: float
    floor: float
    memory: float


def resident() -> float:
    """Megabytes of this process's memory that are in use; its peak where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return peak()


def peak() -> float:
    """The most that it ever was, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def latency_rows(
    policies: Mapping[str, Policy],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
    rates: Rates | None = None,
) -> list[LatencyRow]:
    """The baselines and every policy, one robot, same windows.

    Args:
        rates: of the device; None: measured here.

    Raises:
        InputError: diffusers, for the baselines, isn't installed.
    """
    first = next(iter(policies.values()))
    network = first.denoiser.network
    assert isinstance(network, ConditionalUnet1D)
    rates = measured_rates(first.device, clock) if rates is None else rates
    work = trunk_work(network, first.spec.horizon)
    loops = {name: _Baseline(loop, first) for name, loop in BASELINES.items()}
    ours = {name: _Continuing(policy) for name, policy in policies.items()}
    memory, before = {}, resident()

    def on_warm(name: str) -> None:
        nonlocal before
        gc.collect()
        memory[name] = resident() - before
        before = resident()

    seconds = interleaved({**loops, **ours}, windows, clock, on_turn, on_warm)
    ddpm, ddim, _ = (np.array(seconds[name]) for name in BASELINES)
    rows = []
    for name, values in seconds.items():
        task = loops.get(name) or ours[name]
        iterations = float(np.mean(task.iterations[WARM_UPS:]))
        nfe = float(np.mean(task.nfe[WARM_UPS:])) if isinstance(task, _Continuing) else iterations
        low, middle, high = percentiles(np.divide(ddpm, values), 25, 50, 75)
        p50, p99 = percentiles(values, 50, 99)
        rows.append(
            LatencyRow(
                name,
                p50=p50 * 1e3,
                p99=p99 * 1e3,
                speedup=middle,
                speedup_low=low,
                speedup_high=high,
                speedup_ddim=float(np.median(np.divide(ddim, values))),
                iterations=iterations,
                floor=work.floor(rates, iterations, nfe / iterations) * 1e3,
                memory=memory[name],
            )
        )
    return rows


def latency_table(rows: Sequence[LatencyRow], title: str) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column("plan")
    headings = (
        "iterations",
        "ms p50",
        "ms p99",
        "floor ms",
        "times faster than\nDDPM-100 [quartiles]",
        "than\nDDIM-10",
    )
    for heading in (*headings, "memory\nMB"):
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(
            row.name,
            f"{row.iterations:.1f}",
            f"{row.p50:.1f}",
            f"{row.p99:.1f}",
            f"{row.floor:.1f}",
            f"{row.speedup:.1f} [{row.speedup_low:.1f}, {row.speedup_high:.1f}]",
            f"{row.speedup_ddim:.1f}",
            f"{row.memory:.0f}",
        )
    return view


# ------------------------------------------------------------------------------------- network calls


@dataclass(frozen=True)
class CallRow:
    """A network call of ``batch`` rows; times in milliseconds, ratios to eager in the same turn."""

    name: str
    batch: int
    p50: float
    p99: float
    speedup: float
    speedup_low: float
    speedup_high: float
    floor: float


def call_program(policy: Policy, settings: CaptureSettings, batch: int) -> CapturedProgram:
    """One network call, captured: what is left of it within a plan."""
    backend = with_fallback(settings.backends(policy.device))
    network = policy.denoiser.network
    assert isinstance(network, ConditionalUnet1D)
    forms = TrunkForms(network, settings.precision, policy.device)
    trunk = forms.trunk(matmul=backend.matmul, arithmetic_in_half=backend.arithmetic_in_half)
    assert trunk is not None
    x = torch.zeros(batch, policy.spec.horizon, policy.spec.action_dim, device=policy.device)
    film = torch.zeros(batch, sum(network.film_sizes), device=policy.device)

    def iterate(state: State) -> State:
        return {**state, "y": trunk(state["x"], state["film"])}

    return backend.capture_program(
        Program(
            init=lambda inputs: {**inputs, "y": torch.zeros_like(inputs["x"])},
            iterate=iterate,
            done=lambda state: state["x"].isnan().all(),
            finish=lambda inputs, state: {"y": state["y"]},
            count=1,
            limit=1,
            inputs={"x": x, "film": film},
        )
    )


def call_rows(
    policy: Policy,
    settings: Mapping[str, CaptureSettings],
    batches: Sequence[int],
    repeats: int,
    clock: Clock,
    rates: Rates,
) -> list[CallRow]:
    """A network call eager (whole, as the loops of today make it) and captured, taking turns."""
    network = policy.denoiser.network
    assert isinstance(network, ConditionalUnet1D)
    work, rows = trunk_work(network, policy.spec.horizon), []
    for batch in batches:
        x = torch.randn(batch, policy.spec.horizon, policy.spec.action_dim).to(policy.device)
        t = torch.zeros(batch, device=policy.device)
        condition = torch.zeros(batch, network.global_cond_dim, device=policy.device)
        with torch.inference_mode():
            film = network.time_film(t) + network.condition_film(condition)

        def eager(
            window: NDArray[Any],
            x: torch.Tensor = x,
            t: torch.Tensor = t,
            condition: torch.Tensor = condition,
        ) -> None:
            with torch.inference_mode():
                network(x, t, condition).cpu()

        def frozen_task(
            captured_program: CapturedProgram, x: torch.Tensor = x, film: torch.Tensor = film
        ) -> Task:
            return lambda window: captured_program({"x": x, "film": film})["y"].cpu()

        tasks: dict[str, Task] = {"eager": eager}
        for name, chosen in settings.items():
            tasks[name] = frozen_task(call_program(policy, chosen, batch))
        seconds = interleaved(tasks, [np.zeros(1)] * repeats, clock)
        for name, values in seconds.items():
            low, middle, high = percentiles(np.divide(seconds["eager"], values), 25, 50, 75)
            p50, p99 = percentiles(values, 50, 99)
            floor = work.floor(rates, 1, batch)
            rows.append(CallRow(name, batch, p50 * 1e3, p99 * 1e3, middle, low, high, floor * 1e3))
    return rows


def call_table(rows: Sequence[CallRow], title: str) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column("network call")
    for heading in ("rows", "ms p50", "ms p99", "floor ms", "times faster [quartiles]"):
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(
            row.name,
            str(row.batch),
            f"{row.p50:.1f}",
            f"{row.p99:.1f}",
            f"{row.floor:.1f}",
            f"{row.speedup:.1f} [{row.speedup_low:.1f}, {row.speedup_high:.1f}]",
        )
    return view


# -------------------------------------------------------------------------------------- steady state


@dataclass(frozen=True)
class Steady:
    """Many plans of one robot, one after the other.

    Attributes:
        first: milliseconds of the very first, which captures.
        p50, p99, p999: milliseconds of the others.
        growth: megabytes by which the process grew from the first tenth of the plans to the last.
    """

    plans: int
    first: float
    p50: float
    p99: float
    p999: float
    growth: float


def steady_state(
    policy: Policy, windows: Sequence[NDArray[Any]], plans: int, clock: Clock, on_plan: Callable[[], object]
) -> Steady:
    """Plans again and again from ``windows``, each continuing the last."""
    task, seconds = _Continuing(policy), []
    begun = clock.now()
    task(windows[0])
    first = clock.now() - begun
    policy.warm_up()
    before = resident()
    for k in range(plans):
        begun = clock.now()
        task(windows[k % len(windows)])
        seconds.append(clock.now() - begun)
        if k == plans // 10:
            before = resident()
        on_plan()
    p50, p99, p999 = percentiles(seconds, 50, 99, 99.9)
    growth = resident() - before
    return Steady(plans, first * 1e3, p50 * 1e3, p99 * 1e3, p999 * 1e3, growth)
