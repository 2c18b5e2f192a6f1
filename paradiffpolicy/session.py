"""A session: a policy with the memory that a control loop of the caller's own would have to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InputError, is_whole
from .history import History
from .observation import observation_rows

if TYPE_CHECKING:
    from .policy import Policy
    from .types import Plan


class Session:
    """Plans one robot's actions; keeps the observation history, the last plan and the noise.

    ::

        observations = [robot.observe()]
        while running:
            actions = session.plan(observations)  # [Ta, A]
            observations = [robot.step(action) for action in actions]

    It plans in the caller's thread, so the loop waits for it; ``Controller`` plans beside the loop.

    >>> import paradiffpolicy as pdp
    >>> session = pdp.load_policy(capture="eager").session(seed=0)
    >>> session.plan([256.0] * 20).shape
    (8, 2)

    Args:
        policy: plans; it keeps nothing itself.
        seed: of the noise.

    Attributes:
        last_plan: the whole last plan, its unexecuted steps included; None before the first.

    Raises:
        InputError: ``seed`` isn't a whole number.
    """

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        self.policy = policy
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Starts a new episode: forgets observations and plans, and seeds the noise."""
        if not is_whole(seed):
            raise InputError(f"seed={seed!r} must be a whole number")
        self._history = History(self.policy.spec.n_obs_steps)
        self._generator = torch.Generator().manual_seed(int(seed) % 2**64)
        self.last_plan: Plan | None = None

    def plan(self, observations: Any, executed: int | None = None) -> NDArray[np.floating[Any]]:
        """The next actions ``[Ta, A]``, in the environment's units, in ``Normalizer.raw_dtype``.

        Args:
            observations: all since the last plan ``[k, O]``, oldest first: one after each executed
                action; or the newest alone, ``[O]``, which then stands for those not given.  Each may be
                a dict by field name.
            executed: how many of the last plan's actions were executed; None: k, or Ta for one
                observation alone.

        Raises:
            InputError: ``executed`` isn't a count.
            InvalidObservationError: an observation has the wrong shape, or NaN or infinity in it.
            InvalidPlanError: the plan has NaN or infinity in it.
        """
        spec = self.policy.spec
        rows, alone = observation_rows(spec, observations)
        if self.last_plan is None:
            executed = 0
        elif executed is None:
            executed = spec.n_action_steps if alone else len(rows)
        elif not is_whole(executed) or int(executed) < 0:
            raise InputError(f"executed={executed!r} must be a number of actions, 0 or more")
        if executed > len(rows):  # an old observation isn't the one before the newest
            self._history.clear()
        for row in rows:
            self._history.push(row)
        goes_on = self.last_plan is not None and executed < spec.horizon
        self.last_plan = self.policy.plan(
            self._history.window(),
            self.last_plan if goes_on else None,
            generator=self._generator,
            executed_steps=executed if goes_on else None,
        )
        return self.last_plan.executed_actions[0].cpu().numpy()

    def __repr__(self) -> str:
        return f"Session({self.policy!r})"
