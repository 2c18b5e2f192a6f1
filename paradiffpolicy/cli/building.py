"""Objects from configs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LARGEST, InputError, is_number, nearest
from ..files import exists
from ..tables import bar
from .environments import contract
from .locating import locate_checkpoint

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..planning.blending import Blending
    from ..planning.interpolation import Interpolation
    from ..policy import Policy
    from ..sampling.sampler import Sampler
    from ..types import PolicySpec
    from .parts import DeviceConfig, MachineConfig, PolicyConfig, SamplersConfig, TaskConfig
    from .schema import ExportConfig

# -------------------------------------------------------------------------------------------- policies


def load_policy(cfg: PolicyConfig) -> Policy:
    """The checkpoint's policy, checked against the task, with the reference sampler."""
    from ..policy import Policy
    from ..sampling.spec import spec_sampler

    device = choose_device(cfg)
    checkpoint = task_checkpoint(cfg.checkpoint, cfg.task)
    spec = checkpoint.spec
    if spec.task not in (cfg.task.name, cfg.task.variant_of):
        raise InputError(
            f"the checkpoint is for task {spec.task!r}, not {cfg.task.name!r}: another checkpoint or task"
        )
    if cfg.task.control_hz not in (None, spec.control_hz):
        raise InputError(
            f"the checkpoint is for {spec.control_hz:g} actions per second, but task {spec.task!r} has "
            f"control_hz={cfg.task.control_hz:g}"
        )
    if cfg.n_action_steps is not None:
        spec = replace(spec, n_action_steps=cfg.n_action_steps)
    policy = Policy.from_checkpoint(replace(checkpoint, spec=spec), spec_sampler(spec), device)
    guided = policy.with_guidance(cfg.guidance_scale, cfg.dynamic_threshold)
    return guided.captured(**capture_settings(cfg))


def task_checkpoint(path: str | None, task: TaskConfig) -> Checkpoint:
    """A checkpoint of ours or of another project; one that names no task is the given one's."""
    from ..interchange.reading import read_checkpoint
    from ..interchange.settings import IMPORTED

    checkpoint = read_checkpoint(locate_checkpoint(path))
    spec = checkpoint.spec
    if spec.task != IMPORTED:
        return checkpoint
    rate = spec.control_hz if task.control_hz is None else task.control_hz
    agreed = replace(contract(task), observation=spec.contract.observation)
    return checkpoint.with_spec(task=task.name, control_hz=rate, contract=agreed)


def capture_settings(cfg: MachineConfig, **changes: Any) -> dict[str, Any]:
    """The arguments of ``Policy.captured``."""
    from ..sampling.capture.backends import default_cache

    cache = default_cache() if cfg.capture_cache == "auto" else cfg.capture_cache
    return {
        "backend": changes.get("capture", cfg.capture),
        "precision": changes.get("precision", cfg.precision),
        "cache": None if cache is None else Path(cache),
        "threads": cfg.threads,
        "pinning": cfg.pinning,
        "tf32": cfg.tf32,
        "fuse": cfg.fuse,
    }


def resized(cfg: MachineConfig, policy: Policy, down_dims: Sequence[int]) -> Policy:
    """The same policy with other widths and random weights, for timings."""
    import torch

    from ..checkpoint import Checkpoint
    from ..models.networks import build_network
    from ..policy import Policy

    spec = replace(policy.spec, down_dims=tuple(down_dims))
    torch.manual_seed(0)
    weights = dict(build_network(spec).state_dict())
    normalizers = policy.observation_normalizer, policy.action_normalizer
    random = Checkpoint(spec, weights, *normalizers, {"note": "random weights"})
    return Policy.from_checkpoint(random, policy.sampler, policy.device).captured(**capture_settings(cfg))


CAPTURE_KEYS = ("capture", "precision")
"""How plans are captured, which a sampler's config may say itself."""
POLICY_KEYS = (*CAPTURE_KEYS, "checkpoint")
"""Settings in a sampler's config that aren't the sampler's."""


def sampling_policy(cfg: PolicyConfig, name: str, policy: Policy) -> Policy:
    """The policy with the sampler that the config calls ``name``, captured as that says, and with the window
    that is fastest here if it leaves it open; with its student's weights, if the config names that."""
    own = cfg.sampler.get(name, {}).get("checkpoint")
    if own is not None and not policy.spec.student_timesteps:
        policy = student_policy(cfg, name, policy, own)
    return sampled(cfg, name, policy)


def student_policy(cfg: PolicyConfig | ExportConfig, name: str, policy: Policy, folder: str) -> Policy:
    """The student of a policy, in a folder in its own.

    Raises:
        InputError: it isn't there, or is another task's.
    """
    from ..checkpoint import METADATA, Checkpoint
    from ..policy import Policy
    from ..sampling.spec import spec_sampler

    place = locate_checkpoint(cfg.checkpoint) / folder
    if not exists(place / METADATA):
        raise InputError(
            f"sampler.{name}: no student at {place}: make one with paradiffpolicy distill "
            f"checkpoint={cfg.checkpoint} student={place}"
        )
    student = Checkpoint.load(place)
    spec = replace(student.spec, n_action_steps=policy.spec.n_action_steps)
    alike = ("task", "obs_dim", "action_dim", "n_obs_steps", "horizon")
    for part in alike:
        if getattr(spec, part) != getattr(policy.spec, part):
            raise InputError(f"sampler.{name}: the student at {place} has another {part} than the policy")
    made = Policy.from_checkpoint(replace(student, spec=spec), spec_sampler(spec), policy.device)
    return replace(made, capture=policy.capture)


def sampled(cfg: PolicyConfig, name: str, policy: Policy) -> Policy:
    """The policy's own weights with the sampler that the config calls ``name``."""
    from ..calibration import WINDOWS, calibrated, is_auto, kept_windows
    from ..clock import MonotonicClock

    sampler = named_sampler(cfg, name, policy.spec)
    own = {key: cfg.sampler[name][key] for key in CAPTURE_KEYS if key in cfg.sampler[name]}
    try:
        policy = policy.captured(**capture_settings(cfg, **own)) if own else policy
        policy = policy.with_sampler(sampler)
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")
    if not is_auto(sampler):
        return policy
    with bar(f"window of {name}", len(WINDOWS) + 1, "window") as tried:
        return calibrated(policy, MonotonicClock(), kept_windows(policy.capture.cache), tried.update)


def named_sampler(cfg: SamplersConfig, name: str, spec: PolicySpec) -> Sampler:
    """The sampler that the config calls ``name``, for the policy's noise schedule."""
    from ..sampling.spec import spec_sampler

    if name not in cfg.sampler:
        raise InputError(f"unknown sampler {name!r}{nearest(name, cfg.sampler)}")
    try:
        return spec_sampler(spec, **{k: v for k, v in cfg.sampler[name].items() if k not in POLICY_KEYS})
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")


def check_sampler(settings: dict[str, Any]) -> None:
    """Raises ``InputError`` unless a sampler can be made of the settings, for some policy."""
    from ..diffusion.schedule import NoiseSchedule
    from ..models.precision import CHOICES
    from ..presets import presets
    from ..sampling.capture.backends import BACKENDS
    from ..sampling.sampler import make_sampler

    if settings in presets().values():
        return
    folder = settings.get("checkpoint", "student")
    if not isinstance(folder, str) or not folder:
        raise InputError(f"checkpoint={folder!r:.40} must be a folder in the policy's own, as student")
    own = {name: value for name, value in settings.items() if name not in POLICY_KEYS}
    for name, choices in (("capture", BACKENDS), ("precision", CHOICES)):
        if name in settings and settings[name] not in choices:
            raise InputError(f"unknown {name} {settings[name]!r}{nearest(str(settings[name]), choices)}")
    steps = own.get("n_steps", 100)
    longest = max(100, steps) if isinstance(steps, int) and steps < 10_000 else 100
    if own.get("evaluate") == "sharded":  # the processes that it is over may not have met yet
        own["evaluate"] = "active"
    make_sampler(NoiseSchedule.named("squared_cosine", longest), **own)


def check_driver(settings: dict[str, Any]) -> None:
    """Raises ``InputError`` unless a driver can be made of the settings."""
    if "driver" not in settings:
        raise InputError("driver must be given, as {driver: picard}")
    check_sampler({"solver": "ddpm", "n_steps": 10, **settings})


# --------------------------------------------------------------------------------------------- control


def named_blending(settings: dict[str, Any], spec: PolicySpec | None = None) -> Blending:
    """Which action runs where plans overlap: a name, and its options.

    Raises:
        InputError: there is no such blending, or not for a policy of ``spec``.
    """
    import inspect

    from ..planning.blending import BLENDINGS, Grid
    from ..types import PolicySpec

    options = dict(settings)
    name = options.pop("name", None)
    blending = BLENDINGS.named(name)
    known = [option for option in inspect.signature(blending).parameters if option != "grid"]
    for option, value in options.items():
        if option not in known:
            raise InputError(f"blending {name!r} has no option {option!r}{nearest(option, known)}")
        if not is_number(value) or not 0 <= value <= LARGEST:
            raise InputError(f"blending.{option}={value} must be a number, not below 0")
    chosen = functools.partial(blending, **options)
    any_policy = PolicySpec("any", obs_dim=1, action_dim=1, prefix_steps=1)
    chosen(Grid(spec or any_policy, 1))  # whether it takes such values
    return chosen


def named_interpolation(settings: dict[str, Any]) -> Interpolation:
    """What the command is between a plan's steps: a name, and its options."""
    import inspect

    from ..planning.interpolation import INTERPOLATIONS, Interpolator

    options = dict(settings)
    name = options.pop("name", None)
    interpolation = INTERPOLATIONS.named(name)
    known = list(inspect.signature(interpolation).parameters)[2:]
    for option in options:
        if option not in known:
            raise InputError(f"interpolation {name!r} has no option {option!r}{nearest(option, known)}")
    parts = options.get("parts", [])
    if not isinstance(parts, list):
        raise InputError(f"interpolation.{parts=} must be a list, as [linear,linear,hold]")
    Interpolator.chosen(parts)
    return functools.partial(interpolation, **options)


# --------------------------------------------------------------------------------------------- machine


def choose_device(cfg: DeviceConfig) -> str:
    """Sets the number of threads and names the device."""
    import torch

    from ..models.networks import usable_device

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    return str(usable_device(cfg.device))


EXTRAS = {
    "accelerate": ("accelerate",),
    "ray": ("ray",),
    "serve": ("msgpack", "prometheus_client", "websockets"),
}
"""Modules that the package's optional extras install."""


def require_extra(extra: str) -> None:
    """Raises ``InputError`` unless what an optional extra installs is there."""
    from importlib.util import find_spec

    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} isn't installed: pip install 'paradiffpolicy[{extra}]'")
