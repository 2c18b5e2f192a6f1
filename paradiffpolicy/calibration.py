"""Calibration: the window with which plans take the least time on this machine.

A windowed driver with more nodes per iteration needs fewer iterations, and each takes longer.  Iterations
are the policy's (``iteration_curve`` measures them on recorded observations, and a checkpoint keeps them),
seconds are the machine's (``calibrated`` measures them, and a file keeps them):

    seconds of a plan = iterations(W) * seconds of an iteration of W rows
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clock import Clock
from .errors import InputError, reading, require_positive
from .files import write_json
from .observation import Observation
from .policy import Policy
from .provenance import machine
from .sampling.capture.fingerprint import fingerprint
from .sampling.picard import AUTO, Windowed
from .sampling.sampler import Sampler
from .sampling.sequential import Sequential
from .sampling.sharded import Sharded

log = logging.getLogger(__name__)

WINDOWS = (5, 8, 12, 20, 50, 100)
"""Windows that are tried, as far as a table has so many nodes."""

FAR = 1.3
"""Once a window takes so many times the best one's time, wider ones aren't tried."""

PLANS = 3
"""Timed plans per window."""

CURVES = "iterations"
"""Where a checkpoint's ``info`` keeps its curves."""


@dataclass(frozen=True)
class Measured:
    """What plans from the middle of the training observations took.

    Attributes:
        seconds: of an iteration.
        iterations: per plan.
    """

    seconds: float
    iterations: float


@dataclass(frozen=True)
class Choice:
    """The window with the least expected time.

    Attributes:
        expected: seconds of a plan by window.
        sequential: of a plan, one node after the other.
    """

    expected: Mapping[int, float]
    sequential: float

    @property
    def window(self) -> int | None:
        """The best; None: the sequential driver is faster than every window."""
        best = min(self.expected, key=lambda window: self.expected[window])
        return best if self.expected[best] < self.sequential else None

    def __str__(self) -> str:
        tried = ", ".join(f"{window}: {1e3 * seconds:.3g}" for window, seconds in self.expected.items())
        chosen = "no window pays: sequential" if self.window is None else f"window={self.window}"
        return f"{chosen} (a plan in ms by window: {tried}; sequential: {1e3 * self.sequential:.3g})"


def calibrated(
    policy: Policy, clock: Clock, kept: Path | None = None, on_window: Callable[[], object] = lambda: None
) -> Policy:
    """The policy with the window that is fastest here, where its driver's is ``auto``; with a sequential
    driver if none is faster than that.  Another policy comes back as it is.

    Args:
        clock: times the plans.
        kept: a JSON file of what was measured before, which grows; None: everything is measured now.
        on_window: called after each window that was measured.
    """
    sampler = policy.sampler
    if not is_auto(sampler):
        return policy
    if isinstance(getattr(sampler.driver, "evaluate", None), Sharded):  # every process must choose the same
        return policy.with_sampler(_with_window(sampler, sampler.tableau.n_nodes))
    choice = choose(policy, clock, kept, on_window)
    log.info("sampling: %s", choice)
    return policy.with_sampler(_with_window(sampler, choice.window))


def is_auto(sampler: Sampler) -> bool:
    """Whether its window is yet to be chosen."""
    return isinstance(sampler.driver, Windowed) and sampler.driver.window == AUTO


def kept_windows(cache: Path | str | None) -> Path | None:
    """The file of a cache of compiled programs that keeps what was measured."""
    return None if cache is None else Path(cache).expanduser() / "windows.json"


def choose(
    policy: Policy, clock: Clock, kept: Path | None = None, on_window: Callable[[], object] = lambda: None
) -> Choice:
    """Finds the window with the least expected time; ``calibrated``'s arguments."""
    # Not kept on disk, and not fused: these programs are for a few plans.
    plain = replace(policy, capture=replace(policy.capture, cache=None, fuse=False))
    known, key, curve = _kept(kept), _machine_and_policy(policy), known_curve(policy)
    times = {int(window): Measured(**values) for window, values in known.get(key, {}).items()}

    def measured(window: int) -> Measured:
        if window not in times:
            times[window] = _measured(plain, _with_window(policy.sampler, window or None), clock)
            on_window()
        return times[window]

    expected: dict[int, float] = {}
    for window in _tried(policy.sampler):
        each = measured(window)
        expected[window] = each.seconds * (each.iterations if curve is None else _between(curve, window))
        if expected[window] > FAR * min(expected.values()):
            break
    alone = measured(0)
    if kept is not None and set(map(str, times)) != set(known.get(key, {})):
        try:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(kept, {**_kept(kept), key: {str(w): vars(value) for w, value in times.items()}})
        except (OSError, InputError) as error:
            log.warning("sampling: what windows take can't be kept (%s)", error)
    return Choice(expected, alone.seconds * alone.iterations)


def iteration_curve(policy: Policy, observations: Sequence[Observation]) -> dict[str, Any]:
    """How many iterations plans take on average, by window, from recorded observation windows: an entry of a
    checkpoint's ``info["iterations"]``, for the policy's sampler."""
    sampler, batch = policy.sampler, np.stack([np.asarray(window) for window in observations])
    counts = {}
    for window in _tried(sampler):
        plan = policy.with_sampler(_with_window(sampler, window)).plan(batch, generator=0)
        counts[str(window)] = round(float(plan.solution.iterations.double().mean()), 2)
    words = repr(replace(sampler, driver=policy.driver))
    return {_sampler_key(policy): {"sampler": words, "plans": len(batch), "windows": counts}}


def known_curve(policy: Policy) -> Mapping[int, float] | None:
    """A checkpoint's curve for the policy's sampler; None: it has none."""
    curves = policy.info.get(CURVES)
    entry = curves.get(_sampler_key(policy)) if isinstance(curves, Mapping) else None
    if entry is None:
        return None
    with reading("the checkpoint's info.iterations"):
        return {int(window): float(mean) for window, mean in entry["windows"].items()}


def _tried(sampler: Sampler) -> list[int]:
    return sorted({min(window, sampler.tableau.n_nodes) for window in WINDOWS})


def _between(curve: Mapping[int, float], window: int) -> float:
    """Iterations of a window, interpolated in the logarithm."""
    known = sorted(curve)
    return float(np.interp(np.log(window), np.log(known), [curve[each] for each in known]))


def _with_window(sampler: Sampler, window: int | None) -> Sampler:
    driver: Any = sampler.driver
    if window is None:
        return replace(sampler, driver=Sequential())
    return replace(sampler, driver=replace(driver, window=window))


def _measured(policy: Policy, sampler: Sampler, clock: Clock) -> Measured:
    """Times a sampler's first plans of the middle of the training observations."""
    timed, window = policy.with_sampler(sampler), policy.middle_window()
    timed.plan(window, generator=0)
    seconds = iterations = 0.0
    for seed in range(1, PLANS + 1):
        begun = clock.now()
        plan = timed.plan(window, generator=seed)
        iterations += int(plan.solution.iterations[0])  # waits for the device
        seconds += clock.now() - begun
    return Measured(seconds / iterations, iterations / PLANS)


def _sampler_key(policy: Policy) -> str:
    """Of everything that a sampler's iterations depend on, but its window."""
    driver: Any = policy.driver
    table = [getattr(policy.sampler.tableau, each.name) for each in fields(policy.sampler.tableau)]
    # Rounded: another machine's last digits make no other table.
    table = [
        part.double().round(decimals=6) + 0.0 if isinstance(part, torch.Tensor) else part for part in table
    ]
    return fingerprint(table, replace(driver, window=AUTO), policy.sampler.start)[:16]


def _machine_and_policy(policy: Policy) -> str:
    capture, spec = policy.capture, policy.spec
    here = (machine(), torch.get_num_threads(), str(policy.device))
    how = (capture.backend, capture.precision, capture.threads, capture.pinning, capture.tf32)
    sizes = (spec.horizon, spec.action_dim, spec.obs_dim, spec.n_obs_steps)
    shapes = [tuple(weight.shape) for weight in policy.network.parameters()]
    return fingerprint(here, how, sizes, shapes, policy.guidance_scale, _sampler_key(policy))


def _kept(path: Path | None) -> dict[str, Any]:
    """What was measured before; nothing if the file can't be read."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for entry in content.values():
            for window, values in entry.items():
                require_positive(window=int(window) + 1, **vars(Measured(**values)))
        return dict(content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("sampling: %s is damaged (%s); windows are measured anew", path, error)
        return {}
