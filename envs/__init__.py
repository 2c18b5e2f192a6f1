"""Gymnasium environments; importing this package registers them."""

from __future__ import annotations

import gymnasium

gymnasium.register(
    id="paradiffpolicy/PushT-v0",
    entry_point="paradiffpolicy.envs.pusht:PushTEnv",
    max_episode_steps=300,
)
