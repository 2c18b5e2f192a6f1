"""Videos of a study's episodes: chosen when all is decided, and run again with pictures.

The block of a chosen seed is run again as it was, so that its episodes are the same to the bit; their
environments are filmed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..evaluation.episodes import Episode
from ..evaluation.pictures import episodes_video
from ..evaluation.rollout import in_groups
from ..evaluation.workers import Picture
from .design import Arm
from .running import ArmRun, Progressed


def chosen_seeds(episodes: Mapping[Arm, Sequence[Episode]], n: int) -> list[int]:
    """The seeds of a task that are worth watching: first those where its arms disagree in success, then those
    where all fail, then the others; of these, and where success isn't known, the largest differences of score
    first.

    Args:
        episodes: of the task's arms, in the seeds' order; some may have ended early.
        n: at most so many, of those that all arms ran.
    """

    def interest(rows: tuple[Episode, ...]) -> tuple[int, float, int]:
        successes = {bool(row.success) for row in rows if row.success is not None}
        kind = 0 if len(successes) == 2 else 1 if successes == {False} else 2
        scores = [row.score for row in rows]
        return kind, min(scores) - max(scores), rows[0].seed

    ranked = sorted(zip(*episodes.values(), strict=False), key=interest)
    return [rows[0].seed for rows in ranked[:n]]


@dataclass
class Film:
    """An episode's pictures: before every action, and of the end; and its rewards."""

    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class FilmedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that is filmed if its seed is to be.

    Args:
        films: by seed.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], picture: Picture, films: Mapping[int, Film]) -> None:
        super().__init__(env)
        self._picture, self._films = picture, films
        self._film: Film | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        self._film = None if seed is None else self._films.get(seed)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        if self._film is None:
            return self.env.step(action)
        self._film.frames.append(np.array(self._picture(self.env)))
        stepped = self.env.step(action)
        self._film.rewards.append(float(stepped[1]))
        return stepped

    def close(self) -> None:
        if self._film is not None:
            self._film.frames.append(np.array(self._picture(self.env)))
            self._film = None
        self.env.close()


def filmed(run: ArmRun, seeds: Sequence[int], wanted: Sequence[int], picture: Picture) -> list[Episode]:
    """A block of an arm's seeds run again; the wanted episodes, with pictures.

    Args:
        picture: of an environment.
    """
    films = {seed: Film() for seed in wanted}

    def make_env(*rate_hz: float) -> gymnasium.Env[Any, Any]:
        return FilmedEnv(run.make_env(*rate_hz), picture, films)

    episodes = [e for e in run.run(make_env=make_env, seeds=seeds) if e.seed in films]
    for episode in episodes:
        episode.frames, episode.rewards = films[episode.seed].frames, films[episode.seed].rewards
    return episodes


def film(
    progressed: Progressed,
    runs: Mapping[Arm, ArmRun],
    block: int,
    n: int,
    folder: Path,
    picture: Picture,
    on_video: Callable[[int], object] = lambda n: None,
) -> dict[str, dict[str, str]]:
    """Makes the videos of a study that aren't there yet: ``n`` seeds per task, those of all its arms alike.

    Args:
        block: seeds that ran side by side.
        folder: of the report; videos go to a folder in it.
        on_video: told how many videos are ready.

    Returns:
        Paths in the folder, by the arm's name and the seed.
    """
    made: dict[str, dict[str, str]] = {}
    for task in dict.fromkeys(arm.task for arm in runs):
        arms = {arm: progressed.episodes[arm] for arm in runs if arm.task == task}
        seeds = chosen_seeds(arms, n)
        for arm, episodes in arms.items():
            names = {seed: f"videos/{file_name(arm.name)}_{seed}.mp4" for seed in seeds}
            made[arm.name] = {str(seed): name for seed, name in names.items()}
            missing = [seed for seed, name in names.items() if not (folder / name).exists()]
            on_video(len(names) - len(missing))
            for group in in_groups([episode.seed for episode in episodes], block):
                wanted = [seed for seed in missing if seed in group]
                for episode in filmed(runs[arm], group, wanted, picture) if wanted else ():
                    episodes_video(arm.name, [episode], folder / names[episode.seed], runs[arm].rate_hz)
                    on_video(1)
            runs[arm].policy.release()
    return made


def file_name(name: str) -> str:
    """An arm's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", name)
