"""Reads the tensors of a policy of diffusion_policy by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import finite_weight
from ..data.normalizer import Normalizer
from ..errors import InputError
from ..models.networks import check_weights
from ..types import PolicySpec
from .torch_pickle import StoredTensor, TorchFile


@dataclass(frozen=True)
class StoredPolicy:
    """A policy's state dict in an open file, of which only what is wanted is read.

    Attributes:
        file: that it lies in.
        tensors: by their names there.
    """

    file: TorchFile
    tensors: Mapping[str, StoredTensor]

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    def read(self, name: str) -> Tensor:
        """A tensor's numbers."""
        return self.file.read(self.tensors[name])

    def weights(self, spec: PolicySpec, names: Mapping[str, str]) -> dict[str, Tensor]:
        """The weights of a spec's network, float32.

        Args:
            names: of the weights here, and of those in the file.

        Raises:
            InputError: one is missing, unknown, of another shape, or not finite.
        """
        shaped: dict[str, Any] = {ours: self.tensors[theirs] for ours, theirs in names.items()}
        check_weights(spec, shaped)
        return {ours: finite_weight(theirs, self.read(theirs), self.path) for ours, theirs in names.items()}

    def normalizer(self, part: str) -> Normalizer:
        """The normalizer of actions or of a part of observations.

        Raises:
            InputError: the file has none, or it isn't finite.
        """
        names = [f"normalizer.params_dict.{part}.{name}" for name in ("scale", "offset")]
        for name in names:
            if name not in self.tensors:
                raise InputError(f"{self.path} has no {name}, its normalizer: save the checkpoint again")
        try:
            return Normalizer(*(self.read(name).double() for name in names))
        except InputError as error:
            raise InputError(f"{self.path}, {part!r:.60}: {error}")
