"""What both ends of a `transform` way must agree on: the mean, the directions, and how far rows reach along each.

    x  ≈  mean + basis · z          basis [H, k], z [k] with standard deviations σ

Directions are sent as int8 with one scale each: a quarter of fp32, and they need not be orthonormal after
that, because the sender solves for z by least squares in the directions as the receiver has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from codec.interface import CodecError, as_bytes
from codec.transform.metric import Metric

_COUNT = 4  # bytes of k, int32


@dataclass(frozen=True)
class Directions:
    """As the receiver has them, float32."""

    mean: Tensor  # [H]
    basis: Tensor  # [H, k]
    deviations: Tensor  # [k], above 0, falling
    digest: int  # xxh3-64 of the bytes they came in
    raw: Tensor  # those bytes, uint8
    metric: Metric | None = None  # in which the sender counts errors; none: all alike

    @cached_property
    def analysis(self) -> Tensor:
        """[H, k]: z = (x - mean) · analysis is the least-squares solution of x = mean + basis · z, in the metric."""
        basis = self.basis.double()
        weighted = basis if self.metric is None else self.metric.times(basis)
        return torch.linalg.solve(basis.T @ weighted, weighted.T).T.float().contiguous()

    @cached_property
    def synthesis(self) -> Tensor:
        """[k, H], row by row as a product wants it."""
        return self.basis.T.contiguous()

    def analyse(self, x: Tensor) -> Tensor:
        """Rows [n, H] -> z [n, k]."""
        return (x - self.mean) @ self.analysis

    def synthesise(self, z: Tensor) -> Tensor:
        """z [n, k] -> rows [n, H]."""
        return (z @ self.synthesis).add_(self.mean)


def pack_directions(mean: Tensor, basis: Tensor, deviations: Tensor) -> Tensor:
    """float [H], [H, k], [k] -> flat uint8 on the CPU: k, mean in bf16, scales and σ in float32, int8 directions."""
    scale = (basis.abs().amax(0) / 127).clamp_min(1e-30)
    codes = (basis / scale).round().to(torch.int8).T
    count = torch.tensor([len(deviations)], dtype=torch.int32)
    parts = [count, mean.bfloat16(), scale.float(), deviations.float(), codes]
    return torch.cat([as_bytes(part.detach().cpu()) for part in parts])


def packed_size(hidden: int, k: int) -> int:
    """Bytes of `k` packed directions."""
    return _COUNT + 2 * hidden + 8 * k + hidden * k


def unpack_directions(raw: Tensor, hidden: int, device: torch.device, metric: Metric | None = None) -> Directions:
    """Flat uint8 -> directions. Raises CodecError naming the field."""
    raw = raw.cpu().contiguous()
    if raw.numel() < _COUNT:
        raise CodecError(f"tables of {raw.numel()} bytes hold no count of directions")
    k = int(raw[:_COUNT].clone().view(torch.int32))
    if not 0 <= k <= hidden or raw.numel() != packed_size(hidden, k):
        raise CodecError(f"tables of {raw.numel()} bytes with {k} directions do not fit a hidden size of {hidden}")
    mean, scale, deviations, codes = raw[_COUNT:].split([2 * hidden, 4 * k, 4 * k, hidden * k])
    mean = mean.clone().view(torch.bfloat16).float()
    scale, deviations = scale.clone().view(torch.float32), deviations.clone().view(torch.float32)
    for name, values in (("mean", mean), ("scales", scale), ("deviations", deviations)):
        if not torch.isfinite(values).all():
            raise CodecError(f"{name} of the tables hold a NaN or an infinity")
    if (deviations <= 0).any() or (scale <= 0).any():
        raise CodecError("scales and deviations of the tables must be above 0")
    basis = codes.view(torch.int8).view(k, hidden).float().T * scale
    if not torch.isfinite(basis).all():
        raise CodecError("scales of the tables are too large for float32")
    digest = xxhash.xxh3_64_intdigest(raw.numpy().data)
    return Directions(mean.to(device), basis.contiguous().to(device), deviations.to(device), digest, raw, metric)
