"""Mean and covariance of the rows that cross a boundary, pooled over everything seen.

A basis fitted to the newest batch forgets the other tasks (KL 2.1 -> 3.4 in the prototype), so sums are
forgotten exponentially, by refreshes, and not thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEEP = 0.9  # weight of everything older at each refresh: about the last ten refreshes count


class Moments:
    """Gathers rows in float32 around `shift`, pools them in float64 around zero."""

    def __init__(self, hidden: int):
        self.hidden = hidden
        self.shift = torch.zeros(hidden)
        self.fresh = torch.zeros(1 + hidden + hidden * hidden)  # count, Σ(x - shift), Σ(x - shift)(x - shift)ᵀ
        self.pool = torch.zeros(1 + hidden + hidden * hidden, dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        self.shift, self.fresh, self.pool = self.shift.to(device), self.fresh.to(device), self.pool.to(device)

    def add(self, x: Tensor) -> None:
        """Rows [n, H]."""
        x = x.float() - self.shift
        count, total, square = self.fresh.split([1, self.hidden, self.hidden * self.hidden])
        count.add_(len(x))
        total.add_(x.sum(0))
        square.view(self.hidden, self.hidden).addmm_(x.T, x)

    def gathered(self) -> Tensor:
        """Fresh sums for a sum over replicas: of the symmetric part only the upper triangle, float32."""
        head, square = self.fresh[: 1 + self.hidden], self.fresh[1 + self.hidden :].view(self.hidden, self.hidden)
        rows, columns = torch.triu_indices(self.hidden, self.hidden, device=square.device)
        return torch.cat([head, square[rows, columns]])

    def absorb(self, summed: Tensor) -> None:
        """Pool the sums of all replicas, and gather afresh around the pooled mean."""
        h = self.hidden
        summed, shift = summed.double(), self.shift.double()
        count, total = summed[0], summed[1 : 1 + h]
        rows, columns = torch.triu_indices(h, h, device=summed.device)
        square = summed.new_zeros(h, h)
        square[rows, columns] = summed[1 + h :]
        square = square + square.triu(1).T
        cross = torch.outer(total, shift)
        square = square + cross + cross.T + count * torch.outer(shift, shift)
        self.pool.mul_(KEEP).add_(torch.cat([count[None], total + count * shift, square.view(-1)]))
        self.shift = (self.pool[1 : 1 + h] / self.pool[0].clamp_min(1)).float()
        self.fresh.zero_()

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Of the pool, float64 [H] and [H, H]."""
        h, count = self.hidden, self.pool[0].clamp_min(1)
        mean = self.pool[1 : 1 + h] / count
        return mean, self.pool[1 + h :].view(h, h) / count - torch.outer(mean, mean)

    def state(self) -> dict[str, Tensor]:
        return {"shift": self.shift, "fresh": self.fresh, "pool": self.pool}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name in ("shift", "fresh", "pool"):
            setattr(self, name, state[name].to(self.fresh.device))
