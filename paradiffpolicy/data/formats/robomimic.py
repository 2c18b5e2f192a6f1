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

from ...errors import InputError, first_line, nearest, reading
from ...files import write_new
from ..replay_buffer import require_finite
from .demonstration import Demonstration, check_poses
from .env_args import EnvArgs

SUFFIXES = (".hdf5", ".h5")


class RobomimicFile:
    """A ``Source`` that reads an HDF5 file; values are read on demand.

    Args:
        path: of the HDF5 file.

    Raises:
        InputError: the file doesn't exist, is cut short, or isn't robomimic's.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = str(path)
        if not path.is_file():
            raise InputError(f"no file at {path}: name a robomimic HDF5 file")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            if "truncated file" in str(error):
                raise InputError(f"{path} is cut short ({path.stat().st_size} bytes are left): copy it again")
            raise InputError(f"{path} is not an HDF5 file, or damaged ({first_line(error)}): copy it again")
        try:
            with reading(f"{path}: the file"):
                data = self._file.get("data")
                if not isinstance(data, h5py.Group):
                    raise InputError(f"{path} has no group data: it isn't a robomimic dataset")
                self.demos = sorted(data, key=self._number)
                if not self.demos:
                    raise InputError(f"{path} has no demonstrations: data is empty")
                stored = data.attrs.get("env_args")
                self.env_args = None if stored is None else EnvArgs.parse(stored, self.name)
                self.masks = self._read_masks()
            self.keys = sorted(self._group(self.demos[0]).get("obs", ()))
        except BaseException:
            self._file.close()
            raise

    @property
    def kind(self) -> str | None:
        return self.env_args.kind if self.env_args else None

    def length(self, demo: str) -> int:
        """Steps of a demonstration."""
        return int(self._dataset(demo, "actions").shape[0])

    def fields(self, demo: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of all of a demonstration's datasets, by path."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = (item.shape, str(item.dtype))

        with reading(f"{self.name}: {demo}"):
            self._group(demo).visititems(visit)
        return found

    def values(self, demo: str, field: str) -> NDArray[Any]:
        """One field of a demonstration, ``[N, ...]``, finite.

        Raises:
            InputError: it doesn't exist, is damaged, of another length than the actions, or not finite.
        """
        dataset = self._dataset(demo, field)
        where = f"{self.name}: {demo}/{field}"
        with reading(where):
            values = np.asarray(dataset[()])
        if values.dtype.kind not in "biuf" or not values.ndim:
            raise InputError(f"{where} holds {values.dtype} {values.shape}, not numbers per step")
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
            known = sorted(group.get("obs", ()))
            has = set(group)
            model = group.attrs.get("model_file")
            stated = int(group.attrs.get("num_samples", self.length(demo)))
        actions = self.values(demo, "actions")
        if actions.ndim != 2 or not actions.size:
            raise InputError(f"{where}/actions is {actions.shape}: it must be steps x numbers, both above 0")
        if stated != len(actions):
            raise InputError(
                f"{where} has {len(actions)} actions but num_samples {stated}: copy the file again"
            )
        wanted = self.env_args.action_dim if self.env_args else None
        if wanted is not None and self.env_args and actions.shape[1] != wanted:
            controllers = " and ".join(sorted({part["type"] for part in self.env_args.controllers}))
            raise InputError(
                f"{where}/actions have {actions.shape[1]} numbers per step, but {controllers} of "
                f"{', '.join(self.env_args.robots)} takes {wanted}: correct controller_configs in env_args"
            )
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
            model=model.decode() if isinstance(model, bytes) else model,
            **optional,
        )

    def close(self) -> None:
        self._file.close()

    def _number(self, name: str) -> int:
        found = re.fullmatch(r"demo_(\d+)", name)
        if not found or not isinstance(self._file["data"][name], h5py.Group):
            raise InputError(f"{self.name}: data/{name} isn't a demonstration: they are groups demo_<number>")
        return int(found[1])

    def _read_masks(self) -> dict[str, list[str]]:
        masks = {}
        for name, stored in self._file.get("mask", {}).items():
            names = np.asarray(stored[()]).reshape(-1).tolist()
            masks[name] = [n.decode() if isinstance(n, bytes) else str(n) for n in names]
        return masks

    def _group(self, demo: str) -> h5py.Group:
        if demo not in self.demos:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        with reading(f"{self.name}: {demo}"):
            return self._file["data"][demo]

    def _dataset(self, demo: str, field: str) -> h5py.Dataset:
        group = self._group(demo)
        with reading(f"{self.name}: {demo}/{field}"):
            found = group.get(field)
            if not isinstance(found, h5py.Dataset):
                raise InputError(f"{self.name}: {demo} has no {field}{nearest(field, list(group))}")
            return found


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
        with h5py.File(temporary, "w") as file:
            data = file.create_group("data")
            total = 0
            for demo in demonstrations:
                _write_demo(data.create_group(demo.name), demo)
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
