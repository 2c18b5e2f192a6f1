"""What the package needs from a gymnasium environment, with fallbacks for environments of any origin.

========  ==================================================================  ===========================
need      taken from                                                          else
========  ==================================================================  ===========================
rate      ``control_hz`` given, the attribute, ``metadata["render_fps"]``     ``InputError``
success   ``info[key]`` that the task names, ``success``, ``is_success``      None: it isn't known
picture   the method ``picture(size)``, else ``render()``, resized            ``InputError``
hold      the attribute ``hold_action``                                       None: it can't hold still
friction  the method ``change_friction(change)``, see ``disturbances``        ``InputError``
========  ==================================================================  ===========================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .registry import Registry, find_modules_here

if TYPE_CHECKING:
    import gymnasium
    from numpy.typing import NDArray

SUCCESS_KEYS, TERMINATED = ("success", "is_success"), "terminated"
"""Keys of an environment's info that say whether the task is done; and the key of a task that is done when
the environment terminates."""


def make_env(name: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """A registered environment; ``my_module:My-v0`` imports a module first, also from the current folder.

    Raises:
        InputError: it can't be made.
    """
    import gymnasium

    from . import envs  # noqa: F401  registers the environments

    find_modules_here()
    try:
        return gymnasium.make(name, **kwargs)
    except (ImportError, TypeError, ValueError, gymnasium.error.Error) as error:
        raise InputError(f"{name} can't be made: {error}")
    except (Exception, SystemExit) as error:  # whatever it does with arguments that don't fit
        raise InputError(f"{name} can't be made: {type(error).__name__}: {error}") from error


def require_vectors(env: gymnasium.Env[Any, Any]) -> None:
    """Raises ``InputError`` if observations or actions are dicts or tuples."""
    for what, space in (("observations", env.observation_space), ("actions", env.action_space)):
        parts = getattr(space, "spaces", None)
        if parts is not None:
            names = f"dicts of {', '.join(parts)}" if isinstance(parts, Mapping) else "tuples"
            raise InputError(
                f"{type(env.unwrapped).__name__} has {names} as {what}: wrap it so that they are vectors, as "
                "gymnasium.wrappers.FlattenObservation does, in the order of the task's observation"
            )


def require_seed(seed: object) -> int:
    """A seed that simulators take.

    Raises:
        InputError: it isn't a whole number from 0 to 2^32 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"{seed=} of an environment must be a whole number from 0 to 2^32 - 1")
    return int(seed)


def control_rate(env: gymnasium.Env[Any, Any], given: float | None = None) -> float:
    """Control steps per second.

    Raises:
        InputError: neither the caller nor the environment says.
    """
    inner: Any = env.unwrapped
    rate = given or getattr(inner, "control_hz", None) or (inner.metadata or {}).get("render_fps")
    if not rate:
        raise InputError(
            f"{type(inner).__name__} says neither control_hz nor metadata['render_fps']: set control_hz"
        )
    return float(rate)


def succeeded(terminated: bool, info: Mapping[str, Any], key: str | None = None) -> bool | None:
    """Whether a step accomplished the task; None: the environment doesn't say.  Environments also terminate
    when something went wrong: ``terminated`` counts only for a task that says so, by this key.

    Raises:
        InputError: ``info`` lacks the ``key`` that the task names.
    """
    if key == TERMINATED and key not in info:
        return bool(terminated)
    if key is not None:
        if key not in info:
            raise InputError(f"the environment's info has no {key!r}; it has {', '.join(sorted(info))}")
        return bool(np.any(info[key]))
    for known in SUCCESS_KEYS:
        if known in info:
            return bool(np.any(info[known]))
    return None


Scoring = Callable[[float, float, int], float]
"""The score of n > 1 rewards, given that of the first n - 1, the n-th reward, and n."""

SCORINGS: Registry[Scoring] = Registry(
    "scoring",
    {
        "max": lambda score, reward, n: max(score, reward),
        "mean": lambda score, reward, n: score + (reward - score) / n,
    },
)
"""Ways to make an episode's score of its steps' rewards; the score of one reward is that reward."""


def scored(scoring: str, score: float, reward: float, n: int) -> float:
    """The score after an episode's n-th reward, 1-based, given the score before it.

    Raises:
        InputError: there is no such scoring in ``SCORINGS``.
    """
    added = SCORINGS.named(scoring)
    return reward if n == 1 else added(score, reward, n)


def finite_reward(reward: Any) -> float:
    """A step's reward.

    Raises:
        InputError: it is NaN or infinite, of which no score can be made.
    """
    if not np.isfinite(value := float(reward)):
        raise InputError(f"the environment's reward is {value}: it must be a finite number")
    return value


def recorded(info: Mapping[str, Any], names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Copies of the info's numbers by name: environments may reuse their arrays.

    Raises:
        InputError: ``info`` lacks one, or it isn't numbers.
    """
    values = {}
    for name in names:
        if name not in info:
            known = ", ".join(map(str, info)) or "nothing"
            raise InputError(f"the environment's info has no {name!r} to record; it has {known}")
        try:
            values[name] = np.array(info[name])
            kind = str(values[name].dtype)
        except ValueError:
            kind = "lists of different lengths"
        if kind[:3] not in ("boo", "int", "uin", "flo"):
            raise InputError(f"the environment's info {name!r} is {kind}: only numbers can be recorded")
    return values


def picture(env: gymnasium.Env[Any, Any], size: int) -> NDArray[np.uint8]:
    """The environment as it is now, ``[size, size, 3]``.

    Raises:
        InputError: it can't be drawn.
    """
    inner: Any = env.unwrapped
    try:
        drawn = inner.picture(size) if hasattr(inner, "picture") else env.render()
    except ImportError as error:
        raise InputError(f"{error}: or without pictures, videos=0")
    if not isinstance(drawn, np.ndarray) or drawn.ndim != 3:
        raise InputError(
            f"{type(inner).__name__} gives no picture: make it with render_mode=rgb_array, or set videos=0"
        )
    rows, columns = (np.arange(size) * n // size for n in drawn.shape[:2])
    return np.ascontiguousarray(drawn[rows][:, columns, :3], dtype=np.uint8)


def hold_action(env: gymnasium.Env[Any, Any]) -> NDArray[Any] | None:
    """The action that keeps the robot where it is; None: the environment doesn't say."""
    inner: Any = env.unwrapped
    if "hold_action" not in dir(inner):  # a property may need a reset first
        return None
    return np.asarray(inner.hold_action)
