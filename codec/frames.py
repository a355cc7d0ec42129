"""Frames: what crosses a process border as bytes. No pickle.

    magic "NSF1" │ header length u32 │ xxh3-128 of the rest │ header (msgpack) │ arrays, 64-byte aligned

The header names the arrays (dtype, shape, offset) and carries the caller's fields. Everything is
checked before anything is used, and nothing is allocated: the arrays are views into the frame.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import xxhash

MAGIC = b"NSF1"
MAX_HEADER = 64 << 10  # an honest header is below 2 KB; small containers cost far more memory than bytes
_PREFIX = 24
_ALIGN = 64
_DTYPES = {"float32", "float64", "float16", "int8", "int32", "int64", "uint8", "uint16", "uint32", "bool"}


class FrameError(ValueError):
    """A frame that cannot be trusted; names the sender and the field."""

    def __init__(self, sender: str, field: str, reason: str):
        super().__init__(sender, field, reason)
        self.sender, self.field, self.reason = sender, field, reason

    def __str__(self) -> str:
        return f"bad frame from {self.sender}: {self.field}: {self.reason}"


def digest(*buffers: Any) -> str:
    """xxh3-128 of the buffers, as hex. Guards against corruption, not against an adversary."""
    state = xxhash.xxh3_128()
    for buffer in buffers:
        state.update(buffer)
    return state.hexdigest()


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One contiguous uint8 array, which the object store ships without a copy.

    `header` holds msgpack types only. Raises TypeError for a dtype that frames do not carry.
    """
    table, offset = [], 0
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"array {name!r} has dtype {array.dtype}; frames carry {', '.join(sorted(_DTYPES))}")
        table.append([name, array.dtype.name, list(array.shape), offset])
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    head: bytes = msgpack.packb({"fields": header, "arrays": table})  # pyright: ignore[reportAssignmentType]: never None
    if len(head) > MAX_HEADER:
        raise ValueError(f"frame header of {len(head)} bytes; at most {MAX_HEADER} fit")
    behind = _body_start(len(head))
    frame = np.zeros(behind + offset, np.uint8)
    frame[_PREFIX : _PREFIX + len(head)] = np.frombuffer(head, np.uint8)
    for (_, _, _, start), array in zip(table, arrays.values()):
        native = np.ascontiguousarray(array, array.dtype.name)  # a big-endian array is called the same
        frame[behind + start : behind + start + array.nbytes] = native.reshape(-1).view(np.uint8)
    prefix = MAGIC + len(head).to_bytes(4, "little") + bytes.fromhex(digest(frame[_PREFIX:]))
    frame[:_PREFIX] = np.frombuffer(prefix, np.uint8)
    return frame


def _body_start(head: int) -> int:
    """Where the arrays begin behind a header of `head` bytes."""
    return -(-(_PREFIX + head) // _ALIGN) * _ALIGN


def digest_of(frame: np.ndarray) -> str:
    """The digest that a frame carries, without checking it."""
    return bytes(frame[8:_PREFIX]).hex()


def unpack(frame: Any, sender: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and arrays of a frame; the arrays are read-only views into it. Raises FrameError."""
    data = memoryview(frame).cast("B")
    if len(data) < _PREFIX or bytes(data[:4]) != MAGIC:
        raise FrameError(sender, "magic", f"{bytes(data[:4])!r} is not {MAGIC!r}")
    size = int.from_bytes(data[4:8], "little")
    if size > MAX_HEADER or _body_start(size) > len(data):
        raise FrameError(sender, "header length", f"{size} bytes do not fit in a frame of {len(data)}")
    sent, found = bytes(data[8:_PREFIX]).hex(), digest(data[_PREFIX:])
    if sent != found:
        raise FrameError(sender, "digest", f"{sent} was sent, what arrived has {found}")
    head = _header(bytes(data[_PREFIX : _PREFIX + size]), sender)
    body = data[_body_start(size) :]
    return head["fields"], {name: _array(body, name, spec, sender) for name, *spec in head["arrays"]}


def _header(raw: bytes, sender: str) -> dict[str, Any]:
    try:
        head = msgpack.unpackb(raw)
    except Exception as error:  # msgpack raises many kinds on garbage, among them bare ValueErrors
        raise FrameError(sender, "header", f"not msgpack ({type(error).__name__}: {error})") from error
    kinds = {"fields": dict, "arrays": list}
    if not isinstance(head, dict) or set(head) != set(kinds):
        raise FrameError(sender, "header", f"needs exactly the keys {sorted(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(head[key], kind):
            raise FrameError(sender, key, f"is a {type(head[key]).__name__}, not a {kind.__name__}")
    names = [row[0] for row in head["arrays"] if isinstance(row, list) and row and isinstance(row[0], str)]
    if len(set(names)) != len(names):
        raise FrameError(sender, "arrays", "two arrays have the same name")
    for row in head["arrays"]:
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[0], str)):
            raise FrameError(sender, "arrays", "each row needs name, dtype, shape, offset")
    return head


def _array(body: memoryview, name: str, spec: list[Any], sender: str) -> np.ndarray:
    dtype, shape, offset = spec
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FrameError(sender, f"arrays.{name}.dtype", f"{dtype!r} is not allowed")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise FrameError(sender, f"arrays.{name}.shape", f"{shape!r} is not a shape")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if type(offset) is not int or offset < 0 or offset % _ALIGN or offset + nbytes > len(body):
        raise FrameError(sender, f"arrays.{name}.offset", f"{nbytes} bytes at {offset!r} do not fit in {len(body)}")
    try:
        return np.frombuffer(body[offset : offset + nbytes], dtype).reshape(shape)
    except ValueError as error:  # no bytes at all, for example, but absurd other dimensions
        raise FrameError(sender, f"arrays.{name}.shape", f"{shape!r}: {error}") from error
