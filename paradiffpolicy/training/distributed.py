"""Training in one process, or in several that share every step's batch.

All that is random about a step is a function of (seed, step): every process draws it for the whole batch
and takes its own rows.  The loss is the mean over the whole batch, and so are the gradients that all
processes step with.  So weights, moments and averages stay alike in all of them, and are a single
process's to rounding, however many there are; a run is resumed by any number.

Only the first process writes, logs, evaluates, and judges whether the run has diverged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .objective import WHOLE, Part


class OneProcess:
    """The only process of a run.

    Attributes:
        part: of every batch that this process computes.
        main: whether it is the first process, which writes, logs and evaluates.
    """

    part: Part = WHOLE
    main: bool = True

    def prepare(self, form: nn.Module) -> nn.Module:
        """Makes what a training step calls of a network's form."""
        return form

    def unsynchronized(self, form: nn.Module) -> AbstractContextManager[object]:
        """Within it gradients are only added up, not yet exchanged with other processes."""
        return contextlib.nullcontext()

    def total(self, value: Tensor) -> Tensor:
        """The sum of a scalar over all processes."""
        return value

    def require_same_step(self, step: int, folder: Path) -> None:
        """Makes sure that all processes resumed the same save.

        Raises:
            InputError: the folder holds another one elsewhere, as on another machine.
        """

    def wait(self) -> None:
        """Returns when all processes have come here."""


class SeveralProcesses(OneProcess):
    """One of the processes that ``torchrun`` or ``accelerate launch`` started, which have joined.

    Accelerate wraps what is called in a step, in PyTorch's ``DistributedDataParallel``; its hooks are on the
    network's own parameters, which every form of it has.  Optimizer and data aren't wrapped: each process
    computes the same update, and the windows of a step are a function of its number.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        # Its mixed precision would wrap forward; autocast in the objective has chosen the form already.
        self._accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.part = Part(self._accelerator.process_index, self._accelerator.num_processes)
        self.main = self._accelerator.is_main_process

    def prepare(self, form: nn.Module) -> nn.Module:
        prepared: nn.Module = self._accelerator.prepare_model(form)
        return prepared

    def unsynchronized(self, form: nn.Module) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._accelerator.no_sync(form)
        return context

    def total(self, value: Tensor) -> Tensor:
        summed: Tensor = self._accelerator.reduce(value, "sum")
        return summed

    def require_same_step(self, step: int, folder: Path) -> None:
        steps = self._accelerator.gather(torch.tensor([step], device=self._accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"{folder} holds a run at step {min(steps)} for one process and {max(steps)} for another: "
                "name a folder that all machines share"
            )

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def require_rows(n_rows: int, parts: int) -> None:
    """Raises ``InputError`` unless every process has a row of the batch whenever it computes."""
    if n_rows < parts:
        raise InputError(
            f"a batch of {n_rows} windows can't be shared out in {parts} parts (processes times "
            "training.accumulate): a larger batch_size, or fewer of them"
        )


def backward(
    processes: OneProcess, form: nn.Module, loss: Callable[[Part], Tensor], accumulate: int
) -> Tensor:
    """Computes a step's gradients: of the mean loss over the whole batch, in all processes.

    Args:
        form: what ``processes.prepare`` made.
        loss: a part's share of the batch's loss; it calls ``form``.
        accumulate: pieces that a process computes its rows in, one after the other, to save memory.

    Returns:
        The batch's loss, a scalar without gradient.
    """
    pieces, shares = processes.part.split(accumulate), list[Tensor]()
    for piece in pieces:
        last = piece is pieces[-1]
        with contextlib.nullcontext() if last else processes.unsynchronized(form):
            share = loss(piece)
            # Gradients are averaged over the processes; shares of the loss have to be added.
            (share * processes.part.count).backward()
        shares.append(share.detach())
    return processes.total(torch.stack(shares).sum())
