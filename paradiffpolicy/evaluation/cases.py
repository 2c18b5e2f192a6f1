"""Compares samplers on the same seeds, while simulated time goes on during every plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..control.record import total_faults
from ..planning.blending import Blending, Latest
from ..policy import Policy
from ..task import Contract
from .blocks import Blocks
from .compare import Progress, no_progress
from .episodes import Episode, Outcome
from .executors import BlockExecutor, BlockProgress, BlockTask, LocalExecutor
from .realtime import MakeEnvAt, realtime_rollout, wall_rollout
from .rollout import in_groups
from .smoothness import boundary_jumps, motion, smoothness


@dataclass(frozen=True, kw_only=True)
class RealtimeResult(Outcome):
    """Episodes under one latency at one rate.

    Attributes:
        rate_hz: of control.
        blending: of chunks, by name.
        contract: says which numbers of an action are positions.
    """

    against: ClassVar = "unlimited"

    rate_hz: float
    blending: str
    contract: Contract = field(default_factory=Contract)

    @property
    def row_name(self) -> str:
        return f"{self.name}, {self.rate_hz:g} Hz, {self.blending}, {self.latency_ms['p50'] or 0:.3g} ms"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        records = [episode.record for episode in self.episodes if episode.record is not None]
        ticks = np.concatenate([record.ticks for record in records])
        delay = np.concatenate([record.plans["delay"] for record in records])
        at, within = boundary_jumps(records)
        motions = [motion(record, self.contract, self.rate_hz) for record in records]
        jerk = np.concatenate(
            [np.linalg.norm(np.diff(record.ticks["action"], 3, axis=0), axis=1) for record in records]
        )
        return {
            "case": self.name,
            "rate_hz": self.rate_hz,
            "blending": self.blending,
            "latency_ms": self.latency_ms,
            "delay_ticks": float(np.mean(delay)) if len(delay) else None,
            **self.compared(),
            "fallback_share": float(ticks["fallback_active"].mean()),
            "requests": sum(record.n_requests for record in records),
            "unfinished_requests": sum(record.unfinished for record in records),
            "missed_ticks": sum(record.missed for record in records),
            "jump_at_boundaries": _median_p95(at),
            "change_within_plans": _median_p95(within),
            "jerk": _median_p95(jerk),
            "smoothness": smoothness(motions),
            "faults": total_faults(records),
        }


def _median_p95(values: NDArray[Any]) -> dict[str, float | None]:
    """Of finite values; the p95 of 200 or more, as in ``tables.quantiles``."""
    values = values[np.isfinite(values)]
    n = len(values)
    return {
        "n": n,
        "median": float(np.median(values)) if n else None,
        "p95": float(np.percentile(values, 95)) if n >= 200 else None,
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampler to run while simulated time goes on.

    Attributes:
        name: of the case.
        policy: that plans.
        rate_hz: of control.
        latencies: in seconds, to draw from; None: as plans take on the machine's clock.
        blending_name, blending: of chunks.
        reference: the label of the case that it is compared with, if any.
        table: that the result belongs to.
    """

    name: str
    policy: Policy
    rate_hz: float
    latencies: Sequence[float] | None = (0.0,)
    blending_name: str = "latest"
    blending: Blending = Latest
    reference: str | None = None
    table: str = "cases"

    @property
    def label(self) -> str:
        """Which case it is, among all of an evaluation."""
        latency = "" if not self.latencies else f", {1e3 * float(np.median(self.latencies)):g} ms"
        return f"{self.table}: {self.name}, {self.rate_hz:g} Hz, {self.blending_name}{latency}"

    def rollout(self, wall: Mapping[str, Any]) -> Callable[..., list[Episode]]:
        """Its ``realtime_rollout``, or, with options of its own, ``wall_rollout``."""
        how: dict[str, Any] = {"rate_hz": self.rate_hz, "blending": self.blending}
        if self.latencies is None:
            return partial(wall_rollout, self.policy, **how, **wall)
        return partial(realtime_rollout, self.policy, latencies=self.latencies, **how)


def compare_realtime(
    cases: Sequence[Case],
    make_env: MakeEnvAt,
    seeds: Sequence[int],
    seconds: float,
    *,
    side_by_side: int | None = None,
    wall: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    executor: BlockExecutor | None = None,
    on_result: Callable[[Sequence[RealtimeResult]], object] = lambda results: None,
    progress: Progress = no_progress,
    **options: Any,
) -> list[RealtimeResult]:
    """Runs cases on the same seeds, one after the other, each block by block.  A policy's programs are
    released after its last case.

    Args:
        make_env: see ``realtime_rollout``.
        seeds, seconds: of episodes.
        side_by_side: episodes in a block; None: all.
        wall: options of ``wall_rollout``, for cases whose latencies aren't given.
        blocks: keeps the episodes of finished blocks; None: nothing does.
        executor: where blocks run in virtual time; None: in this process, as in real time.
        on_result: called with the results so far after every block.
        options: of ``realtime_rollout`` and ``wall_rollout``.

    Returns:
        The results, which ``judged`` has yet to compare.
    """
    blocks = Blocks() if blocks is None else blocks
    done: dict[str, RealtimeResult] = {}
    last = {id(case.policy): case for case in cases}
    groups, here = in_groups(seeds, side_by_side), LocalExecutor()
    for case in cases:
        run = partial(case.rollout(wall or {}), make_env, seconds=seconds, **options)
        episodes: list[Episode] = []
        n_ticks = round(seconds * case.rate_hz)
        with progress(case.label, len(seeds) * n_ticks, "tick") as shown:
            ticks = BlockProgress(shown.update)
            missing = [group for k, group in enumerate(groups) if not blocks.has(case.label, k)]
            execute = here if executor is None or case.latencies is None else executor
            made = execute([BlockTask(run, {"seeds": group}, {"on_ticks": ticks.steps}) for group in missing])
            for k, group in enumerate(groups):
                episodes += blocks.episodes(case.label, k, partial(next, made))
                ticks.block_ended(len(group) * n_ticks)
                taken = [float(s) for e in episodes if e.record for s in e.record.plans["latency"]]
                done[case.label] = RealtimeResult(
                    name=case.name,
                    episodes=list(episodes),
                    latencies=taken if case.latencies is None else case.latencies,
                    reference=None if case.reference is None else done[case.reference].episodes,
                    rate_hz=case.rate_hz,
                    blending=case.blending_name,
                    contract=case.policy.spec.contract,
                )
                on_result(list(done.values()))
        if last[id(case.policy)] is case:
            case.policy.release()
    return list(done.values())
