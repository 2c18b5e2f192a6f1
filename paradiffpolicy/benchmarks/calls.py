"""How long a network call takes, eager and captured, next to its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from ..clock import Clock
from ..diffusion.denoiser import Network
from ..policy import Policy
from ..sampling.capture.backends import CaptureSettings
from ..sampling.capture.program import CapturedProgram, CaptureError, Program
from ..sampling.driver import State
from ..tables import spread, table, tail
from .floors import Floors
from .timing import Task, Timing, interleaved, timings


@dataclass(frozen=True, kw_only=True)
class CallRow(Timing):
    """A network call of ``batch`` rows; the baseline is eager."""

    name: str
    batch: int


def call_program(policy: Policy, settings: CaptureSettings, batch: int) -> CapturedProgram:
    """One network call, captured, as it runs within a plan: with the features of timestep and condition."""
    settings = settings.resolved(policy.device)
    backend = settings.backends(policy.device)[0]
    if backend.capture_program is None:
        raise CaptureError("network calls can't be captured here: leave out precisions")
    trunk = policy.model.trunk(
        settings.precision,
        policy.device,
        make_convolution=backend.make_convolution,
        arithmetic_in_half=backend.arithmetic_in_half,
    )
    assert trunk is not None
    x = torch.zeros(batch, policy.spec.horizon, policy.spec.action_dim, device=policy.device)
    features = torch.zeros_like(trunk_features(policy, batch))

    def iterate(state: State) -> State:
        return {**state, "y": trunk(state["x"], state["features"])}

    return backend.capture_program(
        Program(
            init=lambda inputs: {**inputs, "y": torch.zeros_like(inputs["x"])},
            iterate=iterate,
            done=lambda state: state["x"].isnan().all(),
            finish=lambda inputs, state: {"y": state["y"]},
            count=1,
            limit=1,
            inputs={"x": x, "features": features},
        )
    )


def trunk_features(policy: Policy, batch: int) -> Tensor:
    """What the trunk takes beside a sample, for as many rows at timestep 0."""
    network, spec = policy.network, policy.spec
    t = torch.zeros(batch, device=policy.device)
    condition = torch.zeros(batch, spec.condition_dim, device=policy.device)
    with torch.inference_mode():
        return network.combine(network.time_features(t), network.condition_features(condition))


def call_rows(
    policy: Policy,
    settings: Mapping[str, CaptureSettings],
    batches: Sequence[int],
    repeats: int,
    clock: Clock,
    floors: Floors,
) -> list[CallRow]:
    """Times a network call eager (whole, as diffusers' loops make it) and captured, taking turns.

    Args:
        settings: of captures, by name.
        batches: rows of a call.
    """
    spec, network = policy.spec, policy.denoiser.network
    precisions = {name: each.resolved(policy.device).precision for name, each in settings.items()}
    rows = []
    for batch in batches:
        x = torch.randn(batch, spec.horizon, spec.action_dim).to(policy.device)
        t = torch.zeros(batch, device=policy.device)
        condition = torch.zeros(batch, spec.condition_dim, device=policy.device)
        features = trunk_features(policy, batch)
        tasks = {"eager": _eager_call(network, x, t, condition)}
        for name, chosen in settings.items():
            tasks[name] = _captured_call(call_program(policy, chosen, batch), x, features)
        seconds = interleaved(tasks, [np.zeros(1)] * repeats, clock)
        rows += [
            CallRow(
                name=name,
                batch=batch,
                floor=floors.seconds(precisions.get(name, "f32"), 1, batch) * 1e3,
                **timings(values, seconds["eager"]),
            )
            for name, values in seconds.items()
        ]
    return rows


def _eager_call(network: Network, x: Tensor, t: Tensor, condition: Tensor) -> Task:
    def call(_: NDArray[Any]) -> None:
        with torch.inference_mode():
            network(x, t, condition).cpu()

    return call


def _captured_call(program: CapturedProgram, x: Tensor, features: Tensor) -> Task:
    return lambda _: program({"x": x, "features": features})["y"].cpu()


def call_table(rows: Sequence[CallRow], title: str) -> Table:
    """One row per way of calling and batch."""
    return table(
        title,
        (
            {
                "network call": row.name,
                "rows": row.batch,
                "ms p50": tail(row.ms),
                "floor ms": f"{row.floor:.1f}",
                "times faster [quartiles]": spread(row.speedup),
            }
            for row in rows
        ),
    )
