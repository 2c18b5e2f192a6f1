"""Demonstrations from one format to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .environments import task_env
from .locating import locate_checkpoint

if TYPE_CHECKING:
    from ..data.formats.demonstration import Source
    from ..data.formats.env_args import EnvArgs
    from .data_schema import ConvertConfig
    from .parts import TaskConfig


def convert(cfg: ConvertConfig) -> None:
    """A dataset of one format to another, with actions of the kind that is wanted; or another project's
    checkpoint to one of ours."""
    from tqdm import tqdm

    from ..collection.conversion import Conversion, chosen
    from ..data.formats import reading
    from ..data.formats.demonstration import About
    from ..interchange.reading import PROJECTS

    for name in ("source", "out"):
        if getattr(cfg, name) is None:
            raise InputError(
                f"nothing is named by {name}: write {name}=NAME.hdf5, {name}=NAME.zarr or another"
            )
    place, out = locate_checkpoint(cfg.source, "source"), Path(str(cfg.out))
    if any(project.recognises(place) for project in PROJECTS.values()):
        convert_checkpoint(place, out)
        return
    wanted = reading.require_suffix(out)
    if out.exists():
        raise InputError(f"out={out} exists: choose another path")
    source = open_source(place, cfg)
    try:
        names = chosen(source, cfg.mask)
        conversion = Conversion(
            source,
            to_store=wanted != "robomimic",
            actions=cfg.actions,
            observations=cfg.observations,
            keys=cfg.obs_keys,
            check=cfg.check,
            tell=note,
        )
        masks = {key: [name for name in names if name in set(kept)] for key, kept in source.masks.items()}
        masks = {key: kept for key, kept in masks.items() if kept}
        rate = cfg.control_hz or source.control_hz
        about = About(conversion.env_args, conversion.actions, names, masks, rate)
        with tqdm(names, unit="demo", dynamic_ncols=True) as bar:
            reading.write(out, conversion.demonstrations(bar), about)
    finally:
        source.close()
    for line in conversion.summary():
        print(line)
    print(f"{out}: {len(names)} demonstrations, {conversion.n_steps} steps, actions {conversion.actions}")


def convert_checkpoint(source: Path, out: Path) -> None:
    """Another project's checkpoint to a folder of ours; its weights stay float32."""
    from ..files import require_absent
    from ..interchange.reading import read_checkpoint

    require_absent(out)
    checkpoint = read_checkpoint(source)
    checkpoint.save(out)
    millions = sum(weight.numel() for weight in checkpoint.weights.values()) / 1e6
    print(f"{out}: {millions:.1f} M weights in float32, task {checkpoint.spec.task}, from {source}")


def open_source(path: Path, cfg: ConvertConfig) -> Source:
    """The file or store; the task's environment describes one that doesn't describe itself."""
    from ..data.formats.reading import open_source as open_any

    described = None if cfg.task is None else task_env_args(cfg.task, cfg.plugins)
    source = open_any(path, described)
    if described is not None and source.env_args is not described:
        note(f"{path} says in which environment it was made: task={described.env_name} isn't used")
    return source


def task_env_args(task: TaskConfig, plugins: list[str]) -> EnvArgs:
    """The task's environment, described as robomimic does.

    Raises:
        InputError: it can't be made.
    """
    from ..data.formats.env_args import GYM_TYPE, EnvArgs

    where, env = f"task {task.name}", task_env(task, plugins)
    described = getattr(env.unwrapped, "env_args", None)
    env.close()
    if described is not None:
        return EnvArgs.parse(described, where)
    return EnvArgs(str(task.env.id), task.env.kwargs, None, GYM_TYPE, where)


def note(line: str) -> None:
    """A line for the person at the terminal, past the progress bar."""
    from tqdm import tqdm

    tqdm.write(f"paradiffpolicy: note: {line}", file=sys.stderr)
