"""Where figures come from: the machine, the versions, the hashes of weights and data, the programs."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "gymnasium", "pymunk", "mujoco", "robosuite", "openvino", "diffusers")
"""Packages whose versions may change a figure; torch is named with the machine."""


def machine() -> dict[str, Any]:
    """The machine and the software that a figure was measured with."""
    import torch

    from . import __version__

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
    """``machine`` in a few words."""
    gpu = values["gpu"] or "no GPU"
    return f"{values['cpu']}, {values['cores']} cores, {gpu}; torch {values['torch']}"


def versions() -> dict[str, str]:
    """Versions of those of ``PACKAGES`` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes() -> int:
    """This process's memory that is in use; its peak where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def anonymous_bytes() -> int:
    """This process's memory without the pages of files, which the system takes back when it needs them."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return resident_bytes()
    resident, shared = statm.read_text().split()[1:3]
    return (int(resident) - int(shared)) * resource.getpagesize()


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library would keep it: compiling takes several times
    what it leaves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def sha256(path: Path) -> str:
    """The hash of a file's content; of a folder: of its files' names and hashes, in the order of names."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = (f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def code_sha256() -> str:
    """The hash of this package's source and configs: two reports of one hash were made by the same code."""
    package = Path(__file__).parent
    folders = (package, package / "envs", package / "configs")  # two of them may be links
    files = {file for folder in folders for kind in ("*.py", "*.yaml") for file in folder.rglob(kind)}
    lines = sorted(f"{file.relative_to(package).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def about(checkpoint: Path | None, /, **settings: Any) -> dict[str, Any]:
    """The head of a report: the command, the day, the hash of the code, the settings given, machine,
    versions; of a checkpoint also its path, the hash of its weights (of all of it, if it is another
    project's), the data that they were trained on."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "paradiffpolicy")
    head: dict[str, Any] = {
        "command": shlex.join([program, *sys.argv[1:]]),
        "date": f"{datetime.date.today()}",
    }
    if checkpoint is not None:
        described = checkpoint / "policy.json"
        description = json.loads(described.read_text()) if described.exists() else {}
        weights = checkpoint / description["weights"]["file"] if description else checkpoint
        head |= {
            "checkpoint": str(checkpoint),
            "weights_sha256": sha256(weights),
            "data": description.get("info", {}).get("dataset"),
        }
    code = {"code_sha256": code_sha256()}
    return {**head, **code, **settings, "machine": machine(), "versions": versions()}


def programs(policies: Mapping[str, Any]) -> dict[str, Any]:
    """The captured programs of each policy: by which method, in which precision, for how many shapes, in how
    many megabytes."""
    return {
        name: {
            "how": sorted({program.method for program in policy.programs}),
            "precision": policy.capture.precision,
            **{name: getattr(policy.driver, name, None) for name in ("window", "tolerance")},
            "shapes": len(policy.programs),
            "megabytes": round(sum(program.nbytes for program in policy.programs) / 2**20, 1),
        }
        for name, policy in policies.items()
    }


def in_words(captured: Mapping[str, Any]) -> str:
    """``programs`` in a few words."""
    how = " or ".join(sorted({method for entry in captured.values() for method in entry["how"]}))
    shapes = sum(entry["shapes"] for entry in captured.values())
    megabytes = sum(entry["megabytes"] for entry in captured.values())
    precisions = " or ".join(sorted({entry["precision"] for entry in captured.values()}))
    size = f" ({shapes} programs, {megabytes:.0f} MB)" if megabytes else ""
    return f"{how}, {precisions}{size}" if how else "not captured"
