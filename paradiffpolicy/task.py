"""The observation and action contract: what a policy sees, what its actions mean, and at which rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, nearest

NUMBERS = "numbers"
"""The vector's name in observations that have pictures, too."""

Relative = tuple[tuple[int, int], ...]
"""Pairs of a number of an action and the column of the observation that it is relative to."""

ROTATION_WORDS = frozenset(
    ("r11", "r12", "r13", "r21", "r22", "r23", "qx", "qy", "qz", "qw", "rx", "ry", "rz")
)
"""Words in the names of an action's numbers that are a rotation's."""

PLACE = re.compile("[0-9]{1,9}")
"""A place among numbers, as text."""

ACTION_KINDS = {
    "position": "absolute position; repeating it holds still",
    "pose": "absolute pose; repeating it holds still",
    "delta": "difference to the present pose; zero holds still",
    "velocity": "velocity; zero holds still",
    "other": "unknown to this package",
}
"""What an action may be."""


@dataclass(frozen=True)
class ObservationField:
    """One field of the observation vector, flattened, in the order of the vector.

    Attributes:
        key: name in the dataset, and in observations given as a dict.
        start, stop: which of its numbers, after flattening; None: all.
        shape: of the whole field, before a slice is taken; None: not known.
        unit: of its numbers.
    """

    key: str
    start: int | None = None
    stop: int | None = None
    shape: tuple[int, ...] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not isinstance(self.unit, str):
            raise InputError(f"observation field {self.key!r:.40}: its key and unit must be text")
        places = (self.start, self.stop, *(self.shape or ()))
        if any(type(each) is not int or abs(each) > 10**9 for each in places if each is not None):
            raise InputError(f"observation {self.key!r:.40}: start, stop and shape must be whole numbers")
        if math.prod(self.shape or ()) not in range(10**9):
            raise InputError(f"observation {self.key!r:.40}: shape={self.shape!r:.40} has too many numbers")
        there = None if self.shape is None else math.prod(self.shape)
        for name, place in (("start", self.start), ("stop", self.stop)):
            if place is not None and there is not None and abs(place) > there:
                raise InputError(
                    f"observation {self.key!r:.40}: {name}={place} is beyond its {there} numbers"
                )
        if self.size is not None and self.size < 1:
            what = f"{self.start}:{self.stop} of shape={self.shape!r:.40}"
            raise InputError(f"observation {self.key!r:.40}: {what} takes none of its numbers")

    @property
    def size(self) -> int | None:
        """How many numbers of the observation vector it fills; None: not known."""
        if self.shape is None:
            start, stop = self.start or 0, self.stop
            return None if stop is None or min(start, stop) < 0 else stop - start
        return len(range(math.prod(self.shape))[self.start : self.stop])

    @property
    def is_quaternion(self) -> bool:
        """Whether its unit or its key says that there are quaternions in it."""
        return "quat" in f"{self.key} {self.unit}".lower()

    def take(self, value: Any) -> NDArray[np.float64]:
        """Its numbers ``[size]`` of a value."""
        return real_numbers(value).reshape(-1)[self.start : self.stop]


def real_numbers(values: Any) -> NDArray[np.float64]:
    """An array of real numbers as float64 of its own, NaN where they are masked.

    Raises:
        TypeError, ValueError, OverflowError: it is none: numpy would make numbers of text, times and records,
            and leave out imaginary parts.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biufO" or any(isinstance(each, str | bytes) for each in _objects(array)):
        raise TypeError(f"{array.dtype} isn't a type of real numbers")
    numbers = np.array(array, dtype=np.float64)
    if isinstance(values, np.ma.MaskedArray):
        numbers[np.ma.getmaskarray(values)] = np.nan
    return numbers


def _objects(array: NDArray[Any]) -> Any:
    return array.flat if array.dtype.kind == "O" else ()


@dataclass(frozen=True)
class Camera:
    """A camera that a policy sees through.

    Attributes:
        key: name in the dataset, and in observations given as a dict.
        shape: of its pictures, ``(H, W, 3)``: RGB bytes, channels last.
    """

    key: str
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        shape = self.shape
        if not isinstance(self.key, str) or not self.key:
            raise InputError(f"a camera's key must be text, not {self.key!r:.40}")
        if not isinstance(shape, tuple) or len(shape) != 3 or shape[2] != 3:
            first = isinstance(shape, tuple) and len(shape) == 3 and shape[0] == 3
            hint = ": channels come last" if first else ""
            raise InputError(f"camera {self.key!r:.40}: shape={shape!r:.40} must be [height, width, 3]{hint}")
        if any(type(n) is not int or not 1 <= n <= 4096 for n in shape):
            raise InputError(f"camera {self.key!r:.40}: shape={shape!r:.40} must be 1 to 4096 pixels a side")

    def take(self, picture: Any) -> NDArray[np.uint8]:
        """A picture of it, ``[H, W, 3]`` uint8.

        Raises:
            InputError: it has another shape or type; channels that come first are named.
        """
        array = np.asarray(picture)
        if array.shape != self.shape:
            height, width, _ = self.shape
            hint = ": channels come last" if array.shape == (3, height, width) else ""
            raise InputError(f"camera {self.key!r} gives {array.shape}, expected {self.shape}{hint}")
        if array.dtype != np.uint8:
            raise InputError(f"camera {self.key!r} gives {array.dtype}, expected uint8, 0 to 255")
        return array


@dataclass(frozen=True)
class Contract:
    """What a robot must give and will get.

    Attributes:
        observation: fields in the vector's order.
        action_kind: a name in ``ACTION_KINDS``.
        action_names: of its numbers; empty: not known.
        action_unit: of its numbers.
        cameras: whose pictures are observed beside the vector.
    """

    observation: tuple[ObservationField, ...] = ()
    action_kind: str = "other"
    action_names: tuple[str, ...] = ()
    action_unit: str = ""
    cameras: tuple[Camera, ...] = ()

    def __post_init__(self) -> None:
        keys = [camera.key for camera in self.cameras]
        if len(set(keys)) < len(keys) or NUMBERS in keys:
            raise InputError(f"cameras {keys!r:.80} must have different keys, and none of them {NUMBERS!r}")
        if self.action_kind not in ACTION_KINDS:
            hint = nearest(self.action_kind, ACTION_KINDS)
            raise InputError(f"unknown action kind {self.action_kind!r:.80}{hint}")

    @property
    def is_absolute(self) -> bool:
        """Whether actions are known to be absolute, so that repeating one holds still."""
        return self.action_kind in ("position", "pose")

    @property
    def is_relative(self) -> bool:
        """Whether actions are known to be deltas or velocities, so that zero holds still."""
        return self.action_kind in ("delta", "velocity")

    def positions(self, action_dim: int) -> NDArray[np.bool_]:
        """``[A]``, which numbers of an action are a position's: all whose names don't say that they are a
        rotation's or a gripper's."""
        names = self.action_names or ("",) * action_dim
        return np.array([not (is_gripper(name) or ROTATION_WORDS & words(name)) for name in names])

    def mixed(self, obs_dim: int) -> NDArray[np.bool_]:
        """``[O]``, which numbers of an observation may be interpolated linearly: all but fields whose unit or
        key says that they are quaternions, since q and -q are one rotation."""
        sizes = [field.size for field in self.observation]
        if None in sizes or sum(size or 0 for size in sizes) != obs_dim:
            return np.ones(obs_dim, dtype=bool)
        return np.repeat([not field.is_quaternion for field in self.observation], np.array(sizes, dtype=int))

    def relative_pairs(self, named: Mapping[str, str], setting: str = "relative") -> Relative:
        """A spec's ``relative`` by names: ``{x: state.0}`` makes the number ``x`` of an action relative to
        number 0 of the field ``state``.  Numbers of an action without names are counted from 0.  Errors
        name the ``setting``.

        Raises:
            InputError: there is no such number of an action, no such field, or it isn't observed.
        """
        names, pairs = self.action_names, []
        for name, place in named.items():
            if name not in names and (names or not PLACE.fullmatch(name)):
                known = f"they are {', '.join(names)}" if names else "the contract has no names, count from 0"
                raise InputError(f"{setting}: no number of an action is {name!r:.40}: {known}")
            pairs.append((names.index(name) if names else int(name), self._column(str(place), setting)))
        return tuple(pairs)

    def _column(self, place: str, setting: str) -> int:
        """The column of the observation vector that is a number of a field: ``state.0``."""
        key, _, number = place.rpartition(".")
        first = 0
        for field in self.observation:
            assert field.size is not None and field.shape is not None
            there = range(math.prod(field.shape))[field.start : field.stop]
            if field.key == key and PLACE.fullmatch(number) and int(number) in there:
                return first + there.index(int(number))
            first += field.size
        raise InputError(
            f"{setting}: {place!r:.60} isn't observed: name a field and the place of a number in it, as "
            f"{self.observation[0].key}.0"
        )

    def vector(self, observation: Mapping[str, Any]) -> NDArray[np.float64]:
        """The observation vector ``[O]`` of a dict of fields.

        Raises:
            InputError: a field is missing or has another size, or the contract names no fields.
        """
        if not self.observation:
            raise InputError("the policy's contract names no observation fields: give a vector")
        parts = []
        for field in self.observation:
            if field.key not in observation:
                given = ", ".join(map(repr, sorted(observation)))
                raise InputError(f"the observation has no {field.key!r}; it has {given}")
            part = field.take(observation[field.key])
            if field.size is not None and len(part) != field.size:
                raise InputError(
                    f"observation {field.key!r} gives {len(part)} numbers, expected {field.size}"
                )
            parts.append(part)
        return np.concatenate(parts)

    def record_dtype(self, obs_dim: int) -> np.dtype[Any]:
        """Of an observation of a policy with cameras; without padding, the numbers first."""
        pictures = [(camera.key, np.uint8, camera.shape) for camera in self.cameras]
        return np.dtype([(NUMBERS, np.float64, (obs_dim,)), *pictures])

    def record(self, observation: Mapping[str, Any]) -> NDArray[Any]:
        """One observation of a policy with cameras, of a dict by field and camera name.

        Raises:
            InputError: a field or camera is missing, or has another size or type.
        """
        vector = self.vector(observation)
        record = np.zeros((), self.record_dtype(len(vector)))
        record[NUMBERS] = vector
        for camera in self.cameras:
            if camera.key not in observation:
                given = ", ".join(map(repr, sorted(observation)))
                raise InputError(f"the observation has no picture of camera {camera.key!r}; it has {given}")
            record[camera.key] = camera.take(observation[camera.key])
        return record

    def to_dict(self) -> dict[str, Any]:
        """For ``policy.json``."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Contract:
        """From ``policy.json`` or a task file's ``observation`` and ``action``.

        Raises:
            InputError: a value is missing, unknown or of the wrong type.
        """
        try:
            fields = tuple(
                ObservationField(
                    **{**field, "shape": None if field.get("shape") is None else tuple(field["shape"])}
                )
                for field in values.get("observation", ())
            )
            return Contract(
                fields,
                str(values.get("action_kind", "other")),
                tuple(map(str, values.get("action_names", ()))),
                str(values.get("action_unit", "")),
                tuple(Camera(each["key"], tuple(each["shape"])) for each in values.get("cameras", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the observation and action contract is malformed ({error})")


def check_relative(relative: Any, contract: Contract, obs_dim: int, action_dim: int) -> None:
    """Makes sure that numbers of an action can be relative to columns of the observation.

    Raises:
        InputError: these aren't pairs of them, or a difference of the two has no meaning.
    """
    pairs = relative if isinstance(relative, tuple) else (relative,)
    if not all(isinstance(pair, tuple) and [type(place) for place in pair] == [int, int] for pair in pairs):
        raise InputError(f"relative={relative!r:.60} must be pairs of whole numbers, as [[0, 18], [1, 19]]")
    for dimension, column in relative:
        if not (0 <= dimension < action_dim and 0 <= column < obs_dim):
            raise InputError(
                f"relative={relative!r:.60}: the pair {dimension, column} isn't a number of an action, below "
                f"{action_dim}, and a column of the observation, below {obs_dim}"
            )
        if not contract.mixed(obs_dim)[column]:
            raise InputError(
                f"relative: column {column} of the observation is a quaternion's, and a difference of two "
                "rotations' numbers is no rotation: leave it out"
            )
        name = contract.action_names[dimension] if contract.action_names else ""
        if ROTATION_WORDS & words(name):
            raise InputError(
                f"relative: {name!r:.40} is a rotation's number, and a difference of two rotations' numbers "
                "is no rotation: leave it out"
            )
    if len({dimension for dimension, _ in relative}) < len(relative):
        raise InputError(f"relative={relative!r:.60} names a number of an action twice")
    if relative and contract.is_relative:
        raise InputError(
            f"relative={relative!r:.60}: the contract says that actions are of the kind "
            f"{contract.action_kind}, which is relative already: leave it empty"
        )


def words(name: str) -> set[str]:
    """The words of a name, in small letters: ``arm_0/qx`` has arm, 0 and qx."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def is_gripper(name: str) -> bool:
    """Whether a number of this name is a gripper's."""
    return any(word.startswith("grip") for word in words(name))


def contract_size(fields: Sequence[ObservationField]) -> int | None:
    """Numbers in the observation vector; None: not known."""
    sizes = [field.size for field in fields]
    return None if None in sizes else sum(size for size in sizes if size is not None)
