"""No codec: the hidden states as they are. The dense control crosses the same code path."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import Codec, Room, as_bytes, as_numbers


class Dense(Codec):
    """Identity, in the dtype of the model."""

    def __init__(self, hidden: int):
        self.hidden = hidden

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        return as_bytes(x), x if observe else None

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return as_numbers(payload, (n, self.hidden), dtype, "dense rows")

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        size = n * self.hidden * dtype.itemsize
        return size, size


def dense(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    return Dense(hidden), Dense(hidden)
