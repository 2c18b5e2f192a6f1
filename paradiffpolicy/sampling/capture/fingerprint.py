"""Names for compiled programs that hold in every process."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(*parts: Any) -> str:
    """A hash of settings, functions and tensors, the same in every process.  Of other objects their
    ``repr`` counts, which at worst is never the same again."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, bytes):
            digest.update(part)
        elif isinstance(part, list | tuple):
            digest.update(f"{len(part)}".encode())
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        elif is_dataclass(part):
            digest.update(type(part).__name__.encode())
            for field in fields(part):
                digest.update(field.name.encode())
                add(getattr(part, field.name))
        elif inspect.isroutine(part) or isinstance(part, type):
            digest.update(f"{part.__module__}.{part.__qualname__}".encode())
        else:
            digest.update(repr(part).encode())

    for part in parts:
        add(part)
    return digest.hexdigest()
