"""Inspects demonstrations before they are trained on: what never varies, lies far off, jumps, or differs.

Two passes over the episodes, one episode in memory at a time.  The first takes ranges, starts and every so
many steps, of which quantiles are computed; the second looks at every step with them.

Scales are robust: ``sigma`` is the span of the middle 98 % of a dimension, which in a normal distribution is
4.652 standard deviations.  What more than a tenth of the episodes have is how the data are, and no finding: a
gripper that is seldom open, forces that peak at contact, a mouse that is let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .survey import MIN_RANGE, Array, Column, Episodes, Survey

SPAN_SIGMAS = 4.652
"""The middle 98 % of a normal distribution, in standard deviations."""
OUTLIER_SIGMAS, DISCRETE_SIGMAS = 7.0, 50.0
"""Distance from the middle 98 % from which on a step is an outlier; of a dimension that has few values."""
BACK = 3
"""Steps within which a jump back belongs to the one there."""
JUMP_OF_EPISODE, JUMP_OF_ALL, JUMP_OF_NEIGHBOURS = 8.0, 4.0, 4.0
"""A jump is so many times larger than nine of ten steps of its episode, than 99 of 100 of all, and than the
steps around it, which a quick movement isn't."""
DIFFERENT_SIGMAS = 6.0
"""Distance from the other episodes' from which on a length, a start or a range differs."""
COMPARED_EPISODES = 8
"""Fewer episodes don't say what is usual."""
MANY_EPISODES = 1000
"""So many are kept of what is counted however often it occurs."""
PERIODS = {"2 pi": 2 * np.pi, "360": 360.0}
KINDS = ("outliers", "jumps", "differs", "coarse", "wraps", "flips", "hardly varies", "constant")
"""Of findings, the most consequential first."""


@dataclass(frozen=True)
class Finding:
    """Something to look at before training.

    Attributes:
        kind: one of ``KINDS``.
        column: which dimension; None: the episode's length.
        found: what was found, in a few words.
        remedy: what to do about it, in a few words.
        places: ``(episode, step)``, the worst first; a step is counted from its episode's first one.
    """

    kind: str
    column: Column | None
    found: str
    remedy: str
    places: tuple[tuple[int, int], ...] = ()

    @property
    def episodes(self) -> list[int]:
        """Episodes that it is in, the worst first."""
        return list(dict.fromkeys(episode for episode, _ in self.places))


@dataclass(frozen=True, eq=False)
class Inspection:
    """What demonstrations are like, and what in them is unusual.

    Attributes:
        columns: the ``D`` dimensions, field by field.
        lengths: ``[n_episodes]``.
        low, high: ``[D]``, the range.
        bounds: ``[2, D]``, beyond which a step is an outlier.
        sample: ``[n, D]``, steps at equal intervals.
        findings: in the order of ``KINDS``.
    """

    columns: list[Column]
    lengths: NDArray[np.int64]
    low: Array
    high: Array
    bounds: Array
    sample: Array
    findings: list[Finding] = field(default_factory=list)


def inspect(episodes: Episodes) -> Inspection:
    """Looks at every step of every episode, twice.

    Raises:
        InputError: there is no episode, or none has a field.
    """
    survey = Survey(episodes)
    steps = _Search(survey)
    for index, values in survey.episodes():
        steps.add(index, values)
    of_steps = list(steps.findings())
    known = {(finding.column, episode) for finding in of_steps for episode in finding.episodes}
    findings = [*of_steps, *_differing(survey, known), *_still(survey)]
    findings.sort(key=lambda finding: KINDS.index(finding.kind))
    lengths = np.array(survey.lengths, dtype=np.int64)
    return Inspection(survey.columns, lengths, survey.low, survey.high, steps.bounds, survey.sample, findings)


@dataclass(eq=False)
class _Found:
    """What was found of one kind in one dimension: all of it, as long as few episodes have it."""

    most: float
    count: int = 0
    episodes: set[int] = field(default_factory=set)
    kept: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, size: float, episode: int, step: int) -> None:
        self.count += 1
        if len(self.episodes) <= self.most:
            self.episodes.add(episode)
            self.kept.append((size, episode, step))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Places, the worst first; none if too many episodes have it."""
        if len(self.episodes) > self.most:
            return ()
        worst_first = sorted(self.kept, key=lambda each: (-each[0], each[1:]))
        return tuple((episode, step) for _, episode, step in worst_first)


class _Search:
    """The second pass: outliers, jumps, angles that wrap, quaternions that change their sign."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        sigmas = np.where(survey.discrete & (survey.span > 0), DISCRETE_SIGMAS, OUTLIER_SIGMAS)
        margin = sigmas * survey.span / SPAN_SIGMAS
        self.bounds = np.stack((survey.q01 - margin, survey.q99 + margin))
        extent = survey.high - survey.low
        self.periods = {
            name: (extent > 0.8 * period) & (extent < 1.02 * period) for name, period in PERIODS.items()
        }
        limit = survey.limit()
        self.outliers, self.jumps = ([_Found(limit) for _ in survey.columns] for _ in range(2))
        self.wraps = {name: [_Found(MANY_EPISODES) for _ in survey.columns] for name in PERIODS}
        self.flips = [_Found(MANY_EPISODES) for _ in survey.columns]

    def add(self, index: int, values: Array) -> None:
        """Looks at the steps ``[length, D]`` of an episode."""
        survey = self.survey
        beyond = np.maximum(self.bounds[0] - values, values - self.bounds[1])
        for step, k in np.argwhere((beyond > 0) & ~survey.still):
            self.outliers[k].add(float(beyond[step, k]), index, int(step))
        if len(values) < 3:
            return
        values = self._without_flips(index, values)
        moves = np.diff(values, axis=0)
        for name, period in PERIODS.items():
            turns = self.periods[name] & (np.abs(np.abs(moves) - period) < 0.2 * period)
            for step, k in np.argwhere(turns):
                self.wraps[name][k].add(0.0, index, int(step) + 1)
            moves = np.where(turns, 0.0, moves)
        self._add_jumps(index, np.abs(moves))

    def _without_flips(self, index: int, values: Array) -> Array:
        """Quaternions q and -q are the same rotation: a change between them is noted, and undone."""
        for part in self.survey.quaternions:
            rotation = values[:, part]
            flipped = (rotation[1:] * rotation[:-1]).sum(axis=1) < 0
            if flipped.any():
                for step in np.flatnonzero(flipped):
                    self.flips[part.start].add(0.0, index, int(step) + 1)
                signs = np.cumprod(np.where(flipped, -1.0, 1.0))
                values = values.copy()
                values[1:, part] *= signs[:, None]
        return values

    def _add_jumps(self, index: int, moves: Array) -> None:
        survey = self.survey
        typical = np.quantile(moves, 0.9, axis=0)
        least = np.maximum(JUMP_OF_EPISODE * typical, JUMP_OF_ALL * survey.move)
        least = np.maximum(least, 0.05 * survey.span)
        large = (moves > least) & ~survey.discrete & ~survey.still
        if not large.any():
            return
        near = np.pad(moves, ((2, 2), (0, 0)))
        around = np.sort([near[:-4], near[1:-3], near[3:-1], near[4:]], axis=0)[2]  # all but one: back again
        for k in np.flatnonzero(large.any(axis=0)):
            last = -BACK - 1
            for step in np.flatnonzero(large[:, k] & (moves[:, k] > JUMP_OF_NEIGHBOURS * around[:, k])):
                if step > last + BACK:  # there and back again is one
                    ratio = float(moves[step, k] / max(typical[k], survey.move[k], np.finfo(float).tiny))
                    self.jumps[k].add(ratio, index, int(step) + 1)
                last = int(step)

    def findings(self) -> Iterator[Finding]:
        """All that was found, kind by kind."""
        columns = self.survey.columns
        for k, found in enumerate(self.outliers):
            if found.places:
                yield self._outlier(k, found.places)
        for column, found in zip(columns, self.jumps, strict=True):
            if places := found.places:
                worst = max(found.kept)[0]
                words = f"{_steps(places)}, {_times(worst)} a quick move's size, at step {places[0][1]}"
                yield Finding("jumps", column, words, "cut the episode there, or repair it", places)
        for name, turns in self.wraps.items():
            for column, found in zip(columns, turns, strict=True):
                if found.count:
                    words, remedy = f"by {name}, {found.count} times", "observe its sine and cosine instead"
                    yield Finding("wraps", column, words, remedy, _in_order(found))
        for column, found in zip(columns, self.flips, strict=True):
            if found.count:
                words = f"a quaternion that changes its sign, {found.count} times"
                yield Finding(
                    "flips", column, words, "keep one sign, or two rows of the matrix", _in_order(found)
                )

    def _outlier(self, k: int, places: tuple[tuple[int, int], ...]) -> Finding:
        survey, column = self.survey, self.survey.columns[k]
        many = _steps(places)
        extent, span = survey.high[k] - survey.low[k], survey.span[k]
        if span == 0:
            found = f"{many} where it isn't {survey.middle[k]:.4g}"
            return Finding("outliers", column, found, "remove them, or leave the dimension out", places)
        low, high = self.bounds[:, k]
        worst = max(survey.high[k] - high, low - survey.low[k])
        value = survey.high[k] if survey.high[k] - high == worst else survey.low[k]
        sigmas = abs(value - survey.middle[k]) * SPAN_SIGMAS / span
        filled = f"98 % of all fill {100 * span / extent:.2g} % of the range"
        found = f"{many}, up to {value:.4g}, {sigmas:.3g} sigma; {filled}"
        return Finding("outliers", column, found, "repair or remove them: they set the range", places)


def _in_order(found: _Found) -> tuple[tuple[int, int], ...]:
    return tuple((episode, step) for _, episode, step in found.kept)


def _steps(places: tuple[tuple[int, int], ...]) -> str:
    return f"{len(places)} steps" if len(places) > 1 else "1 step"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio < 1e6 else "a million times"


def _still(survey: Survey) -> Iterator[Finding]:
    """Dimensions that don't vary, or in steps that are too large for them."""
    for k in np.flatnonzero(survey.still):
        extent, column, value = survey.high[k] - survey.low[k], survey.columns[k], survey.middle[k]
        if abs(value) * survey.eps[k] > MIN_RANGE:
            words = f"{survey.eps[k] * abs(value):.2g} apart are the next numbers to {value:.6g}"
            yield Finding("coarse", column, words, "record it in double precision, or from another origin")
        elif extent == 0:
            yield Finding("constant", column, f"always {value:.6g}", "none needed; or leave it out")
        else:
            words = f"range {extent:.2g} around {value:.6g}"
            yield Finding("hardly varies", column, words, "is only centred: scale it if it matters")
    for k in np.flatnonzero(~survey.still):
        size = max(abs(survey.low[k]), abs(survey.high[k])) * survey.eps[k]
        if size > 1e-3 * max(survey.span[k], MIN_RANGE):
            words = f"steps of {size:.2g} in a range of {survey.span[k]:.2g}"
            remedy = "record it in double precision, or from another origin"
            yield Finding("coarse", survey.columns[k], words, remedy)


def _differing(survey: Survey, known: set[tuple[Column | None, int]]) -> Iterator[Finding]:
    """Episodes whose length, start or range isn't like the others', and not because of what is known."""
    if len(survey.lengths) < COMPARED_EPISODES:
        return
    lengths = np.log(np.maximum(1, survey.lengths))[:, None]
    usual = f"{np.median(survey.lengths):.0f} is usual"
    for _, episode, sigmas in _far(lengths, np.array([0.2]), survey):
        found = f"{survey.lengths[episode]} steps, {usual} ({sigmas:.2g} sigma)"
        yield Finding("differs", None, found, "look at it; leave it out", ((episode, 0),))
    least = np.maximum(0.01 * survey.span, MIN_RANGE)
    parts = ((survey.starts, "starts at"), (survey.ranges, "has the range"))
    for values, words in parts:
        told = set[int]()
        for k, episode, sigmas in sorted(_far(values, least, survey), key=lambda each: -each[2]):
            if (
                survey.still[k]
                or survey.discrete[k]
                or episode in told
                or (survey.columns[k], episode) in known
            ):
                continue
            told.add(episode)  # the dimension in which it differs most
            usual = f"{np.median(values[:, k]):.3g} is usual"
            found = f"{words} {values[episode, k]:.3g}, {usual} ({sigmas:.2g} sigma)"
            yield Finding("differs", survey.columns[k], found, "look at it; leave it out", ((episode, 0),))


def _far(values: Array, least: Array, survey: Survey) -> list[tuple[int, int, float]]:
    """``(column, episode, sigmas)`` of values ``[n_episodes, D]`` that are far from the other episodes'."""
    q05, middle, q95 = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
    spread = 1.4826 * np.median(np.abs(values - middle), axis=0)
    sigma = np.maximum(np.maximum(spread, (q95 - q05) / 3.29), least)
    beyond = np.abs(values - middle) / sigma
    found = []
    for k in np.flatnonzero((beyond > DIFFERENT_SIGMAS).any(axis=0)):
        episodes = np.flatnonzero(beyond[:, k] > DIFFERENT_SIGMAS)
        if len(episodes) <= survey.limit():
            found += [(int(k), int(episode), float(beyond[episode, k])) for episode in episodes]
    return found
