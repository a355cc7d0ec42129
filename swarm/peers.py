"""Ranks that hold copies of the same parameters, and how they sum: the replicas of a stage, or all copies of a tied embedding.

Payloads of any size go from each to each, its size first. Who sends counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from codec.ledger import Ledger

Waiting = Callable[[str, str], AbstractContextManager[None]]  # who is waited for, and for what: see `Grid`


class WrongSize(RuntimeError):
    """A payload that has not the size that what it should hold can have."""

    def __init__(self, sender: int, size: int, least: int, most: int):
        super().__init__(sender, size, least, most)
        self.sender, self.size, self.least, self.most = sender, size, least, most

    def __str__(self) -> str:
        return f"rank {self.sender} would send {self.size} bytes of a gradient, expected {self.least} to {self.most}"


class Peers:
    """`ranks` of the world, this one's among them, as `codec.coded_sum.Replicas`. With one rank alone nothing is sent."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        rank: int,
        channel: str,
        device: torch.device,
        ledger: Ledger,
        waiting: Waiting,
    ):
        self.group, self.ranks, self.channel, self.device = group, list(ranks), channel, device
        self.ledger, self.waiting = ledger, waiting
        self.count, self.index = len(self.ranks), self.ranks.index(rank)

    def sum(self, tensor: Tensor, dense_bytes: float) -> None:
        """Sum in place over the peers; bit-identical on all of them."""
        if self.count > 1:
            with self.waiting(f"those who hold a copy ({self.channel})", "a sum of gradients"):
                dist.all_reduce(tensor, group=self.group)
            self._add(self._ring * tensor.nbytes, dense_bytes)

    def scatter(self, payloads: list[Tensor], least: int, most: int, dense_bytes: float) -> list[Tensor]:
        """Payload k to peer k -> what came from each. Raises WrongSize before anything is allocated for it."""
        sizes = self._sizes([payload.numel() for payload in payloads])
        self._add(sum(p.numel() for k, p in enumerate(payloads) if k != self.index), dense_bytes)
        return self._exchange(payloads, sizes[:, self.index].tolist(), [(least, most)] * self.count)

    def gather(self, payload: Tensor, limits: list[tuple[int, int]]) -> list[Tensor]:
        """One payload to all peers -> those of all. Raises WrongSize before anything is allocated for it."""
        sizes = self._sizes([payload.numel()] * self.count)
        self._add((self.count - 1) * payload.numel(), 0.0)
        return self._exchange([payload] * self.count, sizes[:, self.index].tolist(), limits)

    def _sizes(self, mine: list[int]) -> Tensor:
        """[from, to], int64."""
        row = torch.tensor(mine, dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(row) for _ in range(self.count)]
        with self.waiting(f"those who hold a copy ({self.channel})", "sizes of gradients"):
            dist.all_gather(rows, row, group=self.group)
        self.ledger.add("control", (self.count - 1) * row.nbytes, 0)
        return torch.stack(rows)

    def _exchange(self, payloads: list[Tensor], sizes: list[int], limits: list[tuple[int, int]]) -> list[Tensor]:
        others = [k for k in range(self.count) if k != self.index]
        for k in others:
            if not limits[k][0] <= sizes[k] <= limits[k][1]:
                raise WrongSize(self.ranks[k], sizes[k], *limits[k])
        came = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        came[self.index] = payloads[self.index]
        calls = [dist.P2POp(dist.irecv, came[k], self.ranks[k], self.group) for k in others]
        calls += [dist.P2POp(dist.isend, payloads[k].contiguous(), self.ranks[k], self.group) for k in others]
        with self.waiting(f"those who hold a copy ({self.channel})", "gradients"):
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        return came

    @property
    def _ring(self) -> float:
        return 2 * (self.count - 1) / self.count

    def _add(self, sent: float, dense_bytes: float) -> None:
        self.ledger.add(self.channel, sent, self._ring * dense_bytes)
