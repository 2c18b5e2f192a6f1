"""A window over several processes: each calls the network on its share of the nodes.

Every process runs the same driver on the same noise and comes to the same decisions; once per
iteration they exchange the network's outputs.  Start them with ``torchrun``:

    torchrun --nproc-per-node 2 -m paradiffpolicy evaluate sampler.paraddpm.evaluate=sharded
"""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .driver import NodeDenoise, evaluate_active


class Sharded:
    """An ``Evaluate``: the window's nodes split evenly, one all-gather per iteration.

    Args:
        group: the processes; all by default.

    Raises:
        InputError: torch.distributed isn't initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("evaluate=sharded needs several processes: start it with torchrun")
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def check(self, window: int) -> None:
        """Raises ``InputError`` if some process would never have a node."""
        if self.world > window:
            raise InputError(
                f"{self.world} processes for a window of {window} nodes: start at most {window}, or widen it"
            )

    def __call__(self, denoise: NodeDenoise, x: Tensor, node: Tensor, active: Tensor) -> Tensor:
        """See ``driver.Evaluate``; all processes get the whole window."""
        share = math.ceil(len(x) / self.world)
        mine = slice(self.rank * share, (self.rank + 1) * share)
        part = x.new_zeros(share, *x.shape[1:])
        if len(x[mine]):
            part[: len(x[mine])] = evaluate_active(denoise, x[mine], node[mine], active[mine])
        whole = x.new_empty(share * self.world, *x.shape[1:])
        dist.all_gather_into_tensor(whole, part, group=self.group)
        return whole[: len(x)]


LONGEST_WAIT = timedelta(days=7)
"""For what one process does while the others wait, as an evaluation.  One that ends is noticed at once."""


def join_from_environment(device: str) -> int:
    """Joins the processes that torchrun started, if it did; this process's rank."""
    if not dist.is_torchelastic_launched():
        return 0
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a process, a GPU
    dist.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    return dist.get_rank()
