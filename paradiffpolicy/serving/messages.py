"""Packs and unpacks msgpack with numpy arrays, as openpi's clients or the package msgpack-numpy write them.

openpi: an array is a map of four entries, ``b"__ndarray__"``: true, ``b"data"``: its bytes in C order,
``b"dtype"``: numpy's name as ``<f4``, ``b"shape"``; a numpy scalar is a map of three,
``b"__npgeneric__"``: true, ``b"data"``: its value, ``b"dtype"``.

msgpack-numpy: ``b"nd"``: true for an array, false for a scalar, ``b"type"``, ``b"data"``: bytes; for an array
also ``b"kind"``: empty, and ``b"shape"``.

Messages come from outside: nothing in them can run code, name a type other than numbers, or claim more
memory than their bytes (a number or list in Python is a few dozen times its msgpack, so their count is
bounded too).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from reprlib import repr as short
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError

MAX_ITEMS = 2**13
"""Entries of lists and maps in one message, all together."""

MAX_AXES = 8

NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
"""dtypes that a message may hold: booleans, integers, floats."""

TEXT = re.compile(r"[<>|]?[SU]\d{1,9}")
"""dtypes of text, which is taken, since clients send some beside their observations, but not decoded."""

ARRAY, SCALAR, ND = b"__ndarray__", b"__npgeneric__", b"nd"

Encode = Callable[[Any], dict[bytes, Any]]
"""Writes a tensor, a numpy array or a numpy scalar as a map."""


class MessageError(InputError):
    """Bytes that aren't a message, or a value that can't be sent as one."""


def openpi(value: Any) -> dict[bytes, Any]:
    """Writes an array or a scalar as openpi's clients do."""
    value = _numeric(value)
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def msgpack_numpy(value: Any) -> dict[bytes, Any]:
    """Writes an array or a scalar as the package msgpack-numpy does."""
    value = _numeric(value)
    encoded = {ND: isinstance(value, np.ndarray), b"type": value.dtype.str, b"data": value.tobytes()}
    return encoded | ({b"kind": b"", b"shape": value.shape} if encoded[ND] else {})


def pack(value: Any, encode: Encode = openpi) -> bytes:
    """Encodes maps, lists, text, bytes, numbers, numpy arrays and torch tensors as a message.

    Raises:
        MessageError: something in it is none of those.
    """
    try:
        packed: bytes = msgpack.packb(value, default=encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"can't be sent: {error}")
    return packed


def unpack(message: bytes) -> Any:
    """Decodes a message, as ``read`` does."""
    return read(message)[0]


def read(message: bytes) -> tuple[Any, Encode]:
    """Decodes a message, and says how its sender writes arrays.  Arrays are copies in the machine's byte
    order, and may be written to.

    Raises:
        MessageError: the bytes aren't msgpack, or an array in them isn't one.
    """
    left, encode = MAX_ITEMS, openpi

    def decoded(values: Any) -> Any:
        """Called for every list and map, the innermost first."""
        nonlocal left, encode
        left -= 1 + len(values)
        if left < 0:
            raise MessageError(f"the message has over {MAX_ITEMS} entries: send numbers as arrays")
        if not isinstance(values, dict):
            return values
        if ND in values:
            encode = msgpack_numpy
        return _decoded(values)

    try:
        value = msgpack.unpackb(
            message,
            object_hook=decoded,
            list_hook=decoded,
            ext_hook=_no_extension,
            strict_map_key=False,  # the arrays' keys are bytes
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
    except MessageError:
        raise
    except Exception as error:  # msgpack raises half a dozen types, all for malformed input
        reason = str(error) or type(error).__name__
        raise MessageError(f"the message isn't msgpack ({reason}): send a packed map")
    return value, encode


def _numeric(value: Any) -> NDArray[Any] | np.generic:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} has no place in a message")
    if not NUMBER.fullmatch(value.dtype.str):
        raise TypeError(f"dtype {value.dtype} has no place in a message")
    return value


def _decoded(values: dict[Any, Any]) -> Any:
    """A map, or the array or scalar that it stands for."""
    kind = next((name for name in (ARRAY, SCALAR, ND) if name in values), None)
    if kind is None:
        return values
    array = values[kind] is True if kind == ND else kind == ARRAY
    wanted = {kind, b"data", b"type" if kind == ND else b"dtype", *([b"shape"] if array else [])}
    if set(values) - {b"kind"} != wanted or not (values[kind] is True or kind == ND):
        what = "an array" if array else "a scalar"
        names = ", ".join(map(str, sorted(wanted - {kind})))
        raise MessageError(f"{what} in the message needs {names}, and no more")
    data, dtype = values[b"data"], values[b"type" if kind == ND else b"dtype"]
    if isinstance(dtype, str) and TEXT.fullmatch(dtype):
        return data if isinstance(data, str | bytes) else None
    if kind == ND and not array:
        return _array(data, _dtype(dtype), [])[()]
    return _array(data, _dtype(dtype), values[b"shape"]) if array else _scalar(data, _dtype(dtype))


def _array(data: Any, dtype: np.dtype[Any], shape: Any) -> NDArray[Any]:
    if not isinstance(data, bytes):
        raise MessageError(f"an array's b'data' must be bytes, not {type(data).__name__}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_AXES
        or any(type(size) is not int or size < 0 for size in shape)
    ):
        raise MessageError(f"an array's b'shape' must be at most {MAX_AXES} whole numbers from 0 on")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise MessageError(f"an array of shape {shape} and dtype {dtype} can't have {len(data)} bytes")
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise MessageError("a boolean array's b'data' must be zeros and ones")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _scalar(data: Any, dtype: np.dtype[Any]) -> np.generic:
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if type(data) not in allowed:
        raise MessageError(f"a scalar of dtype {dtype} can't be {short(data)}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= data <= np.iinfo(dtype).max:
        raise MessageError(f"a scalar of dtype {dtype} can't be {data}")
    with np.errstate(over="ignore"):  # to infinity, which is refused where a finite number is needed
        scalar: np.generic = dtype.newbyteorder("=").type(data)
    return scalar


def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or not NUMBER.fullmatch(name):
        raise MessageError(f"dtype {short(name)} isn't one of numbers, as '<f4'")
    return np.dtype(name)


def _no_extension(code: int, data: bytes) -> Any:
    raise MessageError(f"the message has an extension of type {code}: send maps, lists, numbers and arrays")
