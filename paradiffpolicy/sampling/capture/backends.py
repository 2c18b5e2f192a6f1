"""Every backend by name."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import InputError, nearest, require_count
from .cuda_graph import cuda_graph_backend
from .emulated import EmulatedDevice
from .graphs import Graphs
from .openvino import openvino_backend
from .program import CapturedProgram, CaptureError, Program
from .sampler import EAGER, Backend

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where compiled models are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paradiffpolicy"


@dataclass(frozen=True)
class CaptureSettings:
    """How plans are captured.

    Attributes:
        backend: a name in ``BACKENDS``.
        precision: of the network, a name in ``models.precision.PRECISIONS``.
        threads: of a captured call on a CPU; None: as many as the backend likes.
        pinning: of those threads to cores; None: as the backend likes.
        tf32: whether a GPU may compute float32 products in TF32.
        cache: a folder for compiled models; None: none are kept.
        budget: bytes of memory that a sampler's programs may keep, for all shapes.
    """

    backend: str = "eager"
    precision: str = "f32"
    threads: int | None = None
    pinning: bool | None = None
    tf32: bool = False
    cache: Path | None = None
    budget: int = 2**30

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"unknown capture {self.backend!r}{nearest(self.backend, BACKENDS)}")
        require_count(budget=self.budget, **({} if self.threads is None else {"threads": self.threads}))

    def backends(self, device: torch.device) -> list[Callable[[], Backend]]:
        """What to try on a device, best first; making one raises ``CaptureError`` if it can't be had."""
        return BACKENDS[self.backend](self, device)


def _eager(settings: CaptureSettings, device: torch.device) -> list[Callable[[], Backend]]:
    return [lambda: EAGER]


def _emulated(settings: CaptureSettings, device: torch.device) -> list[Callable[[], Backend]]:
    return [lambda: Backend("emulated", lambda program: Graphs(program, EmulatedDevice()))]


def _openvino(settings: CaptureSettings, device: torch.device) -> list[Callable[[], Backend]]:
    arithmetic = "f32" if settings.precision == "int8" else settings.precision

    def make() -> Backend:
        if device.type != "cpu":
            raise CaptureError(f"capture=openvino computes on the CPU, not on {device}: device=cpu")
        return openvino_backend(
            arithmetic, threads=settings.threads, pinning=settings.pinning, cache=settings.cache
        )

    return [make]


def _cuda_graph(settings: CaptureSettings, device: torch.device) -> list[Callable[[], Backend]]:
    def make() -> Backend:
        if device.type != "cuda":
            raise CaptureError(
                f"capture=cuda_graph needs device=cuda, not {device}: capture=auto takes what there is"
            )
        return cuda_graph_backend(tf32=settings.tf32)

    return [make]


def _auto(settings: CaptureSettings, device: torch.device) -> list[Callable[[], Backend]]:
    best = _cuda_graph if device.type == "cuda" else _openvino
    return [*best(settings, device), *_eager(settings, device)]


BACKENDS: dict[str, Callable[[CaptureSettings, torch.device], list[Callable[[], Backend]]]] = {
    "auto": _auto,
    "eager": _eager,
    "cuda_graph": _cuda_graph,
    "openvino": _openvino,
    "emulated": _emulated,
}


def with_fallback(backends: list[Callable[[], Backend]]) -> Backend:
    """The first backend that can be had; what it can't freeze the next does, and a line in the log
    says why.

    Raises:
        CaptureError: none can be had.
    """
    made: list[Backend] = []
    for position, make in enumerate(backends):
        try:
            made.append(make())
        except CaptureError as error:
            if position == len(backends) - 1:
                raise
            log.warning("capture: %s; trying the next way", error)

    def capture_program(program: Program) -> CapturedProgram:
        for backend, after in itertools.pairwise(made):
            try:
                return backend.capture_program(program)
            except CaptureError as error:
                log.warning("capture: %s: the plan %s; %s instead", backend.name, error, after.name)
        return made[-1].capture_program(program)

    return replace(made[0], capture_program=capture_program)
