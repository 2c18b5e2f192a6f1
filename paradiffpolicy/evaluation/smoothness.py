"""How smooth a motion is: log dimensionless jerk and spectral arc length, the larger the smoother.

Both are of S. Balasubramanian, A. Melendez-Calderon, A. Roby-Brami, E. Burdet, "On the analysis of movement
smoothness", Journal of NeuroEngineering and Rehabilitation 12:112, 2015.  They don't depend on the motion's
amplitude nor, sampled finely, on its duration; they do depend on how many movements it is made of, so only
stretches of one length, at one rate, are compared: ``stretches`` cuts a run into such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..control.record import Record
from ..task import Contract

STRETCH = 2.0
"""Seconds of a stretch: as long as a reaching movement takes, or longer."""
PADDING = 4
"""SPARC's powers of two by which the speed is padded with zeros, for a finely sampled spectrum."""
HIGHEST_HZ, LEAST_AMPLITUDE = 10.0, 0.05
"""SPARC's largest frequency, and the amplitude, as a share of the largest, of the last one that counts."""


def log_dimensionless_jerk(positions: NDArray[np.float64]) -> float | None:
    """LDLJ, ``-ln(duration^3 / peak speed^2 * integral of |jerk|^2)``, by finite differences.

    That of a minimum-jerk movement is ``-ln(204.8) = -5.32``.  The rate cancels out.

    Args:
        positions: ``[n, D]``, at equal intervals.

    Returns:
        None: there are fewer than four, nothing moves, or there is no jerk.
    """
    jerk, speed = np.diff(positions, 3, axis=0), _speed(positions)
    if not len(jerk) or not speed.max() > 0:
        return None
    share = (np.square(jerk / speed.max())).sum(1).mean()
    return float(-np.log((len(positions) - 1) ** 4 * share)) if share > 0 else None


def spectral_arc_length(positions: NDArray[np.float64], rate_hz: float) -> float | None:
    """SPARC: minus the length of the curve that the speed's amplitude spectrum draws, both axes scaled to 1.

    The spectrum is taken up to 10 Hz, or half the rate, or the last frequency of at least 5 % of the largest
    amplitude, if that is lower.

    Args:
        positions: ``[n, D]``.
        rate_hz: of them.

    Returns:
        None: there are fewer than three, or nothing moves.
    """
    speed = _speed(positions)
    if len(speed) < 2 or not speed.max() > 0:
        return None
    n_padded = 2 ** (int(np.ceil(np.log2(len(speed)))) + PADDING)
    amplitude = np.abs(np.fft.rfft(speed / speed.max(), n_padded))
    frequency = np.fft.rfftfreq(n_padded, 1 / rate_hz)
    amplitude = (amplitude / amplitude.max())[frequency <= HIGHEST_HZ]
    last = np.flatnonzero(amplitude >= LEAST_AMPLITUDE)[-1]
    if not last:
        return None
    return float(-np.hypot(1 / last, np.diff(amplitude[: last + 1])).sum())


def _speed(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[n - 1]``, per interval."""
    return np.linalg.norm(np.diff(positions, axis=0), axis=1)


def stretches(record: Record, contract: Contract, rate_hz: float) -> Iterator[NDArray[np.float64]]:
    """Where the actions of a run led, ``[n, D]`` for every ``STRETCH`` seconds, one after the other; those
    in which a tick was missed or had no action are left out, and so is the rest at the end.

    The numbers of an action are its position's: those that the contract's names tell to be a rotation's or a
    gripper's are left out.  Deltas and velocities are added up, which gives positions up to a scale and a
    start.
    """
    index, actions = record.ticks["index"], record.ticks["action"]
    actions = actions[:, contract.positions(actions.shape[1])]
    length = max(1, round(STRETCH * rate_hz))
    for first in range(0, len(actions) - length + 1, length):
        rows = slice(first, first + length)
        if np.ptp(index[rows]) == length - 1 and np.isfinite(actions[rows]).all():
            yield np.cumsum(actions[rows], axis=0) if contract.is_relative else actions[rows]


def boundary_jumps(records: Sequence[Record]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Changes of the action from tick to tick (Euclidean, in its units): ``(between, within plans)``."""
    at, within = [], []
    for record in records:
        change = np.linalg.norm(np.diff(record.ticks["action"], axis=0), axis=1)
        acting = ~record.ticks["fallback_active"]
        joins, steady = record.joins()[1:], acting[1:] & acting[:-1]
        at.append(change[joins])
        within.append(change[steady & ~joins])
    return np.concatenate(at), np.concatenate(within)


def motion(record: Record, contract: Contract, rate_hz: float) -> dict[str, list[float]]:
    """How smooth one run was: ``ldlj`` and ``sparc`` of every stretch that has one."""
    parts = list(stretches(record, contract, rate_hz))
    return {
        "ldlj": [value for value in map(log_dimensionless_jerk, parts) if value is not None],
        "sparc": [value for part in parts if (value := spectral_arc_length(part, rate_hz)) is not None],
    }


def pooled(motions: Sequence[Mapping[str, Sequence[float]]], name: str) -> dict[str, float | None]:
    """A measure over all runs: ``n``, the ``median`` and, of 200 or more, ``p5`` and ``p95``."""
    values = [value for each in motions for value in each.get(name, ())]
    many = len(values) >= 200
    return {
        "n": len(values),
        "median": float(np.median(values)) if values else None,
        "p5": float(np.percentile(values, 5)) if many else None,
        "p95": float(np.percentile(values, 95)) if many else None,
    }


def smoothness(motions: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """``ldlj`` and ``sparc`` of the stretches of all runs."""
    return {"stretch_seconds": STRETCH} | {name: pooled(motions, name) for name in ("ldlj", "sparc")}
