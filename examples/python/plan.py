"""Plans of an exported policy on ONNX Runtime: NumPy and onnxruntime, nothing else.

python plan.py FOLDER        plans three times for a window of your own
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Policy:
    """Makes plans ``[batch, T, A]`` for windows ``[batch, To, O]``; each continues the one before, if the
    sampler does."""

    def __init__(self, folder, seed=0):
        folder = Path(folder)
        self.spec = json.loads((folder / "plan.json").read_text())
        files = {name: str(folder / f"{name}.onnx") for name in self.spec["models"]}
        self.sessions = {name: onnxruntime.InferenceSession(file) for name, file in files.items()}
        self.random = np.random.default_rng(seed)
        self.state = {}

    def plan(self, window, executed=None, **noise):
        """``executed``: how many steps of the last plan have been executed since it was asked for; Ta unless
        given.  ``noise``: standard normal ``x_T`` and ``z``, uniform ``u``; drawn unless given."""
        name = "plan_warm" if self.state and "plan_warm" in self.sessions else "plan"
        inputs = self.spec["models"][name]["inputs"]
        feed = {"observation": np.asarray(window, np.float32), **self.state, **noise}
        feed["executed"] = np.array([self.spec["n_action_steps"] if executed is None else executed])
        for port in inputs:
            if port["name"] not in feed:
                draw = self.random.random if port["name"] == "u" else self.random.standard_normal
                feed[port["name"]] = draw(port["shape"], np.float32)
        session = self.sessions[name]
        values = session.run(None, {port["name"]: feed[port["name"]] for port in inputs})
        outputs = dict(zip([port.name for port in session.get_outputs()], values, strict=True))
        self.state = {k.replace("next_", "last_"): v for k, v in outputs.items() if k.startswith("next_")}
        return outputs["actions"]


if __name__ == "__main__":
    policy = Policy(sys.argv[1])
    To, Ta, obs_dim = (policy.spec[name] for name in ("n_obs_steps", "n_action_steps", "obs_dim"))
    for _ in range(3):
        actions = policy.plan(np.full((policy.spec["batch"], To, obs_dim), 200.0))
        print(actions[0, To - 1 : To - 1 + Ta])
