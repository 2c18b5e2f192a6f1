"""Rollouts are what one environment at a time gives; statistics and reports say what they should."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from paradiffpolicy.benchmarks import baselines
from paradiffpolicy.benchmarks.calls import call_rows
from paradiffpolicy.benchmarks.floors import Floors, Rates, TrunkCost, measured_rates, trunk_cost
from paradiffpolicy.benchmarks.latency import latency_rows, steady_state
from paradiffpolicy.benchmarks.timing import interleaved, plan_latencies
from paradiffpolicy.cli.schema import EvaluateConfig
from paradiffpolicy.cli.train_schema import TrainEvaluationConfig
from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.environment import SCORINGS, succeeded
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.blocks import Blocks, kept_settings
from paradiffpolicy.evaluation.cases import Case, compare_realtime
from paradiffpolicy.evaluation.compare import (
    MARGINS,
    Comparison,
    SamplerResult,
    plan_error,
)
from paradiffpolicy.evaluation.episodes import Episode, judged
from paradiffpolicy.evaluation.pictures import caption, film_strip
from paradiffpolicy.evaluation.report import difference_table, sampler_table, write_episodes, write_report
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.evaluation.statistics import holm, paired_difference, wilson
from paradiffpolicy.files import write_json
from paradiffpolicy.policy import Policy
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.sampling.capture.backends import CaptureSettings
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.tables import quantiles, tail

from .conftest import TINY, tiny_checkpoint
from .toy_env import ToyEnv


def tiny_policy(**sampler) -> Policy:
    return Policy.from_checkpoint(
        tiny_checkpoint(), make_sampler(spec_schedule(TINY), **{"n_steps": 3, **sampler})
    )


def make_env():
    return gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")


@pytest.mark.parametrize("sampler", [{}, {"solver": "ddim", "n_steps": 4, "driver": "rti", "iterations": 1}])
def test_a_batch_of_episodes_is_the_control_loop_run_alone(sampler):
    policy = tiny_policy(**sampler)
    episodes = rollout(policy, make_env, [3, 4], max_steps=20)
    for episode in episodes:
        clock, generator = VirtualClock(), torch.Generator().manual_seed(episode.seed)
        robot = EnvRobot(make_env(), episode.seed, clock)
        controller = Controller(policy, 10, generator=generator, planner="inline", clock=clock).start()
        record = ControlLoop(controller, robot).run(20)
        clock.advance(0.1)
        robot.advance()
        np.testing.assert_allclose(episode.actions, record.ticks["action"], atol=0.01)
        assert episode.score == pytest.approx(robot.score, abs=1e-4)
        assert episode.iterations == record.plans["iterations"].tolist()
        assert episode.n_steps == 20 and len(episode.windows) == 3


def test_episodes_that_end_leave_the_others_alone():
    policy = tiny_policy()

    def short_for(seed):
        def make():
            env = make_env()
            original = env.reset

            def reset(*, seed=None, options=None):
                if seed == 7:  # starts on the target: terminates in its first step
                    options = {"state": [60, 60, 256, 256, np.pi / 4]}
                return original(seed=seed, options=options)

            env.reset = reset
            return env

        return make

    steps = []
    episodes = rollout(policy, short_for(7), [6, 7, 8], 16, on_steps=steps.append)
    assert [e.n_steps for e in episodes] == [16, 1, 16]
    assert episodes[1].success and episodes[1].score == 1.0 and not episodes[0].success
    alone = rollout(policy, make_env, [8], 16)
    np.testing.assert_allclose(episodes[2].actions, alone[0].actions, atol=0.01)
    assert sum(steps) == 3 * 16


def test_records_are_of_before_the_action():
    episodes = rollout(
        tiny_policy(),
        make_env,
        [5],
        10,
        keep_infos=True,
        picture=lambda env: env.unwrapped.picture(32),
        n_pictured=1,
    )
    (episode,) = episodes
    env = make_env()
    env.reset(seed=5)
    for action, info in zip(episode.actions, episode.infos, strict=True):
        np.testing.assert_allclose(info["state"], env.unwrapped.state)
        env.step(action)
    assert len(episode.frames) == 11 and episode.frames[0].shape == (32, 32, 3)


# ------------------------------------------------------------------------------------- statistics


def test_interval_and_test_are_students():
    draw = np.random.default_rng(0)
    reference = draw.uniform(0, 1, 30)
    scores = reference + draw.normal(0.01, 0.03, 30)
    difference = paired_difference(scores, reference)
    expected = stats.ttest_rel(scores, reference).confidence_interval(0.9)
    assert difference.interval == pytest.approx((expected.low, expected.high))
    one = stats.ttest_1samp(scores - reference, -0.05, alternative="greater").pvalue
    other = stats.ttest_1samp(scores - reference, 0.05, alternative="less").pvalue
    worse = stats.ttest_1samp(scores - reference, -0.05, alternative="less").pvalue
    lower = stats.ttest_rel(scores, reference, alternative="less").pvalue
    expected = {"equivalent": max(one, other), "non_inferior": one, "worse": worse, "lower": lower}
    assert difference.p_values == pytest.approx(expected)
    assert difference.equivalent and difference.verdict == "equivalent within 0.05"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=30), min_size=1, max_size=4),
    st.floats(0.01, 0.5),
    st.booleans(),
)
def test_the_interval_that_is_shown_is_the_one_that_was_tested(samples, margin, early):
    """For every claim, at Holm's level and, after an early look, at that look's share of it."""
    looks = {"looks": [3], "n_looks": 2} if early else {}
    found = [
        paired_difference(
            values[:3] if early else values, [0.0] * (3 if early else len(values)), margin, **looks
        )
        for values in samples
    ]
    for result in holm(found):
        if not result.se > 1e-9 or min(result.p_values.values()) == 0:
            continue
        low, high = result.interval
        assert result.equivalent == (-margin < low and high < margin)
        one_sided = {
            claim: result.interval_at(1 - 2 * a * result.share) for claim, a in result.levels.items()
        }
        assert result.non_inferior == (result.equivalent or one_sided["non_inferior"][0] > -margin)
        assert (result.claim == "worse") == (not result.non_inferior and one_sided["worse"][1] < -margin)


def test_a_worse_sampler_is_called_worse_and_a_better_one_not_inferior():
    draw = np.random.default_rng(0)
    reference = draw.uniform(0.2, 0.6, 50)
    better = paired_difference(reference + 0.2 + draw.normal(0, 0.05, 50), reference)
    assert better.non_inferior and not better.equivalent
    assert better.verdict == "non-inferior within 0.05"
    worse = paired_difference(reference - 0.2 + draw.normal(0, 0.05, 50), reference)
    assert not worse.non_inferior and worse.verdict == "worse by more than 0.05"
    lower = paired_difference(reference - 0.05 + draw.normal(0, 0.05, 50), reference)
    assert lower.verdict.startswith("lower, inconclusive within 0.05") and not lower.decided
    four = paired_difference(reference[:4] + np.array([0.2, -0.2, 0.1, -0.1]), reference[:4])
    assert four.verdict.startswith("inconclusive")


def test_one_seed_shows_nothing_and_identical_scores_are_equivalent():
    one = paired_difference([1.0], [1.0])
    assert one.verdict == "inconclusive" and math.isnan(one.low) and one.seeds_needed is None
    assert paired_difference([0.5, 0.7], [0.5, 0.7]).equivalent
    assert paired_difference([0.9, 0.9], [0.5, 0.5]).verdict == "non-inferior within 0.05"
    with pytest.raises(ValueError, match="2 scores against 1"):
        paired_difference([1.0, 1.0], [1.0])


def test_successes_are_compared_as_proportions():
    """Agreement on a few seeds isn't agreement on all."""
    few, many = [1.0] * 20, [1.0] * 100
    assert not paired_difference(few, few).equivalent
    same = paired_difference(many, many)
    assert same.equivalent and same.mean == 0 and same.low == -same.high and 0.01 < same.high < 0.03
    worse = paired_difference([0.0] * 10 + [1.0] * 90, many)
    assert worse.mean == pytest.approx(-0.1) and worse.high < -0.03 and not worse.equivalent
    assert paired_difference([0.0] * 100, many).low == -1 and paired_difference(many, [0.0] * 100).high == 1
    assert wilson(50, 50) == pytest.approx((0.9286, 1.0), abs=1e-4)
    assert wilson(18, 50) == pytest.approx(stats.binomtest(18, 50).proportion_ci(0.95, "wilson"))


def test_the_interval_of_successes_holds_the_truth_as_often_as_it_says():
    draw, truth, hits = np.random.default_rng(0), 0.02 - 0.05, 0
    for _ in range(1000):
        kind = draw.choice(3, size=60, p=[0.02, 0.05, 0.93])  # won, lost, the same
        scores, reference = (kind != 1).astype(float), (kind != 0).astype(float)
        low, high = paired_difference(scores.tolist(), reference.tolist()).interval
        hits += low <= truth <= high
    assert hits >= 880


MARGIN = {"score": 0.05, "success": 0.1}


def pairs_of(kind, draw, margins, n):
    """Scores and references whose mean difference is so many margins: normal, or of successes."""
    mean = margins * MARGIN[kind]
    if kind == "score":
        return draw.normal(mean, 0.1, n), np.zeros(n)
    outcome = draw.choice(3, size=n, p=[0.2, 0.2 - mean, 0.6 + mean])  # won, lost, the same
    return (outcome != 1).astype(float), (outcome != 0).astype(float)


@pytest.mark.parametrize("kind", ["score", "success"])
@pytest.mark.parametrize(("mean", "false"), [(-1, "non_inferior"), (1, "equivalent"), (-0.99, "worse")])
def test_stopping_early_does_not_cheat(kind, mean, false):
    """At the margin, where a claim is just false, it is made in no more than 5 % of evaluations with eight
    looks; looking as often at tests of the whole level makes it far more often."""
    draw, ends, n_runs = np.random.default_rng(3), [25, 50, 75, 100, 125, 150, 175, 200], 400
    stopped = peeking = 0
    for _ in range(n_runs):
        scores, reference = pairs_of(kind, draw, mean, ends[-1])
        margin = MARGIN[kind]
        last = paired_difference(scores, reference, margin, looks=ends, n_looks=len(ends))  # its best look
        stopped += last.p_values[false] < 0.05
        once = (paired_difference(scores[:end], reference[:end], margin) for end in ends)
        peeking += any(found.p_values[false] < 0.05 for found in once)
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_runs)
    assert stopped / n_runs < bound < peeking / n_runs


def test_a_verdict_stays_and_comes_early_where_it_is_clear():
    draw = np.random.default_rng(0)
    scores, reference = pairs_of("score", draw, 0.0, 200)
    p_values = [
        paired_difference(scores[:end], reference[:end], looks=range(25, end + 1, 25), n_looks=8).p_values[
            "equivalent"
        ]
        for end in range(25, 201, 25)
    ]
    assert p_values == sorted(p_values, reverse=True) and p_values[4] < 0.05


@pytest.mark.parametrize("name", ["equivalent", "non_inferior", "worse"])
def test_of_many_comparisons_hardly_one_is_called_wrongly(name):
    """Twelve samplers at the margin: any false claim in a table has a chance of at most 5 %."""
    mean = {"equivalent": 0.05, "non_inferior": -0.05, "worse": -0.05}[name]
    draw, n_tables, alone, together = np.random.default_rng(5), 200, 0, 0
    for _ in range(n_tables):
        found = [paired_difference(draw.normal(mean, 0.1, 30), np.zeros(30)) for _ in range(12)]
        alone += any(result.p_values[name] < 0.05 for result in found)
        together += any(result.p_values[name] < result.levels[name] for result in holm(found))
    assert together / n_tables < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_tables) < alone / n_tables


def test_holm_steps_down():
    draw = np.random.default_rng(0)
    easy = [paired_difference(draw.normal(0, 0.001, 20), np.zeros(20)) for _ in range(3)]
    hard = paired_difference(np.linspace(-0.05, 0.1, 20), np.zeros(20))
    assert 0.05 / 4 < hard.p_values["equivalent"] < 0.05
    levels = [found.levels["equivalent"] for found in holm([hard, *easy])]
    assert sorted(levels) == pytest.approx([0.05 / 4, 0.05 / 3, 0.05 / 2, 0.05]) and levels[0] == 0.05


@pytest.mark.parametrize("mean", [-0.02, -0.03, -0.07])
def test_as_many_seeds_as_are_named_decide(mean):
    """Four times in five, if the difference and its spread are as they seemed."""
    draw = np.random.default_rng(1)
    seen = mean + 0.1 * np.tile([-1.0, 1.0], 8)
    found = paired_difference(seen, np.zeros(16))
    n = found.seeds_needed
    assert found.verdict.endswith(f": some {n if n < 100 else -(-n // 10) * 10} seeds would decide")
    decided = [paired_difference(draw.normal(mean, 0.1, n), np.zeros(n)).decided for _ in range(200)]
    assert 0.7 < sum(decided) / 200 <= 0.97


# ----------------------------------------------------------------------------------------- latency


def test_a_percentile_is_stated_only_where_enough_values_are_beyond_it():
    for n, stated in ((20, set()), (999, set()), (1_000, {"p99"}), (10_000, {"p99", "p99.9"})):
        found = quantiles([*range(n), math.nan])
        assert {name for name in ("p99", "p99.9") if found[name] is not None} == stated
        assert (found["n"], found["max"], found["p50"]) == (n, n - 1, (n - 1) / 2)
    assert tail(quantiles([1.0, 2.0, 6.0])) == "2.0, max 6.0 (n = 3)"
    assert tail(quantiles(range(1_000)), 0) == "500, p99 989, max 999 (n = 1000)"
    assert tail(quantiles([])) == "-" and quantiles([])["max"] is None


def test_tasks_take_turns_and_the_first_turns_are_not_counted():
    clock, order = VirtualClock(), []

    def task(name, seconds):
        def run(window):
            order.append((name, int(window[0, 0])))
            clock.advance(seconds)

        return run

    windows = [np.full((2, 1), float(k)) for k in range(3)]
    seconds = interleaved({"a": task("a", 1.0), "b": task("b", 0.25)}, windows, clock)
    assert seconds["a"] == pytest.approx([1.0] * 3) and seconds["b"] == pytest.approx([0.25] * 3)
    assert order == [("a", 0), ("a", 0), ("b", 0), ("b", 0)] + [(name, k) for k in range(3) for name in "ab"]


def test_latency_rows_compare_with_the_baseline():
    policy = tiny_policy()
    windows = [np.full((2, 20), 256.0)] * 2

    class Steps:
        """A clock that counts network calls: a plan's time is its iterations."""

        calls = 0

        def now(self):
            return float(self.calls)

        def sleep_until(self, moment):
            raise AssertionError

    clock = Steps()
    last_layer = policy.denoiser.network.final_conv  # of every network call
    last_layer.register_forward_hook(lambda *args: setattr(clock, "calls", clock.calls + 1))
    realtime = policy.with_sampler(
        make_sampler(policy.schedule, solver="ddim", n_steps=10, driver="rti", iterations=2)
    )
    rows = latency_rows({"short": policy, "rti": realtime}, windows, clock, floors=floors_of(policy))
    assert [row.name for row in rows] == [*baselines.BASELINES, "short", "rti"]
    parallel = rows[2].iterations
    assert 3 < parallel < 60
    assert [row.iterations for row in rows] == [100, 10, parallel, 3, 2]
    assert [row.ms["p50"] for row in rows] == [100e3, 10e3, parallel * 1e3, 3e3, 2e3]
    assert [row.speedup[1] for row in rows] == pytest.approx([1, 10, 100 / parallel, 100 / 3, 50])
    assert [row.speedup_ddim for row in rows] == pytest.approx([0.1, 1, 10 / parallel, 10 / 3, 5])
    work = trunk_cost(policy.denoiser.network, 16)
    assert rows[3].floor == pytest.approx(3 * 1e-6 * max(4 * work.weights, work.operations))
    assert rows[4].floor == pytest.approx(2 * 1e-6 * max(4 * work.weights, 10 * work.operations))
    assert plan_latencies({"realtime": realtime}, windows, clock) == {"realtime": [2.0, 2.0]}


def floors_of(policy):
    """As if a byte and an operation took a nanosecond."""
    floors = Floors(policy.network, policy.spec.horizon, policy.device, MonotonicClock())
    floors.rates["f32"] = Rates(bandwidth=1e9, matrix=1e9)
    return floors


def test_a_floor_is_what_takes_longer():
    rates = Rates(bandwidth=100.0, matrix=10.0)
    cost = TrunkCost(weights=50, operations=10)
    assert cost.floor(rates, calls=3, rows=1) == pytest.approx(6.0)
    assert cost.floor(rates, calls=3, rows=5) == pytest.approx(15.0)
    assert cost.floor(rates, calls=3, rows=1, precision="bf16") == pytest.approx(3.0)


def test_rates_are_measured_and_a_trunk_is_counted():
    rates = measured_rates(torch.device("cpu"), MonotonicClock(), repeats=1)
    assert 1e8 < rates.bandwidth < 1e13 and 1e8 < rates.matrix < 1e15
    network = tiny_policy().denoiser.network
    work = trunk_cost(network, 16)
    layers = network.state_dict().items()
    film = sum(w.nbytes for name, w in layers if "cond_encoder" in name or "diffusion_step" in name)
    assert 4 * work.weights == sum(w.nbytes for _, w in layers) - film
    dense = 2 * 16 * (2 * 16 * 5 + 16 * 16 * 5)  # a first block's convolutions, taps on the padding too
    assert dense / 2 < work.operations / 10 < dense * 2


def test_calls_are_timed_eager_and_captured():
    policy = tiny_policy()
    settings = {name: CaptureSettings("emulated", name) for name in ("f32", "f16")}
    floors = floors_of(policy)
    floors.rates["f16"] = Rates(1e9, 1e18)
    rows = call_rows(policy, settings, [1, 2], 2, MonotonicClock(), floors)
    assert [(row.name, row.batch) for row in rows] == [
        (n, b) for b in (1, 2) for n in ("eager", "f32", "f16")
    ]
    assert rows[2].floor == pytest.approx(2e-6 * floors.cost.weights)
    assert all(row.ms["p50"] > 0 and row.floor > 0 for row in rows)


def test_a_steady_state_is_many_plans():
    policy = tiny_policy(solver="ddim", n_steps=4, driver="rti").captured("emulated")
    plans = []
    steady = steady_state(
        policy, [np.full((2, 20), 256.0)] * 3, 12, MonotonicClock(), lambda: plans.append(1)
    )
    assert steady.ms["n"] == len(plans) == 12
    assert 0 < steady.ms["p50"] <= steady.ms["max"] and abs(steady.growth) < 100


def given_noise(monkeypatch, noise):
    """Makes diffusers' loops draw the noise of one of our solutions."""
    draws = iter([noise.x_T, *noise.z])
    monkeypatch.setattr(baselines, "_noise", lambda *args: next(draws))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(draws)
    )


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_the_baselines_are_the_same_policy(monkeypatch, name):
    """With the noise that ours draws, diffusers' loops give our sequential plans; unclipped, since
    theirs takes epsilon from before the clipping."""
    ours = {"solver": "ddim", "n_steps": 10} if "DDIM" in name else {"solver": "ddpm", "n_steps": 100}
    spec = replace(TINY, clip=None)
    policy = Policy.from_checkpoint(tiny_checkpoint(spec), make_sampler(spec_schedule(spec), **ours))
    plan = policy.plan(np.full((2, 20), 200.0), generator=torch.Generator().manual_seed(4))
    given_noise(monkeypatch, plan.solution.noise)
    condition = policy.observation_normalizer.normalize(torch.full((1, 2, 20), 200.0)).flatten(1)
    settings = {"tolerance": 1e-5} if "ParaDiGMS" in name else {}
    theirs, iterations = baselines.BASELINES[name](policy, condition, torch.Generator(), **settings)
    torch.testing.assert_close(theirs, plan.solution.sample, atol=2e-3, rtol=1e-4)
    assert iterations <= ours["n_steps"] if settings else iterations == ours["n_steps"]


def test_the_baselines_refuse_what_diffusers_does_not_have():
    spec = replace(TINY, prediction="score")
    policy = Policy.from_checkpoint(tiny_checkpoint(spec), make_sampler(spec_schedule(spec)))
    with pytest.raises(InputError, match="prediction=score"):
        baselines.ddpm(policy, torch.zeros(1, 40), torch.Generator())


# ------------------------------------------------------------------------------------------ report


def toy_episode(seed, score, n_steps):
    episode = Episode(seed, iterations=[4, 6], nfe=[40, 60])
    episode.add([score, *[0.5 * score] * (n_steps - 1)], score > 0.9)
    episode.frames = [np.full((31, 31, 3), 5 * k, dtype=np.uint8) for k in range(n_steps + 1)]
    return episode


def toy_results():
    ddpm = [toy_episode(0, 0.95, 3), toy_episode(1, 0.8, 4), toy_episode(2, 1.0, 5)]
    fast = [toy_episode(0, 0.94, 3), toy_episode(1, 0.81, 4), toy_episode(2, 1.0, 5)]
    results = [
        SamplerResult(name="ddpm", episodes=ddpm, latencies=[0.5, 0.52, 0.51]),
        SamplerResult(name="fast", episodes=fast, latencies=[0.02, 0.03, 0.02], reference=ddpm),
    ]
    return judged(results, MARGINS)


def test_a_report_is_json_picture_and_videos(tmp_path):
    paths = write_report(tmp_path, toy_results(), "toy", {"task": "toy"}, control_hz=10)
    assert [p.name for p in paths] == ["report.json", "score_latency.png", "rollout.png"]
    report = json.loads(paths[0].read_text())
    fast = report["samplers"]["fast"]
    assert fast["score"]["mean"] == pytest.approx(0.9166667)
    assert fast["iterations_per_plan"] == {"mean": 5.0, "median": 5.0, "max": 6.0}
    assert fast["plan_latency_ms"]["p50"] == pytest.approx(20.0)
    assert fast["difference_to_reference"]["verdict"] == "equivalent within 0.05"
    assert fast["success_difference_to_reference"]["verdict"].startswith("inconclusive: some ")
    assert fast["success"]["per_seed"] == {"0": 1.0, "1": 0.0, "2": 1.0}
    assert report["samplers"]["ddpm"]["difference_to_reference"] is None
    assert imageio.imread(paths[1]).shape[0] > 300
    (path,) = write_episodes(tmp_path, toy_results()[0], control_hz=10)
    video = imageio.mimread(path)
    # Three episodes side by side, 4 pixels between them, odd sizes cut, captions above; the longest counts,
    # with a frame after its last action.
    assert path.name == "ddpm.mp4" and len(video) == 6
    assert video[0].shape[1] == 100 and video[0].shape[0] > 31


def test_pictures_say_seed_time_score_and_that_an_episode_has_ended():
    episode = toy_episode(7, 0.8, 4)
    assert caption("rti", episode, 0, 10) == ["seed 7, rti", "0.0 s", ""]
    assert caption("rti", episode, 2, 10) == ["seed 7, rti", "0.2 s, score 0.40", "best 0.80 (at 0.1 s)"]
    assert caption("rti", episode, 3, 10)[1] == "0.3 s, score 0.40"
    assert caption("rti", episode, 4, 10)[1] == "ended at 0.4 s, score 0.40"
    figure = film_strip(toy_results(), 10, columns=6)
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert sum("ended" in title for title in titles) == 1
    long = SamplerResult(name="long", episodes=[toy_episode(0, 0.5, 40)])
    short = film_strip([toy_results()[0], long], 10, columns=6).axes[:6]
    assert [axes.axison for axes in short] == [True, True, False, False, False, False]


def test_the_table_shows_every_sampler():
    console = Console(width=150, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(sampler_table(toy_results(), "toy"), difference_table(toy_results(), "toy"))
    text = capture.get()
    parts = ("ddpm", "fast", "0.917 ± 0.056", "67% [21%, 94%]", "max 30 (n = 3)")
    for part in (*parts, "equivalent within 0.05", "inconclusive: some"):
        assert part in text, text


def compared(policies, folder, **options):
    """Four seeds in blocks of two, with pictures of three of them."""
    blocks = Blocks(folder, {"seeds": 4})
    run = {
        "policies": policies,
        "make_env": make_env,
        "seeds": [1, 2, 3, 4],
        "max_steps": 8,
        "reference": "ddpm",
        "clock": VirtualClock(),
        "n_pictured": 3,
        "side_by_side": 2,
        "blocks": blocks,
        "options": {"picture": lambda env: env.unwrapped.picture(32)},
    }
    return Comparison(**(run | options)).run(), blocks


class Failing:
    """A policy that is interrupted at a plan."""

    def __init__(self, policy, at):
        self.policy, self.left = policy, at

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def plan(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.policy.plan(*args, **kwargs)


def test_an_evaluation_that_is_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    """The second sampler fails in its second block: the blocks before are there, and aren't run again."""
    policies = {"ddpm": tiny_policy(), "fast": tiny_policy(n_steps=2)}
    whole, _ = compared(policies, None)
    written, stages = [], []

    def write(results, name):
        written.append((name, [len(result.episodes) for result in results]))
        write_report(tmp_path, results, "toy", {}, 10)

    @contextlib.contextmanager
    def progress(label, total, unit):
        yield SimpleNamespace(update=lambda n: None, set_postfix_str=stages.append)

    with pytest.raises(KeyboardInterrupt):
        failing = policies | {"fast": Failing(policies["fast"], 1)}
        compared(failing, tmp_path, on_result=write, progress=progress)
    assert written == [("ddpm", [2]), ("ddpm", [4]), ("fast", [4, 2])]
    report = json.loads((tmp_path / "report.json").read_text())["samplers"]
    assert len(report["ddpm"]["score"]["per_seed"]) == 4
    assert report["fast"]["difference_to_reference"]["n"] == 2
    assert (tmp_path / "rollout.png").exists()
    assert stages[:2] == ["ddpm starting 2 environments", "ddpm compiling the sampler"]
    assert "ddpm" in stages  # it says no longer that something is starting
    never = {"ddpm": Failing(policies["ddpm"], 0), "fast": policies["fast"]}
    again, blocks = compared(never, tmp_path)
    for one, other in zip(whole, again, strict=True):
        assert one.to_dict() == other.to_dict()
        for mine, theirs in zip(one.episodes, other.episodes, strict=True):
            np.testing.assert_equal(asdict(theirs), asdict(mine))
    blocks.remove()
    assert kept_settings(tmp_path) is None and not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("stop_early", [False, True])
def test_what_a_sampler_needed_is_freed_when_its_rows_are_written(stop_early):
    """Captured programs, and pictures and windows that nothing will show."""
    policies = {name: tiny_policy().captured("emulated") for name in ("ddpm", "second", "third")}
    kept, left = {name: [] for name in policies}, []

    def alive(names):
        gc.collect()
        return [(name, ref()) for name in names for ref in kept[name] if ref() is not None]

    def note(results, name):
        left.extend([] if stop_early else alive(before for before in kept if before != name))
        newest = next(result for result in results if result.name == name).episodes
        windows = [newest[-1].windows[0].base] if name != "ddpm" else []
        assert policies[name].programs
        kept[name] += map(weakref.ref, [*policies[name].programs, newest[1].frames[0], *windows])

    results, _ = compared(policies, None, on_result=note, stop_early=stop_early)
    assert all(kept.values()) and left + alive(kept) == []
    assert all("emulated" in result.captured["how"][0] for result in results)
    assert all(result.episodes[0].frames for result in results)


def test_the_error_of_plans_stands_beside_their_iterations():
    """Of the plans that the episodes had, against the sequential ones of the same noise."""
    loose, tight, slow = (
        tiny_policy(n_steps=6, driver="picard", window=6, tolerance=tolerance, start="warm")
        for tolerance in (10.0, 1e-6, 0.1)
    )
    episodes = rollout(loose, make_env, [3, 4], 20)
    found = plan_error(loose, episodes)
    assert found["n"] == 4 and found["worst"] >= found["median"] > 1
    plan, errors, generator = None, [], torch.Generator().manual_seed(3)
    for window in episodes[0].windows:
        plan = loose.plan(window, plan, generator=generator)
        sequential = tiny_policy(n_steps=6).with_sampler(
            replace(tiny_policy(n_steps=6).sampler, start=lambda *_, noise=plan.solution.noise: (noise, None))
        )
        moved = plan.executed_actions - sequential.plan(window).executed_actions
        errors.append(float(moved.abs().max()))
    alone = plan_error(loose, episodes[:1])
    assert alone["worst"] == pytest.approx(max(errors[1:]), rel=1e-4)
    assert plan_error(tight, rollout(tight, make_env, [3], 20))["worst"] < 0.1
    assert plan_error(tiny_policy(), rollout(tiny_policy(), make_env, [3], 20)) is None
    assert plan_error(slow, rollout(slow, make_env, [3], 2)) is None
    console = Console(width=150)
    result = SamplerResult(name="loose", episodes=episodes, plan_error=alone)
    with console.capture() as capture:
        console.print(sampler_table([result], ""))
    assert "(n = 2)" in capture.get() and result.to_dict()["plan_error"] == alone


def test_an_evaluation_in_real_time_goes_on_too(tmp_path):
    def run(policy, folder):
        cases = [
            Case(name="free", policy=policy, rate_hz=10),
            Case(name="late", policy=policy, rate_hz=10, latencies=[0.2], reference=FREE),
        ]
        options = {"side_by_side": 1, "on_result": lambda results: seen.append(len(results))}
        blocks = Blocks(folder, {})
        return compare_realtime(cases, lambda rate_hz: make_env(), [1, 2], 1.0, blocks=blocks, **options)

    seen = []
    FREE = Case(name="free", policy=None, rate_hz=10).label
    whole = run(tiny_policy(), None)
    assert seen == [1, 1, 2, 2]
    with pytest.raises(KeyboardInterrupt):
        run(Failing(tiny_policy(), 5), tmp_path)
    again = run(tiny_policy(), tmp_path)
    assert [result.to_dict() for result in judged(again, MARGINS)] == [
        result.to_dict() for result in judged(whole, MARGINS)
    ]


def test_an_evaluation_in_real_time_frees_a_policys_programs_after_its_last_case():
    first, second = (tiny_policy().captured("emulated") for _ in range(2))
    cases = [
        Case(name=name, policy=policy, rate_hz=10, latencies=[latency])
        for name, policy, latency in (("a", first, 0.0), ("b", second, 0.0), ("a late", first, 0.2))
    ]
    seen = []
    compare_realtime(
        cases,
        lambda rate_hz: make_env(),
        [1],
        0.5,
        on_result=lambda results: seen.append([len(policy.programs) for policy in (first, second)]),
    )
    assert seen == [[1, 0], [1, 1], [1, 0]] and not first.programs


def test_blocks_of_another_evaluation_or_damaged_ones_are_not_taken(tmp_path):
    Blocks(tmp_path, {"seeds": 4, "a": 1}).episodes("ddpm", 0, lambda: [toy_episode(0, 1.0, 3)])
    with pytest.raises(InputError, match=r"unfinished evaluation with other settings \(a, seeds\): finish"):
        Blocks(tmp_path, {"seeds": 5})
    (path,) = (tmp_path / "unfinished").glob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"is damaged .*: delete it, and its episodes are run again"):
        Blocks(tmp_path, {"seeds": 4, "a": 1}).episodes("ddpm", 0, list)


def test_an_evaluation_stops_when_it_is_decided():
    """A sampler that is the reference is equivalent soon; one that never gets anywhere isn't run on."""
    same = tiny_policy()
    policies = {"ddpm": same, "twin": same}
    results, _ = compared(
        policies,
        None,
        make_env=ToyEnv,
        seeds=range(1, 17, 2),
        max_steps=4,
        margins={"score": 1e9, "success": 1},
        stop_early=True,
        options={},
    )
    assert [len(result.episodes) for result in results] == [2, 2] and results[1].decided
    assert results[1].differences["score"].verdict == "equivalent within 1e+09"


def test_scores_may_be_negative_and_success_is_not_a_reward():
    episode = Episode(3)
    episode.add([-2.0, -0.5, -1.0], None)
    assert (episode.score, episode.n_steps) == (-0.5, 3)
    (result,) = judged([SamplerResult(name="a", episodes=[episode], reference=[Episode(3, -1.0)])], MARGINS)
    values = result.compared()
    assert values["score"]["mean"] == -0.5 and values["difference_to_reference"]["mean"] == 0.5
    assert values["success"] is values["success_rate"] is values["success_difference_to_reference"] is None


@pytest.mark.parametrize(("scoring", "score"), [("max", 0.5), ("mean", -0.75), ("last_but_more", -0.5)])
def test_a_score_is_made_of_rewards_as_the_task_says(monkeypatch, scoring, score):
    """However the rewards come; also in the caller's own way; reports name it."""
    monkeypatch.setitem(SCORINGS._choices, "last_but_more", lambda before, reward, n: reward + n / 8)
    episode = Episode(3, scoring=scoring)
    episode.add([-2.0, 0.5], None)
    episode.add([-0.5, -1.0], None)
    assert episode.score == score
    result = SamplerResult(name="a", episodes=[episode])
    assert result.compared()["score"] | {"scoring": scoring, "mean": score} == result.compared()["score"]
    row = replace(result, episodes=[replace(toy_episode(0, 1.0, 3), scoring=scoring)])
    headings = [column.header for column in sampler_table([row], "t").columns]
    heading = "score ± s.e." if scoring == "max" else f"score ± s.e.\n({scoring} reward)"
    assert heading in headings


def test_an_unknown_scoring_is_refused():
    with pytest.raises(InputError, match="unknown scoring 'maxx'; did you mean 'max'"):
        Episode(3, scoring="maxx").add([1.0], None)


def test_rollouts_score_as_they_are_told():
    for scoring in ("max", "mean"):
        (episode,) = rollout(tiny_policy(), make_env, [5], 12, scoring=scoring)
        made = {"max": max, "mean": np.mean}[scoring](episode.rewards)
        assert episode.score == pytest.approx(made, abs=1e-12) and episode.scoring == scoring


def test_an_environment_that_terminates_has_not_succeeded():
    """Many terminate when something went wrong; only a task may say that it means success."""
    assert succeeded(True, {}) is None and succeeded(True, {}, "terminated") is True
    assert succeeded(True, {"is_success": False}) is False and succeeded(False, {"success": 1}) is True
    fallen, fine = (
        rollout(tiny_policy(), ToyEnv, [6], 20, success_key=key)[0] for key in (None, "terminated")
    )
    assert (fallen.n_steps, fallen.success) == (fine.n_steps, None) and fine.success is True


@pytest.mark.parametrize("score", [0.5, 1.0])
def test_one_seed_has_neither_standard_error_nor_interval(score):
    one = [SamplerResult(name=n, episodes=[toy_episode(0, score, 3)], reference=None) for n in "ab"]
    results = judged([one[0], replace(one[1], reference=one[0].episodes)], MARGINS)
    console = Console(width=150)
    with console.capture() as capture:
        console.print(sampler_table(results, "one"), difference_table(results, "one"))
    text = capture.get()
    assert not re.search("nan|± [0-9]|[0-9%] \\[", text), text
    success = "100%" if score == 1 else "0%"
    for part in (f" {score:.3f} (n = 1) ", f" {success} (n = 1) ", " +0.000 (n = 1) ", " inconclusive "):
        assert part in text, text
    values = results[1].compared()
    assert values["score"]["interval_95"] is values["success"]["interval_95"] is None


def test_seeds_to_choose_on_and_seeds_of_reports_are_apart():
    chosen, reported = TrainEvaluationConfig(), EvaluateConfig()
    ends = [of.first_seed + of.seeds for of in (chosen, reported)]
    assert chosen.first_seed == 200_000 >= ends[1] and chosen.seeds > 0


def test_episodes_give_columns_by_name():
    (episode,) = rollout(tiny_policy(), make_env, [5], 4, keep_infos=True)
    columns = episode.columns(["state", "action", "rewards"])
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys(columns, 4)
    np.testing.assert_array_equal(columns["state"][2], episode.infos[2]["state"])
    assert max(columns["rewards"]) == episode.score


def test_reports_have_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.0], "b": {"c": -math.inf, "d": "NaN"}})
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert content == {"a": [None, 1.0], "b": {"c": None, "d": "NaN"}}
