"""A codec of your own: rows in 8 bits a number, with a scale a row, up the pipeline and down.

    .venv/bin/northstar plan k5 --set codec.kind=examples.own_codec:eight_bits
    .venv/bin/northstar run k5 --set codec.kind=examples.own_codec:eight_bits --set run.steps=10

`codec.kind` names the function below as `module:function`; the module is looked for in the folder where the command is given, and
on a cluster must be importable on every node. `codec/interface.py` has all that a codec may have besides: statistics, tables, a held rate.
The contract that it must pass is `tests/unit/codec/test_codecs.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.costs import BoundaryShape, CodecCost, Tokens
from codec.interface import Codec, CodecError, Room, as_bytes, as_numbers

SCALE = 4  # bytes of a row's scale, fp32
LEVELS = 127


class EightBits(Codec):
    """One way through one boundary; both ends are this class. A payload: n scales, then n rows of int8."""

    def __init__(self, hidden: int):
        self.hidden = hidden

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        scale = x.abs().amax(dim=1, keepdim=True).float() / LEVELS
        steps = (x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        payload = torch.cat([as_bytes(scale), as_bytes(steps)])
        return payload, (steps.float() * scale).to(x.dtype) if observe else None

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        scales, rows = payload[: SCALE * n].clone(), payload[SCALE * n :]  # a copy: four bytes lie where they must
        scale = as_numbers(scales, (n, 1), torch.float32, "scales")
        steps = as_numbers(rows, (n, self.hidden), torch.int8, "rows")
        if not bool(torch.isfinite(scale).all()):
            raise CodecError("a row's scale is not finite")
        return (steps.float() * scale).to(dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        size = n * (SCALE + self.hidden)
        return size, size


def eight_bits(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    """What `codec.kind` names: X up the pipeline, dX down. `config` is the section `[codec]`."""
    return EightBits(hidden), EightBits(hidden)


def cost(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    """Bytes of a token each way, for plan, simulate, probe and doctor."""
    each = SCALE + shape.hidden
    return CodecCost("8 bits", forward=each, backward=each, dense=shape.dense)


eight_bits.cost = cost  # pyright: ignore[reportFunctionMemberAccess]
