"""One command in several processes: they join, one of them reports, and a failure in one ends all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from .building import choose_device, require_extra

if TYPE_CHECKING:
    from ..training.distributed import OneProcess

PATIENCE = timedelta(seconds=2)
"""For the first process to say itself what is wrong, since mostly all find the same."""
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)
"""Part of the RuntimeError that an exchange with a process raises once that has ended."""


class LostProcessError(InputError):
    """Another of the processes has ended."""


def by_torchrun() -> bool:
    """Whether torchrun started this process, perhaps for accelerate; others set WORLD_SIZE and RANK, too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def one_of_several(cfg: Any) -> Iterator[Any]:
    """Joins the other processes if torchrun started several.  The first reports; the others are silent and
    write to a folder that goes away.

    Raises:
        InputError: they can't join, or another of them has ended.
    """
    if not by_torchrun():
        yield cfg
        return
    import torch.distributed as dist

    from ..sampling.sharded import join_from_environment

    device = choose_device(cfg) if hasattr(cfg, "device") else "cpu"
    try:
        rank = join_from_environment(device)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"processes can't join ({first_line(error)}): start them with torchrun")
    try:
        with noticing_ends(), silenced(cfg) if rank else contextlib.nullcontext():
            yield cfg
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def noticing_ends() -> Iterator[None]:
    """Raises ``LostProcessError`` where an exchange with another process fails since that has ended."""
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise LostProcessError(
            f"another of the processes has ended ({first_line(error)[:160]}): what was saved is kept, and "
            "the same command goes on from there"
        )


@contextlib.contextmanager
def silenced(cfg: Any) -> Iterator[None]:
    """Prints nothing, and writes a command's ``out`` to a folder that goes away."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,  # noqa: PTH123  a stream, not a path
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        if hasattr(cfg, "out"):
            cfg.out = f"{scratch}/out"
        yield


def speaks(error: Exception) -> bool:
    """Whether this process prints an error: of several, only the first that fails does."""
    if not by_torchrun():
        return True
    import torch.distributed as dist

    rank = os.environ.get("RANK", "")
    later = rank.isdecimal() and int(rank) > 0
    failed = f"paradiffpolicy/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:  # torchrun's own store, also for processes that haven't joined
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=PATIENCE)
        if later and not isinstance(error, LostProcessError):
            with contextlib.suppress(RuntimeError):  # the time is over
                store.wait([failed], PATIENCE)
        return int(store.add(failed, 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # there is none, or none any more
        return not later


def joined_processes(device: str) -> OneProcess:
    """The processes that share a training run, which have joined; or this one alone.

    Raises:
        InputError: they are several, and Accelerate isn't installed.
    """
    import torch
    import torch.distributed as dist

    from ..training.distributed import OneProcess, SeveralProcesses

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return OneProcess()
    require_extra("accelerate")
    return SeveralProcesses(torch.device(device))
