"""The design of a study: which arms run, and what is asked about them.

An *arm* is a task, a policy, a sampler and how time passes.  A *question* compares an arm with its reference
in score or in success: does it lie within a margin?  Questions are written as a product of settings, such as
three samplers under two latencies; the reference of each arm is the arm with some of the settings replaced::

    samplers [ddpm, rti] x latencies [unlimited, 100], reference {sampler: ddpm}:
        rti against ddpm;  rti under 100 ms against ddpm under 100 ms
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InputError, is_number, nearest

UNLIMITED, MEASURED = "unlimited", "measured"
"""Latencies beside numbers of milliseconds: the world waits for every plan; or plans take as long as they
were timed to take on this machine."""


@dataclass(frozen=True)
class Arm:
    """What runs on every seed.

    Attributes:
        task: its name or file.
        checkpoint: the policy's folder; None: the task's.
        sampler: by name.
        latency: of every plan, in milliseconds, or one of ``UNLIMITED`` and ``MEASURED``.
        rate_hz: of control; None: the policy's.
        blending: of chunks, by name; None: ``latest``.
        replan_every: steps from plan to plan; None: ``n_action_steps``.
        disturbance: by name; None: none.
    """

    task: str
    checkpoint: str | None
    sampler: str
    latency: float | str = UNLIMITED
    rate_hz: float | None = None
    blending: str | None = None
    replan_every: int | None = None
    disturbance: str | None = None

    @property
    def waits(self) -> bool:
        """Whether the world waits for every plan."""
        return self.latency == UNLIMITED

    @property
    def place(self) -> tuple[str, str | None]:
        """The task and the checkpoint: arms of one place share a policy's weights."""
        return self.task, self.checkpoint

    @property
    def name(self) -> str:
        """Tells it from all others, as ``pusht/rti, 50 Hz, measured latency``."""
        parts = [part for part in (self.task, self.checkpoint, self.sampler) if part is not None]
        how = {
            "rate_hz": "{:g} Hz",
            "blending": "{}",
            "replan_every": "every {} steps",
            "disturbance": "{}",
        }
        words = ["/".join(parts)]
        if not self.waits:
            measured = self.latency == MEASURED
            words.append("measured latency" if measured else f"{float(self.latency):g} ms")
        words += [
            text.format(getattr(self, part)) for part, text in how.items() if getattr(self, part) is not None
        ]
        return ", ".join(words)

    def plain(self) -> Arm:
        """The same arm without settings that change nothing: where the world waits, those of time."""
        if not self.waits:
            return self
        return replace(self, rate_hz=None, blending=None, replan_every=None)


AXES = tuple(each.name for each in fields(Arm))
"""Names of an arm's settings."""


@dataclass(frozen=True)
class Question:
    """Whether an arm is as good as its reference.

    Attributes:
        measure: ``score`` or ``success``.
        margin: the largest difference that counts as equal.
    """

    arm: Arm
    reference: Arm
    measure: str
    margin: float

    @property
    def name(self) -> str:
        return f"{self.arm.name} against {self.reference.name}, {self.measure}"


def product(
    axes: Mapping[str, Sequence[Any]], reference: Mapping[str, Any], measure: str, margin: float, where: str
) -> list[Question]:
    """The questions about every combination of settings, each against the one with the reference's settings.

    Args:
        axes: the values of each of ``AXES``; one that is left out is as in ``Arm``.
        reference: values of some of them.
        where: the name of it all, for error messages.

    Raises:
        InputError: the reference isn't among them, or there is nothing beside it.
    """
    for name, value in reference.items():
        if name not in axes:
            raise InputError(f"{where}: reference has no {name!r}{nearest(name, AXES)}")
        if value not in axes[name]:
            listed = ", ".join(map(str, axes[name]))
            raise InputError(
                f"{where}: the reference {name} {value!r} isn't in the question, which has {listed}: "
                "add it there"
            )
    arms = [
        Arm(**dict(zip(axes, values, strict=True))).plain() for values in itertools.product(*axes.values())
    ]
    pairs = {arm: replace(arm, **reference).plain() for arm in arms}
    found = [Question(arm, other, measure, margin) for arm, other in pairs.items() if arm != other]
    if not found:
        raise InputError(f"{where}: there is nothing beside the reference: list another sampler, or latency")
    return found


def arms_of(questions: Sequence[Question]) -> list[Arm]:
    """The arms that questions need, each once; references come first."""
    arms = dict.fromkeys(question.reference for question in questions)
    return list(arms | dict.fromkeys(question.arm for question in questions))


def require_margin(question: Question, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """The bounds of the measure's values.

    Args:
        bounds: of the task's score; None: they aren't known.

    Raises:
        InputError: they are needed, or the margin isn't between 0 and the largest difference that can be.
    """
    if question.measure == "success":
        bounds = (0.0, 1.0)
    elif bounds is None:
        raise InputError(
            f"task {question.arm.task!r} doesn't say how large a reward can be, which a question about its "
            "score needs: write reward_range: [0, 1] in the task's file, or ask about success"
        )
    low, high = bounds
    if not is_number(question.margin) or not 0 < question.margin < high - low:
        raise InputError(
            f"margin={question.margin:g} of {question.measure} on task {question.arm.task!r} must be above 0 "
            f"and below {high - low:g}, the largest difference that there can be"
        )
    return low, high


def require_seeds(first: int, budget: int, block: int, validation: Sequence[int]) -> range:
    """The seeds of a study.

    Raises:
        InputError: they hold a seed of validation, or are fewer than a block.
    """
    if budget < block:
        raise InputError(
            f"budget={budget} seeds are fewer than one block={block}: raise budget, or lower block"
        )
    low, high = validation
    seeds = range(first, first + budget)
    if low <= seeds[-1] and seeds[0] <= high:
        raise InputError(
            f"seeds {seeds[0]} to {seeds[-1]} of the study hold some of the validation seeds {low} to "
            f"{high}, which settings are chosen on: first_seed={high + 1}, or above"
        )
    return seeds
