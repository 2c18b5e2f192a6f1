"""What a command is between two steps of a plan: pure functions of the actions around it.

::

    before      start   .  end        after         steps, one apart
                        ^ fraction of the way from start to end, in (0, 1)

Each takes four actions and the fraction; where that is 0 or 1 it gives ``start`` or ``end``.  A plan's first
and last actions stand for what is missing beyond them.  All are in plain floats: for an action's few numbers
that takes a fraction of numpy's time, within a control loop's tick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..registry import Registry

Numbers = Sequence[float]
Between = Callable[[Any, Any, Any, Any, float], Any]
"""``(before, start, end, after, fraction)`` to what is between ``start`` and ``end``: floats for one number
of an action, lists of floats for those that belong together."""

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


def hold(before: float, start: float, end: float, after: float, fraction: float) -> float:
    """The last step's action goes on until the next step: zero-order hold."""
    return start


def linear(before: float, start: float, end: float, after: float, fraction: float) -> float:
    """A straight line."""
    return start + fraction * (end - start)


def cubic(before: float, start: float, end: float, after: float, fraction: float) -> float:
    """A cubic Hermite polynomial whose slopes are the harmonic means of the neighboring differences, 0 where
    these differ in sign: PCHIP (Fritsch and Butland 1984) on equal steps.

    Its first derivative is continuous, and it never leaves the range of ``start`` and ``end``, so limits that
    hold at the steps hold between them.
    """
    difference = end - start
    first, second = _slope(start - before, difference), _slope(difference, after - end)
    # The polynomial in the fraction with the values 0 and `difference`, and these slopes, at its ends.
    third = first + second - 2 * difference
    curve = first + fraction * (difference - first - third + fraction * third)
    # Rounding alone could take it past an end, and so past a limit.
    return min(max(start + fraction * curve, min(start, end)), max(start, end))


def _slope(left: float, right: float) -> float:
    return 2 * left * (right / (left + right)) if left * right > 0 else 0.0


# ------------------------------------------------------------------------------------------- rotations


def slerp(before: Numbers, start: Numbers, end: Numbers, after: Numbers, fraction: float) -> Numbers:
    """Spherical linear interpolation of quaternions (Shoemake 1985), scalar first or last.

    The short way: of q and -q, which are one rotation, the end nearer to ``start`` counts.  Of unit
    quaternions it is one; lengths of others change linearly, so that nothing jumps at a step.
    """
    return _slerp(start, end, fraction)


def _slerp(start: Numbers, end: Numbers, fraction: float) -> Numbers:
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


def slerp_rotation_vector(
    before: Numbers, start: Numbers, end: Numbers, after: Numbers, fraction: float
) -> Numbers:
    """``slerp`` of rotation vectors: axis times angle.

    Of the vectors of one rotation, whose angles differ by full turns, it is the one nearest to ``start``.
    """
    w, *xyz = _slerp(_quaternion_of_vector(start), _quaternion_of_vector(end), fraction)
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


def slerp_6d(before: Numbers, start: Numbers, end: Numbers, after: Numbers, fraction: float) -> Numbers:
    """``slerp`` of rotations by the first two rows of their matrix (Zhou et al. 2019).

    Rows that aren't orthonormal are made so, by Gram-Schmidt; by how much they weren't changes linearly, so
    that nothing jumps at a step.
    """
    one, other = _quaternion_of_rows(start), _quaternion_of_rows(end)
    between = _rows_of_quaternion(_slerp(one, other, fraction))
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
        "slerp": Interpolant(slerp, size=4),
        "slerp_rotation_vector": Interpolant(slerp_rotation_vector, size=3),
        "slerp_6d": Interpolant(slerp_6d, size=6),
    },
)
"""Interpolants by name: ``INTERPOLANTS.register("mine", Interpolant(mine))``."""
