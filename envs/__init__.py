"""Gymnasium environments; importing this package registers them."""

from __future__ import annotations

import gymnasium

for _name, _class in (("PushT", "pusht:PushTEnv"), ("PushTDynamic", "pusht_dynamic:PushTDynamicEnv")):
    gymnasium.register(
        id=f"paradiffpolicy/{_name}-v0",
        entry_point=f"paradiffpolicy.envs.{_class}",
        max_episode_steps=300,
    )

for _name, _task, _max_steps in (
    ("Lift", "lift", 400),
    ("Can", "can", 400),
    ("Square", "square", 400),
    ("Transport", "transport", 700),
    ("ToolHang", "tool_hang", 700),
):
    gymnasium.register(
        id=f"paradiffpolicy/{_name}-v0",
        entry_point="paradiffpolicy.envs.robosuite.env:RobosuiteEnv",
        max_episode_steps=_max_steps,
        kwargs={"task": _task},
    )
