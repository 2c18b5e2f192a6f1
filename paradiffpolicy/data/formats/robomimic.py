"""robomimic's HDF5 files.

::

    data                    attributes: total (steps), env_args (JSON)
      demo_<i>              attributes: num_samples, model_file (MJCF)
        actions             [N, A]
        states              [N, 1 + nq + nv]   time, positions, velocities
        obs/<key>           [N, ...]           images as uint8, height, width, channels
        next_obs/<key>      [N, ...]           the observation one step later
        rewards, dones      [N]
        actions_abs         [N, 7 n]           absolute poses, where ``actions`` are deltas
    mask/<subset>           [n]                names of demonstrations, as bytes

``obs[t]`` and ``states[t]`` precede ``actions[t]``.  Demonstrations are in the order of their numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, nearest, reading
from ...files import Closing, write_new
from ..replay_buffer import require_finite
from .demonstration import About, Demonstration, check_poses
from .env_args import EnvArgs
from .hdf5 import datasets, entries, find, new_file, numbers, open_file, unreadable

SUFFIXES = (".hdf5", ".h5")
MASK_BYTES = 2**24


def recognises(path: Path) -> bool:
    """Whether a path may be such a file: it isn't a folder."""
    return not path.is_dir()


def open_source(path: Path, env_args: EnvArgs | None = None) -> RobomimicFile:
    """See ``RobomimicFile``."""
    return RobomimicFile(path, env_args)


class RobomimicFile(Closing):
    """A ``Source`` that reads an HDF5 file; values are read on demand.

    Args:
        path: of the HDF5 file.
        env_args: of a file that doesn't say in which environment it was made.

    Raises:
        InputError: the file doesn't exist, is cut short, or isn't robomimic's.
    """

    cameras: Mapping[str, tuple[int, int, int]] = {}

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self.name = str(path)
        self._file = open_file(Path(path))
        try:
            with reading(f"{path}: the file"):
                data = find(self._file, "data")
                if not isinstance(data, h5py.Group):
                    raise InputError(f"{path} has no group data: it isn't a robomimic dataset")
                self._data = data
                self.demos = sorted(entries(data), key=self._number)
                if not self.demos:
                    raise InputError(f"{path} has no demonstrations: data is empty")
                self.env_args = _stated_env_args(data, self.name) or env_args
                self.masks = self._read_masks()
                fields = self.fields(self.demos[0])
            seen = {field.removeprefix("obs/"): why for field, why in fields.items() if field[:4] == "obs/"}
            for key in seen:
                if "/" in key:
                    seen[key] = seen[key] or "is in a group of its own, which isn't read"
            self.keys = [key for key, why in seen.items() if why is None]
            first = f"{path}: {self.demos[0]}"
            self.skipped = [f"{first}/obs/{key} {why}" for key, why in seen.items() if why is not None]
        except BaseException:
            self._file.close()
            raise

    @property
    def kind(self) -> str | None:
        return self.env_args.kind if self.env_args else None

    @property
    def control_hz(self) -> float | None:
        return self.env_args.control_hz if self.env_args else None

    def length(self, demo: str) -> int:
        """Steps of a demonstration."""
        with reading(f"{self.name}: {demo}/actions"):
            return int((self._dataset(demo, "actions").shape or (0,))[0])

    def fields(self, demo: str) -> dict[str, str | None]:
        """All of a demonstration's datasets, by path: ``None``, or why they aren't readable numbers."""
        with reading(f"{self.name}: {demo}"):
            return {path: unreadable(dataset) for path, dataset in sorted(datasets(self._group(demo)))}

    def values(self, demo: str, field: str) -> NDArray[Any]:
        """One field of a demonstration, ``[N, ...]``, finite.

        Raises:
            InputError: it doesn't exist, is damaged, of another length than the actions, or not finite.
        """
        where = f"{self.name}: {demo}/{field}"
        values = numbers(self._dataset(demo, field), where)
        if len(values) != self.length(demo):
            raise InputError(
                f"{where} has {len(values)} steps, actions have {self.length(demo)}: write the demo anew, or "
                "leave it out with a mask"
            )
        require_finite(values, where, "leave the demo out with a mask, or repair the value")
        return values

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        group, where = self._group(demo), f"{self.name}: {demo}"
        with reading(where):
            has = {name for name in entries(group) if isinstance(find(group, name), h5py.Dataset)}
            seen = find(group, "obs")
            known = sorted(entries(seen)) if isinstance(seen, h5py.Group) else []
            model = group.attrs.get("model_file")
            model = model.decode() if isinstance(model, bytes) else model
            if not isinstance(model, str | None):
                raise InputError(f"{where}: model_file isn't text: write the demo anew")
            stated = int(group.attrs.get("num_samples", self.length(demo)))
        actions = self.values(demo, "actions")
        if actions.ndim != 2 or not actions.size:
            raise InputError(f"{where}/actions is {actions.shape}: it must be steps x numbers, both above 0")
        if stated != len(actions):
            raise InputError(
                f"{where} has {len(actions)} actions but num_samples {stated}: copy the file again"
            )
        wanted = self.env_args.action_dim if self.env_args else None
        if self.env_args:
            self.env_args.require_width(actions.shape[1], f"{where}/actions")
        keys = self.keys if keys is None else keys
        for key in keys:
            if key not in known:
                raise InputError(
                    f"{where} has no obs/{key}{nearest(key, known)}; choose obs_keys=[...], or compute them "
                    "with observations=states"
                )
        poses = self.values(demo, "actions_abs") if "actions_abs" in has else None
        if poses is not None:
            check_poses(poses, f"{where}/actions_abs")
        if self.kind == "absolute" and wanted is not None and wanted % 7 == 0:
            check_poses(actions, f"{where}/actions")
        optional = {name: self.values(demo, name) for name in ("states", "rewards", "dones") if name in has}
        return Demonstration(
            name=demo,
            actions=actions,
            observations={k: self.values(demo, f"obs/{k}") for k in keys},
            poses=poses,
            model=model,
            **optional,
        )

    def close(self) -> None:
        self._file.close()

    def _number(self, name: str) -> int:
        found = re.fullmatch(r"demo_(\d+)", name)
        if not found or not isinstance(find(self._data, name), h5py.Group):
            raise InputError(f"{self.name}: data/{name} isn't a demonstration: they are groups demo_<number>")
        return int(found[1])

    def _read_masks(self) -> dict[str, list[str]]:
        """Names by subset; groups of subsets are taken apart, and links to nothing left out."""
        masks = {}
        group = find(self._file, "mask")
        for name, stored in datasets(group) if isinstance(group, h5py.Group) else ():
            if stored is not None and stored.nbytes <= MASK_BYTES and not stored.external:
                names = np.asarray(stored[()]).reshape(-1).tolist()
                masks[name] = [n.decode() if isinstance(n, bytes) else str(n) for n in names]
        return masks

    def _group(self, demo: str) -> h5py.Group:
        if demo not in self.demos:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        with reading(f"{self.name}: {demo}"):
            return find(self._data, demo)

    def _dataset(self, demo: str, field: str) -> h5py.Dataset:
        group = self._group(demo)
        with reading(f"{self.name}: {demo}/{field}"):
            found = find(group, field)
            if found is None and field in dict(datasets(group)):
                raise InputError(f"{self.name}: {demo}/{field} {unreadable(None)}")
            if not isinstance(found, h5py.Dataset):
                raise InputError(f"{self.name}: {demo} has no {field}{nearest(field, list(group))}")
            return found


def _stated_env_args(data: h5py.Group, where: str) -> EnvArgs | None:
    """The description of the environment, robomimic's or that of robosuite's own recordings."""
    stated = data.attrs
    if "env_args" in stated:
        return EnvArgs.parse(stated["env_args"], where)
    if "env" not in stated or "env_info" not in stated:
        return None
    kwargs = {key: value for key, value in json.loads(stated["env_info"]).items() if key != "env_name"}
    version = stated.get("repository_version")
    return EnvArgs.parse({"env_name": stated["env"], "env_version": version, "env_kwargs": kwargs}, where)


def write(path: Path, demonstrations: Iterable[Demonstration], about: About) -> None:
    """As ``write_robomimic``; raises ``InputError`` too where the environment isn't known."""
    if about.env_args is None:
        raise InputError(
            f"{path} must say in which environment it was made, which the source doesn't: name the task, as "
            "task=lift"
        )
    write_robomimic(path, demonstrations, about.env_args, about.masks)


def write_robomimic(
    path: str | Path,
    demonstrations: Iterable[Demonstration],
    env_args: EnvArgs,
    masks: Mapping[str, Sequence[str]],
) -> None:
    """Writes demonstrations to a new file, or leaves none.

    Unknown rewards are written as 0, unknown ``dones`` as 1 at the last step: robomimic reads both from
    every demonstration.

    Raises:
        InputError: the path exists, or a demonstration can't be read.
    """

    def write(temporary: Path) -> None:
        with new_file(temporary) as (file, require_written):
            data = file.create_group("data")
            total = 0
            for demo in demonstrations:
                _write_demo(data.create_group(demo.name), demo)
                file.flush()
                require_written()
                total += len(demo)
            data.attrs["total"] = total
            data.attrs["env_args"] = json.dumps(env_args.to_dict(), indent=4)
            for name, names in masks.items():
                file.create_dataset(f"mask/{name}", data=np.array(names, dtype="S"))

    write_new(Path(path), write)


def _write_demo(group: h5py.Group, demo: Demonstration) -> None:
    group.attrs["num_samples"] = len(demo)
    if demo.model is not None:
        group.attrs["model_file"] = demo.model
    ends = np.zeros(len(demo), dtype=np.int64)
    ends[-1] = 1
    group["actions"] = demo.actions
    group["rewards"] = np.zeros(len(demo)) if demo.rewards is None else demo.rewards
    group["dones"] = ends if demo.dones is None else demo.dones
    if demo.states is not None:
        group["states"] = demo.states
    if demo.poses is not None:
        group["actions_abs"] = demo.poses
    for key, values in demo.observations.items():
        # Pictures shrink to a fraction; they are read one by one, so a chunk is one of them.
        packed = {"chunks": (1, *values.shape[1:]), "compression": "gzip"} if values.ndim > 2 else {}
        group.create_dataset(f"obs/{key}", data=values, **packed)
