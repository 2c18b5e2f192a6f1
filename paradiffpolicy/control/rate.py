"""The rate of a control loop, in steps of a plan."""

from __future__ import annotations

import math

from ..errors import InputError, require_positive

MAX_RATE = 100_000
"""Ticks per second, more than any loop has."""


def ticks_per_step(rate_hz: float, policy_hz: float) -> float:
    """How many ticks of the loop one step of a plan lasts, 1 or more: an int where it is a whole number.

    Raises:
        InputError: ``rate_hz`` is below ``policy_hz``, or above ``MAX_RATE``.
    """
    require_positive(rate_hz=rate_hz, policy_hz=policy_hz)
    if rate_hz > MAX_RATE:
        raise InputError(f"rate_hz={rate_hz:g} must be {MAX_RATE} ticks per second or fewer")
    stride = round(rate_hz / policy_hz)
    if stride and abs(stride * policy_hz - rate_hz) <= 1e-9 * rate_hz:
        return stride
    if rate_hz < policy_hz:
        raise InputError(
            f"rate_hz={rate_hz:g} must be the policy's {policy_hz:g} Hz or more, since it needs an "
            "observation for each of its steps"
        )
    return rate_hz / policy_hz


def whole_ticks_per_step(rate_hz: float, policy_hz: float, purpose: str) -> int:
    """``ticks_per_step``, where ``purpose`` needs ticks that lie on the steps.

    Raises:
        InputError: ``rate_hz`` isn't a multiple of ``policy_hz``.
    """
    stride = ticks_per_step(rate_hz, policy_hz)
    if not isinstance(stride, int):
        below = math.floor(stride)
        rates = " or ".join(f"{n * policy_hz:g}" for n in (below, below + 1))
        raise InputError(
            f"{purpose}: rate_hz={rate_hz:g} must be a multiple of the policy's {policy_hz:g} Hz, as {rates}"
        )
    return stride
