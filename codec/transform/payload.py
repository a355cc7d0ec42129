"""The frame of one `transform` payload: what the receiver must know, and digests of what it must agree on."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from codec.interface import CodecError

_HEADER = struct.Struct("<4sIffIQQ")  # magic, rows, knob, scale, bytes of tables, agreement, digest of the rest
_MAGIC = b"NSB1"
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class Payload:
    """`knob` is the coder's: a step, or bits a row. `agreement` digests the tables and tables-made state of a side."""

    rows: int
    knob: float
    scale: float
    agreement: int
    tables: Tensor  # uint8, empty unless the receiver has none yet
    body: Tensor  # uint8


def pack_payload(payload: Payload) -> Tensor:
    """Flat uint8, under a digest."""
    rest, tables = payload.body, payload.tables.numel()
    if tables:
        rest = torch.cat([payload.tables.to(rest.device), rest])
    fields = (payload.rows, payload.knob, payload.scale, tables, payload.agreement)
    header = _HEADER.pack(_MAGIC, *fields, _seal(fields, rest))
    return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8).to(rest.device), rest])


def unpack_payload(raw: Tensor, rows: int) -> Payload:
    """Flat uint8 -> payload of that many rows; nothing is allocated. Raises CodecError naming the field."""
    if raw.numel() < HEADER_BYTES:
        raise CodecError(f"a payload of {raw.numel()} bytes has no header of {HEADER_BYTES}")
    magic, *fields, seal = _HEADER.unpack(raw[:HEADER_BYTES].cpu().numpy().tobytes())
    if magic != _MAGIC:
        raise CodecError(f"magic: {magic!r} is not {_MAGIC!r}")
    rest = raw[HEADER_BYTES:]
    if _seal(tuple(fields), rest) != seal:
        raise CodecError("digest: the payload was damaged on its way")
    found, knob, scale, tables, agreement = fields
    if found != rows:
        raise CodecError(f"rows: {found} came, {rows} were expected")
    if not (math.isfinite(knob) and knob > 0 and math.isfinite(scale) and scale >= 0):
        raise CodecError(f"knob {knob} and scale {scale} must be finite, and not below 0")
    if tables > rest.numel():
        raise CodecError(f"tables: {tables} bytes of {rest.numel()}")
    return Payload(rows, knob, scale, agreement, rest[:tables], rest[tables:])


def _seal(fields: tuple[float, ...], rest: Tensor) -> int:
    state = xxhash.xxh3_64(repr(fields).encode())
    state.update(rest.cpu().numpy().data)
    return state.intdigest()
