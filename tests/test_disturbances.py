"""Disturbances are of the size that is asked for, the same for every policy, and nothing at strength 0."""

from __future__ import annotations

import json
import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from paradiffpolicy import environment
from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.environments import env_maker, env_maker_at
from paradiffpolicy.cli.evaluate import deciding
from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.run import build_robot
from paradiffpolicy.disturbances import DISTURBANCES, ActionNoise, disturbed
from paradiffpolicy.envs.pusht import PushTEnv
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.blocks import Blocks
from paradiffpolicy.recorded_env import RecordedEnv
from paradiffpolicy.task import NUMBERS, Camera, Contract, ObservationField

from .conftest import TINY, tiny_checkpoint
from .robosuite_envs import shared_env
from .toy_env import ToyEnv

WITHOUT_FRICTION = {"action_noise": 0.02, "dropped_observations": 0.3, "observation_delay": 2}
ALL = {"friction": 0.5, **WITHOUT_FRICTION}


class CountingEnv(gymnasium.Env):
    """Observes the number of steps, in arrays that it reuses; ``info`` has it, and the action that came."""

    action_space = spaces.Box(np.array([-512.0, -1.0]), np.array([512.0, 1.0]), dtype=np.float64)
    observation_space = spaces.Dict(
        {"state": spaces.Box(-np.inf, np.inf, (1,)), "img": spaces.Box(0, 255, (2, 2, 3), np.uint8)}
    )

    def __init__(self):
        self.seen = {"state": np.zeros(1), "img": np.zeros((2, 2, 3), np.uint8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(0), {"step": 0}

    def observe(self, step):
        self.step_number = step
        self.seen["state"][:], self.seen["img"][:] = step, min(step, 255)
        return self.seen

    def step(self, action):
        return (
            self.observe(self.step_number + 1),
            0.0,
            False,
            False,
            {"step": self.step_number, "action": action},
        )


def vectors():
    return gymnasium.wrappers.TransformObservation(
        CountingEnv(), lambda seen: seen["state"], spaces.Box(-np.inf, np.inf, (1,))
    )


def records():
    fields = (ObservationField("state", shape=(1,)),)
    return RecordedEnv(CountingEnv(), Contract(fields, "other", cameras=(Camera("img", (2, 2, 3)),)))


KINDS = {
    "vectors": (vectors, lambda seen: [*seen]),
    "dicts": (CountingEnv, lambda seen: [*seen["state"], *seen["img"].flat]),
    "records": (records, lambda seen: [*seen[NUMBERS], *seen["img"].flat]),
}


def episode(env, n, seed=0, action=(0.0, 0.0)):
    """Yields the reset's observation and info, then those of ``n`` steps."""
    yield env.reset(seed=seed)
    for _ in range(n):
        observation, *_, info = env.step(np.array(action))
        yield observation, info


def steps_seen(env, n, numbers=lambda seen: [*seen["state"]], seed=0):
    """The steps that an episode's observations are of, and those that its infos are of."""
    shown, told = [], []
    for observation, info in episode(env, n, seed):
        (step,) = {int(number) for number in numbers(observation)}
        shown.append(step)
        told.append(info["step"])
    return shown, told


def actions_taken(env, n, seed=0, action=(0.0, 0.0)):
    """The actions ``[n, A]`` that come to the environment."""
    return np.stack([info["action"] for _, info in [*episode(env, n, seed, action)][1:]])


def pushes(env, n=25, seed=3):
    """An episode of PushT that pushes the block off its middle: its results."""
    _, info = env.reset(seed=seed)
    target = info["state"][2:4] + np.array([20, -10])
    return [env.step(target) for _ in range(n)]


# --------------------------------------------------------------------------------------- strength and share


@pytest.mark.parametrize("name", DISTURBANCES)
def test_strength_0_changes_no_bit(name):
    def results(env):
        out = pushes(env)
        return [(*each[:-1], *(np.array(value) for value in each[-1].values())) for each in out]

    plain = results(PushTEnv())
    for one, other in zip(plain, results(DISTURBANCES[name].apply(PushTEnv(), 0)), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    env = PushTEnv()
    assert disturbed(env, {name: 0}) is env


def test_action_noise_is_the_share_of_the_range_that_is_asked_for():
    noise = actions_taken(disturbed(CountingEnv(), {"action_noise": 0.02}), 2000) / np.array([1024, 2])
    np.testing.assert_allclose(noise.std(axis=0), 0.02, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.002)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.1 and abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.1


def test_action_noise_leads_no_action_out_of_its_bounds():
    """Nor farther out than it is."""
    env = disturbed(CountingEnv(), {"action_noise": 0.5})
    x, y = actions_taken(env, 50, action=(512, -1.5)).T
    assert x.min() < 400 and x.max() == 512 and y.min() == -1.5 and -1 < y.max() <= 1
    assert env.step(np.zeros(2, np.float32))[-1]["action"].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delay", [1, 3])
def test_a_delay_shows_exactly_what_was_observed_that_many_steps_before(kind, delay):
    make, numbers = KINDS[kind]
    env = disturbed(make(), {"observation_delay": delay})
    for _ in range(2):  # a reset forgets the episode before
        shown, told = steps_seen(env, 9, numbers)
        assert shown == [max(0, step - delay) for step in range(10)] and told == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_observations_show_the_last_one_again(kind):
    make, numbers = KINDS[kind]
    shown, told = steps_seen(disturbed(make(), {"dropped_observations": 0.3}), 250, numbers)
    dropped = [seen != step for seen, step in zip(shown, told, strict=True)]
    assert told == list(range(251)) and not dropped[0]
    assert all(shown[step] == shown[step - 1] for step in told if dropped[step])
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.06)
    assert {*steps_seen(disturbed(make(), {"dropped_observations": 1}), 5, numbers)[0]} == {0}


def test_late_observations_are_those_that_were_not_dropped():
    dropped, _ = steps_seen(disturbed(CountingEnv(), {"dropped_observations": 0.4}), 50)
    strengths = {"observation_delay": 2, "dropped_observations": 0.4}  # in any order
    both, _ = steps_seen(disturbed(CountingEnv(), strengths), 50)
    assert both == [0, 0, *dropped[:-2]]


# ---------------------------------------------------------------------------------------------- friction


def test_friction_changes_pushts_motion_only_when_asked():
    env = PushTEnv()
    plain = pushes(env)[-1][-1]["state"]
    changed = pushes(disturbed(env, {"friction": 0.5}))[-1][-1]["state"]
    assert np.abs(changed[2:4] - plain[2:4]).max() > 1
    (pusher,), block = env._pusher.shapes, env._block.shapes
    assert [pusher.friction * part.friction for part in block] == pytest.approx([0.5, 0.5])
    env.change_friction(0)
    np.testing.assert_array_equal(pushes(env)[-1][-1]["state"], plain)


def test_friction_of_robosuites_contacts_is_scaled_once():
    """Lift's scene is built anew by a reset."""
    env = shared_env("lift")

    def frictions():
        env.reset(seed=1)
        for _ in range(3):
            env.step(env.hold_action)
        return np.array(env.simulation.mujoco_data.contact.friction[:, 0])

    plain, largest = frictions(), env.simulation.mujoco_model.geom_friction[:, 0].max()
    assert len(plain)
    try:
        for _ in range(2):
            disturbed(env, {"friction": -0.5})
        assert env.simulation.mujoco_model.geom_friction[:, 0].max() == 0.5 * largest
        np.testing.assert_allclose(frictions(), 0.5 * plain)
    finally:
        env.change_friction(0)
    assert env.simulation.mujoco_model.geom_friction[:, 0].max() == largest


# ------------------------------------------------------------------------------------------------- seeds


def test_all_policies_meet_the_same_disturbances_on_a_seed():
    """Whatever they do, and whichever other disturbances there are."""

    def met(seed, strengths, action=(0.0, 0.0)):
        env = disturbed(CountingEnv(), strengths)
        return actions_taken(env, 40, seed, action) - action, steps_seen(env, 40, seed=seed)[0]

    noise, shown = met(7, WITHOUT_FRICTION)
    moved, seen = met(7, WITHOUT_FRICTION, (50.0, 0.1))
    np.testing.assert_allclose(moved, noise, atol=1e-12)
    assert seen == shown
    np.testing.assert_array_equal(met(7, {"action_noise": 0.02})[0], noise)
    other, others = met(8, WITHOUT_FRICTION)
    assert others != shown and not np.array_equal(other, noise)
    # Without a seed it goes on, as environments do.
    env = disturbed(CountingEnv(), {"action_noise": 0.02})
    assert not np.array_equal(actions_taken(env, 3), actions_taken(env, 3, None))


# ---------------------------------------------------------------------------------------------- commands


def test_what_the_package_needs_of_an_environment_goes_through():
    cfg = compose("run", [])
    for env in (env_maker(cfg, **ALL)(), env_maker_at(cfg, **ALL)(50.0)):
        _, info = env.reset(seed=0)
        assert isinstance(env.unwrapped, PushTEnv) and set(cfg.task.record) <= set(info)
        assert environment.control_rate(env) in (10, 50)
        np.testing.assert_array_equal(environment.hold_action(env), info["state"][:2])
        assert environment.picture(env, 16).shape == (16, 16, 3)


def test_a_report_says_which_disturbances_were_on(capsys, tmp_path):
    tiny_checkpoint().save(tmp_path / "tiny")
    strengths = "{action_noise: 0.02, observation_delay: 1}"
    code = main(
        [
            *("evaluate", f"checkpoint={tmp_path / 'tiny'}", f"disturbances={strengths}", "capture=eager"),
            *("samplers=ddim", "reference=ddim", "seeds=1", "task.max_steps=8", "videos=0", "paced_ticks=0"),
            *("latency_plans=0", f"out={tmp_path / 'report'}"),
        ]
    )
    assert code == 0 and "action_noise 0.02, observation_delay 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["disturbances"] == {"action_noise": 0.02, "observation_delay": 1}


def test_an_evaluation_with_other_disturbances_is_not_resumed(tmp_path):
    plain, noisy = (
        deciding(compose("evaluate", [f"disturbances={each}"])) for each in ("{}", "{action_noise: 0.1}")
    )
    Blocks(tmp_path, plain).values("latencies", dict)
    with pytest.raises(InputError, match=r"other settings \(disturbances\)"):
        Blocks(tmp_path, noisy)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ("{action_nois: 0.1}", "unknown disturbance 'action_nois'; did you mean 'action_noise'?"),
        ("{action_noise: 1.5}", "disturbances: action_noise=1.5 must be a number from 0 to 1"),
        ("{action_noise: -0.1}", "action_noise=-0.1 must be a number from 0 to 1"),
        ("{action_noise: high}", "action_noise='high' must be a number from 0 to 1"),
        ("{action_noise: [1, 2]}", "action_noise=[1, 2] must be a number from 0 to 1"),
        ("{dropped_observations: true}", "dropped_observations=True must be a number from 0 to 1"),
        ("{dropped_observations: .nan}", "dropped_observations="),
        ("{observation_delay: 0.5}", "observation_delay=0.5 must be a whole number from 0 to 100"),
        ("{observation_delay: 1000}", "observation_delay=1000 must be a whole number from 0 to 100"),
        ("{friction: -2}", "friction=-2 must be a number from -1 to 10"),
        ("3", "disturbances=3 must be names and values"),
    ],
)
def test_unknown_disturbances_and_strengths_are_refused(strengths, message):
    for command in ("evaluate", "run"):
        with pytest.raises(InputError, match=re.escape(message)) as refusal:
            compose(command, [f"disturbances={strengths}"])
        assert "\n" not in str(refusal.value)


def test_environments_that_cant_be_disturbed_so_are_refused():
    """And robots that are none."""
    frictionless, boundless = ToyEnv(), ToyEnv()
    with pytest.raises(InputError, match="friction: ToyEnv has no change_friction"):
        disturbed(frictionless, {"friction": 0.5})
    with pytest.raises(InputError, match=r"friction=-0.5: PushT's .* have no friction to lose"):
        env_maker(compose("evaluate", []), friction=-0.5)()
    boundless.action_space = spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(InputError, match="those of ToyEnv are Box"):
        ActionNoise(boundless, 0.1)
    for env in (frictionless, boundless):
        env.close()
    cfg = compose("run", ["robot=udp", "disturbances={action_noise: 0.1}"])
    with pytest.raises(InputError, match=r"disturbances=\{action_noise: 0.1\} .* robot=env"):
        build_robot(cfg, TINY, 10, None)
