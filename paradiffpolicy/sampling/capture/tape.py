"""Records a function of tensors as a list of aten calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..driver import State

Op = torch._ops.OpOverload


@dataclass(frozen=True)
class Call:
    """One aten call with its very tensors."""

    op: Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> Iterator[Tensor]:
        return (value for value in tree_iter((self.args, self.kwargs)) if isinstance(value, Tensor))

    @property
    def outputs(self) -> list[Tensor]:
        return [value for value in tree_iter(self.output) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Tape:
    """The calls of one function, in order, and its result."""

    calls: list[Call]
    result: State


class Recorder(TorchDispatchMode):
    """Records calls while it is active; ``check`` may refuse one by raising."""

    def __init__(
        self, check: Callable[[Op, tuple[Any, ...], dict[str, Any]], None], whole: frozenset[Op] = frozenset()
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.check, self.whole = check, whole

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported for that, which takes two seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        if func not in self.whole:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        self.calls.append(Call(func, args, kwargs, output))
        return output


def record(
    function: Callable[[], State],
    check: Callable[[Op, tuple[Any, ...], dict[str, Any]], None] = lambda op, args, kwargs: None,
    whole: frozenset[Op] = frozenset(),
) -> Tape:
    """Runs ``function`` and writes down its calls.

    Args:
        check: called with every call before it is made.
        whole: composite operations to record as one call, instead of their parts.
    """
    with torch.inference_mode(), Recorder(check, whole) as recorder:
        result = function()
    return Tape(recorder.calls, result)
