"""What there is: machine, checkpoint, dataset, captured programs."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .building import Config, choose_device, locate

if TYPE_CHECKING:
    from ..policy import Policy


def info(cfg: Config) -> None:
    """What is installed, on what machine, and what a checkpoint and a dataset are."""
    from rich.console import Console
    from rich.table import Table

    from ..checkpoint import read_metadata
    from ..data.replay_buffer import ReplayBuffer

    console = Console(width=None if sys.stdout.isatty() else 120)

    def show(title: str, values: Mapping[str, Any]) -> None:
        view = Table(title=title, title_justify="left", show_header=False)
        for key, value in values.items():
            view.add_row(key, str(value))
        console.print(view)

    choose_device(cfg)
    show("machine", machine())
    metadata = read_metadata(locate(cfg.checkpoint))
    training = metadata.get("info", {}).get("training", {})
    show(
        f"checkpoint {cfg.checkpoint}",
        {
            **metadata["spec"],
            "weights": metadata["weights"]["file"],
            "trained on": metadata.get("info", {}).get("dataset", {}),
            "steps": training.get("step"),
            "minutes": training.get("minutes"),
            "scores": training.get("scores"),
        },
    )
    path = locate(cfg.dataset)
    if not path.exists():
        console.print(f"dataset {cfg.dataset}: not there")
        return
    buffer = ReplayBuffer.open(path)
    shapes = {field: buffer.read(field, 0, 1).shape[1:] for field in buffer.fields}
    show(
        f"dataset {cfg.dataset}",
        {
            "episodes": buffer.n_episodes,
            "steps": buffer.n_steps,
            **{f"data/{k}": v for k, v in shapes.items()},
        },
    )


def machine() -> dict[str, Any]:
    """What a figure should be read with."""
    import torch

    from .. import __version__

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
    return {
        "paradiffpolicy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe(values: Mapping[str, Any]) -> str:
    gpu = values["gpu"] or "no GPU"
    return f"{values['cpu']}, {values['cores']} cores, {gpu}; torch {values['torch']}"


def programs(policies: Mapping[str, Policy]) -> dict[str, Any]:
    """What each policy has captured: how, for how many shapes, and the megabytes that it keeps."""
    return {
        name: {
            "how": sorted({program.rung for program in policy.programs}),
            "shapes": len(policy.programs),
            "megabytes": round(sum(program.nbytes for program in policy.programs) / 2**20, 1),
        }
        for name, policy in policies.items()
    }


def in_words(captured: Mapping[str, Any]) -> str:
    how = " or ".join(sorted({rung for entry in captured.values() for rung in entry["how"]}))
    shapes = sum(entry["shapes"] for entry in captured.values())
    megabytes = sum(entry["megabytes"] for entry in captured.values())
    return f"{how} ({shapes} programs, {megabytes:.0f} MB)" if megabytes else how or "not captured"
