"""The rate of a control loop, in steps of a plan."""

from __future__ import annotations

import math

from ..errors import InputError, require_positive

MAX_RATE = 100_000
"""Ticks per second, more than any loop has."""


def ticks_per_step(rate_hz: float, policy_hz: float) -> int:
    """How many ticks of the loop one step of a plan lasts.

    Raises:
        InputError: ``rate_hz`` isn't a multiple of ``policy_hz``, or above ``MAX_RATE``.
    """
    require_positive(rate_hz=rate_hz, policy_hz=policy_hz)
    if rate_hz > MAX_RATE:
        raise InputError(f"rate_hz={rate_hz:g} must be {MAX_RATE} ticks per second or fewer")
    stride = round(rate_hz / policy_hz)
    if stride < 1 or abs(stride * policy_hz - rate_hz) > 1e-9 * rate_hz:
        below = math.floor(rate_hz / policy_hz)
        rates = ", ".join(f"{n * policy_hz:g}" for n in (below, below + 1) if n)
        raise InputError(
            f"rate_hz={rate_hz:g} must be a multiple of the policy's {policy_hz:g} Hz, since a plan's step "
            f"lasts a whole number of ticks; nearest rates: {rates}"
        )
    return stride
