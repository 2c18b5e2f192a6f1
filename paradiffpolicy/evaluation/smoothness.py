"""How smooth a motion is: log dimensionless jerk and spectral arc length, the larger the smoother.

Both are of S. Balasubramanian, A. Melendez-Calderon, A. Roby-Brami, E. Burdet, "On the analysis of movement
smoothness", Journal of NeuroEngineering and Rehabilitation 12:112, 2015.  They don't depend on the motion's
amplitude nor, sampled finely, on its duration; they do depend on how many movements it is made of, so only
stretches of one length, at one rate, are compared: ``stretches`` cuts a run into such.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    if not len(jerk) or not speed.max() > 0 or not jerk.any():
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


def commanded_positions(record: Record, contract: Contract) -> NDArray[np.float64]:
    """Where the actions of a run led, tick by tick, ``[n, D]``; NaN at ticks without an action, or missed.

    Numbers that the contract's names tell to be a rotation's or a gripper's are left out; deltas and
    velocities are added up, which gives positions up to a scale and a start.
    """
    ticks = record.ticks
    index, actions = ticks["index"], ticks["action"][:, contract.positions(ticks["action"].shape[1])]
    if not len(index):
        return actions
    positions = np.full((index[-1] - index[0] + 1, actions.shape[1]), np.nan)
    positions[index - index[0]] = actions
    return np.cumsum(positions, axis=0) if contract.is_relative else positions


def stretches(positions: NDArray[np.float64], length: int) -> Iterator[NDArray[np.float64]]:
    """Cuts positions ``[n, D]`` into stretches ``[length, D]``, one after the other, without those that hold
    NaN and without the rest."""
    for first in range(0, len(positions) - length + 1, length):
        stretch = positions[first : first + length]
        if np.isfinite(stretch).all():
            yield stretch
