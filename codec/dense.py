"""No codec: the hidden states as they are. The dense control crosses the same code path."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.config import CodecConfig


class Dense:
    """The face of a codec with nothing in it: identity both ways, no statistics, no basis."""

    basis = None

    def __init__(self, config: CodecConfig, hidden: int, seed: int):
        self.hidden = hidden

    def to(self, device: torch.device) -> Dense:
        return self

    def reset(self) -> None: ...

    def observe(self, x: Tensor, y: Tensor) -> None: ...

    def encode(self, x: Tensor) -> Tensor:
        return x

    decode = encode_backward = decode_backward = encode

    def width(self) -> int:
        return self.hidden

    def health(self) -> dict[str, float]:
        return {}
