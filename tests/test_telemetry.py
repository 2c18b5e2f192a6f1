"""Telemetry shows what happened in a run: as a dataset, a video, pictures and in the viewer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tracemalloc
from dataclasses import replace
from functools import partial

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.environments import contract
from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.run import noted_signals
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.record import Record
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError
from paradiffpolicy.planning.delayed import DelayedPlanner
from paradiffpolicy.planning.request import PlanMaker
from paradiffpolicy.policy import Policy
from paradiffpolicy.process import ChildProcess
from paradiffpolicy.robots import ROBOTS
from paradiffpolicy.robots.env import EnvRobot, PacedEnvRobot
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.telemetry.caption import captioned, episode_lines
from paradiffpolicy.telemetry.recorder import DatasetRecorder, VideoRecorder, write_video
from paradiffpolicy.telemetry.rerun import RerunView, to_file, to_url
from paradiffpolicy.telemetry.summary import summary, summary_table, write_run
from paradiffpolicy.telemetry.timeline import latencies, timeline

from .conftest import TINY, tiny_checkpoint

FIELDS = ["state", "keypoint", "n_contacts"]


def tiny_policy(spec=TINY) -> Policy:
    return Policy.from_checkpoint(tiny_checkpoint(spec), make_sampler(spec_schedule(spec), n_steps=3))


def delayed(seconds):
    """A planner whose plans take so long, in virtual time."""

    def make(policy, generator, clock):
        maker = PlanMaker(policy, generator, clock)
        return DelayedPlanner(lambda request: partial(maker, request), clock, lambda: seconds)

    return make


class Bench:
    """A robot without a body: gives the observations of a script by the tick that the clock says, and
    takes as much of the clock's time to apply an action as it is told."""

    def __init__(self, clock, rate_hz=10.0, script=None, seconds=None, breaks_at=None, obs_dim=20):
        self.clock, self.rate, self.script, self.seconds = clock, rate_hz, script or {}, seconds or {}
        self.breaks_at, self.obs_dim, self.stopped = breaks_at, obs_dim, False

    @property
    def now(self):
        return round(self.clock.now() * self.rate)

    def observe(self):
        if self.now == self.breaks_at:
            raise ConnectionError("the robot's cable is out")
        return self.script.get(self.now, np.full(self.obs_dim, 100.0 + self.now))

    def apply(self, action):
        self.clock.advance(self.seconds.get(self.now, 0.0))

    def stop(self):
        self.stopped = True


def bench_run(n_ticks, observers=(), *, rate_hz=10.0, planner=None, policy=None, capacity=None, **robot):
    """A real loop in virtual time; its record."""
    clock = VirtualClock()
    policy = policy or tiny_policy()
    controller = Controller(
        policy,
        rate_hz,
        generator=torch.Generator().manual_seed(0),
        planner=planner or delayed(0.0),
        clock=clock,
        capacity=capacity or n_ticks,
    )
    bench = Bench(clock, rate_hz, obs_dim=policy.spec.obs_dim, **robot)
    return ControlLoop(controller, bench, observers=observers).run(n_ticks)


def watched_robot(clock, rate_hz=10.0, seed=3):
    env = gymnasium.make(
        "paradiffpolicy/PushT-v0", obs_type="keypoints", control_hz=rate_hz, max_episode_steps=-1
    )
    return PacedEnvRobot(env, seed, clock)


def env_run(n_ticks, observers_of, *, rate_hz=10.0):
    """PushT in virtual time."""
    clock = VirtualClock()
    controller = Controller(
        tiny_policy(), rate_hz, generator=torch.Generator().manual_seed(0), planner=delayed(0.0), clock=clock
    )
    robot = watched_robot(clock, rate_hz)
    ControlLoop(controller, robot, observers=observers_of(robot)).run(n_ticks)
    return robot, controller.record


# ------------------------------------------------------------------------------------------ captions


def test_a_caption_is_above_the_frame_and_its_size_depends_on_the_lines_count_alone():
    frame = np.full((64, 96, 3), 7, np.uint8)
    lines = episode_lines("dpm-solver++2m-10", 100_003, 17.9, -0.25, 0.98, 12.3, ended=True)
    assert lines[1:] == ["ended at 17.9 s, score -0.25", "best 0.98 (at 12.3 s)"]
    pictures = [captioned(frame, shown) for shown in (lines, ["a", "b", ""], [*lines[:2], "wide " * 99])]
    for picture in pictures:
        assert picture.shape == pictures[0].shape and picture.shape[0] % 2 == 0
        np.testing.assert_array_equal(picture[-64:], frame)
        assert (picture[:-64, :2] == 255).all() and (picture[:-64, -2:] == 255).all()
        assert picture[:-64].min() < 100  # there is text
    assert captioned(frame, []) is frame
    assert episode_lines("rti", 3, 0.0, np.nan, np.nan, 0.0)[1:] == ["0.0 s", ""]


# ----------------------------------------------------------------------------------------- recorders


def test_a_recorded_run_is_what_happened_in_it(tmp_path):
    ticks = []
    store = tmp_path / "runs.zarr"
    for _ in range(2):

        def observers(robot):
            recorder = DatasetRecorder(store, TINY, 12, fields=lambda: robot.fields(FIELDS))
            observers.recorder = recorder
            return [recorder, ticks.append]

        env_run(12, observers)
        observers.recorder.close()
    buffer = ReplayBuffer.open(store)
    assert buffer.episode_ends.tolist() == [12, 24]
    episode = buffer.episode(0)
    assert set(episode) == {"observation", "action", *FIELDS}
    np.testing.assert_allclose(episode["observation"], [t.observation for t in ticks[:12]], rtol=1e-6)
    np.testing.assert_allclose(episode["action"], [t.action for t in ticks[:12]], rtol=1e-6)
    # The fields are those of the observation, not of a moment later.
    columns = np.concatenate((episode["keypoint"].reshape(12, 18), episode["state"][:, :2]), axis=1)
    np.testing.assert_array_equal(columns, episode["observation"])


def test_a_recorded_run_can_be_trained_on(tmp_path):
    store = tmp_path / "runs.zarr"

    def observers(robot):
        observers.recorder = DatasetRecorder(store, TINY, 200, every=5, fields=lambda: robot.fields(FIELDS))
        return [observers.recorder]

    env_run(200, observers, rate_hz=50.0)
    observers.recorder.close()
    buffer = ReplayBuffer.open(store)
    assert buffer.n_steps == 40  # the policy's steps, not the loop's ticks
    data = WindowDataset.of(
        buffer, contract(compose("train", []).task).observation, n_obs_steps=2, horizon=16, n_action_steps=8
    )
    # What a policy is trained on is what it observed.
    np.testing.assert_allclose(data.observations, buffer.read("observation"), rtol=1e-6)
    assert data.actions.shape == (40, 2)


def test_rows_keep_to_the_grid(tmp_path):
    """Ticks 4 and 5 are missed, the observation of tick 7 has NaN, that of tick 8 a number too few, and
    that of tick 9 never came."""
    script = {7: np.full(20, np.nan), 8: np.zeros(19), 9: None}
    forces = iter([np.array([float(k) if k != 4 else np.nan]) for k in range(12)])
    with DatasetRecorder(
        tmp_path / "runs.zarr", TINY, 12, fields=lambda: {"force": next(forces)}
    ) as recorder:
        bench_run(12, [recorder], seconds={3: 0.25}, script=script)
    buffer = ReplayBuffer.open(tmp_path / "runs.zarr")
    # One was asked for beforehand; the fourth tick's has NaN.
    assert buffer.read("force")[:, 0].tolist() == [1, 2, 3, 3, 3, 3, 5, 6, 7, 8, 9, 10]
    observed = buffer.read("observation")[:, 0]
    assert observed.tolist() == [100, 101, 102, 103, 103, 103, 106, 106, 106, 106, 110, 111]


def test_a_recording_begins_with_the_first_action(tmp_path):
    """The first plan takes 2.5 ticks; until then there is nothing to hold on to."""
    with DatasetRecorder(tmp_path / "runs.zarr", TINY, 12) as recorder:
        bench_run(12, [recorder], planner=delayed(0.25))
    assert ReplayBuffer.open(tmp_path / "runs.zarr").read("observation")[:, 0].tolist() == [*range(103, 112)]


def test_what_a_store_cant_hold_is_refused_or_repeated(tmp_path):
    for name in ("a/b", "..", "x" * 201):
        with pytest.raises(InputError, match="a field can't be called"):
            DatasetRecorder(tmp_path / "runs.zarr", TINY, 5, fields=lambda name=name: {name: np.zeros(1)})
    forces = iter([0.0, 1.0, 1e300, 3.0])
    fields = lambda: {"force": np.array([next(forces)])}  # noqa: E731
    with DatasetRecorder(tmp_path / "runs.zarr", TINY, 3, fields=fields) as recorder:
        bench_run(3, [recorder])
    assert ReplayBuffer.open(tmp_path / "runs.zarr").read("force")[:, 0].tolist() == [1, 1, 3]


def test_what_comes_after_the_capacity_is_left_out(tmp_path):
    ticks = []
    with (
        DatasetRecorder(tmp_path / "runs.zarr", TINY, 5) as recorder,
        VideoRecorder(tmp_path / "run.mp4", lambda: np.zeros((8, 8, 3), np.uint8), 10.0, 5) as video,
    ):
        bench_run(9, [recorder, video, ticks.append])
    assert len(ticks) == 9
    assert ReplayBuffer.open(tmp_path / "runs.zarr").n_steps == 5
    assert imageio.get_reader(tmp_path / "run.mp4").count_frames() == 5


def test_a_run_that_breaks_is_recorded_up_to_there(tmp_path):
    def gray():
        return np.full((32, 32, 3), 128, np.uint8)

    with (
        pytest.raises(ConnectionError),
        DatasetRecorder(tmp_path / "runs.zarr", TINY, 20) as recorder,
        VideoRecorder(tmp_path / "run.mp4", gray, 10.0, 20) as video,
    ):
        bench_run(20, [recorder, video], breaks_at=7)
    assert ReplayBuffer.open(tmp_path / "runs.zarr").episode_ends.tolist() == [7]
    assert imageio.get_reader(tmp_path / "run.mp4").count_frames() == 7


def test_a_run_without_a_good_tick_writes_nothing(tmp_path):
    with DatasetRecorder(tmp_path / "runs.zarr", TINY, 3) as recorder:
        bench_run(3, [recorder], planner=delayed(9.0))
    with VideoRecorder(tmp_path / "run.mp4", lambda: np.zeros((8, 8, 3), np.uint8), 10.0, 3):
        pass
    assert not list(tmp_path.iterdir())


def test_a_store_of_something_else_is_refused_before_the_run(toy_store):
    with pytest.raises(InputError, match="has fields"):
        DatasetRecorder(toy_store, TINY, 10)
    assert ReplayBuffer.open(toy_store).n_episodes == 3


def test_a_video_lasts_as_long_as_the_run(tmp_path):
    """30 ticks at 30 Hz, a picture every third, of which one is missed."""
    shades = iter(range(0, 250, 10))

    def picture():
        return np.full((33, 47, 3), next(shades), np.uint8)

    with VideoRecorder(tmp_path / "run.mp4", picture, 30.0, 30, every=3) as video:
        bench_run(30, [video], rate_hz=30.0, seconds={10: 4.2 / 30})
    reader = imageio.get_reader(tmp_path / "run.mp4")
    frames = [int(np.median(frame)) for frame in reader]
    assert reader.get_meta_data()["fps"] == 10 and reader.get_meta_data()["size"] == (46, 32)
    assert len(frames) == 10
    assert abs(frames[3] - frames[4]) <= 2 and frames[5] - frames[4] >= 5
    assert abs(frames[-1] - 90) <= 2  # the last picture of ten, the first of which only told its size


def test_a_videos_memory_grows_with_its_frames(tmp_path):
    """A long run doesn't take all of it at its start; one that could never be kept is refused then."""
    frame = np.zeros((64, 64, 3), np.uint8)
    tracemalloc.start()
    video = VideoRecorder(tmp_path / "run.mp4", lambda: frame, 10.0, 100_000)  # 1.2 GB
    with contextlib.closing(video):
        bench_run(4, [video])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    with pytest.raises(InputError, match=r"500000 frames of 12 kB are more than 4 GiB: fewer seconds"):
        VideoRecorder(tmp_path / "run.mp4", lambda: frame, 10.0, 500_000)


def test_a_video_shows_the_caption_of_each_frame(tmp_path):
    """Ticks 3 to 5 are missed: their frames repeat the picture and the caption before them."""
    asked = []

    def caption(tick):
        asked.append(tick.index)
        return ["", "I" * 40 if tick.index < 3 else ""]

    path, black = tmp_path / "run.mp4", np.zeros((64, 64, 3), np.uint8)
    with VideoRecorder(path, lambda: black, 10.0, 9, caption=caption) as video:
        bench_run(9, [video], seconds={2: 0.35})
    frames = [*imageio.get_reader(path).iter_data()]
    assert asked == [0, 1, 2, 6, 7, 8] and len(frames) == 9
    height = frames[0].shape[0] - 64
    assert [bool(frame[: height - 2].min() < 100) for frame in frames] == [True] * 6 + [False] * 3


def test_a_video_that_can_not_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.mp4"
    write_video(path, [np.zeros((16, 16, 3), np.uint8)] * 3, 10.0)
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017  whatever the encoder says
        write_video(path, [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 5), np.uint8)], 10.0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="must end in"):
        VideoRecorder(tmp_path / "run.avi", lambda: np.zeros((8, 8, 3), np.uint8), 10.0, 3)


def test_the_world_waits_for_the_loop_and_ticks_fall_into_the_middle_of_its_steps():
    clock = VirtualClock()
    robot = watched_robot(clock)
    clock.advance(5.0)
    robot.stop()  # a loop that ends before it began
    first = robot.observe()
    assert robot.n_steps == 0
    for tick, jitter in enumerate((0.04, -0.08, 0.06), start=1):
        clock.advance(0.1 + jitter)
        observation = robot.observe()
        assert robot.n_steps == tick
    np.testing.assert_array_equal(robot.info["keypoint"].reshape(-1), observation[:18])
    assert not np.shares_memory(first, observation)


def test_a_robots_score_is_its_best_rewards_even_below_zero():
    rewards = iter([-3.0, -1.0, -2.0])
    clock = VirtualClock()
    env = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")
    robot = PacedEnvRobot(gymnasium.wrappers.TransformReward(env, lambda _: next(rewards)), 3, clock)
    assert np.isnan(robot.score)
    robot.observe()
    clock.advance(0.3)
    robot.observe()
    assert (robot.score, robot.best_step, robot.reward, robot.n_steps) == (-1.0, 2, -2.0, 3)


def test_a_robots_score_may_be_the_mean_reward_beside_its_best():
    rewards = iter([0.5, 1.0, 0.0])
    clock = VirtualClock()
    env = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")
    env = gymnasium.wrappers.TransformReward(env, lambda _: next(rewards))
    robot = EnvRobot(env, 3, clock, scoring="mean")
    clock.advance(0.3)
    robot.observe()
    assert (robot.score, robot.best, robot.best_step) == (0.5, 1.0, 2)
    assert (robot.progress().best, robot.progress().best_at) == (1.0, 0.2)


def test_a_picture_is_drawn_once_per_step():
    clock = VirtualClock()
    robot = watched_robot(clock)
    robot.observe()
    first = robot.picture(32)
    assert first.shape == (32, 32, 3) and robot.picture(32) is first and robot.picture(16) is not first
    clock.advance(0.1)
    robot.observe()
    assert robot.picture(32) is not first


# -------------------------------------------------------------------------------------- the viewer


def rrd_columns(path):
    """``{entity: {column: [values]}}`` of a saved recording."""
    chunk = pytest.importorskip("rerun.chunk")
    found: dict[str, dict[str, list]] = {}
    for part in chunk.RrdReader(path).stream():
        if not part.is_static:
            columns = found.setdefault(part.entity_path, {})
            batch = part.to_record_batch()
            for name in batch.schema.names:
                column = batch.column(name)
                if name in ("control_time", "log_time"):
                    column = column.cast("int64")  # nanoseconds
                columns.setdefault(name, []).extend(column.to_pylist())
    return found


def test_the_view_shows_the_run(tmp_path):
    path = tmp_path / "run.rrd"
    ticks = []
    picture = partial(np.zeros, (8, 8, 3), np.uint8)
    caption = lambda tick: [f"tick {tick.index}", "seed 3"]  # noqa: E731
    with RerunView(to_file(path), TINY, 10.0, picture=picture, every=4, caption=caption) as view:
        record = bench_run(25, [view, ticks.append], planner=delayed(0.15), script={12: np.full(20, np.nan)})
    shown = rrd_columns(path)
    assert shown["/observation"]["tick"] == list(range(25))
    seconds = 1e-9 * np.array(shown["/observation"]["control_time"])
    np.testing.assert_allclose(seconds, 0.1 * np.arange(25), atol=1e-8)
    np.testing.assert_allclose(
        np.array(shown["/observation"]["Scalars:scalars"]), [t.observation for t in ticks]
    )
    acting = [t for t in ticks if t.action is not None]
    points = np.array(shown["/scene/action"]["Points2D:positions"])[:, 0]
    np.testing.assert_allclose(points[-len(acting) :], [t.action for t in acting], rtol=1e-6)
    # Each plan when it starts to act: the first at tick 2, the next asked for 8 ticks after it.
    assert shown["/scene/plan"]["tick"] == [2, 10, 18]
    fan = np.array(shown["/scene/plan"]["LineStrips2D:strips"][0][0])
    np.testing.assert_allclose(fan, acting[0].plan.actions[1:], rtol=1e-6)
    assert shown["/timing/delay"]["Scalars:scalars"] == [[2.0]] * 3
    np.testing.assert_allclose(np.ravel(shown["/timing/latency"]["Scalars:scalars"]), 150.0)
    assert (
        np.ravel(shown["/state/fallback_active"]["Scalars:scalars"]).sum()
        == record.ticks["fallback_active"].sum()
        == 2
    )
    ages = np.array(shown["/timing/ticks"]["Scalars:scalars"])[:, 2]
    np.testing.assert_allclose(ages, [1e3 * t.plan_age for t in ticks])
    assert shown["/faults"]["tick"] == [0, 12]
    assert "no plan yet" in shown["/faults"]["TextLog:text"][0][0]
    assert "NaN" in shown["/faults"]["TextLog:text"][1][0]
    assert shown["/scene/picture"]["tick"] == shown["/caption"]["tick"] == list(range(0, 25, 4))
    assert shown["/caption"]["TextDocument:text"][1] == ["tick 4\nseed 3"]


def test_actions_that_are_no_points_are_shown_over_time(tmp_path):
    path = tmp_path / "run.rrd"
    spec = replace(TINY, obs_dim=6, action_dim=3)
    with RerunView(to_file(path), spec, 20.0) as view:
        bench_run(40, [view], rate_hz=20.0, policy=tiny_policy(spec))
    shown = rrd_columns(path)
    assert not any(name.startswith("/scene") for name in shown)
    # A plan's 15 steps ahead last 30 ticks, the next one starts after 16: two lanes, with a gap each.
    lanes = {name: shown[name] for name in shown if name.startswith("/plan")}
    assert {name: columns["tick"][0] for name, columns in lanes.items()} == {"/plan/0": 0, "/plan/1": 16}
    assert lanes["/plan/0"]["tick"] == [*range(0, 31, 2), *range(32, 63, 2)]
    assert np.isnan(np.array(lanes["/plan/0"]["Scalars:scalars"])[[15, 31]]).all()
    assert np.isfinite(np.array(lanes["/plan/0"]["Scalars:scalars"])[:15]).all()


def test_what_a_view_was_sent_is_there_after_a_fault(tmp_path):
    path = tmp_path / "run.rrd"
    with pytest.raises(ConnectionError), RerunView(to_file(path), TINY, 10.0) as view:
        bench_run(20, [view], breaks_at=7)
    assert rrd_columns(path)["/action"]["tick"] == list(range(7))


def test_a_viewer_that_is_not_there_is_found_at_the_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"rerun+http://127.0.0.1:{free.getsockname()[1]}/proxy"
    for wrong in (url, "rerun+http://nowhere.invalid/proxy", "rerun+http://"):
        with pytest.raises(InputError, match=re.escape(f"view={wrong}: ")):
            RerunView(to_url(wrong), TINY, 10.0)


def test_a_viewer_that_goes_away_does_not_keep_a_run_from_ending(caplog):
    """Rerun takes ten seconds to notice by itself: here its own word for that comes at once."""

    def gone(timeout_sec):
        raise RuntimeError("Flush timed out")

    with RerunView(lambda stream, blueprint: setattr(stream, "flush", gone), TINY, 10.0) as view:
        bench_run(3, [view])
    assert "the viewer doesn't answer (Flush timed out)" in caplog.text


def test_the_view_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(InputError, match=r"paradiffpolicy\[rerun\]"):
        RerunView(to_file(tmp_path / "run.rrd"), TINY, 10.0)


# ---------------------------------------------------------------------------------------- pictures


def drawn(figure):
    """The texts, the colors' count of filled dots, and of hollow ones."""
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    filled = sum(len(line.get_xdata()) for line in dots if line.get_markerfacecolor() != "white")
    hollow = sum(len(line.get_xdata()) for line in dots if line.get_markerfacecolor() == "white")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    return [text.get_text() for text in axes.texts], filled, hollow, legend


def test_the_timeline_has_every_step_that_acted_and_every_one_that_came_too_late():
    record = bench_run(40, planner=delayed(0.15), script={20: np.full(20, np.nan)})
    texts, filled, hollow, legend = drawn(timeline(record, (0.0, 4.0)))
    ticks, plans = record.ticks, record.plans
    assert filled == (~ticks["fallback_active"]).sum() == 38
    assert hollow == plans["delay"].sum() == 2 * len(plans)
    indices = [text for text in texts if text.isdigit()]
    assert sorted(map(int, indices)) == sorted(ticks["plan_index"][~ticks["fallback_active"]])
    assert sum("150 ms" in text for text in texts) == len(plans)
    assert "observation not finite" in legend and "plan late" not in legend


def test_the_timeline_shows_a_step_once_however_many_ticks_it_lasts():
    record = bench_run(100, rate_hz=50.0, planner=delayed(0.15))
    _, filled, hollow, _ = drawn(timeline(record, ticks_per_step=5))
    # From tick 8 on the first plan acts: the end of step 1 after its own, 2 to 9, and the end of 10.
    ticks, plans = record.ticks, record.plans
    pairs = {(tick["plan"], tick["plan_index"]) for tick in ticks if not tick["fallback_active"]}
    assert filled == len(pairs)
    assert hollow == (plans["delay"] // 5).sum() == len(plans)


def test_faults_that_come_together_stand_below_each_other():
    script = {k: np.full(20, np.nan) for k in range(5, 20)}
    record = bench_run(30, planner=delayed(0.15), script=script)
    (axes,) = timeline(record, (0.0, 3.0)).axes
    rows = {line.get_marker(): line.get_ydata()[0] for line in axes.lines if line.get_color() == "C3"}
    assert len(rows) == len(set(rows.values())) == 4
    assert min(rows.values()) > axes.get_ylim()[0]


def test_the_timeline_of_a_part(tmp_path):
    record = bench_run(60, planner=delayed(0.15))
    _, filled, hollow, _ = drawn(timeline(record, (2.0, 3.0)))
    assert filled == 10 and hollow == 2  # those of the plan for tick 24, not of the one for 16
    with pytest.raises(InputError, match=r"no tick between 7 and 8 s: the run had 0 to 5\.9 s"):
        timeline(record, (7.0, 8.0))
    with pytest.raises(InputError, match="without a tick"):
        timeline(Record(2, 10))


def test_a_record_that_lost_its_beginning_keeps_its_time():
    record = bench_run(60, planner=delayed(0.15), capacity=20)
    _, filled, _, _ = drawn(timeline(record, (5.0, 6.0)))
    assert filled == 10
    with pytest.raises(InputError, match=r"the run had 4 to 5\.9 s"):
        timeline(record, (0.0, 1.0))


def test_the_histograms_have_every_plan_and_tick():
    record = bench_run(40, planner=delayed(0.15), seconds={5: 0.13, 9: 0.17})
    plans, ticks = latencies(record).axes
    assert sum(patch.get_height() for patch in plans.patches) == len(record.plans)
    assert sum(patch.get_height() for patch in ticks.patches) == len(record.ticks)
    assert [text.get_text() for text in plans.get_legend().get_texts()] == ["p50 150", "max 150"]
    empty = latencies(bench_run(2, planner=delayed(9.0)))
    assert empty.axes[0].get_title(loc="left") == "no plans"


def test_the_summary_counts_what_happened(tmp_path):
    record = bench_run(40, planner=delayed(0.15), seconds={5: 0.13}, script={20: np.full(20, np.nan)})
    values = summary(record)
    assert (values["ticks"], values["missed"], values["plans"]) == (39, 1, len(record.plans))
    assert values["faults"] == {"observation_not_finite": 1, "plan_missing": 2}
    n, latency = len(record.plans), values["plan_latency_ms"]
    assert (latency["n"], latency["p99"]) == (n, None) and latency["max"] == pytest.approx(150)
    assert values["delay_mean"] == 2 and values["fallback_share"] == pytest.approx(2 / 39)
    paths = write_run(tmp_path / "out", record, values, "a run")
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads(paths[0].read_text()) == values
    kept = np.load(tmp_path / "out" / "record.npz")
    assert kept["ticks"].tobytes() == record.ticks.tobytes()
    assert kept["requests"] == len(record.plans) + values["unfinished_requests"]


def test_a_run_of_nothing_is_summed_up_too(tmp_path):
    values = summary(Record(2, 10))
    assert values["ticks"] == 0 and values["plan_latency_ms"]["p50"] is None
    assert summary_table(values, "nothing").row_count == 8
    names = [path.name for path in write_run(tmp_path, Record(2, 10), values, "nothing")]
    assert names == ["report.json", "record.npz"]


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("telemetry") / "tiny"
    tiny_checkpoint().save(folder)
    return f"checkpoint={folder}"


def test_run_drives_and_keeps_everything(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    code = main(
        [
            *("run", checkpoint, "planner=inline", "sampler_name=rti", "seconds=1", "capture=eager"),
            *(f"record={tmp_path / 'runs.zarr'}", f"video={tmp_path / 'run.mp4'}", "picture_size=64"),
            *(f"view={tmp_path / 'run.rrd'}", "blending.name=temporal_ensemble", "+blending.decay=0.1"),
            f"out={out}",
        ]
    )
    printed, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    # The last ticks may be missed on a loaded machine, which the next one would have noted.
    n_ticks = int(np.load(out / "record.npz")["ticks"]["index"][-1]) + 1
    assert report["ticks"] + report["missed"] == n_ticks <= 10
    assert report["plans"] >= 1 and "score" in report
    assert report["blending"] == {"name": "temporal_ensemble", "decay": 0.1}
    names = ["report.json", "record.npz", "timeline.png", "latencies.png"]
    for path in [*(out / name for name in names), *map(tmp_path.joinpath, ("run.mp4", "run.rrd"))]:
        assert path.stat().st_size > 500 and str(path) in printed.replace("\n", "")
    assert ReplayBuffer.open(tmp_path / "runs.zarr").n_steps == n_ticks
    for words in ("deadline error, ms", "fallback active", "score"):
        assert words in printed
    shown = rrd_columns(tmp_path / "run.rrd")
    assert shown["/scene/picture"]["tick"]
    caption = shown["/caption"]["TextDocument:text"][-1][0]
    words = r"seed 100000, rti\n0\.\d s, score 0\.\d\d\nbest 0\.\d\d \(at 0\.\d s\)"
    assert re.fullmatch(words, caption), caption
    assert imageio.get_reader(tmp_path / "run.mp4").get_meta_data()["size"][1] > 64  # with a caption


def test_run_at_another_rate_records_at_the_policys(capsys, checkpoint, tmp_path):
    code = main(
        [
            *("run", checkpoint, "planner=thread", "seconds=0.6", "rate_hz=50", "capture=eager"),
            *(f"out={tmp_path / 'out'}", f"record={tmp_path / 'runs.zarr'}", "timeline=[0.1,0.4]"),
            *("blending.name=rtc", "replan_every=2", "scheduling.freeze_gc=false"),
            *("safety.limits=[[0,0],[512,1e-3]]", "safety.fallback_timeout=0.05"),
        ]
    )
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"plan_refused", "fallback_timeout"} <= {*report["faults"]}
    n_ticks = int(np.load(tmp_path / "out" / "record.npz")["ticks"]["index"][-1]) + 1
    assert report["ticks"] + report["missed"] == n_ticks <= 30 and report["rate_hz"] == 50
    assert ReplayBuffer.open(tmp_path / "runs.zarr").n_steps <= 6


def test_run_at_a_rate_that_doesnt_divide(capsys, checkpoint, tmp_path):
    out, view = tmp_path / "out", tmp_path / "run.rrd"
    run = [
        "run",
        checkpoint,
        "planner=inline",
        "seconds=0.8",
        "rate_hz=25",
        "capture=eager",
        "replan_every=2",
    ]
    assert main([*run, "interpolation=cubic", f"view={view}", f"out={out}"]) == 0, capsys.readouterr().err
    report, ticks = json.loads((out / "report.json").read_text()), np.load(out / "record.npz")["ticks"]
    assert report["interpolation"] == {"name": "cubic"} and (out / "timeline.png").stat().st_size > 500
    assert set(np.diff(np.unique(ticks["plan"]))) <= {5, 10}  # two steps of 2.5 ticks; a plan may be missed
    assert view.stat().st_size > 500


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["planner=procces"], "unknown planner 'procces'; did you mean 'process'?"),
        (["blending.name=latst"], "unknown blending 'latst'; did you mean 'latest'?"),
        (["+blending.decay=1"], "blending 'latest' has no option 'decay'"),
        (
            ["blending.name=rtc", "+blending.overlap=-1"],
            "blending.overlap=-1 must be a number",
        ),
        (["robot=panda"], "unknown robot 'panda'; known: env"),
        (["rate_hz=5"], "rate_hz=5 must be the policy's 10 Hz or more"),
        (
            ["rate_hz=25", "record=a.zarr"],
            "record=a.zarr holds the policy's steps: rate_hz=25 must be a multiple",
        ),
        (["interpolation.name=liner"], "unknown interpolation 'liner'; did you mean 'linear'?"),
        (["+interpolation.parts=[hold]"], "interpolation 'auto' has no option 'parts'"),
        (["interpolation={name: per_dimension, parts: [slurp]}"], "unknown interpolant 'slurp'"),
        (["interpolation={name: per_dimension, parts: [hold]}"], "are for 1 numbers of an action"),
        (["rate_hz=fast"], "rate_hz=fast must be a number above 0"),
        (["rate_hz=30"], "rate_hz=30: paradiffpolicy/PushT-v0"),
        (["seconds=0"], "seconds=0 must be a number above 0"),
        (["seed=-1"], "seed=-1 must be a whole number"),
        (["replan_every=2.5"], "replan_every=2.5 must be a whole number"),
        (["sampler_name=rt"], "did you mean 'rti'"),
        (["view=browser"], "view=browser must be rerun, a path that ends in .rrd"),
        (["video=run.avi"], "video=run.avi must be a path that ends in .mp4"),
        (["timeline=[3,1]"], "timeline=[3,1] must be [from, to]"),
        (["scheduling.awake=perhaps"], "scheduling.awake=perhaps must be true or false"),
        (["safety.limits=[0,512]"], "safety.limits=[0,512] must be a list, each entry a list"),
        (["safety.limits=[[0,0,0],[9,9,9]]"], "limits must be two arrays [action_dim=2], low and high"),
        (["safety.limits=[[9,9],[0,0]]"], "limits must be two arrays [action_dim=2], low and high"),
        (["safety.frozen_after=0"], "safety.frozen_after=0 must be a number above 0"),
        (["plannr=inline"], "did you mean 'planner'"),
    ],
)
def test_run_refuses(capsys, monkeypatch, checkpoint, tmp_path, overrides, message):
    monkeypatch.chdir(tmp_path)
    code = main(["run", checkpoint, "capture=eager", "out=out", *overrides])
    err = capsys.readouterr().err
    assert code == 2 and message in err
    assert err.startswith("paradiffpolicy: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_robot_that_can_not_say_how_it_ended_loses_no_record(monkeypatch, checkpoint, tmp_path):
    def outcome():
        raise OSError("the robot is gone")

    build = ROBOTS["env"]
    monkeypatch.setitem(ROBOTS._choices, "env", lambda settings: replace(build(settings), outcome=outcome))
    settings = ["planner=inline", "seconds=0.3", "capture=eager", f"out={tmp_path / 'out'}"]
    with pytest.raises(OSError, match="the robot is gone"):
        main(["run", checkpoint, *settings])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ticks"] > 0
    assert (tmp_path / "out" / "record.npz").exists()


@pytest.mark.parametrize("name", ["out", "record", "video", "view"])
def test_run_refuses_places_that_can_not_be_written(capsys, checkpoint, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    place = {"out": "x", "record": "x.zarr", "video": "x.mp4", "view": "x.rrd"}[name]
    settings = [f"out={tmp_path / 'out'}", f"{name}={tmp_path / 'file' / place}"]
    code = main(["run", checkpoint, "planner=inline", "capture=eager", *settings])
    err = capsys.readouterr().err
    assert code == 2 and f"{name}=" in err and "can't be written" in err and err.count("\n") == 1


def test_run_names_the_extra_that_a_view_needs(capsys, monkeypatch, checkpoint, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    code = main(["run", checkpoint, "view=rerun", f"out={tmp_path / 'out'}"])
    err = capsys.readouterr().err
    assert code == 2 and "pip install 'paradiffpolicy[rerun]'" in err and err.count("\n") == 1


class Interrupting:
    """A robot during whose fourth observation a signal comes."""

    def __init__(self, robot, number):
        self.robot, self.number, self.observed, self.stopped = robot, number, 0, False

    def observe(self):
        self.observed += 1
        if self.observed == 4:
            os.kill(os.getpid(), self.number)
        return self.robot.observe()

    def apply(self, action):
        self.robot.apply(action)

    def stop(self):
        self.stopped = True
        self.robot.stop()


@pytest.mark.parametrize(
    ("number", "planner", "exit_code"), [(signal.SIGINT, "inline", 130), (signal.SIGTERM, "process", 143)]
)
def test_a_signal_ends_a_run_in_order(capsys, monkeypatch, checkpoint, tmp_path, number, planner, exit_code):
    """The robot is stopped, what there is is written, and no process is left."""
    made, build, children = [], ROBOTS["env"], []
    ended = ChildProcess.end

    def interrupted(settings):
        driven = build(settings)
        made.append(Interrupting(driven.robot, number))
        return replace(driven, robot=made[0])

    def end(child, *args, **kwargs):
        ended(child, *args, **kwargs)
        children.append(child.process.poll())

    monkeypatch.setitem(ROBOTS._choices, "env", interrupted)
    monkeypatch.setattr(ChildProcess, "end", end)
    before = signal.getsignal(number)
    out, store, video, view = (tmp_path / name for name in ("out", "runs.zarr", "run.mp4", "run.rrd"))
    settings = [f"planner={planner}", "capture=eager", f"out={out}", f"record={store}", "picture_size=64"]
    code = main(["run", checkpoint, *settings, f"video={video}", f"view={view}"])
    printed, err = capsys.readouterr()
    said = f"paradiffpolicy: stopped by {number.name}; what was recorded until then is written"
    assert (code, err.splitlines()[-1]) == (exit_code, said) and "fallback active" in printed
    assert made[0].stopped and made[0].observed == 4 and signal.getsignal(number) is before
    assert len(children) == (planner == "process") and None not in children
    report, record = json.loads((out / "report.json").read_text()), np.load(out / "record.npz")
    n_ticks = report["ticks"] + report["missed"]
    assert len(record["ticks"]) == report["ticks"] == 4 and (out / "timeline.png").exists()
    held = int(record["ticks"]["index"][np.isfinite(record["ticks"]["action"]).all(axis=1)][0])
    assert ReplayBuffer.open(store).n_steps == n_ticks - held
    assert imageio.get_reader(video).count_frames() == n_ticks
    assert rrd_columns(view)["/action"]["tick"][-1] == n_ticks - 1


def test_the_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), noted_signals(signal.SIGTERM) as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(noted) == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)


def test_faults_are_named_in_the_summary_table():
    record = bench_run(30, script={k: np.full(20, np.nan) for k in range(5, 20)})
    values = summary(record)
    assert set(values["faults"]) == {"observation_not_finite", "observation_stale"}
    view = summary_table(values, "faults")
    assert "fault: observation stale, ticks" in list(view.columns[0].cells)
