"""Settings of the commands that get and convert datasets."""

from __future__ import annotations

from dataclasses import dataclass

from .parts import CommandConfig, TaskConfig
from .settings import among, lazily, out_setting, path_setting, setting


@dataclass
class DownloadConfig(CommandConfig):
    """Downloads published demonstrations to where 'train' looks for them, and checks them; without a name,
    lists them. Goes on where it was interrupted; what is there already is checked and never replaced.

    Examples:
      paradiffpolicy download pusht
          diffusion_policy's demonstrations of PushT
      paradiffpolicy download lift can square
          robomimic's
      paradiffpolicy download pusht out=~/demonstrations
          to another folder
    """

    datasets: list[str] = setting([], "what to download", choices=lazily("data.published", "DATASETS"))
    out: str | None = out_setting(
        None, "folder; null: PARADIFFPOLICY_DATA, or ../shared/data, where train looks for them"
    )


@dataclass
class ConvertConfig(CommandConfig):
    """Turns a dataset of any known format into another: zarr stores, robomimic's HDF5 files, folders of npz
    files, LeRobot's datasets; robomimic's with absolute or delta actions. Half a dataset is never written.

    Examples:
      paradiffpolicy convert source=demo.hdf5 out=lift.zarr
          robomimic's, to absolute actions
      paradiffpolicy convert source=demo.hdf5 out=train.zarr mask=train observations=states
          a subset, with observations computed from the states
      paradiffpolicy convert source=outputs/collect/lift.zarr out=lift.hdf5 actions=delta
          for robomimic
    """

    source: str | None = path_setting(None, "a dataset of any known format")
    out: str | None = path_setting(
        None, "what to write, by its ending: NAME.zarr, .hdf5, .npz, .lerobot; must not exist"
    )
    actions: str | None = setting(
        None,
        "absolute: poses in the world; delta: what a delta controller takes; recorded: as they are; null: "
        "absolute, or as recorded where the environment has one kind",
        choices=among("absolute", "delta", "recorded"),
    )
    observations: str = setting(
        "recorded",
        "recorded: as they are; states: computed anew from the recorded states",
        choices=among("recorded", "states"),
    )
    obs_keys: list[str] | None = setting(None, "observations to keep; null: all", some=True)
    control_hz: float | None = setting(
        None, "steps per second, for a format that says so; null: as the source does", above=0
    )
    mask: str | None = setting(None, "a subset, as train or valid; null: every demonstration")
    check: int = setting(3, "demonstrations to play again from their first state; 0: none", minimum=0)
    task: TaskConfig | None = setting(
        None, "task whose environment describes a file or store that doesn't describe itself"
    )
