"""A policy from a checkpoint, ready to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .calibration import calibrated, kept_windows
from .clock import MonotonicClock
from .errors import InputError
from .interchange.reading import read_checkpoint
from .policy import Policy
from .presets import preset
from .sampling.capture.backends import default_cache
from .sampling.spec import spec_sampler

SHIPPED = "checkpoints/pusht_keypoints"
"""The checkpoint that comes with the package."""


def load_policy(
    folder: str | Path = SHIPPED,
    *,
    sampler: str | Mapping[str, Any] = "rti",
    n_action_steps: int | None = None,
    capture: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    warm_up: bool = True,
    **capture_settings: Any,
) -> Policy:
    """Loads a policy that is ready to use: lowest-latency sampler, captured, warmed up.

    >>> import paradiffpolicy as pdp
    >>> policy = pdp.load_policy("checkpoints/pusht_keypoints", capture="eager")
    >>> policy.plan([256.0] * 20).executed_actions.shape  # one robot, Ta actions of A numbers
    torch.Size([1, 8, 2])

    Args:
        folder: the checkpoint's, the shipped PushT policy unless given; or LeRobot's folder, or
            diffusion_policy's ``.ckpt`` file (``interchange``); or such a checkpoint on the Hugging Face Hub,
            as ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        sampler: a preset's name (``presets``; ``native`` is what the checkpoint says), or settings as
            ``make_sampler`` takes them; a window that is ``auto`` is chosen here, in some ten seconds where
            this machine's times aren't known yet.
        n_action_steps: Ta, actions executed per plan; None: as in training.
        capture: ``auto`` (CUDA graphs on a GPU, OpenVINO on a CPU), another backend's name, or ``eager``.
        precision: ``f32``, ``bf16``, ``f16``, or ``int8`` weights; ``auto``: see ``Policy.captured``.
        device: ``auto``: a GPU if there is one.
        warm_up: compiles now instead of at the first plan.
        capture_settings: see ``CaptureSettings``.

    Raises:
        InputError: there is no such checkpoint, or a setting is unknown or can't be had here.
    """
    if not isinstance(folder, str | Path) or not isinstance(sampler, str | Mapping):
        raise InputError(f"{folder=!r:.40} must be a path, and {sampler=!r:.40} a name or settings")
    if not isinstance(warm_up, bool):
        raise InputError(f"{warm_up=!r:.40} must be true or false")
    checkpoint = read_checkpoint(folder)
    if n_action_steps is not None:
        checkpoint = checkpoint.with_spec(n_action_steps=n_action_steps)
    settings = preset(sampler) if isinstance(sampler, str) else dict(sampler)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, **settings), device)
    settings = {"cache": default_cache(), **capture_settings}
    policy = policy.captured(capture, precision=precision, **settings)
    policy = calibrated(policy, MonotonicClock(), kept_windows(policy.capture.cache))
    return policy.warm_up() if warm_up else policy
