"""Capture settings, and every backend by name."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import InputError, require_count
from ...models.precision import CHOICES, check_precision
from ...registry import Registry
from .cuda_graph import cuda_graph_backend, tensor_cores
from .emulated import EmulatedDevice
from .graphs import Graphs
from .openvino import openvino_backend
from .program import EAGER, Backend, CaptureError

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where compiled models are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paradiffpolicy"


MakeBackends = Callable[["CaptureSettings", torch.device], list[Backend]]
"""Settings and a device to the backends to use, in order of preference.  Raises ``CaptureError`` if there are
none here."""


@dataclass(frozen=True)
class CaptureSettings:
    """How plans are to be captured; ``Policy.programs`` says how they were.

    Attributes:
        backend: a name in ``BACKENDS``, or a function like those.
        precision: of the network, a name in ``models.precision.CHOICES``.
        threads: of a captured call on a CPU; None: as many as the backend likes.
        pinning: of those threads to cores; None: as the backend likes.
        tf32: whether a GPU may compute float32 products in TF32.
        fuse: whether a captured program's kernels are fused on a GPU, which takes tens of seconds at its
            first plan.
        cache: a folder for compiled models; None: none are kept.
        budget: bytes of memory that a sampler's programs may keep, for all shapes.
    """

    backend: str | MakeBackends = "eager"
    precision: str = "f32"
    threads: int | None = None
    pinning: bool | None = None
    tf32: bool = False
    fuse: bool = True
    cache: Path | str | None = None
    budget: int = 2**30

    def __post_init__(self) -> None:
        if not callable(self.backend):
            BACKENDS.named(self.backend)
        check_precision(self.precision, CHOICES)
        for name in ("pinning", "tf32", "fuse"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (value is None and name == "pinning")):
                raise InputError(f"{name}={value!r:.40} must be true or false")
        if not isinstance(self.cache, str | Path | None):
            raise InputError(f"cache={self.cache!r:.40} must be a folder, or null")
        require_count(budget=self.budget, **({} if self.threads is None else {"threads": self.threads}))

    def resolved(self, device: torch.device) -> CaptureSettings:
        """These settings with the precision that ``auto`` stands for: the first backend's fastest, or f32
        if that captures nothing.

        Raises:
            CaptureError: there are no backends here.
        """
        if self.precision != "auto":
            return self
        plain = replace(self, precision="f32")
        first = plain.backends(device)[0]
        return replace(plain, precision="f32" if first.capture_program is None else first.fastest)

    def backends(self, device: torch.device) -> list[Backend]:
        """The backends to use on a device, in order of preference; the precision isn't ``auto``.

        Raises:
            CaptureError: there are none here.
        """
        make = self.backend if callable(self.backend) else BACKENDS.named(self.backend)
        return make(self, device)


def _eager(settings: CaptureSettings, device: torch.device) -> list[Backend]:
    if device.type != "cuda":
        return [EAGER]
    return [replace(EAGER, arithmetic=functools.partial(tensor_cores, settings.tf32))]


def _emulated(settings: CaptureSettings, device: torch.device) -> list[Backend]:
    return [Backend("emulated", lambda program: Graphs(program, EmulatedDevice()))]


def _openvino(settings: CaptureSettings, device: torch.device) -> list[Backend]:
    if device.type != "cpu":
        raise CaptureError(f"capture=openvino computes on the CPU, not on {device}: device=cpu")
    arithmetic = "f32" if settings.precision == "int8" else settings.precision
    return [
        openvino_backend(
            arithmetic,
            threads=settings.threads,
            pinning=settings.pinning,
            cache=None if settings.cache is None else Path(settings.cache).expanduser(),
        )
    ]


def _cuda_graph(settings: CaptureSettings, device: torch.device) -> list[Backend]:
    if device.type != "cuda":
        raise CaptureError(
            f"capture=cuda_graph needs device=cuda, not {device}: capture=auto takes what there is"
        )
    return [cuda_graph_backend(tf32=settings.tf32, fuse=settings.fuse)]


def _auto(settings: CaptureSettings, device: torch.device) -> list[Backend]:
    eager = _eager(settings, device)
    try:
        if device.type == "cuda":
            return [*_cuda_graph(settings, device), *eager]
        return [*_openvino(settings, device), *eager]
    except CaptureError as error:
        log.warning("capture: %s; eager instead", error)
        return eager


BACKENDS: Registry[MakeBackends] = Registry(
    "capture",
    {
        "auto": _auto,
        "eager": _eager,
        "cuda_graph": _cuda_graph,
        "openvino": _openvino,
        "emulated": _emulated,
    },
)
"""Every backend by name; ``auto`` is the best one here, and eager for what it can't capture."""
