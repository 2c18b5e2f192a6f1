"""CUDA graphs: one launch runs a whole plan, or an iteration.

Preconditions, on top of a program's (``program``): its tensors are on a CUDA device.  Noise is drawn
before a plan and copied into the graph's memory, so no generator is captured.  Captures are made on a
stream of their own, after a warm-up there, in a memory pool of their own per graph, and thread-local,
so that other threads may go on using the device; but one at a time, and without the garbage collector,
since a graph that is freed by the capturing thread ends the capture.

Its control flow is ``graphs``, which the tests run on the emulated device; tests marked ``cuda`` run it
on a real one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...models.matmul_unet1d import Windows
from ...models.precision import bfloat16_pays
from ..driver import State
from .fusion import fused
from .graphs import Graphs, WhileLoop
from .program import Backend, CaptureError, Program

log = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before a capture: libraries choose their algorithms and allocate in the first."""


_CAPTURE = threading.Lock()
"""A process captures one graph at a time: the beginning of a capture waits for the whole device, which
another capture forbids."""


def cuda_graph_backend(*, tf32: bool = False, fuse: bool = True) -> Backend:
    """The backend that captures programs of CUDA tensors.

    Args:
        tf32: float32 products may be computed in TF32, which has 10 bits of mantissa.
        fuse: kernels are fused, where Triton is installed.

    Raises:
        CaptureError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise CaptureError("capture=cuda_graph needs a CUDA device: capture=auto takes what there is")
    if fuse and importlib.util.find_spec("triton") is None:
        log.info("capture: kernels aren't fused, since Triton isn't installed: pip install triton")
        fuse = False
    return Backend(
        "cuda_graph",
        lambda program: cuda_graphs(program, tf32, fuse=fuse),
        make_convolution=Windows,
        fastest="bf16" if bfloat16_pays(torch.device("cuda")) else "f16",
    )


def cuda_graphs(program: Program, tf32: bool, *, fuse: bool) -> Graphs:
    """Captures a program on its inputs' device."""
    devices = {value.device for value in program.inputs.values()}
    (device, *others) = devices
    if others or device.type != "cuda":
        raise CaptureError(f"needs all inputs on one CUDA device, not on {sorted(map(str, devices))}")
    cuda = CudaDevice(device, tf32)
    if fuse:
        log.info("capture: kernels are being fused, in tens of seconds (fuse=false: none are)")
        try:
            with cuda.active(), tensor_cores(tf32):
                smaller = fused(program)
            return Graphs(smaller, cuda)
        except CaptureError as error:
            log.warning("capture: kernels aren't fused, since the plan %s", error)
    return Graphs(program, cuda)


@contextlib.contextmanager
def tensor_cores(tf32: bool) -> Iterator[None]:
    """Switches TF32 on or off for captures inside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def _nothing_freed() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaGraph:
    """A ``graphs.Graph``."""

    def __init__(self, function: Callable[[], State]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        before = torch.cuda.memory_reserved()
        self.graph = torch.cuda.CUDAGraph()
        with (
            torch.inference_mode(),
            _nothing_freed(),
            torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self.result = function()
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        self.graph.replay()


class CudaDevice:
    """A ``graphs.Device``: a CUDA device, which needn't be the current one."""

    def __init__(self, device: torch.device, tf32: bool) -> None:
        self.device, self.tf32 = device, tf32
        self.name = f"CUDA graph on {torch.cuda.get_device_name(device)}"
        self.while_loop = while_node()

    def active(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def capture(self, function: Callable[[], State]) -> CudaGraph:
        try:
            with _CAPTURE, tensor_cores(self.tf32):
                return CudaGraph(function)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise CaptureError(f"failed to be captured ({str(error).splitlines()[0]})")

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def host_flag(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool, pin_memory=True)


def while_node() -> WhileLoop | str:
    """A loop inside a graph, or why there is none."""
    wanted = "while nodes need PyTorch 2.14.1 and CUDA 12.4 or newer"
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if cuda < (12, 4):
        return f"{wanted}, not CUDA {torch.version.cuda}"
    nodes: Any
    try:
        from torch._higher_order_ops import cudagraph_conditional_nodes as nodes

        loop = nodes.while_loop_node
    except (ImportError, AttributeError):
        return f"{wanted}, not PyTorch {torch.__version__}"

    def while_loop(again: Any, body: Any, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            return tuple(loop(again, body, carried, ()))
        body(*carried)  # a warm-up: the loop's kernels once
        again(*carried)
        return carried

    return while_loop
