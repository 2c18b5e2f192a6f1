"""Describes what there is: machine, task, checkpoint, dataset."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..provenance import machine
from ..tables import console, pairs, table
from .building import choose_device
from .environments import contract, task_env
from .locating import locate, locate_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from .parts import TaskConfig
    from .schema import InfoConfig

SCANNED_BYTES = 2**24
"""As much of a field is in memory at once."""


def info(cfg: InfoConfig) -> None:
    """Describes the named files; without any, the machine, the task, its checkpoint and its dataset."""
    screen = console()
    if cfg.paths:
        # All of them are read before the first is shown: a mistyped name is the last line, and alone.
        paths = [locate_checkpoint(path, "paths") for path in cfg.paths]
        views = [describe(path, place) for path, place in zip(paths, pictures(paths, cfg.out), strict=True)]
        for view in [view for each in views for view in each]:
            screen.print(view)
        return
    choose_device(cfg)
    screen.print(pairs("machine", machine()))
    screen.print(describe_task(cfg.task, cfg.plugins))
    policy = cfg.checkpoint
    if policy not in (None, cfg.task.checkpoint):  # the task's own may just not be trained yet
        policy = str(locate_checkpoint(policy))
    for name, path in (("checkpoint", policy), ("dataset", cfg.dataset)):
        if path is None or not locate(path, name).exists():
            screen.print(f"{name} {path or 'null'}: not there")
            continue
        found = locate(path, name)
        for view in describe(found, pictures([found], cfg.out)[0]):
            screen.print(view)


def describe_task(task: TaskConfig, plugins: list[str]) -> Table:
    """Builds a table of what a task needs, with what there is and where it comes from.

    The environment is made, reset, and steps once.
    """
    from ..environment import control_rate, hold_action, picture, succeeded
    from ..task import ACTION_KINDS, contract_size

    agreed = contract(task)
    rows: list[dict[str, object]] = []

    def need(name: str, where: str, find: Callable[[], object]) -> None:
        try:
            rows.append({"need": name, "found": find(), "from": where})
        except InputError as error:
            rows.append({"need": name, "found": f"MISSING: {error}", "from": where})

    def known(value: object, otherwise: str) -> object:
        return otherwise if value is None else value

    need("observed fields", "observation", lambda: ", ".join(f.key for f in agreed.observation) or "none")
    need("numbers observed", "observation's shapes", lambda: contract_size(agreed.observation) or "not known")
    need("action", "action.kind", lambda: f"{agreed.action_kind}: {ACTION_KINDS[agreed.action_kind]}")
    try:
        env = task_env(task, plugins)
    except InputError as error:
        rows.append({"need": "environment", "found": f"MISSING: {error}", "from": "env"})
        return table(f"task {task.name}", rows, left=("found", "from"))
    with contextlib.closing(env):
        env.reset(seed=0)
        hold = hold_action(env)
        action = env.action_space.sample() if hold is None else hold
        _, reward, terminated, _, after = env.step(action)
        missing = [key for key in task.record if key not in after]
        keys = task.success_key or "info: success, is_success"
        need("environment", "env", lambda: task.env.id)
        need("observation", "observation_space", lambda: env.observation_space)
        need("action", "action_space", lambda: env.action_space)
        need("control_hz", "control_hz, else the environment", lambda: control_rate(env, task.control_hz))
        need("reward of a step", "step", lambda: f"{float(reward):g}")
        done = "unknown: set success_key, to terminated where termination is success"
        need("success", keys, lambda: known(succeeded(terminated, after, task.success_key), done))
        need("holds still", "hold_action", lambda: known(hold, "unknown: no attribute hold_action"))
        need("picture", "picture(size), else render()", lambda: picture(env, 64).shape)
        need(
            "record",
            "info",
            lambda: f"MISSING: {missing}" if missing else ", ".join(task.record) or "nothing",
        )
    return table(f"task {task.name}", rows, left=("found", "from"))


def pictures(paths: Sequence[Path], out: str | None) -> list[Path | None]:
    """Where the pictures of datasets are written to, also of those of the same name; None: nowhere."""
    names: list[str] = []
    for path in paths:
        again = sum(path.stem == other.stem for other in paths[: len(names)])
        names.append(f"{path.stem}-{again + 1}.png" if again else f"{path.stem}.png")
    return [Path(out) / name if out else None for name in names]


def describe(path: Path, picture: Path | None) -> list[Table]:
    """Tables about a checkpoint, or about a dataset, with what is unusual in it, and a picture where one is
    wanted; raises as ``describe_path`` does."""
    from ..interchange.reading import is_checkpoint
    from .inspecting import inspected

    views = describe_path(path)
    return views if is_checkpoint(path) else [*views, *inspected(path, picture)]


def describe_path(path: Path) -> list[Table]:
    """Tables about a dataset or a checkpoint.

    Raises:
        InputError: there is nothing, it is none of these, or it is damaged.
    """
    from ..checkpoint import METADATA
    from ..data.formats.reading import format_of
    from ..interchange.reading import is_checkpoint

    if not path.exists():
        raise InputError(f"nothing at {path}: name a dataset or a checkpoint's folder")
    if is_checkpoint(path):
        return describe_checkpoint(path) if (path / METADATA).exists() else describe_imported(path)
    kind = format_of(path)
    if (
        kind == "zarr"
        and path.is_dir()
        and not any((path / name).exists() for name in ("zarr.json", ".zgroup", "data", "meta"))
    ):
        raise InputError(
            f"{path} is neither a dataset nor a checkpoint (it has no {METADATA}): name such a folder"
        )
    describers = {"zarr": describe_store, "robomimic": describe_hdf5}
    return describers.get(kind, describe_source)(path)


def describe_checkpoint(path: Path) -> list[Table]:
    """What it was made for, from, and how well it does.

    Raises:
        InputError: it isn't a checkpoint.
    """
    from ..checkpoint import read_description

    about = read_description(path)
    training = about.info.get("training", {})
    return [
        pairs(
            f"checkpoint {path}",
            {
                **asdict(about.spec),
                "weights": about.weights_file,
                "trained on": about.info.get("dataset", {}),
                "steps": training.get("step"),
                "minutes": training.get("minutes"),
                "scores": training.get("scores"),
            },
        )
    ]


def describe_imported(path: Path) -> list[Table]:
    """What another project's checkpoint says of itself.

    Raises:
        InputError: it can't be read.
    """
    from ..interchange.reading import read_checkpoint

    checkpoint = read_checkpoint(path)
    return [pairs(f"checkpoint {path}", {**asdict(checkpoint.spec), **checkpoint.info["origin"]})]


def describe_store(path: Path) -> list[Table]:
    """Fields, episodes and attributes of a zarr store.

    Raises:
        InputError: it isn't diffusion_policy's, or damaged.
    """
    import numpy as np

    from ..data.formats.env_args import EnvArgs
    from ..data.formats.store import stated_masks
    from ..data.replay_buffer import ReplayBuffer

    buffer = ReplayBuffer.open(path)
    attributes = buffer.attributes
    lengths = np.diff(buffer.episode_ends, prepend=0)
    about = _of_episodes(lengths, stated_masks(attributes, str(path)))
    if "actions" in attributes:
        about["actions"] = attributes["actions"]
    if "env_args" in attributes:
        about |= EnvArgs.parse(attributes["env_args"], str(path)).describe()
    if "rewards" in buffer.fields and buffer.n_episodes:
        done = [bool(np.any(buffer.episode(k, ["rewards"])["rewards"] > 0)) for k in range(buffer.n_episodes)]
        about["with a reward"] = f"{sum(done)} of {len(done)}"
    if buffer.texts:
        about["texts per episode"] = ", ".join(buffer.texts)
    for field, why in buffer.unreadable.items():
        about[f"data/{field}"] = str(why).removeprefix(f"{buffer.name}: data/{field} ")
    ranges = {}
    for field in buffer.fields:
        span = Span()
        buffer.require_whole(field)
        step = buffer.read(field, 0, 1)
        scanned = max(1, SCANNED_BYTES // max(1, step.nbytes))
        for start in range(0, 1 if step.ndim > 3 else buffer.n_steps, scanned):
            span.add(buffer.read(field, start, start + scanned))
        ranges[f"data/{field}"] = span
    return [pairs(f"dataset {path}", about), fields_table(ranges)]


def describe_hdf5(path: Path) -> list[Table]:
    """Demonstrations, subsets and environment of a robomimic file.

    Raises:
        InputError: it isn't robomimic's, or damaged.
    """
    import numpy as np

    from ..data.formats.robomimic import RobomimicFile

    file = RobomimicFile(path)
    try:
        about = _of_episodes(np.array([file.length(demo) for demo in file.demos]), file.masks)
        if file.env_args is None:
            about["environment"] = "not told: there are no env_args"
        else:
            about |= file.env_args.describe()
        ranges: dict[str, Span] = {}
        counts: dict[str, int] = {}
        done = 0
        for demo in file.demos:
            for field, why in file.fields(demo).items():
                if why is not None:
                    about.setdefault(f"{demo}/{field}", why)
                    continue
                values = file.values(demo, field)
                ranges.setdefault(field, Span()).add(values)
                counts[field] = counts.get(field, 0) + 1
                done += field == "rewards" and bool(np.any(values > 0))
        if "rewards" in ranges:
            about["with a reward"] = f"{done} of {len(file.demos)}"
        for field, count in counts.items():
            if count < len(file.demos):
                about[f"without {field}"] = f"{len(file.demos) - count} demonstrations"
    finally:
        file.close()
    return [pairs(f"dataset {path}", about), fields_table(ranges)]


def describe_source(path: Path) -> list[Table]:
    """Episodes and fields of a dataset of another format.

    Raises:
        InputError: it is damaged.
    """
    import numpy as np

    from ..data.formats.demonstration import fields_of, numbers_of
    from ..data.formats.reading import open_source

    ranges: dict[str, Span] = {}
    with contextlib.closing(open_source(path)) as source:
        about = _of_episodes(np.array([source.length(demo) for demo in source.demos]), source.masks)
        if source.control_hz:
            about["control_hz"] = source.control_hz
        if source.env_args is not None:
            about |= source.env_args.describe()
        if seeds := getattr(source, "seeds", {}):
            about["with a seed"] = f"{len(seeds)} of {len(source.demos)}"
        about |= {f"left out {index}": line for index, line in enumerate(source.skipped, 1)}
        numbers = numbers_of(source)
        for demo in source.demos:
            for field, values in fields_of(source.read(demo, numbers), source.name).items():
                ranges.setdefault(field, Span()).add(values)
        ranges |= {key: Span(shape, "uint8, a camera") for key, shape in source.cameras.items()}
    return [pairs(f"dataset {path}", about), fields_table(ranges)]


@dataclass
class Span:
    """Shape per step, dtype and range of a field, as it is read piece by piece."""

    shape: tuple[int, ...] | None = None
    dtype: str = ""
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: NDArray[Any]) -> None:
        """Values ``[n, ...]``."""
        self.shape, self.dtype = values.shape[1:], str(values.dtype)
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def fields_table(ranges: Mapping[str, Span]) -> Table:
    """A table with a row per field."""
    rows = []
    for field, span in ranges.items():
        shape = " x ".join(map(str, span.shape or ())) or "1"
        low, high = (f"{value:.4g}" if math.isfinite(value) else "" for value in (span.low, span.high))
        rows.append({"field": field, "per step": shape, "dtype": span.dtype, "from": low, "to": high})
    return table("", rows, left=("per step", "dtype"))


def _of_episodes(lengths: NDArray[Any], masks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    about: dict[str, Any] = {"episodes": len(lengths), "steps": int(lengths.sum())}
    if len(lengths):
        about["steps per episode"] = f"{lengths.min()} to {lengths.max()}, {lengths.mean():.1f} on average"
    if masks:
        about["masks"] = ", ".join(f"{name} ({len(kept)})" for name, kept in masks.items())
    return about
