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

# who is waited for in words, for what, and their ranks: see `Grid`
Waiting = Callable[[str, str, Sequence[int]], AbstractContextManager[None]]


class WrongSize(RuntimeError):
    """A payload that has not the size that what it should hold can have."""

    def __init__(self, sender: int, size: int, least: int, most: int):
        super().__init__(sender, size, least, most)
        self.sender, self.size, self.least, self.most = sender, size, least, most

    def __str__(self) -> str:
        return f"rank {self.sender} would send {self.size} bytes of a gradient, expected {self.least} to {self.most}"


class Peers:
    """`ranks` of the world, this one's among them, as `codec.coded_sum.Replicas`. With one rank alone nothing is sent."""

    def __init__(self, channel: str, device: torch.device, ledger: Ledger, waiting: Waiting):
        self.channel, self.device, self.ledger, self.waiting = channel, device, ledger, waiting

    def join(self, group: dist.ProcessGroup | None, ranks: Sequence[int], rank: int) -> None:
        """Be `rank`, one of `ranks`, from now on."""
        self.group, self.ranks = group, list(ranks)
        self.count, self.index = len(self.ranks), self.ranks.index(rank)
        self.others = [k for k in range(self.count) if k != self.index]

    def sum(self, tensor: Tensor, dense_bytes: float) -> None:
        """Sum in place over the peers; bit-identical on all of them."""
        if self.count > 1:
            with self.waiting(f"those who hold a copy ({self.channel})", "a sum of gradients", self.ranks):
                dist.all_reduce(tensor, group=self.group)
            self._add(self._ring * tensor.nbytes, dense_bytes)

    def scatter(self, payloads: list[Tensor], least: int, most: int, dense_bytes: float) -> list[Tensor]:
        """Payload k to peer k -> what came from each. Raises WrongSize before anything is allocated for it."""
        self._add(0.0, dense_bytes)
        return self._exchange(payloads, [(least, most)] * self.count)

    def gather(self, payload: Tensor, limits: list[tuple[int, int]]) -> list[Tensor]:
        """One payload to all peers -> those of all. Raises WrongSize before anything is allocated for it."""
        return self._exchange([payload] * self.count, limits)

    def _exchange(self, payloads: list[Tensor], limits: list[tuple[int, int]]) -> list[Tensor]:
        """Sizes first: raw messages between two ranks report neither a short one nor a stale one."""
        mine = [torch.tensor([payload.numel()], dtype=torch.int64, device=self.device) for payload in payloads]
        sizes = [torch.empty_like(size) for size in mine]
        self._pass(mine, sizes, "sizes of gradients", "control")
        came = [payloads[self.index]] * self.count
        for k in self.others:
            size = int(sizes[k].item())
            if not limits[k][0] <= size <= limits[k][1]:
                raise WrongSize(self.ranks[k], size, *limits[k])
            came[k] = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._pass(payloads, came, "gradients", self.channel)
        return came

    def _pass(self, mine: list[Tensor], theirs: list[Tensor], what: str, channel: str) -> None:
        """Tensor k of `mine` to peer k, and its own into tensor k of `theirs`."""
        calls = [(dist.irecv, theirs[k], self.ranks[k]) for k in self.others]
        calls += [(dist.isend, mine[k].contiguous(), self.ranks[k]) for k in self.others]
        filled = [dist.P2POp(call, tensor, peer, self.group) for call, tensor, peer in calls if tensor.numel()]
        with self.waiting(f"those who hold a copy ({self.channel})", what, self.ranks):
            for work in dist.batch_isend_irecv(filled) if filled else []:
                work.wait()
        self.ledger.add(channel, sum(mine[k].nbytes for k in self.others), 0.0)

    @property
    def _ring(self) -> float:
        return 2 * (self.count - 1) / self.count

    def _add(self, sent: float, dense_bytes: float) -> None:
        self.ledger.add(self.channel, sent, self._ring * dense_bytes)
