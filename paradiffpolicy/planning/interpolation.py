"""The commands between a plan's steps, for a control loop whose ticks don't all lie on them.

Plans have a step per period of the policy; the loop's ticks lie anywhere between.  At a step the command is
the plan's action, exactly; in between each number of it goes on as an interpolant says::

    plan's steps     a0          a1          a2          a3
    ticks            |       |       |       |       |
    hold             a0      a0      a1      a2      a2
    linear           a0   a0…a1   a1…a2     a2   ...

An interpolation of one's own is a callable that takes a policy's spec and the ticks per step, and returns an
``Interpolator``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..registry import Registry
from ..task import is_gripper, words
from ..types import PolicySpec
from .interpolants import INTERPOLANTS, Between, Interpolant

POSITIONS = {"x", "y", "z"}
"""Words in the names of a pose's numbers that are a position's."""

ROTATIONS = {
    ("r11", "r12", "r13", "r21", "r22", "r23"): "slerp_6d",
    ("qx", "qy", "qz", "qw"): "slerp",
    ("qw", "qx", "qy", "qz"): "slerp",
    ("rx", "ry", "rz"): "slerp_rotation_vector",
}
"""Words in the names of a pose's numbers that, in a row, are a rotation's."""


class Interpolator:
    """Gives commands between a plan's steps.

    Args:
        parts: interpolants, or their names in ``INTERPOLANTS``, in the order of an action's numbers.  Each
            is for as many numbers as its ``size`` says.
        action_dim: A.

    Attributes:
        reach: how many steps after the one before it a command depends on; 0: it is held.

    Raises:
        InputError: a part is unknown, or they aren't for A numbers.
    """

    def __init__(self, parts: Sequence[str | Interpolant], action_dim: int) -> None:
        chosen = self.chosen(parts)
        total = sum(part.size for part in chosen)
        if total != action_dim:
            raise InputError(
                f"parts={list(parts)} are for {total} numbers of an action, action_dim={action_dim}"
            )
        self.reach = max(part.reach for part in chosen)
        self._parts: list[tuple[Between, int | slice]] = []
        start = 0
        for part in chosen:
            if part.reach:
                at = start if part.size == 1 else slice(start, start + part.size)
                self._parts.append((part.between, at))
            start += part.size

    @staticmethod
    def chosen(parts: Sequence[str | Interpolant]) -> list[Interpolant]:
        """The interpolants, those that are named by their names.

        Raises:
            InputError: one is unknown.
        """
        return [part if isinstance(part, Interpolant) else INTERPOLANTS.named(part) for part in parts]

    def __call__(self, actions: NDArray[np.float64], step: int, fraction: float) -> NDArray[np.float64]:
        """The command ``[A]``, ``fraction`` of the way from a step of ``actions`` ``[T, A]`` to the next."""
        if not fraction or not self.reach:
            return actions[step]
        last = len(actions) - 1
        before, start, end, after = (actions[min(max(step + k, 0), last)].tolist() for k in (-1, 0, 1, 2))
        command = start.copy()
        for between, at in self._parts:
            command[at] = between(before[at], start[at], end[at], after[at], fraction)
        return np.array(command)


Interpolation = Callable[[PolicySpec, float], Interpolator]
"""``(spec, ticks per step)`` to an ``Interpolator``."""


def held(spec: PolicySpec, ticks_per_step: float = 1) -> Interpolator:
    """Every action goes on until the next step."""
    return Interpolator(["hold"] * spec.action_dim, spec.action_dim)


def linear(spec: PolicySpec, ticks_per_step: float) -> Interpolator:
    """Straight lines, ``slerp`` for rotations; grippers are held.  The contract says which is which."""
    return Interpolator(smooth_parts(spec, "linear"), spec.action_dim)


def cubic(spec: PolicySpec, ticks_per_step: float) -> Interpolator:
    """``linear`` with PCHIP in place of straight lines: the command's velocity doesn't jump at a step."""
    return Interpolator(smooth_parts(spec, "cubic"), spec.action_dim)


def per_dimension(
    spec: PolicySpec, ticks_per_step: float, parts: Sequence[str | Interpolant] = ()
) -> Interpolator:
    """As the caller says: ``partial(per_dimension, parts=["linear", "linear", "slerp", "hold"])``."""
    return Interpolator(parts, spec.action_dim)


def automatic(spec: PolicySpec, ticks_per_step: float) -> Interpolator:
    """``held`` where a step is a whole number of ticks; else ``linear``, with velocities held.

    Raises:
        InputError: what an action is doesn't allow either.
    """
    kind, whole = spec.contract.action_kind, float(ticks_per_step).is_integer()
    if kind == "delta" and ticks_per_step != 1:
        raise InputError(
            f"actions are deltas, each for one whole step: at {ticks_per_step:.4g} ticks per step the robot "
            "would be given them more than once; run at the policy's own rate, or say interpolation=hold if "
            "a repeated command moves your robot no further"
        )
    if whole or kind == "velocity":
        return held(spec)
    if kind == "other":
        raise InputError(
            f"what the command is between two steps, at {ticks_per_step:.4g} ticks per step, depends on what "
            "an action is, which the policy's contract doesn't say: say interpolation=linear, cubic or hold"
        )
    return linear(spec, ticks_per_step)


def smooth_parts(spec: PolicySpec, smooth: str) -> list[str]:
    """The interpolants of an action's numbers, by the contract: ``smooth`` for positions.

    Raises:
        InputError: actions are deltas, or a pose's numbers can't be told apart.
    """
    contract = spec.contract
    if contract.action_kind == "delta":
        raise InputError(
            f"interpolation={smooth}: actions are deltas, and a mix of two is the delta of no part of a "
            "step; run at the policy's own rate"
        )
    names = contract.action_names
    if contract.action_kind != "pose":
        return ["hold" if is_gripper(name) else smooth for name in names] or [smooth] * spec.action_dim
    parts: list[str] = []
    at = 0
    while at < spec.action_dim:
        size, part = _pose_part(names[at:], smooth)
        parts.append(part)
        at += size
    return parts


def _pose_part(names: Sequence[str], smooth: str) -> tuple[int, str]:
    """How many of the first numbers belong together, and their interpolant."""
    for rotation, part in ROTATIONS.items():
        if len(names) >= len(rotation) and all(
            word in words(name) for word, name in zip(rotation, names, strict=False)
        ):
            return len(rotation), part
    if names and is_gripper(names[0]):
        return 1, "hold"
    if names and POSITIONS & words(names[0]):
        return 1, smooth
    known = "; ".join(" ".join(each) for each in (sorted(POSITIONS), *ROTATIONS, ["gripper"]))
    what = f"{names[0]!r}" if names else "a number without a name"
    raise InputError(
        f"interpolation={smooth}: actions are poses, and {what} isn't known as a position's, rotation's or "
        f"gripper's ({known}): name the action's numbers so, or say interpolation=per_dimension with parts"
    )


INTERPOLATIONS: Registry[Callable[..., Interpolator]] = Registry(
    "interpolation",
    {
        "auto": automatic,
        "hold": held,
        "linear": linear,
        "cubic": cubic,
        "per_dimension": per_dimension,
    },
)
"""Ways of interpolating by name: ``INTERPOLATIONS.register("mine", mine)``."""
