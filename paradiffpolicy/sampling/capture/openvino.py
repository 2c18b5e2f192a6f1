"""A whole plan as one OpenVINO model: a CPU's equivalent of a graph of kernels.

The program's calls are recorded (``tape``) and translated (``openvino_ops``); the iterations are
the body of a Loop, so that a plan is one call of the model, and its weights are there once, whatever
the number of iterations.

A compiled model is kept on disk, so that only a first start waits for it.  Its constants are there, too,
also at the first start: the weights in float32, which OpenVINO needs only to pack them, are pages of a file,
and needn't stay in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import stat
import struct
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from ...errors import InputError, first_line
from ...files import require_regular
from ...models.matmul_unet1d import Taps
from ...models.precision import bfloat16_pays
from ...provenance import anonymous_bytes, return_freed_memory
from ..driver import State
from .fingerprint import fingerprint
from .program import Backend, CaptureError, Program, nbytes

if TYPE_CHECKING:
    import openvino as ov

log = logging.getLogger(__name__)

PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""The capability that a CPU needs for a precision of arithmetic."""


LARGEST_BATCH = 64
"""Of a call: a larger one takes more memory, and no less time per element."""


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
        captures_warm=True,
        fastest="bf16" if bfloat16_pays(torch.device("cpu")) and "BF16" in capabilities else "f32",
    )


class OpenVINO:
    """A compiled model with its buffers.

    Attributes:
        nbytes: by how much the process grew for it, pages of files left out, but at least what is known of
            it: OpenVINO tells nothing of the memory that it computes in, most of it for large batches.
    """

    method = "one OpenVINO model"

    def __init__(self, program: Program, options: dict[str, Any], cache: Path | None) -> None:
        if any(value.device.type != "cpu" for value in program.inputs.values()):
            raise CaptureError("computes on the CPU alone: device=cpu, or another capture")
        compiled, before, size, self._program = compiled_plan(program, options, cache)
        import openvino as ov

        from .openvino_plan import OUTPUT, WARM

        self.inputs = {name: value.clone() for name, value in program.inputs.items()}
        self.outputs: State = {}
        if program.warm is not None:
            self.inputs |= {name: value.clone() for name, value in program.warm.inputs.items()}
            self.inputs[WARM] = torch.tensor(False)
        self._cold, self._warm = program.inputs.keys(), self.inputs.get(WARM)
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
            if self._warm is not None:
                self._warm.fill_(True)
                self.request.infer()
        return_freed_memory()
        self.nbytes = max(nbytes(self.inputs, self.outputs) + size, anonymous_bytes() - before)

    def __call__(self, inputs: State) -> State:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        if self._warm is not None:
            self._warm.fill_(inputs.keys() != self._cold)
        self.request.infer()
        return self.outputs


class Compiled(NamedTuple):
    """A compiled model.

    Attributes:
        model: ready to be called.
        before: the process's memory without it.
        nbytes: of its constants, if they are in memory.
        program: whose constants they are, and which must outlive it; None: they are in a file.
    """

    model: ov.CompiledModel
    before: int
    nbytes: int = 0
    program: Program | None = None


def compiled_plan(program: Program, options: dict[str, Any], cache: Path | None) -> Compiled:
    """The program's model, from the cache if there is one."""
    if cache is None or program.identity is None or not is_private(cache):
        return compiled_in_memory(program, options)
    path = cache / f"{fingerprint(program.identity(), options, surroundings())}.blob"
    return kept_plan(path, options) or compiled_to_file(program, options, path)


def compiled_in_memory(program: Program, options: dict[str, Any]) -> Compiled:
    """The program's model, compiled now, and not kept."""
    from .openvino_plan import plan_model

    before = anonymous_bytes()
    model, size = plan_model(program)
    with compiling():
        return Compiled(core().compile_model(model, "CPU", options), before, size, program)


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

TRAILER = struct.Struct("=Q32s")
"""Ends a kept model: where the compiled model begins, behind its constants, and the hash of all before."""

WEIGHTLESS = {"CACHE_MODE": "OPTIMIZE_SIZE"}
"""A compiled model's constants stay in the file that the model was read from."""


def kept_plan(path: Path, options: dict[str, Any]) -> Compiled | None:
    """The compiled model in a file; None if there is none, or if it is damaged."""
    if not os.path.lexists(path):
        return None
    try:
        require_regular(path, LARGEST_MODEL)
        if not is_own(path):
            raise ValueError("others can write to it")
        with path.open("rb") as file:
            blob = checked_blob(file)
        before = anonymous_bytes()
        placed = options | WEIGHTLESS | {"WEIGHTS_PATH": str(path)}
        compiled = core().import_model(BytesIO(blob), "CPU", placed)
        path.touch()  # pruning takes the oldest
    except (RuntimeError, ValueError, OSError, InputError, struct.error) as error:
        log.warning("capture: %s is damaged (%s); compiling anew", path, first_line(error))
        return None
    return Compiled(compiled, before)


def checked_blob(file: BinaryIO) -> bytes:
    """The compiled model in an open file.

    Raises:
        ValueError, struct.error: the file's content isn't what was written.
    """
    end = os.fstat(file.fileno()).st_size - TRAILER.size
    digest, read = hashlib.sha256(), 0
    while read < end and (part := file.read(min(2**20, end - read))):
        digest.update(part)
        read += len(part)
    begin, expected = TRAILER.unpack(file.read())
    if begin > end or digest.digest() != expected:
        raise ValueError("its content isn't what was written")
    file.seek(begin)
    return file.read(end - begin)


def compiled_to_file(program: Program, options: dict[str, Any], path: Path) -> Compiled:
    """The program's model, compiled now from a file with its constants, which is kept."""
    import openvino as ov

    from .openvino_plan import plan_model

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        model, _ = plan_model(program)
        source = Path(folder) / "plan.xml"
        try:
            ov.save_model(model, source, compress_to_fp16=False)
            model = core().read_model(source)
        except RuntimeError as error:
            log.warning("capture: can't keep the compiled model (%s)", first_line(error))
            return compiled_in_memory(program, options)
        return_freed_memory()
        before = anonymous_bytes()
        with compiling():
            compiled = core().compile_model(model, "CPU", options | WEIGHTLESS)
        try:
            blob = BytesIO()
            compiled.export_model(blob)
            kept = source.with_suffix(".bin")
            begin = kept.stat().st_size
            with kept.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256")
                digest.update(blob.getbuffer())
                file.write(blob.getbuffer())
                file.write(TRAILER.pack(begin, digest.digest()))
            kept.chmod(0o600)
            kept.replace(path)
            prune(path.parent)
        except (RuntimeError, OSError) as error:
            log.warning("capture: can't keep the compiled model (%s)", error)
        return Compiled(compiled, before)


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
