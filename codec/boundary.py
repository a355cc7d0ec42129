"""A boundary: where the decoder is cut and a codec stands in for the link.

    virtual   x ──encode──▶ y ──decode──▶ x̂        both ends in one process
    wire      x ──encode──▶ y ═══link═══▶ y ──decode──▶ x̂        (and dx back the same way)

Both run the very same encode and decode on the same rows, so their numbers are identical. Rows are
real tokens only: padding is never encoded, sent or counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.dense import Dense
from codec.ledger import Ledger
from codec.powersgd import PowerSGD

CODECS = {"none": Dense, "powersgd": PowerSGD}


class Boundary:
    """One boundary's codec and its bytes. `index` numbers the boundaries from the embedding upwards."""

    def __init__(self, config: CodecConfig, index: int, hidden: int, seed: int, ledger: Ledger):
        self.index, self.hidden, self.ledger = index, hidden, ledger
        self.codec = CODECS[config.kind](config, hidden, seed=seed + index)

    def encode(self, x: Tensor, observe: bool) -> Tensor:
        """[N, H] -> payload, upstream side. `observe` adds x to the statistics of the next refresh."""
        y = self.codec.encode(x)
        if observe:
            self.codec.observe(x, y)
        self.ledger.add("boundary_fwd", y.nbytes, x.nbytes)
        return y

    def decode(self, y: Tensor) -> Tensor:
        """Payload -> [N, H], downstream side."""
        return self.codec.decode(y)

    def encode_backward(self, dx: Tensor) -> Tensor:
        """Gradient [N, H] -> payload, downstream side."""
        dy = self.codec.encode_backward(dx)
        self.ledger.add("boundary_bwd", dy.nbytes, dx.nbytes)
        return dy

    def decode_backward(self, dy: Tensor) -> Tensor:
        """Payload -> gradient [N, H], upstream side."""
        return self.codec.decode_backward(dy)

    def virtual(self, x: Tensor, observe: bool) -> Tensor:
        """Both ends at once, differentiable: [N, H] -> [N, H]."""
        return _Virtual.apply(x, self, observe)


class _Virtual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, boundary: Boundary, observe: bool) -> Tensor:
        ctx.boundary = boundary
        return boundary.decode(boundary.encode(x, observe)).clone()

    @staticmethod
    def backward(ctx, dx: Tensor):
        return ctx.boundary.decode_backward(ctx.boundary.encode_backward(dx)), None, None


def pack_rows(hidden: Tensor, real: Tensor) -> Tensor:
    """[B, L, H] and the mask of real tokens [B, L] -> the real rows [N, H], differentiable."""
    return hidden[real]


def unpack_rows(rows: Tensor, real: Tensor) -> Tensor:
    """Real rows [N, H] -> [B, L, H] with zeros at the padding, differentiable."""
    return rows.new_zeros(*real.shape, rows.shape[-1]).index_put((real,), rows)
