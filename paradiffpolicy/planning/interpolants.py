"""What a command is between two steps of a plan: pure functions of the actions around it.

::

    before      start   .  end        after         steps, one apart
                        ^ fraction of the way from start to end, in (0, 1)

Each takes four actions ``[..., n]`` and the fraction, and returns ``[..., n]``; where the fraction is 0 or 1
it is ``start`` or ``end``.  A plan's first and last actions stand for what is missing beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..registry import Registry

Actions = NDArray[np.float64]
Between = Callable[[Actions, Actions, Actions, Actions, float], Actions]
"""``(before, start, end, after, fraction)`` to the command between ``start`` and ``end``."""

TINY = 1e-12
"""A length or an angle below it is none."""


@dataclass(frozen=True)
class Interpolant:
    """A function of the time between two steps.

    Attributes:
        between: the function.
        size: how many numbers it takes together: 1 for those that are independent of each other.
        reach: how many steps after ``start`` it depends on.
    """

    between: Between
    size: int = 1
    reach: int = 1


def hold(before: Actions, start: Actions, end: Actions, after: Actions, fraction: float) -> Actions:
    """The last step's action goes on until the next step: zero-order hold."""
    return start


def linear(before: Actions, start: Actions, end: Actions, after: Actions, fraction: float) -> Actions:
    """A straight line."""
    return start + fraction * (end - start)


def cubic(before: Actions, start: Actions, end: Actions, after: Actions, fraction: float) -> Actions:
    """A cubic Hermite polynomial whose slopes are the harmonic means of the neighboring differences, 0 where
    these differ in sign: PCHIP (Fritsch and Butland 1984) on equal steps.

    Its first derivative is continuous, and it never leaves the range of ``start`` and ``end``, so limits that
    hold at the steps hold between them.
    """
    difference = end - start
    first, second = _slope(start - before, difference), _slope(difference, after - end)
    # The polynomial in f with the values 0 and `difference` and these slopes at its ends.
    curve = first + fraction * (
        3 * difference - 2 * first - second + fraction * (first + second - 2 * difference)
    )
    # Rounding alone could take it past an end, and so past a limit.
    low, high = np.minimum(start, end), np.maximum(start, end)
    return np.minimum(np.maximum(start + fraction * curve, low), high)


def _slope(left: Actions, right: Actions) -> Actions:
    same = left * right > 0
    return np.where(same, 2 * left * right / np.where(same, left + right, 1.0), 0.0)


# ------------------------------------------------------------------------------------------- rotations

Numbers = Sequence[float]


def rotated(between: Callable[[Numbers, Numbers, float], Numbers]) -> Between:
    """Makes an interpolant of a function of one rotation's ``start`` and ``end``.

    In plain floats: for one rotation that takes a tenth of numpy's time.
    """

    def rows(before: Actions, start: Actions, end: Actions, after: Actions, fraction: float) -> Actions:
        size = start.shape[-1]
        pairs = zip(start.reshape(-1, size).tolist(), end.reshape(-1, size).tolist(), strict=True)
        return np.array([between(one, other, fraction) for one, other in pairs]).reshape(start.shape)

    return rows


def slerp(start: Numbers, end: Numbers, fraction: float) -> Numbers:
    """Spherical linear interpolation of quaternions (Shoemake 1985), scalar first or last.

    The short way: of q and -q, which are one rotation, the end nearer to ``start`` counts.  Of unit
    quaternions it is one; lengths of others change linearly, so that nothing jumps at a step.
    """
    near, far = math.hypot(*start), math.hypot(*end)
    one = [each / max(near, TINY) for each in start]
    other = [each / max(far, TINY) for each in end]
    if sum(a * b for a, b in zip(one, other, strict=True)) < 0:
        other = [-each for each in other]
    # Exact also for small angles, where the product's arc cosine isn't.
    angle = 2 * math.atan2(math.dist(one, other), math.dist(one, [-each for each in other]))
    own, its = 1 - fraction, fraction
    if angle > TINY:
        own, its = (math.sin(part * angle) / math.sin(angle) for part in (own, its))
    length = (1 - fraction) * near + fraction * far
    return [length * (own * a + its * b) for a, b in zip(one, other, strict=True)]


def slerp_rotation_vector(start: Numbers, end: Numbers, fraction: float) -> Numbers:
    """``slerp`` of rotation vectors: axis times angle.

    Of the vectors of one rotation, whose angles differ by full turns, it is the one nearest to ``start``.
    """
    w, *xyz = slerp(_quaternion_of_vector(start), _quaternion_of_vector(end), fraction)
    sine = math.hypot(*xyz)
    if sine < TINY:  # a whole number of turns, about the axis of `start`
        sine, xyz = 0.0, list(start)
    axis = [each / max(math.hypot(*xyz), TINY) for each in xyz]
    angle = 2 * math.atan2(sine, w)
    turns = round((sum(a * b for a, b in zip(start, axis, strict=True)) - angle) / math.tau)
    return [each * (angle + math.tau * turns) for each in axis]


def _quaternion_of_vector(vector: Numbers) -> Numbers:
    angle = math.hypot(*vector)
    per_length = math.sin(angle / 2) / angle if angle > TINY else 0.5
    return [math.cos(angle / 2), *(per_length * each for each in vector)]


def slerp_6d(start: Numbers, end: Numbers, fraction: float) -> Numbers:
    """``slerp`` of rotations by the first two rows of their matrix (Zhou et al. 2019).

    Rows that aren't orthonormal are made so, by Gram-Schmidt; by how much they weren't changes linearly, so
    that nothing jumps at a step.
    """
    one, other = _quaternion_of_rows(start), _quaternion_of_rows(end)
    between = _rows_of_quaternion(slerp(one, other, fraction))
    return [
        row + (1 - fraction) * (a - own) + fraction * (b - its)
        for row, a, own, b, its in zip(
            between, start, _rows_of_quaternion(one), end, _rows_of_quaternion(other), strict=True
        )
    ]


def _quaternion_of_rows(rows: Numbers) -> Numbers:
    """Of two rows, which Gram-Schmidt makes orthonormal; of parallel ones something finite."""
    a, b, c, d, e, f = rows
    length = max(math.hypot(a, b, c), TINY)
    a, b, c = a / length, b / length, c / length
    along = a * d + b * e + c * f
    d, e, f = d - along * a, e - along * b, f - along * c
    length = max(math.hypot(d, e, f), TINY)
    d, e, f = d / length, e / length, f / length
    g, h, i = b * f - c * e, c * d - a * f, a * e - b * d
    # By the largest of the four, which isn't near zero (Shepperd 1978).
    largest = max(a + e + i, a, e, i)
    if largest == a + e + i:
        quaternion = [1 + a + e + i, h - f, c - g, d - b]
    elif largest == a:
        quaternion = [h - f, 1 + a - e - i, b + d, c + g]
    elif largest == e:
        quaternion = [c - g, b + d, 1 - a + e - i, f + h]
    else:
        quaternion = [d - b, c + g, f + h, 1 - a - e + i]
    length = max(math.hypot(*quaternion), TINY)
    return [each / length for each in quaternion]


def _rows_of_quaternion(quaternion: Numbers) -> Numbers:
    w, x, y, z = quaternion
    return [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
    ]


INTERPOLANTS: Registry[Interpolant] = Registry(
    "interpolant",
    {
        "hold": Interpolant(hold, reach=0),
        "linear": Interpolant(linear),
        "cubic": Interpolant(cubic, reach=2),
        "slerp": Interpolant(rotated(slerp), size=4),
        "slerp_rotation_vector": Interpolant(rotated(slerp_rotation_vector), size=3),
        "slerp_6d": Interpolant(rotated(slerp_6d), size=6),
    },
)
"""Interpolants by name: ``INTERPOLANTS.register("mine", Interpolant(mine))``."""
