"""Holds the bytes of a way at a share of what a dense bf16 system would send, tables and all."""

from __future__ import annotations

import torch
from torch import Tensor

HORIZON = 10  # ticks in which an overdraft is paid back
SLACK = 0.3  # a tick's target stays within this share of the rate, whatever was overdrawn


class RateControl:
    """Books of one way, summed over the replicas at the end of every tick, so equal on all of them.

    A tick: bytes of payloads, bytes of tables and statistics ("side"), bytes that dense bf16 would have taken,
    rows that were coded, and of the payloads' bytes those that no coder can change (headers, exact rows).
    """

    def __init__(self, rate: float, side_share: float):
        self.rate, self.side_share = rate, side_share
        self.tick = torch.zeros(5, dtype=torch.float64)  # payload, side, dense, rows, fixed; of this rank
        self.last = torch.zeros(5, dtype=torch.float64)  # the same of the last tick, of all replicas
        self.sum = torch.zeros(5, dtype=torch.float64)  # since the start
        self.refresh_cost = 0.0  # bytes of the last refresh

    def count(self, payload: int, dense: int, rows: int, fixed: int) -> None:
        self.tick += torch.tensor([payload, 0, dense, rows, fixed], dtype=torch.float64)

    def count_side(self, nbytes: float) -> None:
        self.tick[1] += nbytes

    def close(self, summed: Tensor) -> None:
        """Book a tick, summed over the replicas."""
        self.last = summed.cpu()
        self.sum += self.last
        self.tick.zero_()
        if self.last[1]:
            self.refresh_cost = self.last[1].item()

    def target(self) -> float:
        """Share of dense bf16 for the next tick's payloads, so that all bytes together come to the rate."""
        payload, side, dense = self.sum[:3].tolist()
        if not dense:
            return self.rate
        wish = self.rate - (payload + side - self.rate * dense) / (HORIZON * self.last[2].item())
        return min(max(wish, self.rate * (1 - SLACK)), self.rate * (1 + SLACK))

    def affords_refresh(self) -> bool:
        """Whether tables and statistics like the last ones keep within their share of all bytes."""
        payload, side = self.sum[:2].tolist()
        return side + self.refresh_cost <= self.side_share * (payload + side)

    def metrics(self, name: str) -> dict[str, float]:
        payload, side, dense = self.sum[:3].tolist()
        if not dense:
            return {}
        return {f"codec/{name}rate": (payload + side) / dense, f"codec/{name}side_share": side / (payload + side)}

    def state(self) -> dict[str, Tensor]:
        cost = torch.tensor([self.refresh_cost], dtype=torch.float64)
        return {"tick": self.tick, "last": self.last, "sum": self.sum, "refresh_cost": cost}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.tick, self.last, self.sum = (state[k].cpu().clone() for k in ("tick", "last", "sum"))
        self.refresh_cost = state["refresh_cost"].item()
