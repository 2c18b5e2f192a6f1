"""A whole plan as one OpenVINO model: a CPU's equivalent of a graph of kernels.

The program's calls are recorded (``tape``) and translated (``openvino_ops``); the iterations are
the body of a Loop, so that a plan is one call of the model, and its weights are there once, whatever
the number of iterations.

A compiled model is kept on disk, so that only a first start waits for it, and is run from there: its file is
mapped, so that the weights as they were before OpenVINO packed them, which it never reads again, needn't
stay in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import mmap
import os
import platform
import stat
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ...errors import InputError, first_line
from ...files import require_regular, write_atomically
from ...models.matmul_unet1d import Taps
from ...models.precision import bfloat16_pays
from ...provenance import resident_bytes, return_freed_memory
from ..driver import State
from .fingerprint import fingerprint
from .program import Backend, CaptureError, Program, nbytes
from .tape import Tape, record

if TYPE_CHECKING:
    import openvino as ov

log = logging.getLogger(__name__)

PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""The capability that a CPU needs for a precision of arithmetic."""


LARGEST_BATCH = 64
"""Of a call: a larger one takes more memory, and no less time per element."""

OUTPUT = "output."
"""Begins the names of a model's outputs, which must differ from its inputs'."""


@functools.cache
def core() -> ov.Core:
    """One for the process.

    Raises:
        CaptureError: OpenVINO isn't installed.
    """
    try:
        import openvino as ov
    except ImportError:
        raise CaptureError("capture=openvino needs OpenVINO: pip install 'paradiffpolicy[openvino]'")
    return ov.Core()


def openvino_backend(
    precision: str = "f32",
    *,
    threads: int | None = None,
    pinning: bool | None = None,
    cache: Path | None = None,
) -> Backend:
    """The backend that captures programs of CPU tensors.

    Args:
        precision: of the arithmetic, a name in ``PRECISIONS``.
        threads: of a call; None: as many as OpenVINO likes.
        pinning: of threads to cores; None: as OpenVINO likes.
        cache: a folder for compiled models; None: none are kept.

    Raises:
        CaptureError: OpenVINO isn't installed, or the CPU can't compute in that precision.
    """
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if PRECISIONS[precision] not in capabilities:
        raise CaptureError(f"this CPU doesn't compute in {precision}: precision=f32, or int8 weights")
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if pinning is not None:
        options["ENABLE_CPU_PINNING"] = pinning
    return Backend(
        "openvino",
        lambda program: OpenVINO(program, options, cache),
        make_convolution=Taps,
        arithmetic_in_half=True,
        largest_batch=LARGEST_BATCH,
        fastest="bf16" if bfloat16_pays(torch.device("cpu")) and "BF16" in capabilities else "f32",
    )


class OpenVINO:
    """A compiled model with its buffers.

    Attributes:
        nbytes: by how much the process grew for it, but at least what is known of it: OpenVINO tells nothing
            of the memory that it computes in, which is most of it for large batches.
    """

    method = "one OpenVINO model"

    def __init__(self, program: Program, options: dict[str, Any], cache: Path | None) -> None:
        if any(value.device.type != "cpu" for value in program.inputs.values()):
            raise CaptureError("computes on the CPU alone: device=cpu, or another capture")
        compiled, size, before, self._constants = compiled_plan(program, options, cache)
        import openvino as ov

        self.inputs = {name: value.clone() for name, value in program.inputs.items()}
        self.outputs: State = {}
        self.request = compiled.create_infer_request()
        used = {port.any_name for port in compiled.inputs}
        for name, value in self.inputs.items():
            if name in used:
                self.request.set_tensor(name, ov.Tensor(value.numpy(), shared_memory=True))
        for port in compiled.outputs:
            dtype = torch.from_numpy(port.element_type.to_dtype().type(0)[None]).dtype
            value = torch.zeros(tuple(port.shape), dtype=dtype)
            self.outputs[port.any_name.removeprefix(OUTPUT)] = value
            self.request.set_tensor(port.any_name, ov.Tensor(value.numpy(), shared_memory=True))
        with compiling():
            self.request.infer()  # the first call packs weights and allocates what lies between
        if isinstance(self._constants, mmap.mmap):
            self._constants.madvise(mmap.MADV_DONTNEED)
        return_freed_memory()
        self.nbytes = max(nbytes(self.inputs, self.outputs) + size, resident_bytes() - before)

    def __call__(self, inputs: State) -> State:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.request.infer()
        return self.outputs


class Compiled(NamedTuple):
    """A compiled model.

    Attributes:
        model: ready to be called.
        nbytes: of memory for its constants.
        before: the process's memory before it was there.
        constants: what holds them, and must outlive it: a mapped file, or the program.
    """

    model: ov.CompiledModel
    nbytes: int
    before: int
    constants: mmap.mmap | Program


def compiled_plan(program: Program, options: dict[str, Any], cache: Path | None) -> Compiled:
    """The program's model, from the cache if there is one."""
    if cache is not None and program.identity is not None and is_private(cache):
        path = cache / f"{fingerprint(program.identity(), options, surroundings())}.blob"
        kept = kept_plan(path, options)
        if kept is None and keep(newly_compiled(program, options).model, path):
            return_freed_memory()
            kept = kept_plan(path, options)
        if kept is not None:
            return kept
    return newly_compiled(program, options)


def newly_compiled(program: Program, options: dict[str, Any]) -> Compiled:
    """The program's model, compiled now."""
    before = resident_bytes()
    model, size = plan_model(program)
    with compiling():
        return Compiled(core().compile_model(model, "CPU", options), size, before, program)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Turns OpenVINO's errors into ``CaptureError``, so that another backend is tried."""
    try:
        yield
    except RuntimeError as error:
        raise CaptureError(f"can't be compiled by OpenVINO ({first_line(error)})") from error


def is_private(cache: Path) -> bool:
    """Makes the folder if there is none; whether this user alone can put programs there."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = is_own(cache)
    except OSError as error:
        log.warning("capture: %s can't be used (%s); no program is kept", cache, error.strerror)
        return False
    if not private:
        log.warning("capture: others can write to %s; no program is kept: chmod 700, or name another", cache)
    return private


def is_own(path: Path) -> bool:
    """Whether a path is this user's, and no other can write to it."""
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


LARGEST_MODEL = 2**36
"""Bytes of a kept model at most."""

DIGEST = hashlib.sha256().digest_size
"""Bytes at the end of a kept model, the hash of those before."""


def kept_plan(path: Path, options: dict[str, Any]) -> Compiled | None:
    """The compiled model in a file; None if there is none, or if it is damaged."""
    import openvino as ov

    if not os.path.lexists(path):
        return None
    before = resident_bytes()
    try:
        require_regular(path, LARGEST_MODEL)
        if not is_own(path):
            raise ValueError("others can write to it")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        model = np.frombuffer(mapped, np.uint8, len(mapped) - DIGEST)
        if hashlib.sha256(model.data).digest() != mapped[-DIGEST:]:
            raise ValueError("its content isn't what was written")
        compiled = core().import_model(ov.Tensor(model, shared_memory=True), "CPU", options)
        path.touch()  # pruning takes the oldest
    except (RuntimeError, ValueError, OSError, InputError) as error:
        log.warning("capture: %s is damaged (%s); compiling anew", path, first_line(error))
        return None
    return Compiled(compiled, 0, before, mapped)


def keep(compiled: ov.CompiledModel, path: Path) -> bool:
    """Writes a compiled model to a file; whether that went well."""
    try:
        blob = BytesIO()
        compiled.export_model(blob)
        digest = hashlib.sha256(blob.getbuffer()).digest()

        def write(temporary: Path) -> None:
            temporary.touch(mode=0o600)
            with temporary.open("wb") as file:
                file.write(blob.getbuffer())
                file.write(digest)

        write_atomically(path, write)
        prune(path.parent)
    except (RuntimeError, OSError, InputError) as error:
        log.warning("capture: can't keep the compiled model (%s)", error)
        return False
    return True


KEPT_MODELS = 24


def prune(cache: Path) -> None:
    """Leaves the ``KEPT_MODELS`` that were used last."""
    blobs = sorted(cache.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in blobs[KEPT_MODELS:]:
        path.unlink(missing_ok=True)


@functools.cache
def surroundings() -> str:
    """Hashes everything else that a compiled model depends on: versions, this package's code, the CPU."""
    package = Path(__file__).parents[2]
    sources = [path.read_bytes() for path in sorted(package.rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("openvino", "torch")]
    return fingerprint(core().get_property("CPU", "FULL_DEVICE_NAME"), platform.machine(), versions, sources)


def plan_model(program: Program) -> tuple[ov.Model, int]:
    """The whole plan, and the bytes of its constants; its ports are named as the program's inputs, and
    ``OUTPUT`` and its outputs.

    Raises:
        CaptureError: an operation isn't translated.
    """
    import openvino as ov
    import openvino.opset13 as op

    from .openvino_graph import ModelGraph
    from .openvino_ops import WHOLE

    def recorded(function: Callable[[], State]) -> Tape:
        return record(function, whole=WHOLE)

    plan = ModelGraph(program.inputs)
    initial_tape = recorded(lambda: program.init(program.inputs))
    plan.add(initial_tape)

    # An iteration, on tensors of its own so that its graph has its own parameters.
    state = {name: value.clone() for name, value in initial_tape.result.items()}
    iteration = recorded(lambda: program.iterate(state))
    changed = [name for name in state if iteration.result[name] is not state[name]]
    body = ModelGraph(state)
    body.add(iteration)
    results = {name: op.result(body.value(iteration.result[name])) for name in changed}
    if program.count is None:
        done = recorded(lambda: {"done": program.done(iteration.result)})
        body.add(done)
        again = op.result(op.logical_not(body.value(done.result["done"])))
    else:
        again = op.result(body.constant(torch.tensor(True)))
    limit = program.limit if program.count is None else program.count

    loop = op.loop(plan.constant(torch.tensor(limit)), plan.constant(torch.tensor(True)))
    loop.set_function(ov.Model([again, *results.values()], list(body.parameters.values()), "iteration"))
    loop.set_special_body_ports([-1, 0])
    for name, parameter in body.parameters.items():
        initial = plan.output(initial_tape.result[name])
        if name in results:
            loop.set_merged_input(parameter, initial, results[name].output(0))
        else:
            loop.set_invariant_input(parameter, initial)
    after = {name: value.clone() for name, value in state.items()}
    for name, value in after.items():
        if name in results:
            plan.stands_for(value, loop.get_iter_value(results[name].output(0), -1))
        else:
            plan.stands_for(value, plan.output(initial_tape.result[name]))
    loop.validate_and_infer_types()

    finish = recorded(lambda: program.finish(program.inputs, after))
    plan.add(finish)
    outputs = []
    for name, value in finish.result.items():
        result = op.result(plan.output(value))
        result.output(0).set_names({OUTPUT + name})
        outputs.append(result)
    return ov.Model(outputs, list(plan.parameters.values()), "plan"), plan.nbytes + body.nbytes
