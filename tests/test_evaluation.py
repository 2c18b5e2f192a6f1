"""Rollouts are what one environment at a time gives; statistics and reports say what they should."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from paradiffpolicy.control.clock import VirtualClock
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.robot import EnvRobot
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.baseline import diffusers_ddpm
from paradiffpolicy.evaluation.compare import results
from paradiffpolicy.evaluation.latency import interleaved, latency_rows, plan_latencies
from paradiffpolicy.evaluation.report import table, write_report
from paradiffpolicy.evaluation.rollout import Episode, rollout
from paradiffpolicy.evaluation.statistics import paired_difference, standard_error
from paradiffpolicy.policy import Policy, spec_schedule
from paradiffpolicy.sampling.sampler import make_sampler

from .conftest import TINY, tiny_checkpoint


def tiny_policy(**sampler) -> Policy:
    return Policy(tiny_checkpoint(), make_sampler(spec_schedule(TINY), **{"n_steps": 3, **sampler}))


def make_env():
    return gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")


@pytest.mark.parametrize("sampler", [{}, {"solver": "ddim", "n_steps": 4, "driver": "realtime", "rounds": 1}])
def test_a_batch_of_episodes_is_the_control_loop_run_alone(sampler):
    policy = tiny_policy(**sampler)
    episodes = rollout(policy, make_env, [3, 4], max_steps=20)
    for episode in episodes:
        clock, generator = VirtualClock(), torch.Generator().manual_seed(episode.seed)
        robot = EnvRobot(make_env(), episode.seed)
        loop = ControlLoop(policy, robot, rate_hz=10, clock=clock, generator=generator)
        ticks = loop.run(20)
        np.testing.assert_allclose(episode.actions, [t.action for t in ticks], atol=0.01)
        assert episode.score == pytest.approx(max(t.reward for t in ticks), abs=1e-4)
        assert episode.rounds == [t.rounds for t in ticks if t.rounds]
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
    assert len(episode.frames) == 10 and episode.frames[0].shape == (32, 32, 3)


# ------------------------------------------------------------------------------------- statistics


def test_interval_and_test_are_students():
    draw = np.random.default_rng(0)
    reference = draw.uniform(0, 1, 30)
    scores = reference + draw.normal(0.01, 0.03, 30)
    difference = paired_difference(scores, reference)
    expected = stats.ttest_rel(scores, reference).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    one = stats.ttest_1samp(scores - reference, -0.05, alternative="greater").pvalue
    other = stats.ttest_1samp(scores - reference, 0.05, alternative="less").pvalue
    assert difference.p_value == pytest.approx(max(one, other))
    assert difference.equivalent and difference.verdict == "equivalent within 0.05"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=30), st.floats(0.01, 0.5))
def test_equivalent_means_the_90_percent_interval_is_inside_the_margin(differences, margin):
    result = paired_difference(differences, [0.0] * len(differences), margin)
    se = standard_error(differences)
    if se > 1e-9:
        half = stats.t.ppf(0.95, len(differences) - 1) * se
        inside = -margin < result.mean - half and result.mean + half < margin
        assert result.equivalent == inside


def test_a_worse_sampler_is_not_called_equivalent():
    draw = np.random.default_rng(1)
    reference = draw.uniform(0.8, 1, 50)
    assert not paired_difference(reference - 0.06 + draw.normal(0, 0.01, 50), reference).equivalent
    assert not paired_difference(reference[:4] + np.array([0.2, -0.2, 0.1, -0.1]), reference[:4]).equivalent


def test_one_seed_shows_nothing_and_identical_scores_are_equivalent():
    assert not paired_difference([1.0], [1.0]).equivalent
    assert paired_difference([0.5, 0.7], [0.5, 0.7]).equivalent
    assert not paired_difference([0.9, 0.9], [0.5, 0.5]).equivalent
    with pytest.raises(ValueError, match="2 scores against 1"):
        paired_difference([1.0, 1.0], [1.0])


# ----------------------------------------------------------------------------------------- latency


def test_tasks_take_turns_and_the_first_turn_is_not_counted():
    clock, order = VirtualClock(), []

    def task(name, seconds):
        def run(window):
            order.append((name, int(window[0, 0])))
            clock.advance(seconds)

        return run

    windows = [np.full((2, 1), float(k)) for k in range(3)]
    seconds = interleaved({"a": task("a", 1.0), "b": task("b", 0.25)}, windows, clock)
    assert seconds["a"] == pytest.approx([1.0] * 3) and seconds["b"] == pytest.approx([0.25] * 3)
    assert order == [("a", 0), ("b", 0)] + [(name, k) for k in range(3) for name in "ab"]


def test_latency_rows_compare_with_the_baseline():
    policy = tiny_policy()
    windows = [np.full((2, 20), 256.0)] * 2

    class Steps:
        """A clock that counts network calls: a plan's time is its rounds."""

        calls = 0

        def now(self):
            return float(self.calls)

        def sleep_until(self, moment):
            raise AssertionError

    clock = Steps()
    policy.denoiser.network.register_forward_hook(lambda *args: setattr(clock, "calls", clock.calls + 1))
    realtime = policy.with_sampler(
        make_sampler(policy.schedule, solver="ddim", n_steps=10, driver="realtime", rounds=2)
    )
    rows = latency_rows({"short": policy, "realtime": realtime}, windows, clock)
    assert [row.name for row in rows] == ["diffusers DDPM-100", "short", "realtime"]
    assert [row.rounds for row in rows] == [100, 3, 2]
    assert [row.p50 for row in rows] == [100e3, 3e3, 2e3]
    assert [row.speedup for row in rows] == pytest.approx([1, 100 / 3, 50])
    assert plan_latencies({"realtime": realtime}, windows, clock) == {"realtime": [2.0, 2.0]}


def test_the_baseline_is_the_same_policy(monkeypatch):
    """With the noise that ours draws, the diffusers loop gives our sequential DDPM's plan."""
    policy = tiny_policy(n_steps=100)
    window = np.full((2, 20), 200.0)
    plan = policy.plan(window, generator=torch.Generator().manual_seed(4))
    noises = iter([plan.walk.noise.x_T, *plan.walk.noise.z])
    monkeypatch.setattr("torch.randn", lambda *args, **kwargs: next(noises))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(noises)
    )
    condition = policy.observation_normalizer.normalize(torch.full((1, 2, 20), 200.0)).flatten(1)
    theirs = diffusers_ddpm(policy, condition, torch.Generator())
    torch.testing.assert_close(theirs, plan.walk.sample, atol=2e-3, rtol=0)


def test_the_baseline_refuses_what_diffusers_does_not_have():
    spec = replace(TINY, prediction="score")
    policy = Policy(tiny_checkpoint(spec), make_sampler(spec_schedule(spec)))
    with pytest.raises(InputError, match="prediction=score"):
        diffusers_ddpm(policy, torch.zeros(1, 40), torch.Generator())


# ------------------------------------------------------------------------------------------ report


def toy_results():
    def episode(seed, score):
        frames = [np.full((31, 31, 3), 10 * k, dtype=np.uint8) for k in range(3 + seed)]
        return Episode(seed, score, score > 0.9, 10, [4, 6], [40, 60], frames=frames)

    episodes = {
        "ddpm": [episode(0, 0.95), episode(1, 0.8), episode(2, 1.0)],
        "fast": [episode(0, 0.94), episode(1, 0.81), episode(2, 1.0)],
    }
    latencies = {"ddpm": [0.5, 0.52, 0.51], "fast": [0.02, 0.03, 0.02]}
    return results(episodes, latencies, {}, "ddpm", 0.05)


def test_a_report_is_json_picture_and_videos(tmp_path):
    paths = write_report(tmp_path, toy_results(), "toy", {"task": "toy"}, control_hz=10)
    assert [p.name for p in paths] == [
        "report.json",
        "score_latency.png",
        "rollout.png",
        "ddpm.mp4",
        "fast.mp4",
    ]
    report = json.loads(paths[0].read_text())
    fast = report["samplers"]["fast"]
    assert fast["score"]["mean"] == pytest.approx(0.9166667)
    assert fast["rounds_per_plan"] == {"mean": 5.0, "median": 5.0, "max": 6.0}
    assert fast["plan_latency_ms"]["p50"] == pytest.approx(20.0)
    assert fast["difference_to_reference"]["verdict"] == "equivalent within 0.05"
    assert report["samplers"]["ddpm"]["difference_to_reference"] is None
    assert imageio.imread(paths[1]).shape[0] > 300
    video = imageio.mimread(paths[3])
    # Three episodes side by side, 4 pixels between them, odd sizes cut; as long as the longest.
    assert len(video) == 5 and video[0].shape == (30, 100, 3)


def test_the_table_shows_every_sampler():
    console = Console(width=150, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table(toy_results(), "toy"))
    text = capture.get()
    for part in ("ddpm", "fast", "0.917 ± 0.056", "reference", "equivalent within 0.05", "20 / 30"):
        assert part in text, text
