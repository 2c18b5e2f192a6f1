"""Answers requests as openpi's clients send them, whose state the server keeps for the connection.

A request is a map: ``observation`` ``[O]`` (or ``observation/state``), the newest, to which the
session adds the ones before, or ``[To, O]``, a whole window; of a policy with cameras a map by field and
camera name, the newest; and, all optional, ``reset``: forget
observations and plan first, ``seed``: a whole number that seeds the noise from here on, and
``executed_steps`` of the last plan.  Other entries are ignored, which an answer says once.  It becomes a
pure request whose window, previous plan and generator the connection keeps.

A policy sees observations that are one control step apart.  A client that asks only once per Ta
steps should therefore send windows; one that asks every step may send single observations, with
``executed_steps=1``.
"""

from __future__ import annotations

import copy
import difflib
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from ..history import History
from ..observation import InvalidObservationError
from ..policy import InvalidPlanError, Policy
from ..types import Plan
from .messages import MessageError
from .protocol import PlanJob, executed_steps_of, numbers, state_of, whole

OBSERVATION = ("observation", "observation/state")
OPTIONAL = ("reset", "seed", "executed_steps")

MAX_IGNORED = 64
"""Entries of a request that may be ignored."""


class ClientSession:
    """One connection's observations, last plan and noise.

    Args:
        policy: gives the shapes.
        seed: of the noise.
    """

    def __init__(self, policy: Policy, seed: int) -> None:
        self._policy = policy
        self._state = _seeded(seed)
        self._history = self._next = History(policy.spec.n_obs_steps)
        self._plan: Plan | None = None
        self._ignored, self._told = list[str](), False

    def job(self, request: Any) -> PlanJob:
        """Reads a request, raising as ``protocol.job_of`` does; remembers nothing until ``remember``.

        A bad observation makes the session forget its observations and its plan, as a control loop
        does: after a gap the next plan is a cold start.
        """
        request = self._known(request)
        given = [name for name in OBSERVATION if name in request]
        if len(given) != 1:
            raise MessageError("the request needs one 'observation', an array [O] or [To, O]")
        reset = request.get("reset", False)
        if not isinstance(reset, bool | np.bool_):
            raise MessageError(f"reset={short(reset)} must be true or false")
        steps = executed_steps_of(request, self._policy.spec)
        seed = request.get("seed")
        state = self._state if seed is None else _seeded(whole(seed, "seed", 0, 2**63 - 1))
        try:
            history = self._history_with(request[given[0]], bool(reset))
            window = self._policy.checked(history.window())
        except InvalidObservationError:
            self._forget()
            raise
        self._next = history
        return PlanJob(window, None if reset else self._plan, (state,), steps)

    def _known(self, request: Any) -> dict[str, Any]:
        """The entries that the session reads.  Clients of other policies send more, as a prompt, which is
        ignored unless it looks like a misspelt one."""
        if not isinstance(request, dict):
            raise MessageError(f"the request must be a map, not {type(request).__name__}")
        named = {
            key.decode(errors="replace") if isinstance(key, bytes) else key: value
            for key, value in request.items()
        }
        others = [key for key in named if key not in (*OBSERVATION, *OPTIONAL)]
        if len(others) > MAX_IGNORED:
            raise MessageError(f"the request has over {MAX_IGNORED} entries that the policy doesn't use")
        for key in others:
            close = difflib.get_close_matches(str(key)[:40], OPTIONAL, n=1, cutoff=0.75)
            if close:
                raise MessageError(f"the request has no place for {short(key)}; did you mean {close[0]!r}?")
        self._ignored = sorted(map(short, others))
        return named

    def remember(self, result: Plan | Exception, state: bytes) -> None:
        """Keeps a job's result, a plan on the policy's device or an error, and the generator's state."""
        self._state = state
        if isinstance(result, Plan):
            self._history, self._plan = self._next, result
        elif isinstance(result, InvalidPlanError):
            self._forget()

    def ignored(self) -> list[str]:
        """What the last request has that is ignored, once per connection: empty from then on."""
        if self._told or not self._ignored:
            return []
        self._told = True
        return self._ignored

    def _forget(self) -> None:
        self._history = History(self._policy.spec.n_obs_steps)
        self._plan = None

    def _history_with(self, observation: Any, reset: bool) -> History:
        spec = self._policy.spec
        history = History(spec.n_obs_steps) if reset else copy.deepcopy(self._history)
        if spec.contract.cameras:
            history.push(self._recorded(observation))
            return history
        array: NDArray[Any] = numbers(observation, "observation")
        if array.shape not in ((spec.obs_dim,), (spec.n_obs_steps, spec.obs_dim)):
            raise InvalidObservationError(
                f"observation has shape {array.shape}, the policy needs ({spec.obs_dim},) or a window "
                f"({spec.n_obs_steps}, {spec.obs_dim})"
            )
        for row in array.reshape(-1, spec.obs_dim):
            history.push(row)
        return history

    def _recorded(self, observation: Any) -> NDArray[Any]:
        """The record of a map by field and camera name."""
        if not isinstance(observation, dict):
            contract = self._policy.spec.contract
            keys = [field.key for field in contract.observation] + [each.key for each in contract.cameras]
            raise InvalidObservationError(f"observation must be a map of {keys}: the policy has cameras")
        named = {
            key.decode(errors="replace") if isinstance(key, bytes) else str(key): value
            for key, value in observation.items()
        }
        try:
            return self._policy.spec.contract.record(named)
        except InputError as error:
            raise InvalidObservationError(str(error))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidObservationError(f"the observation is no map of arrays ({error})")


def answer_map(plan: Plan, infer_seconds: float) -> dict[str, Any]:
    """Writes the answer to a request."""
    return {
        "actions": plan.executed_actions[0],
        "plan": plan.actions[0],
        "iterations": int(plan.solution.iterations[0]),
        "nfe": int(plan.solution.nfe[0]),
        "policy_timing": {"infer_ms": infer_seconds * 1e3},
    }


def _seeded(seed: int) -> bytes:
    return state_of(torch.Generator().manual_seed(seed))
