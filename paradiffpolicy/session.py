"""A session: a policy with the memory that its caller would else keep, for loops of the caller's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InputError
from .history import History

if TYPE_CHECKING:
    from .policy import Policy
    from .types import Plan


class Session:
    """Plans one robot's actions from single observations.

    Keeps the observation history, the last plan (for warm starts) and the noise generator; the policy
    itself keeps nothing.  It runs in the caller's thread: ``Controller`` plans beside the loop.

    >>> import paradiffpolicy as pdp
    >>> session = pdp.load_policy(capture="eager").session(seed=0)
    >>> session.plan([256.0] * 20).shape  # Ta actions of A numbers
    (8, 2)

    Args:
        policy: plans.
        seed: of the noise.

    Attributes:
        last_plan: the whole last plan; None before the first.
    """

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        self.policy = policy
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Begins a new episode: forgets observations and plans, and seeds the noise."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed={seed!r} must be a whole number")
        self._history = History(self.policy.spec.n_obs_steps)
        self._generator = torch.Generator().manual_seed(seed)
        self._observed = 0
        self.last_plan: Plan | None = None

    def observe(self, observation: Any) -> None:
        """Takes the observation after an action: ``[O]``, or a dict by field name.

        Raises:
            InvalidObservationError: it has the wrong shape, or NaN or infinity in it.
        """
        self._history.push(self.policy.vector(observation))
        self._observed += 1

    def plan(self, observation: Any) -> NDArray[np.float32]:
        """The next actions ``[Ta, A]``, in the environment's units.

        Execute as many of them as you like, giving the observations in between to ``observe``, then call
        ``plan`` with the newest one.

        Args:
            observation: the newest, ``[O]`` or a dict by field name.

        Raises:
            InvalidObservationError: it has the wrong shape, or NaN or infinity in it.
            InvalidPlanError: the plan has NaN or infinity in it.
        """
        self.observe(observation)
        executed, self._observed = self._observed, 0
        previous = self.last_plan if executed < self.policy.spec.horizon else None
        self.last_plan = self.policy.plan(
            self._history.window(),
            previous,
            generator=self._generator,
            executed_steps=executed if previous is not None else None,
        )
        return self.last_plan.executed_actions[0].cpu().numpy()

    def __repr__(self) -> str:
        return f"Session({self.policy!r})"
