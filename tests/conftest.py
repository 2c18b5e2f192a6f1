"""Shared fixtures.  Where real data or the shipped policy is needed, the real one is used."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

# Before PyTorch is loaded, so that threads that tests start compute with one thread too: sums depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the Hugging Face Hub: those of it have one of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

import paradiffpolicy.envs  # noqa: F401  registers them
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.diffusion.denoiser import BoundDenoise, per_row
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.sampling.solvers import SOLVERS
from paradiffpolicy.task import Contract
from paradiffpolicy.types import PolicySpec

ROOT = Path(__file__).resolve().parent.parent
HUMAN_DATA = (
    Path(os.environ.get("PARADIFFPOLICY_DATA", ROOT.parent / "shared" / "data")) / "pusht_cchi_v7_replay.zarr"
)
SHIPPED = ROOT / "checkpoints" / "pusht_keypoints"

TINY = PolicySpec(
    "pusht",
    obs_dim=20,
    action_dim=2,
    down_dims=(16, 32),
    diffusion_step_embed_dim=16,
    contract=Contract(action_kind="position"),
)
"""A policy of PushT's shape that computes in no time."""

FLOW = replace(TINY, schedule="flow", prediction="velocity")
"""The same, of flow matching."""

DISTINCT_SOLVERS = [name for name, solver in SOLVERS.items() if name == solver.__name__]
"""One name of every solver: the others stand for the same functions."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Compiled models of tests don't mix with the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def fixtures(name: str) -> Path:
    """A folder of other projects' checkpoints, beside the human demonstrations' folder."""
    folder = HUMAN_DATA.parent.parent / "fixtures" / name
    if not folder.exists():
        pytest.skip(f"no checkpoints to compare with at {folder} (set PARADIFFPOLICY_DATA)")
    return folder


@pytest.fixture(scope="session")
def human_data() -> Path:
    if not HUMAN_DATA.exists():
        pytest.skip(f"the human demonstrations are not at {HUMAN_DATA} (set PARADIFFPOLICY_DATA)")
    return HUMAN_DATA


@pytest.fixture(scope="session")
def shipped() -> Path:
    return SHIPPED


@functools.cache
def load_script(name: str) -> ModuleType:
    """A script, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script_file(path: Path, *arguments: str) -> None:
    """Runs a script with arguments, in a process of its own."""
    subprocess.run([sys.executable, path, *arguments], check=True, capture_output=True)


UNMEASURED = ["sampler.paraddpm.window=10", "sampler.speculative.window=10"]
"""Settings of ``train`` under which no iterations by window are measured, which takes seconds."""


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol=None, rtol=None, msg="") -> None:
    """``torch.testing.assert_close``, whose first use imports for half a second."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), msg
    usual = (1e-7, 1e-7) if actual.dtype == torch.float64 else (1e-5, 1.3e-6)
    atol, rtol = (usual[i] if given is None else given for i, given in enumerate((atol, rtol)))
    np.testing.assert_allclose(
        actual.detach().cpu(), expected.detach().cpu(), rtol, atol, equal_nan=False, err_msg=msg
    )


def gaussian_denoiser(schedule: NoiseSchedule, mean: torch.Tensor, std: float) -> BoundDenoise:
    """``E[x_0 | x_t]`` for ``x_0 ~ N(mean, std^2)``; linear in x_t. ``mean`` ``[T, A]``."""

    def denoise(x, t, element):
        alpha, sigma = per_row(schedule.alpha(t), x), per_row(schedule.sigma(t), x)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


def tiny_checkpoint(spec: PolicySpec = TINY, seed: int = 0) -> Checkpoint:
    """Untrained weights with plausible normalizers."""
    torch.manual_seed(seed)
    observation = Normalizer.fit(torch.tensor([[0.0], [512.0]]).expand(2, spec.obs_dim))
    action = Normalizer.fit(torch.tensor([[0.0], [512.0]]).expand(2, spec.action_dim))
    return Checkpoint(
        spec, dict(build_network(spec).state_dict()), observation, action, {"note": "untrained"}
    )


def toy_episode(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers in PushT's fields; actions follow the state, so there is something to learn."""
    draw = np.random.default_rng(seed)
    path = np.cumsum(draw.normal(0, 5, (length, 2)), axis=0) + 256
    return {
        "state": np.concatenate((path, draw.uniform(0, 512, (length, 3))), axis=1).astype(np.float32),
        "keypoint": draw.uniform(0, 512, (length, 9, 2)).astype(np.float32),
        "n_contacts": np.ones((length, 1), dtype=np.float32),
        "action": (path + 3).astype(np.float32),
    }


def make_toy_store(path: Path) -> Path:
    """Three short episodes on disk."""
    buffer = ReplayBuffer.create(path)
    for seed, length in enumerate((30, 25, 41)):
        buffer.append(toy_episode(length, seed))
    return path


@pytest.fixture(scope="session")
def _toy_store(tmp_path_factory) -> Path:
    return make_toy_store(tmp_path_factory.mktemp("toy") / "toy.zarr")


@pytest.fixture
def toy_store(tmp_path, _toy_store) -> Path:
    return Path(shutil.copytree(_toy_store, tmp_path / "toy.zarr"))
