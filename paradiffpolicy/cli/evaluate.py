"""Samplers compared in closed loop: the simulation waits for every plan, or goes on meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..provenance import about, describe, in_words, machine
from ..tables import bar, console
from .building import (
    capture_settings,
    load_policy,
    named_blending,
    named_interpolation,
    resized,
    sampling_policy,
)
from .environments import env_maker, env_maker_at, env_workers, recorded_windows
from .executing import block_executor, policy_gpus
from .locating import locate_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.blocks import Blocks
    from ..evaluation.cases import Case, RealtimeResult
    from ..evaluation.compare import SamplerResult
    from ..policy import Policy
    from .parts import PolicyConfig
    from .schema import CaseConfig, EvaluateConfig


def evaluate(cfg: EvaluateConfig) -> None:
    """Compares samplers on the same seeds, in one of two ways of letting time pass."""
    modes = {"unlimited": evaluate_unlimited, "realtime": evaluate_realtime}
    with quiet("paradiffpolicy.control"):  # faults are in the report; a line for each would bury it
        modes[cfg.mode](cfg)


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Raises a logger's level to errors."""
    named = logging.getLogger(logger)
    before = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(before)


NOT_DECIDING = {
    "out",
    "workers",
    "executor",
    "plugins",
    "checkpoint",
    "margin",
    "success_margin",
    "latency_plans",
    "paced_ticks",
}
"""Settings that change no episode; the weights' hash stands for the checkpoint."""


def deciding(cfg: EvaluateConfig) -> dict[str, Any]:
    """All that decides the episodes, as plain values: settings, weights, versions of code and packages."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in NOT_DECIDING}
    head = about(locate_checkpoint(cfg.checkpoint))
    settings["student_sha256"] = student_hashes(cfg)
    return settings | {name: head[name] for name in ("weights_sha256", "code_sha256", "versions")}


def student_hashes(cfg: PolicyConfig) -> dict[str, str]:
    """The hash of the weights of every sampler that has some of its own."""
    from ..checkpoint import METADATA, read_description
    from ..files import exists

    teacher, hashes = locate_checkpoint(cfg.checkpoint), {}
    for name, sampler in cfg.sampler.items():
        if "checkpoint" in sampler and exists(teacher / sampler["checkpoint"] / METADATA):
            hashes[name] = read_description(teacher / sampler["checkpoint"]).sha256
    return hashes


def out_folder(cfg: EvaluateConfig, command: str, settings: Mapping[str, Any]) -> Path:
    """The report's folder; see ``report_folder``."""
    return report_folder(cfg.out, Path(f"outputs/{command}/{cfg.task.name}"), settings)


def report_folder(out: str | None, parent: Path, settings: Mapping[str, Any], *kept: str) -> Path:
    """A report's folder: as given; else where blocks of the same settings are kept; else named by the time.

    Args:
        kept: the name of the folder that they are kept in, if it isn't the usual one.

    Raises:
        InputError: it can't be written.
    """
    from ..evaluation.blocks import kept_settings
    from ..files import require_writable

    cut_off = [] if out else [path for path in parent.glob("*") if kept_settings(path, *kept) == settings]
    now = parent / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = Path(out) if out else max(cut_off, default=now)
    require_writable(out=folder / "report.json")
    return folder


def evaluate_unlimited(cfg: EvaluateConfig) -> None:
    """Samplers side by side on the same seeds: reward, iterations, plan error, latency, deadlines."""
    from ..clock import MonotonicClock
    from ..environment import picture
    from ..evaluation.blocks import Blocks
    from ..evaluation.compare import Comparison
    from ..evaluation.report import difference_table, sampler_table

    workers, policy = env_workers(cfg.workers), load_policy(cfg)
    settings = deciding(cfg)
    folder = out_folder(cfg, "evaluate", settings)
    blocks, names = Blocks(folder, settings), list(dict.fromkeys([cfg.reference, *cfg.samplers]))
    report = UnlimitedReport(cfg, folder, names, policy.spec.control_hz)
    executor = block_executor(cfg, policy_gpus(cfg))
    comparison = Comparison(
        policies={name: sampling_policy(cfg, name, policy) for name in names},
        make_env=env_maker(cfg, policy.spec, **cfg.disturbances),
        seeds=range(cfg.first_seed, cfg.first_seed + cfg.seeds),
        max_steps=cfg.task.max_steps,
        reference=cfg.reference,
        clock=MonotonicClock(),
        margins={"score": cfg.margin, "success": cfg.success_margin},
        stop_early=cfg.stop_early,
        side_by_side=cfg.side_by_side,
        n_pictured=cfg.videos,
        latency_plans=cfg.latency_plans,
        paced_ticks=cfg.paced_ticks,
        blocks=blocks,
        on_result=report.on_result,
        progress=bar,
        workers=workers,
        executor=executor,
        options={
            "picture": functools.partial(picture, size=cfg.video_size),
            "success_key": cfg.task.success_key,
            "scoring": cfg.task.scoring,
        },
    )
    with contextlib.closing(workers), contextlib.closing(executor):
        results = comparison.run()
    paths = report.write(results, [], pictures=True)
    blocks.remove()
    how = in_words({result.name: result.captured for result in results})
    tables = [
        sampler_table(results, report.title),
        difference_table(results, f"Differences to {cfg.reference}"),
    ]
    notes = [f"on {describe(machine())}; plans: {how}"]
    show(tables, [*notes, *paths, *itertools.chain(*report.videos.values())])


def report_title(cfg: EvaluateConfig) -> str:
    """Of a report's tables and pictures."""
    from ..disturbances import in_title

    about = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint or '').name}"
    return about + in_title(cfg.disturbances)


class UnlimitedReport:
    """Writes the report and the videos of samplers on the same seeds, as far as there are results.

    Attributes:
        title: of tables and pictures.
        videos: paths of every sampler's.
    """

    def __init__(self, cfg: EvaluateConfig, folder: Path, names: Sequence[str], control_hz: float) -> None:
        self._cfg, self._folder, self._names, self._control_hz = cfg, folder, names, control_hz
        self.title = report_title(cfg)
        self.videos: dict[str, list[Path]] = {}

    def write(
        self, results: Sequence[SamplerResult], unfinished: Sequence[str], *, pictures: bool
    ) -> list[Path]:
        """Writes all but the videos; returns the paths."""
        from ..evaluation.report import write_report

        cfg = self._cfg
        captured = {result.name: result.captured for result in results}
        head = about(
            locate_checkpoint(cfg.checkpoint),
            checkpoint=str(cfg.checkpoint),
            task=cfg.task.name,
            reference=cfg.reference,
            guidance_scale=cfg.guidance_scale,
            disturbances=cfg.disturbances,
            capture={"backend": cfg.capture, "precision": cfg.precision, "programs": captured},
            seeds=[cfg.first_seed, cfg.first_seed + cfg.seeds - 1],
            stop_early=cfg.stop_early,
            samplers_config={name: cfg.sampler[name] for name in self._names},
            student_sha256={k: v for k, v in student_hashes(cfg).items() if k in self._names},
            unfinished=unfinished,
        )
        return write_report(self._folder, results, self.title, head, self._control_hz, pictures=pictures)

    def on_result(self, results: Sequence[SamplerResult], name: str) -> None:
        """Writes the report after a sampler's block, and its video when all pictures are there."""
        from ..evaluation.report import write_episodes

        cfg = self._cfg
        (newest,) = (result for result in results if result.name == name)
        pictured = name not in self.videos and len(newest.episodes) >= min(cfg.videos, cfg.seeds)
        done = [r.name for r in results if len(r.episodes) == cfg.seeds or (cfg.stop_early and r.decided)]
        unfinished = [name for name in self._names if name not in done]
        self.write(results, unfinished, pictures=pictured)
        if pictured:
            self.videos[name] = write_episodes(self._folder, newest, self._control_hz)


def show(tables: Sequence[Table], lines: Sequence[object]) -> None:
    """Prints the tables that have a row, then lines."""
    screen = console()
    for view in tables:
        if view.row_count:
            screen.print(view)
    for line in lines:
        screen.print(str(line), highlight=False)


def evaluate_realtime(cfg: EvaluateConfig) -> None:
    """Reward while simulated time goes on: by sampler and control rate, and against latency."""
    from ..clock import MonotonicClock
    from ..evaluation.blocks import Blocks
    from ..evaluation.cases import compare_realtime
    from ..evaluation.episodes import judged
    from ..evaluation.report import difference_table, realtime_table, write_realtime_report

    setting, policy, settings = cfg.realtime, load_policy(cfg), deciding(cfg)
    folder = out_folder(cfg, "realtime", settings)
    blocks = Blocks(folder, settings)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    title = f"{report_title(cfg)}, {setting.clock} clock"
    cases, sweep = realtime_cases(cfg, policy, blocks)

    def split(results: Sequence[RealtimeResult]) -> tuple[list[RealtimeResult], list[RealtimeResult]]:
        margins, n = {"score": cfg.margin, "success": cfg.success_margin}, len(cases)
        return judged(results[:n], margins), judged(results[n:], margins)

    def write(results: Sequence[RealtimeResult], pictures: bool = False) -> list[Path]:
        done = sum(len(result.episodes) == cfg.seeds for result in results)
        head = about(
            locate_checkpoint(cfg.checkpoint),
            checkpoint=str(cfg.checkpoint),
            task=cfg.task.name,
            seeds=[seeds.start, seeds.stop - 1],
            realtime=asdict(setting),
            disturbances=cfg.disturbances,
            unfinished=[case.label for case in (*cases, *sweep)[done:]],
        )
        judged_cases, judged_sweep = split(results)
        return write_realtime_report(folder, judged_cases, judged_sweep, title, head, pictures=pictures)

    with contextlib.closing(block_executor(cfg, policy_gpus(cfg))) as executor:
        results = compare_realtime(
            [*cases, *sweep],
            env_maker_at(cfg, policy.spec, **cfg.disturbances),
            seeds,
            cfg.task.max_steps / policy.spec.control_hz,
            side_by_side=cfg.side_by_side,
            wall={"clock": MonotonicClock(), "side_by_side": setting.side_by_side},
            blocks=blocks,
            executor=executor,
            on_result=write,
            progress=bar,
            replan_every=setting.replan_every,
            interpolation=named_interpolation(setting.interpolation),
            forward=setting.forward,
            success_key=cfg.task.success_key,
            scoring=cfg.task.scoring,
        )
    paths = write(results, pictures=True)
    blocks.remove()
    titles = (title, f"{setting.sweep.sampler} under injected latency")
    shown = [
        view
        for part, heading in zip(split(results), titles, strict=True)
        for view in (realtime_table(part, heading), difference_table(part, "Differences to unlimited time"))
    ]
    show(shown, [f"on {describe(machine())}", *paths])


def realtime_cases(cfg: EvaluateConfig, policy: Policy, blocks: Blocks) -> tuple[list[Case], list[Case]]:
    """Every sampler with unlimited time, then the cases at every rate; and the sweep."""
    from ..control.rate import ticks_per_step
    from ..evaluation.cases import Case
    from ..planning.forward import moved_pairs

    setting = cfg.realtime
    rates = setting.rates_hz or [policy.spec.control_hz]
    moved_pairs(policy.spec, setting.forward)
    for rate in rates:  # before hours of other cases
        named_interpolation(setting.interpolation)(policy.spec, ticks_per_step(rate, policy.spec.control_hz))
    virtual, blending = setting.clock == "virtual", named_blending(setting.blending, policy.spec)
    chunks: dict[str, Any] = {"blending_name": setting.blending["name"], "blending": blending}
    blendings = {
        name: named_blending(chosen, policy.spec) for name, chosen in setting.sweep.blendings.items()
    }
    timed = {name: case_policy(cfg, case, policy) for name, case in setting.cases.items()}
    latencies = case_latencies(cfg, timed, policy, blocks)
    names = dict.fromkeys(case.sampler for case in setting.cases.values())
    samplers = {name: sampling_policy(cfg, name, policy) for name in names}
    unlimited = {
        name: Case(name=f"{name}, unlimited", policy=sampler, rate_hz=rates[0], **chunks)
        for name, sampler in samplers.items()
    }
    cases = [
        Case(
            name=name,
            policy=samplers[case.sampler] if virtual else timed[name],
            rate_hz=rate,
            latencies=latencies[name] if virtual else None,
            reference=unlimited[case.sampler].label,
            **chunks,
        )
        for name, case in setting.cases.items()
        for rate in rates
    ]
    swept, reference = (
        sampling_policy(cfg, setting.sweep.sampler, policy),
        unlimited.get(setting.sweep.sampler),
    )
    sweep = [
        Case(
            name=setting.sweep.sampler,
            policy=swept,
            rate_hz=rates[0],
            latencies=[ms / 1e3],
            blending_name=name,
            blending=blending,
            reference=reference.label if reference else None,
            table="sweep",
        )
        for name, blending in blendings.items()
        for ms in (setting.sweep.latency_ms if virtual else [])
    ]
    return [*unlimited.values(), *cases], sweep


def case_latencies(
    cfg: EvaluateConfig, timed: Mapping[str, Policy], policy: Policy, blocks: Blocks
) -> dict[str, list[float]]:
    """Seconds per plan of every case on the virtual clock: as given, or measured once per evaluation."""
    from ..benchmarks.timing import plan_latencies
    from ..clock import MonotonicClock

    cases = cfg.realtime.cases
    given = {
        name: latency_seconds(case.latency_ms) for name, case in cases.items() if case.latency_ms is not None
    }
    measured = {name: timed[name] for name in cases if name not in given}
    if not measured or cfg.realtime.clock != "virtual":
        return given

    def measure() -> dict[str, list[float]]:
        windows = recorded_windows(cfg, sampling_policy(cfg, "rti", policy), max(cfg.latency_plans, 1))
        with bar("latency", len(windows)) as turns:
            taken = plan_latencies(measured, windows, MonotonicClock(), turns.update)
        for each in measured.values():  # in virtual time others make the plans
            each.release()
        return taken

    return given | blocks.values("latencies", measure)


def case_policy(cfg: EvaluateConfig, case: CaseConfig, policy: Policy) -> Policy:
    """The policy whose plans a case of ``realtime.cases`` times."""
    sized = resized(cfg, policy, case.network) if case.network else policy
    own = {"capture": case.capture} if case.capture else {}
    return sampling_policy(cfg, case.sampler, sized.captured(**capture_settings(cfg, **own)))


def latency_seconds(latency_ms: Any) -> list[float]:
    """Injected latencies, of a number of milliseconds or a list of them."""
    return [number / 1e3 for number in (latency_ms if isinstance(latency_ms, list) else [latency_ms])]
