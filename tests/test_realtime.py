"""Simulated time goes on while plans are computed; a run is repeated bit by bit, whatever is batched."""

from __future__ import annotations

import json
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from paradiffpolicy.benchmarks.control import BARE, control_rows, control_table, timed_runs
from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.scheduling import Scheduling
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.cases import RealtimeResult
from paradiffpolicy.evaluation.episodes import judged
from paradiffpolicy.evaluation.pictures import realtime_figure
from paradiffpolicy.evaluation.realtime import Batch, drawn_from, realtime_rollout, wall_rollout
from paradiffpolicy.evaluation.report import write_realtime_report
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.evaluation.smoothness import boundary_jumps
from paradiffpolicy.planning.blending import Latest, RealTimeChunking, TemporalEnsemble
from paradiffpolicy.planning.delayed import DelayedPlanner
from paradiffpolicy.planning.inline import InlinePlanner
from paradiffpolicy.planning.request import PlanMaker
from paradiffpolicy.policy import Policy
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.robots.replay import ReplayRobot
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.telemetry.summary import summary

from .conftest import TINY, tiny_checkpoint

REALTIME = {"solver": "ddim", "n_steps": 6, "driver": "rti", "iterations": 2}


def tiny_policy(**sampler):
    return Policy.from_checkpoint(
        tiny_checkpoint(), make_sampler(spec_schedule(TINY), **{"n_steps": 3, **sampler})
    )


def make_env(rate_hz):
    return gymnasium.make(
        "paradiffpolicy/PushT-v0", obs_type="keypoints", control_hz=rate_hz, max_episode_steps=-1
    )


def actions_of(episode):
    return episode.record.ticks["action"].tolist()


@pytest.mark.parametrize("scoring", ["max", "mean"])
def test_without_latency_it_is_the_rollout_that_waits_for_every_plan(scoring):
    policy = tiny_policy(**REALTIME)
    waited = rollout(policy, partial(make_env, 10), [3, 4], 40, scoring=scoring)
    live = realtime_rollout(policy, make_env, [3, 4], 4.0, rate_hz=10, scoring=scoring)
    for expected, episode in zip(waited, live, strict=True):
        np.testing.assert_allclose(actions_of(episode), expected.actions, atol=1e-3)
        assert episode.score == pytest.approx(expected.score, abs=1e-4)
        assert episode.scoring == expected.scoring == scoring


@pytest.mark.parametrize(
    "blending", [Latest, RealTimeChunking, partial(TemporalEnsemble, decay=0.1)], ids=str
)
def test_a_run_is_repeated_bit_by_bit(blending):
    policy = tiny_policy(**REALTIME)
    options = {"rate_hz": 20, "latencies": [0.02, 0.3, 0.11], "blending": blending, "replan_every": 3}
    first = realtime_rollout(policy, make_env, [1, 2, 3], 3.0, **options)
    again = realtime_rollout(policy, make_env, [1, 2, 3], 3.0, **options)
    for one, other in zip(first, again, strict=True):
        assert np.nan_to_num(actions_of(one)).tolist() == np.nan_to_num(actions_of(other)).tolist()
        assert one.record.plans["delay"].tolist() == other.record.plans["delay"].tolist()
        assert one.score == other.score


def test_an_episode_does_not_know_its_neighbours():
    policy = tiny_policy(**REALTIME)
    options = {"rate_hz": 10, "latencies": [0.05, 0.31], "replan_every": 4, "blending": RealTimeChunking}
    together = realtime_rollout(policy, make_env, [1, 2, 3], 3.0, **options)
    (alone,) = realtime_rollout(policy, make_env, [2], 3.0, **options)
    np.testing.assert_allclose(
        np.nan_to_num(actions_of(together[1])), np.nan_to_num(actions_of(alone)), atol=0.05
    )
    counted = []
    first, *_ = realtime_rollout(
        policy, make_env, [2, 1, 3], 3.0, side_by_side=1, on_ticks=counted.append, **options
    )
    np.testing.assert_array_equal(actions_of(first), actions_of(alone))
    assert sum(counted) == 90
    with pytest.raises(InputError, match="side_by_side=0"):
        realtime_rollout(policy, make_env, [1], 3.0, side_by_side=0, **options)


def test_side_by_side_is_one_controller_with_a_late_planner():
    """The batch against the plain form: a loop, a controller and a planner that computes by itself."""
    policy, clock = tiny_policy(**REALTIME), VirtualClock()

    def planner(policy, generator, clock):
        maker = PlanMaker(policy, generator, clock)
        return DelayedPlanner(lambda request: lambda: maker(request), clock, lambda: 0.25)

    generator = torch.Generator().manual_seed(7)
    controller = Controller(policy, 10, generator=generator, planner=planner, clock=clock).start()
    robot = EnvRobot(make_env(10), 7, clock)
    record = ControlLoop(controller, robot).run(30)
    (episode,) = realtime_rollout(policy, make_env, [7], 3.0, rate_hz=10, latencies=[0.25])
    np.testing.assert_array_equal(episode.record.ticks["action"], record.ticks["action"])
    assert episode.record.plans["delay"].tolist() == [3] * len(record.plans)


def test_every_reply_is_its_own_requests(monkeypatch):
    """With plans that overtake one another, many of which nobody waits for any more."""
    begin, replies = Batch.begin, []

    def watched(batch, maker, request):
        made = begin(batch, maker, request)

        def checked():
            reply = made()
            replies.append((reply.tick, reply.session, reply.asked) == wanted)
            return reply

        wanted = request.tick, request.session, request.asked
        return checked

    monkeypatch.setattr(Batch, "begin", watched)
    latencies = [0.31, 0.05, 0.02]
    realtime_rollout(
        tiny_policy(**REALTIME), make_env, range(4), 6.0, rate_hz=10, latencies=latencies, replan_every=1
    )
    assert len(replies) > 100 and all(replies)


@pytest.mark.parametrize(("latencies", "answered"), [([0.25], True), ([0.31, 0.05], True), ([9.0], False)])
def test_requests_that_were_never_answered_are_counted(monkeypatch, latencies, answered):
    """Replaced by newer ones, or the episode ended first."""
    request, asked = DelayedPlanner.request, []

    def counted(planner, wanted):
        asked.append(wanted.tick)
        request(planner, wanted)

    monkeypatch.setattr(DelayedPlanner, "request", counted)
    options = {"rate_hz": 10, "latencies": latencies, "replan_every": 1}
    (episode,) = realtime_rollout(tiny_policy(**REALTIME), make_env, [3], 3.0, **options)
    record, values = episode.record, result("a", 10, "latest", 0.2, [episode]).to_dict()
    assert record.n_requests == values["requests"] == len(asked) > 0
    assert record.unfinished == values["unfinished_requests"] == len(asked) - len(record.plans) > 0
    assert bool(len(record.plans)) == answered
    assert summary(record)["unfinished_requests"] == record.unfinished


@pytest.mark.parametrize(("rate", "late"), [(10, 1), (20, 2), (50, 4), (100, 7)])
def test_latency_is_counted_in_ticks_of_the_rate(rate, late):
    (episode,) = realtime_rollout(tiny_policy(), make_env, [1], 2.0, rate_hz=rate, latencies=[0.07])
    assert episode.record.n_ticks == 2 * rate
    assert set(episode.record.plans["delay"].tolist()) == {late}


def test_a_plan_that_takes_longer_than_it_lasts_begins_with_its_first_action():
    """The robot stands still until it comes, so none of it has been executed."""
    (episode,) = realtime_rollout(tiny_policy(), make_env, [1], 6.0, rate_hz=10, latencies=[1.6])
    ticks = episode.record.ticks
    assert ticks["plan_index"].tolist()[15:32] == [-1, *range(1, 16), -1]
    # The next was made from an observation before the first one's actions, which have run in its place.
    assert ticks["plan"].tolist()[31:33] == [0, 15] and ticks["plan_index"][32] == -1


def test_latencies_are_drawn_from_those_that_were_measured():
    draw = drawn_from([0.1, 0.2])(np.random.default_rng(0))
    values = {draw() for _ in range(50)}
    assert values == {0.1, 0.2} and drawn_from([0.3])(np.random.default_rng(0))() == 0.3
    for bad in ([], [-0.1], [float("nan")]):
        with pytest.raises(InputError, match="latencies="):
            drawn_from(bad)


def test_ticks_are_counted_whole():
    counted = []
    realtime_rollout(tiny_policy(), make_env, [1, 2], 1.0, rate_hz=10, on_ticks=counted.append)
    assert sum(counted) == 20


def test_jumps_at_joins_are_told_from_changes_within_plans():
    policy = tiny_policy()
    episodes = realtime_rollout(policy, make_env, [1, 2], 3.0, rate_hz=10, latencies=[0.1])
    at, within = boundary_jumps([episode.record for episode in episodes])
    assert len(at) == 2 * 3 and len(within) == 2 * (30 - 2 - 3)  # a tick of waiting, and the first action
    assert np.isfinite(at).all() and np.isfinite(within).all()


def test_at_the_real_rate_every_robot_has_its_loop():
    counted = []
    episodes = wall_rollout(
        tiny_policy(**REALTIME),
        make_env,
        [1, 2, 3],
        0.5,
        rate_hz=50,
        clock=MonotonicClock(),
        side_by_side=3,
        on_ticks=counted.append,
    )
    assert [episode.seed for episode in episodes] == [1, 2, 3]
    for episode in episodes:
        assert episode.record.n_ticks + episode.record.missed <= 25 and episode.record.n_plans
    assert sum(counted) == 75


def result(name, rate, blending, latency, episodes, reference=None):
    return RealtimeResult(
        name=name,
        rate_hz=rate,
        blending=blending,
        latencies=[latency],
        episodes=episodes,
        reference=reference,
    )


def test_the_report_says_what_happened(tmp_path):
    policy = tiny_policy()
    unlimited = realtime_rollout(policy, make_env, [1, 2], 2.0, rate_hz=10)
    late = realtime_rollout(policy, make_env, [1, 2], 2.0, rate_hz=10, latencies=[0.2])
    cases = [
        result("a, unlimited", 10, "latest", 0.0, unlimited),
        result("a", 10, "latest", 0.2, late, unlimited),
        result("b", 10, "latest", 0.2, unlimited, unlimited),
    ]
    sweep = [result("a", 10, j, ms, late, unlimited) for j in ("latest", "rtc") for ms in (0.0, 0.2)]
    cases, sweep = (judged(part, {"score": 0.05, "success": 0.1}) for part in (cases, sweep))
    paths = write_realtime_report(tmp_path, cases, sweep, "title", {"task": "pusht"})
    content = json.loads(paths[0].read_text())
    first, second, third = content["cases"]
    assert first["difference_to_unlimited"] is None and second["delay_ticks"] == 2
    assert third["difference_to_unlimited"]["mean"] == third["success_difference_to_unlimited"]["mean"] == 0
    assert second["latency_ms"]["p50"] == 200
    assert 0 < second["fallback_share"] < 0.2 and first["fallback_share"] == 0
    smooth = second["smoothness"]
    assert smooth["ldlj"]["n"] == smooth["sparc"]["n"] == 0  # 20 ticks, of which two have no action
    smooth = third["smoothness"]
    assert smooth["ldlj"]["n"] == smooth["sparc"]["n"] == 2 and smooth["ldlj"]["median"] < -5
    assert len(content["sweep"]) == 4 and paths[1].stat().st_size > 10_000
    legend = realtime_figure(content, "t").axes[0].get_legend().get_texts()
    labels = {text.get_text() for text in legend}
    assert labels == {"injected, latest", "injected, rtc", "a, unlimited", "a", "b"}


def test_the_loops_bench_counts_ticks_and_plans():
    clock = VirtualClock()
    records = timed_runs(
        tiny_policy(),
        {"inline": InlinePlanner},
        np.full((3, 20), 256.0),
        clock,
        rate_hz=20,
        seconds=4,
        turns=2,
        blending=Latest,
        replan_every=0,
        scheduling=Scheduling(),
    )
    bare, row = control_rows(records, 20)
    assert (bare["ticks"], bare["plans_per_second"], bare["over_a_period"]) == (80, 0, 0)
    assert (row["ticks"], row["missed"], row["faults"]) == (80, 0, {})
    assert max(r["deadline_error_ms"]["max"] for r in (bare, row)) < 1e-6
    assert row["delay_mean"] == 0 and row["plans_per_second"] == pytest.approx(80 / 3.9, rel=0.01)
    assert control_table([row], "t").row_count == 1
    robot = ReplayRobot(np.arange(6.0).reshape(3, 2))
    assert [robot.observe()[0] for _ in range(4)] == [2, 4, 0, 2]


# -------------------------------------------------------------------------------------- the commands


@pytest.fixture
def checkpoint(tmp_path):
    tiny_checkpoint().save(tmp_path / "tiny")
    return f"checkpoint={tmp_path / 'tiny'}"


FAST = ["mode=realtime", "seeds=2", "task.max_steps=20", "capture=eager", "latency_plans=2"]


def replaced(cases):
    """Overrides that leave only these cases."""
    default = ("ddpm_eager", "ddpm", "paraddpm", "rti", "large_ddpm_eager", "large_rti")
    return [f"~realtime.cases.{name}" for name in default] + [f"+realtime.cases.{c}" for c in cases]


def test_the_command_in_virtual_time(tmp_path, checkpoint, capsys):
    cases = replaced(["fast={sampler: rti}", "given={sampler: ddim, latency_ms: [50, 190]}"])
    sweep = ["realtime.sweep.latency_ms=[0,200]", "~realtime.sweep.blendings.temporal_ensemble"]
    out = tmp_path / "out"
    options = [*FAST, *cases, *sweep, "realtime.rates_hz=[10,25]", "realtime.blending={name: rtc}"]
    options += ["task=pusht_dynamic"]  # PushT's policies drive it
    assert main(["evaluate", checkpoint, *options, f"out={out}"]) == 0
    content = json.loads((out / "report.json").read_text())
    assert content["unfinished"] == [] and not (out / "unfinished").exists()
    assert [(c["case"], c["rate_hz"]) for c in content["cases"][2:]] == [
        *(("fast", 10), ("fast", 25), ("given", 10), ("given", 25)),
    ]
    assert {c["case"] for c in content["cases"][:2]} == {"rti, unlimited", "ddim, unlimited"}
    assert content["task"] == "pusht_dynamic" and content["cases"][0]["score"]["scoring"] == "mean"
    assert [(c["blending"], c["latency_ms"]["p50"]) for c in content["sweep"]] == [
        *(("latest", 0), ("latest", 200), ("rtc", 0), ("rtc", 200)),
    ]
    assert (out / "latency.png").exists() and "unlimited" in capsys.readouterr().out


def test_the_command_at_the_real_rate(tmp_path, checkpoint):
    cases = replaced(["fast={sampler: rti}"])
    options = [*FAST, *cases, "task.max_steps=5", "realtime.rates_hz=[10]", "realtime.clock=wall"]
    assert main(["evaluate", checkpoint, *options, f"out={tmp_path / 'out'}"]) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["cases"][1]["latency_ms"]["p50"] > 0 and content["sweep"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mode=realtim"], "unknown mode 'realtim'; did you mean 'realtime'?"),
        (["realtime.clock=wal"], "unknown clock 'wal'; did you mean 'wall'?"),
        (["realtime.rates_hz=[-1]"], "realtime.rates_hz=[-1] must be a list, each entry a number above 0"),
        (["realtime.side_by_side=0"], "realtime.side_by_side=0 must be a whole number above 0"),
        (replaced(["x={sampler: nix}"]), "realtime.cases.x.sampler: unknown sampler 'nix'"),
        (replaced(["x={sampler: ddim, latency: 3}"]), "realtime.cases.x has no setting 'latency'"),
        (replaced(["x={latency_ms: 3}"]), "realtime.cases.x.sampler must be given"),
        (replaced(["x={sampler: ddim, latency_ms: -1}"]), "realtime.cases.x.latency_ms=-1 must be a number"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError) as refused:
        compose("evaluate", options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["realtime.rates_hz=[5]"], "rate_hz=5 must be the policy's 10 Hz or more"),
        (["realtime.interpolation=slerp"], "unknown interpolation 'slerp'"),
        (["realtime.blending={name: rt}"], "unknown blending 'rt'; did you mean 'rtc'?"),
        (["+realtime.blending.overlap=1"], "blending 'latest' has no option 'overlap'"),
        (replaced(["x={sampler: ddim, latency_ms: []}"]), "x.latency_ms=[] must be a number from 0"),
    ],
)
def test_bad_input_is_one_line(options, message, checkpoint, tmp_path, capsys):
    assert main(["evaluate", checkpoint, *FAST, *options, f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("paradiffpolicy: ") and message in error
    assert not (tmp_path / "out").exists()


def test_bench_control_beside_every_planner(tmp_path, checkpoint, capsys):
    out = tmp_path / "control.json"
    options = ["seconds=0.3", "turns=1", "capture=eager", "scheduling.lock_memory=false", f"out={out}"]
    options += ["task.max_steps=16", "planners=[thread,inline]"]  # in a process: beside the soak
    assert main(["bench", "control", checkpoint, *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["planner"] for row in rows] == [BARE, "thread", "inline"]
    assert all(row["ticks"] + row["missed"] >= 29 for row in rows)
    assert main(["bench", "control", checkpoint, "planners=[proces]"]) == 2
    assert "unknown planner 'proces'; did you mean 'process'?" in capsys.readouterr().err
