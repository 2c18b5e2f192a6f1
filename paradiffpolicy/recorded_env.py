"""Environments that observe pictures, for policies with cameras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
from numpy.typing import NDArray

from .errors import InputError
from .task import Contract


class RecordedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose dicts of observations become records, for policies with cameras.

    Args:
        env: observes dicts, by field and camera name.
        contract: of the policy.
        renamed: the contract's names of the environment's, where they differ.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], contract: Contract, renamed: Mapping[str, str] = {}
    ) -> None:
        super().__init__(env)
        self._contract, self._renamed = contract, dict(renamed)
        parts = getattr(env.observation_space, "spaces", None)
        if not isinstance(parts, Mapping):
            raise InputError(
                f"{type(env.unwrapped).__name__} observes {env.observation_space}: a policy with cameras "
                "needs dicts, by field and camera name"
            )
        fields = [field.size or 0 for field in contract.observation]
        self.observation_space = gymnasium.spaces.Space((), contract.record_dtype(sum(fields)))

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        return self._record(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, *rest = self.env.step(action)
        return self._record(observation), *rest  # type: ignore[return-value]

    def _record(self, observation: Mapping[str, Any]) -> NDArray[Any]:
        named = {self._renamed.get(name, name): value for name, value in observation.items()}
        return self._contract.record(named)
