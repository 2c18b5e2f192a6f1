"""Compares solvers, numbers of steps and drivers: the cost of a plan, and its error.

There are two errors.  A driver's is the distance of the policy's plan to the sequential one of the same
tableau and noise.  A solver's is the distance of the sequential sample to the exact flow, on a Gaussian
mixture whose denoiser is known; stochastic solvers have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ..clock import Clock
from ..diffusion.analytic import mixture_denoiser
from ..diffusion.schedule import NoiseSchedule
from ..policy import Policy
from ..sampling.noise import noise_for
from ..sampling.reference import probability_flow
from ..sampling.sampler import Sampler
from ..sampling.sequential import Sequential
from ..sampling.spec import spec_sampler
from ..sampling.tableau import Tableau
from ..tables import table
from ..telemetry.axes import plain_ticks
from ..types import Noise, Plan, PolicySpec
from .timing import WARM_UPS, interleaved


@dataclass(frozen=True)
class SolverCase:
    """One row to measure."""

    solver: str
    n_steps: int
    driver: str
    sampler: Sampler


def solver_cases(
    spec: PolicySpec,
    solvers: Sequence[str],
    steps: Sequence[int],
    drivers: Mapping[str, Mapping[str, Any]],
    **grid: Any,
) -> list[SolverCase]:
    """All combinations; a window holds all nodes, and ``speculative`` needs a stochastic solver.

    Args:
        drivers: settings of each, as ``make_sampler`` takes them.
        grid: ``spacing`` and ``lambda_min`` of all.
    """
    cases = []
    for solver in solvers:
        for n_steps in steps:
            grid["n_steps"] = n_steps
            tableau = spec_sampler(spec, solver=solver, **grid).tableau
            for name, settings in drivers.items():
                if settings["driver"] == "speculative" and not tableau.stochastic:
                    continue
                window = {} if settings["driver"] == "sequential" else {"window": tableau.n_nodes}
                sampler = spec_sampler(spec, solver=solver, **grid, **(window | dict(settings)))
                cases.append(SolverCase(solver, n_steps, name, sampler))
    return cases


@dataclass(frozen=True)
class SolverRow:
    """One row of the benchmark.

    Attributes:
        nodes: of the tableau, the network calls of a sequential plan.
        iterations, nfe: of the policy's plans, means.
        ms: median wall time of a plan for one robot, milliseconds.
        error: to the sequential plan of the same noise: the largest deviation of a plan's executed actions,
            in the action's units, median over plans.
        worst_error: the same, of the plan that deviates most.
        flow_error: root mean square to the exact flow on the mixture; None for stochastic solvers.
    """

    solver: str
    n_steps: int
    driver: str
    nodes: int
    iterations: float
    nfe: float
    ms: float
    error: float
    worst_error: float
    flow_error: float | None


def flow_error(schedule: NoiseSchedule, tableau: Tableau, batch: int = 64) -> float | None:
    """Root mean square distance of sequential samples to the flow of a Gaussian mixture."""
    if tableau.stochastic:
        return None
    denoise, noise = mixture_denoiser(schedule), noise_for(tableau.n_nodes, 1, shape=(batch, 1))
    exact = probability_flow(denoise, tableau, noise, schedule, rtol=1e-8, atol=1e-8).sample
    sample = Sequential()(denoise, tableau, noise).sample
    return float((sample - exact).square().mean().sqrt())


class _Planning:
    """Plans from windows, each from its own noise; keeps the plans."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.plans = policy, list[Plan]()

    def __call__(self, window: NDArray[Any]) -> None:
        generator = torch.Generator().manual_seed(len(self.plans))
        self.plans.append(self.policy.plan(window, generator=generator))


def sequential_plan(policy: Policy, window: NDArray[Any], noise: Noise) -> Plan:
    """The plan that the policy's tableau gives sequentially from a noise."""

    def given(*_: Any) -> tuple[Noise, None]:
        return noise, None

    sampler = Sampler(policy.sampler.tableau, Sequential(), given)
    return policy.with_sampler(sampler).plan(window)


def solver_rows(
    policy: Policy,
    cases: Sequence[SolverCase],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
) -> list[SolverRow]:
    """Times every case on the same observation windows ``[To, O]``, taking turns."""
    tasks = {str(i): _Planning(policy.with_sampler(case.sampler)) for i, case in enumerate(cases)}
    seconds = interleaved(tasks, windows, clock, on_turn)
    flow_errors: dict[tuple[str, int], float | None] = {}
    references: dict[tuple[str, int, int], Plan] = {}
    rows = []
    for case, task, times in zip(cases, tasks.values(), seconds.values(), strict=True):
        plans = task.plans[WARM_UPS:]
        errors, key = [], (case.solver, case.n_steps)
        for k, (window, plan) in enumerate(zip(windows, plans, strict=True)):
            reference = references.get((*key, k))
            if reference is None or reference.solution.noise != plan.solution.noise:
                reference = references[*key, k] = sequential_plan(task.policy, window, plan.solution.noise)
            errors.append(float((plan.executed_actions - reference.executed_actions).abs().max()))
        if key not in flow_errors:
            flow_errors[key] = flow_error(policy.schedule, case.sampler.tableau)
        rows.append(
            SolverRow(
                *key,
                case.driver,
                nodes=case.sampler.tableau.n_nodes,
                iterations=float(np.mean([int(plan.solution.iterations[0]) for plan in plans])),
                nfe=float(np.mean([int(plan.solution.nfe[0]) for plan in plans])),
                ms=float(np.median(times)) * 1e3,
                error=float(np.median(errors)),
                worst_error=max(errors),
                flow_error=flow_errors[key],
            )
        )
    return rows


def solver_table(rows: Sequence[SolverRow], title: str) -> Table:
    """One row per solver, number of steps and driver."""
    return table(
        title,
        (
            {
                "solver": row.solver,
                "steps": row.n_steps,
                "driver": row.driver,
                "iterations": f"{row.iterations:.1f}",
                "NFE": f"{row.nfe:.0f}",
                "ms p50": f"{row.ms:.0f}",
                "error to sequential\nmedian / worst": f"{row.error:.2g} / {row.worst_error:.2g}",
                "error to\nthe flow": "-" if row.flow_error is None else f"{row.flow_error:.1e}",
            }
            for row in rows
        ),
        left=("driver",),
    )


def work_precision(rows: Sequence[SolverRow], title: str) -> Figure:
    """Draws error over NFE per solver on the left, iterations over nodes per driver on the right."""
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    solvers = list(dict.fromkeys(row.solver for row in rows))
    styles = {
        solver: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        for i, solver in enumerate(solvers)
    }
    for solver in solvers:
        points = [r for r in rows if r.solver == solver and r.driver == "sequential" and r.flow_error]
        if points:
            left.plot(
                [r.nodes for r in points],
                [r.flow_error for r in points],
                marker="o",
                label=solver,
                **styles[solver],
            )
    left.set(xscale="log", yscale="log", xlabel="NFE", ylabel="error to the exact flow (rms)")
    left.set_title("solvers, on a Gaussian mixture", loc="left", fontsize="medium")
    left.legend(fontsize="x-small")
    drivers: Mapping[str, str] = dict(
        zip(dict.fromkeys(r.driver for r in rows if r.driver != "sequential"), "os^vD", strict=False)
    )
    for driver, marker in drivers.items():
        points = [r for r in rows if r.driver == driver]
        colours = [styles[r.solver]["color"] for r in points]
        right.scatter(
            [r.nodes for r in points], [r.iterations for r in points], marker=marker, c=colours, alpha=0.8
        )
        right.scatter([], [], marker=marker, color="gray", label=driver)
    longest = max(row.nodes for row in rows)
    right.plot([1, longest], [1, longest], color="gray", linestyle=":", label="sequential")
    right.set(xscale="log", yscale="log", xlabel="nodes of the tableau", ylabel="iterations per plan")
    right.set_title("drivers, on the policy (colours: solvers)", loc="left", fontsize="medium")
    right.legend(fontsize="x-small")
    for axes in (left, right):
        axes.grid(visible=True, which="both", alpha=0.25)
        plain_ticks(axes.xaxis)
    plain_ticks(right.yaxis)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="medium")
    return figure
