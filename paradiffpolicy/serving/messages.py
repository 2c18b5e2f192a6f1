"""Packs and unpacks msgpack with numpy arrays, as openpi's clients write them.

An array is a map of four entries, ``b"__ndarray__"``: true, ``b"data"``: its bytes in C order,
``b"dtype"``: numpy's name as ``<f4``, ``b"shape"``; a numpy scalar is a map of three,
``b"__npgeneric__"``: true, ``b"data"``: its value, ``b"dtype"``.

Messages come from outside: nothing in them can run code, name a type other than numbers, or claim more
memory than their bytes (a number or list in Python is a few dozen times its msgpack, so their count is
bounded too).
"""

from __future__ import annotations

import math
import re
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

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"


class MessageError(InputError):
    """Bytes that aren't a message, or a value that can't be sent as one."""


def pack(value: Any) -> bytes:
    """Encodes maps, lists, text, bytes, numbers, numpy arrays and torch tensors as a message.

    Raises:
        MessageError: something in it is none of those.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_encoded)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"can't be sent: {error}")
    return packed


def unpack(message: bytes) -> Any:
    """Decodes a message.  Arrays are copies in the machine's byte order, and may be written to.

    Raises:
        MessageError: the bytes aren't msgpack, or an array in them isn't one.
    """
    left = MAX_ITEMS

    def read(values: Any) -> Any:
        """Called for every list and map, the innermost first."""
        nonlocal left
        left -= 1 + len(values)
        if left < 0:
            raise MessageError(f"the message has over {MAX_ITEMS} entries: send numbers as arrays")
        return _decoded(values) if isinstance(values, dict) else values

    try:
        return msgpack.unpackb(
            message,
            object_hook=read,
            list_hook=read,
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


def _encoded(value: Any) -> dict[bytes, Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} has no place in a message")
    if not NUMBER.fullmatch(value.dtype.str):
        raise TypeError(f"dtype {value.dtype} has no place in a message")
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decoded(values: dict[Any, Any]) -> Any:
    """A map, or the array or scalar that it stands for."""
    data, dtype = values.get(b"data"), values.get(b"dtype")
    if ARRAY in values:
        if set(values) != {ARRAY, b"data", b"dtype", b"shape"} or values[ARRAY] is not True:
            raise MessageError("an array in the message needs b'data', b'dtype' and b'shape', and no more")
        return _array(data, _dtype(dtype), values[b"shape"])
    if SCALAR in values:
        if set(values) != {SCALAR, b"data", b"dtype"} or values[SCALAR] is not True:
            raise MessageError("a scalar in the message needs b'data' and b'dtype', and no more")
        return _scalar(data, _dtype(dtype))
    return values


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
