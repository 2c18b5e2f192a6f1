"""Inspecting demonstrations: planted anomalies are found, where they are, and nothing else is."""

from __future__ import annotations

import inspect as signatures

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from paradiffpolicy.cli.main import main
from paradiffpolicy.data.inspection import Finding, Inspection, inspect
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.data.survey import MIN_RANGE, SAMPLED_STEPS, Column
from paradiffpolicy.errors import InputError
from paradiffpolicy.telemetry.demonstrations import demonstrations


class Listed:
    """Episodes in memory, which count how often they are read."""

    def __init__(self, episodes):
        self.episodes, self.reads = episodes, 0
        self.lengths = [len(episode["action"]) for episode in episodes]

    def read(self, index):
        self.reads += 1
        return self.episodes[index]


def smooth(seed, n_actions=2, n_state=4, n=24, length=(80, 130), noise=0.005):
    """Slow movements with a little noise."""
    draw = np.random.default_rng(seed)
    episodes = []
    for _ in range(n):
        steps = int(draw.integers(*length))
        t = np.linspace(0, 1, steps)[:, None]

        def waves(size, t=t, steps=steps):
            phase = draw.uniform(0.3, 1.2, size) * t + draw.uniform(0, 1, size)
            wave = np.sin(2 * np.pi * phase) * draw.uniform(0.3, 1, size)
            return wave + noise * draw.normal(size=(steps, size))

        episodes.append({"action": waves(n_actions), "state": waves(n_state)})
    return episodes


def kinds(inspection: Inspection) -> list[tuple[str, str]]:
    return [(finding.kind, str(finding.column)) for finding in inspection.findings]


def only(inspection: Inspection) -> Finding:
    assert len(inspection.findings) == 1, kinds(inspection)
    return inspection.findings[0]


SEEDS = st.integers(0, 10**6)
EPISODE, STATE = st.integers(0, 23), st.integers(0, 3)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(-1e6, 1e6), st.sampled_from([1e-2, 1.0, 1e3]))
def test_smooth_movements_are_nothing_unusual(seed, offset, scale):
    episodes = smooth(seed)
    for episode in episodes:
        episode["state"] = episode["state"] * scale + offset
    assert kinds(inspect(Listed(episodes))) == []


NO_TURN = st.floats(8, 280) | st.floats(440, 1e6)
"""Sizes of jumps that aren't taken for an angle's wrap at 360 degrees."""


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPISODE, STATE, st.integers(5, 70), NO_TURN, st.sampled_from([-1, 1]))
def test_a_step_that_is_far_off_is_found(seed, episode, column, step, size, sign):
    """As an outlier and as one jump there and back."""
    episodes = smooth(seed)
    episodes[episode]["state"][step, column] = sign * size
    outlier, jump = inspect(Listed(episodes)).findings
    assert (outlier.kind, jump.kind) == ("outliers", "jumps")
    for finding in (outlier, jump):
        assert finding.column == Column("state", column) and finding.places == ((episode, step),)


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPISODE, STATE, st.integers(5, 70), st.floats(1.2, 2))
def test_a_jump_within_the_range_is_found(seed, episode, column, step, size):
    """Of what moves on from elsewhere, and never is an outlier."""
    episodes = smooth(seed)
    for other in (3, 7, 11, 15, 19):  # elsewhere is usual
        episodes[other]["state"][:, column] += size
    episodes[episode]["state"][step:, column] += size if episode not in (3, 7, 11, 15, 19) else -size
    jump = only(inspect(Listed(episodes)))
    assert (jump.kind, jump.places) == ("jumps", ((episode, step),))


@settings(max_examples=25, deadline=None)
@given(SEEDS, STATE, st.floats(-1e9, 1e9), st.floats(0, 0.9 * MIN_RANGE))
def test_dimensions_that_do_not_vary_are_found(seed, column, value, wobble):
    episodes = smooth(seed)
    for k, episode in enumerate(episodes):
        episode["state"][:, column] = value + wobble * (k % 2)
    finding = only(inspect(Listed(episodes)))
    varies = value + wobble != value
    assert (finding.kind, finding.column) == (
        "hardly varies" if varies else "constant",
        Column("state", column),
    )


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPISODE, st.booleans())
def test_an_episode_of_another_length_is_found(seed, episode, longer):
    episodes = smooth(seed)
    one = smooth(seed, n=1, length=(2000, 2001) if longer else (5, 6))[0]
    episodes[episode] = one
    found = [f for f in inspect(Listed(episodes)).findings if f.column is None]
    assert [f.episodes for f in found] == [[episode]] and found[0].kind == "differs"


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPISODE, STATE)
def test_an_episode_that_starts_elsewhere_is_found(seed, episode, column):
    episodes = smooth(seed)
    for each in episodes:
        each["state"] = each["state"] - each["state"][0] + 0.05 * each["state"][:1]
    episodes[episode]["state"][:, column] += 1
    found = [f for f in inspect(Listed(episodes)).findings if f.found.startswith("starts at")]
    assert [(f.column, f.episodes) for f in found] == [(Column("state", column), [episode])]


def test_what_many_episodes_have_is_no_finding():
    """A gripper that opens at times, a force that peaks at contact, in every episode."""
    episodes = smooth(0)
    for episode in episodes:
        episode["action"][:, 0] = -1.0
        episode["action"][60:, 0] = 1.0
        episode["state"][:, 0] = 0.01 * episode["state"][:, 0]
        episode["state"][40:42, 0] = 30
    assert kinds(inspect(Listed(episodes))) == []


def test_an_angle_that_wraps_is_no_jump():
    episodes = smooth(0)
    for episode in episodes:
        steps = len(episode["state"])
        episode["state"][:, 1] = (np.linspace(0, 9, steps) + 1) % (2 * np.pi)
    wraps = only(inspect(Listed(episodes)))
    assert wraps.kind == "wraps" and "sine and cosine" in wraps.remedy and len(wraps.episodes) == 24


def test_a_quaternion_that_changes_its_sign_is_no_jump():
    episodes = smooth(0)
    for k, episode in enumerate(episodes):
        half = np.linspace(0.2, 1.0, len(episode["state"])) + 0.01 * k
        rotation = np.stack((np.cos(half), np.sin(half) * 0.6, np.sin(half) * 0.8, 0 * half), axis=1)
        rotation[30:50] *= -1
        episode["state"] = rotation
    found = inspect(Listed(episodes)).findings
    assert [(f.kind, f.column.index) for f in found] == [("flips", 0), ("constant", 3)]
    assert found[0].places[:2] == ((0, 30), (0, 50))


def test_numbers_that_single_precision_rounds_are_found():
    """Near 1e6 float32 has steps of 0.06; what is recorded so is lost."""
    episodes = smooth(0)
    for episode in episodes:
        episode["state"] = (episode["state"] + 1e6).astype(np.float32)
    found = inspect(Listed(episodes)).findings
    assert {f.kind for f in found} == {"coarse"} and "double precision" in found[0].remedy
    for episode in episodes:
        episode["state"] = (1e-3 * (episode["state"].astype(float) - 1e6) + 1e7).astype(np.float32)
    assert {f.kind for f in inspect(Listed(episodes)).findings} == {"coarse"}


def test_the_human_demonstrations_raise_no_false_alarm(human_data):
    """Their block's angle wraps, as it is known to."""
    buffer = ReplayBuffer.open(human_data)
    fields = ["action", "keypoint", "n_contacts", "state"]
    episodes = Listed([buffer.episode(k, fields) for k in range(buffer.n_episodes)])
    assert kinds(inspect(episodes)) == [("wraps", "state[4]")]


def test_memory_is_bounded_however_many_steps():
    """One episode is read at a time, twice, and of all of them so many steps are kept."""
    one = smooth(0, n=1, length=(3000, 3001))[0]
    episodes = Listed([one] * 60)
    inspection = inspect(episodes)
    assert SAMPLED_STEPS <= len(inspection.sample) <= 2 * SAMPLED_STEPS < sum(episodes.lengths)
    assert episodes.reads == 1 + 2 * 60


def test_the_least_range_is_the_normalizers():
    assert signatures.signature(Normalizer.fit).parameters["min_range"].default == MIN_RANGE


@pytest.mark.parametrize("episodes", [[], [{"action": np.zeros((3, 0))}]])
def test_nothing_to_inspect_is_named(episodes):
    with pytest.raises(InputError):
        inspect(Listed(episodes))


@pytest.mark.parametrize("lengths", [(1, 2), (2, 3), (4, 9)])
def test_short_episodes_are_inspected(lengths):
    inspect(Listed(smooth(0, length=lengths)))


@pytest.mark.parametrize(("n_actions", "n_state"), [(2, 0), (7, 7), (10, 60)])
def test_the_picture_has_every_dimension_up_to_its_limit(n_actions, n_state):
    episodes = Listed(smooth(0, n_actions, n_state))
    episodes.episodes[5]["action"][20, 1] = 1e4
    inspection = inspect(episodes)
    figure = demonstrations(episodes, inspection, "planted")
    titles = [axes.get_title(loc="left") for part in figure.subfigs for axes in part.axes]
    shown = [title for title in titles if title]
    assert shown == list(map(str, inspection.columns))[:40]
    words = [text.get_text() for part in figure.subfigs for axes in part.axes for text in axes.texts]
    assert any("action[1] outliers: 1 step" in text for text in words)
    assert any("more dimensions aren't drawn" in text for text in words) == (n_actions + n_state > 40)


def planted_store(path):
    buffer = ReplayBuffer.create(path)
    episodes = smooth(0)
    episodes[4]["action"][30, 1] = 50
    for episode in episodes:
        buffer.append({**episode, "img": np.zeros((len(episode["action"]), 4, 4, 3), np.uint8)})
    return path


def test_info_says_what_is_unusual_and_draws_it(capsys, tmp_path):
    first, second = (planted_store(tmp_path / name / "mine.zarr") for name in "ab")
    out = tmp_path / "pictures"
    assert main(["info", str(first), str(second), f"out={out}"]) == 0
    shown = capsys.readouterr().out
    for part in ("outliers", "action[1]", "jumps", "at step 30", str(out / "mine-2.png")):
        assert part in shown
    assert sorted(place.name for place in out.iterdir()) == ["mine-2.png", "mine.png"]
    assert imread(out / "mine.png").shape[1] == 1600
    assert main(["info", str(first), "out=null"]) == 0
    assert "mine.png" not in capsys.readouterr().out
