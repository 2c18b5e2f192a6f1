"""Objects from configs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, nearest, require_count

if TYPE_CHECKING:
    import gymnasium
    import numpy as np
    from numpy.typing import NDArray

    from ..evaluation.realtime import MakeEnvAt
    from ..evaluation.workers import MakeEnv, Workers
    from ..planning.blending import Blending
    from ..planning.planner import MakePlanner
    from ..policy import Policy
    from ..sampling.sampler import Sampler
    from ..task import ObservationField
    from ..types import PolicySpec

Config = Any
"""A composed OmegaConf node."""


def load_policy(cfg: Config) -> Policy:
    """The checkpoint's policy, checked against the task, with the reference sampler."""
    from ..checkpoint import Checkpoint
    from ..policy import Policy, check_task, spec_sampler

    device = choose_device(cfg)
    checkpoint = Checkpoint.load(locate(cfg.checkpoint))
    task = cfg.task
    check_task(checkpoint.spec, task.name, task.obs_dim, task.action_dim, task.control_hz)
    policy = Policy(checkpoint, spec_sampler(checkpoint.spec), device)
    guided = policy.with_guidance(cfg.get("guidance_scale"), cfg.get("dynamic_threshold"))
    return guided.captured(**capture_settings(cfg))


def capture_settings(cfg: Config, **changes: Any) -> dict[str, Any]:
    """What ``Policy.captured`` takes."""
    from ..sampling.capture.backends import default_cache

    cache = default_cache() if cfg.capture_cache == "auto" else cfg.capture_cache
    return {
        "backend": changes.get("capture", cfg.capture),
        "precision": changes.get("precision", cfg.precision),
        "cache": None if cache is None else Path(cache),
        "threads": cfg.threads,
        "pinning": cfg.pinning,
        "tf32": cfg.tf32,
    }


def resized(cfg: Config, policy: Policy, down_dims: Any) -> Policy:
    """The same policy with other widths and random weights, for timings."""
    import torch

    from ..checkpoint import Checkpoint
    from ..policy import Policy, build_network

    spec = replace(policy.spec, down_dims=tuple(down_dims))
    torch.manual_seed(0)
    weights = dict(build_network(spec).state_dict())
    normalizers = policy.observation_normalizer, policy.action_normalizer
    random = Checkpoint(spec, weights, *normalizers, {"note": "random weights"})
    return Policy(random, policy.sampler, policy.device).captured(**capture_settings(cfg))


CAPTURE_KEYS = ("capture", "precision")
"""Settings that a sampler's config may have of its own."""


def sampling_policy(cfg: Config, name: str, policy: Policy) -> Policy:
    """The policy with the sampler that the config calls ``name``, captured as that says."""
    sampler = named_sampler(cfg, name, policy.spec)
    own = {key: cfg.sampler[name][key] for key in CAPTURE_KEYS if key in cfg.sampler[name]}
    try:
        policy = policy.captured(**capture_settings(cfg, **own)) if own else policy
        return policy.with_sampler(sampler)
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")


def named_sampler(cfg: Config, name: str, spec: PolicySpec) -> Sampler:
    """The sampler that the config calls ``name``, for the policy's noise schedule."""
    from ..policy import spec_sampler

    if name not in cfg.sampler:
        raise InputError(f"unknown sampler {name!r}{nearest(name, cfg.sampler)}")
    try:
        settings = {k: v for k, v in plain(cfg.sampler[name]).items() if k not in CAPTURE_KEYS}
        return spec_sampler(spec, **settings)
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")


def env_maker(cfg: Config) -> MakeEnv:
    """Makes the task's environment, also in another process."""
    return functools.partial(
        make_env, cfg.task.env.id, max_episode_steps=cfg.task.max_steps, **plain(cfg.task.env.kwargs)
    )


def make_env(name: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """A registered environment."""
    import gymnasium

    from .. import envs  # noqa: F401  registers the environments

    try:
        return gymnasium.make(name, **kwargs)
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"{name} can't be made: {error}")


def env_picture(env: gymnasium.Env[Any, Any], size: int) -> NDArray[np.uint8]:
    """``[size, size, 3]`` of the environment as it is."""
    try:
        picture: NDArray[np.uint8] = env.unwrapped.picture(size)  # type: ignore[attr-defined]
    except ImportError as error:
        raise InputError(f"{error}: videos=0")
    return picture


def env_workers(count: int | str) -> Workers:
    """Where environments live, for a config's ``workers``."""
    from ..evaluation.workers import make_workers

    return make_workers(worker_count(count))


def worker_count(count: int | str) -> int:
    """How many processes a config's ``workers`` means."""
    from ..evaluation.workers import usable_cores

    if count == "auto":
        return usable_cores()
    if isinstance(count, str):
        raise InputError(f"workers={count} must be a whole number above 0, or auto: a process per core")
    require_count(workers=count)
    return count


def env_maker_at(cfg: Config) -> MakeEnvAt:
    """Makes the task's environment for a control rate, without an end."""
    kwargs = plain(cfg.task.env.kwargs)

    def make(rate_hz: float) -> gymnasium.Env[Any, Any]:
        try:
            # -1: an episode's length is a matter of seconds here.
            return make_env(cfg.task.env.id, control_hz=rate_hz, max_episode_steps=-1, **kwargs)
        except InputError as error:
            raise InputError(f"rate_hz={rate_hz:g}: {error}")

    return make


def recorded_windows(cfg: Config, guide: Policy, count: int) -> list[Any]:
    """Observation windows ``[To, O]`` of an episode that ``guide`` runs, again from its start if short."""
    from ..evaluation.rollout import rollout

    episode = rollout(guide, env_maker(cfg), [cfg.first_seed], cfg.task.max_steps)[0]
    return [episode.windows[k % len(episode.windows)] for k in range(count)]


def named_planner(name: str) -> MakePlanner:
    """Where plans are made."""
    from ..planning.planner import InlinePlanner, ThreadPlanner
    from ..planning.process import ProcessPlanner

    planners: dict[str, MakePlanner] = {
        "inline": InlinePlanner,
        "thread": ThreadPlanner,
        "process": ProcessPlanner,
    }
    if name not in planners:
        raise InputError(f"unknown planner {name!r}{nearest(str(name), planners)}")
    return planners[name]


def named_blending(node: Config) -> Blending:
    """Which action runs where plans overlap: a name, and its options."""
    import inspect

    from ..planning.blending import BLENDINGS

    options = plain(node)
    name = options.pop("name", None)
    if name not in BLENDINGS:
        raise InputError(f"unknown blending {name!r}{nearest(str(name), BLENDINGS)}")
    known = [option for option in inspect.signature(BLENDINGS[name]).parameters if option != "grid"]
    for option, value in options.items():
        if option not in known:
            raise InputError(f"blending {name!r} has no option {option!r}{nearest(option, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise InputError(f"blending.{option}={value} must be a number, not below 0")
    return functools.partial(BLENDINGS[name], **options)


def observation_fields(cfg: Config) -> list[ObservationField]:
    from ..task import ObservationField

    return [ObservationField(**plain(field)) for field in cfg.task.observation]


def choose_device(cfg: Config) -> str:
    """Sets the number of threads and names the device."""
    import torch

    if cfg.threads is not None:
        require_count(threads=cfg.threads)
        torch.set_num_threads(cfg.threads)
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={cfg.device} can't be used here ({str(error).splitlines()[0]}): device=cpu can"
        )
    return str(cfg.device)


def locate(path: str) -> Path:
    """A path as given, from the working folder, or else from the checkout that this code lies in."""
    given = Path(path)
    beside = Path(__file__).resolve().parents[2] / given
    return beside if not given.exists() and beside.exists() else given


EXTRAS = {"serve": ("msgpack", "prometheus_client", "websockets")}
"""Modules that the package's optional extras install."""


def require_extra(extra: str) -> None:
    """Raises ``InputError`` unless what an optional extra installs is there."""
    from importlib.util import find_spec

    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} isn't installed: pip install 'paradiffpolicy[{extra}]'")


def plain(node: Config) -> Any:
    """A config node as dicts, lists and numbers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


def typed(cls: type, node: Config) -> dict[str, Any]:
    """A config node's values, checked against the annotations of the dataclass they are for."""
    import typing

    hints = typing.get_type_hints(cls)
    values = plain(node)
    for name, value in values.items():
        wanted = hints[name]
        allowed = (int, float) if wanted is float else wanted
        if wanted in (int, float, str, bool) and (
            not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool)
        ):
            raise InputError(f"{name}={value} must be a {wanted.__name__}")
    return dict(values)
