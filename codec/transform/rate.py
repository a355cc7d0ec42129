"""Holds the bytes of a way at a share of what a dense bf16 system would send, tables and all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codec.interface import Rate
from codec.transform.coders import Coder

HORIZON = 10  # ticks in which an overdraft is paid back
SLACK = 0.3  # a tick's target stays within this part of the share, whatever was overdrawn


class Books:
    """Bytes of one way, summed over the replicas at the end of every tick, so equal on all of them.

    A tick: bytes of payloads, bytes of tables and statistics ("side"), bytes that dense bf16 would have taken,
    rows that were coded, and of the payloads' bytes those that no coder can change (headers, exact rows).
    """

    def __init__(self, share: float, side_share: float):
        self.share, self.side_share = share, side_share
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
        """Share of dense bf16 for the next tick's payloads, so that all bytes together come to the share held."""
        payload, side, dense = self.sum[:3].tolist()
        if not dense:
            return self.share
        wish = self.share - (payload + side - self.share * dense) / (HORIZON * self.last[2].item())
        return min(max(wish, self.share * (1 - SLACK)), self.share * (1 + SLACK))

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


class HeldRate(Rate):
    """Turns a coder's knob by the books. Every replica's turns alike, as their books are the same."""

    def __init__(self, share: float, side_share: float, coder: Coder):
        self.books, self.coder = Books(share, side_share), coder
        self.knob = 0.0  # the coder's; 0 before the first rows
        self.wanted = 1.0  # bits for each coded row that the knob was last set for

    @property
    def share(self) -> float:
        return self.books.share

    @property
    def side(self) -> float:
        return self.books.tick[1].item()

    def count_side(self, nbytes: float) -> None:
        self.books.count_side(nbytes)

    def spent(self) -> Tensor:
        return self.books.tick.clone()

    def steer(self, spent: Tensor) -> None:
        self.books.close(spent)
        payload, _, _, rows, fixed = self.books.last.tolist()
        if rows and self.knob:
            self.knob = float32(self.coder.next_knob(self.knob, 8 * (payload - fixed) / rows, self.target_bits()))

    def aim(self, share: float) -> None:
        self.books = Books(share, self.books.side_share)

    def first_bits(self, dense: float, fixed: float, rows: int) -> float:
        """Bits for each row of the first payload that is coded, which takes `dense` bytes without codec."""
        self.wanted = _bits_a_row(self.share, dense, fixed, rows)
        return self.wanted

    def start(self, z: Tensor, bits: float) -> None:
        """Set the knob for the first coefficients [n, k]."""
        self.knob = float32(self.coder.first_knob(z, bits))

    def target_bits(self) -> float:
        """Bits for each coded row in the next tick."""
        _, _, dense, rows, fixed = self.books.last.tolist()
        if rows:  # else nothing but zeros was sent, or nothing yet
            self.wanted = _bits_a_row(self.books.target(), dense, fixed, rows)
        return self.wanted


def float32(value: float) -> float:
    """As the receiver reads it from a header: both sides must count with the same number."""
    return float(np.float32(value))


def _bits_a_row(share: float, dense_bytes: float, fixed_bytes: float, rows: float) -> float:
    """Bits left for each coded row when payloads may take `share` of dense."""
    return max(1.0, 8 * (share * dense_bytes - fixed_bytes) / max(1.0, rows))
