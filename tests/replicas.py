"""Replicas that sum gradients, as threads of one process: what `swarm.peers` does between processes, without a network."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LATE_S = 30.0


class ByThreads:
    """One of `count` threads, as `codec.coded_sum.Replicas`."""

    def __init__(self, index: int, table: list[Any], barrier: Barrier):
        self.index, self.count, self.table, self.barrier = index, len(table), table, barrier
        self.sent = 0.0  # bytes, a ring's share of a sum
        self.rounds = 0

    def _all(self, mine: Any) -> list[Any]:
        self.table[self.index] = mine
        self.barrier.wait(LATE_S)
        found = list(self.table)
        self.barrier.wait(LATE_S)
        return found

    def sum(self, tensor: Tensor, dense_bytes: float) -> None:
        parts = self._all(tensor.clone())
        tensor.copy_(torch.stack(parts).sum(0))
        self.sent += 2 * (self.count - 1) / self.count * tensor.nbytes
        self.rounds += 1

    def scatter(self, payloads: list[Tensor], least: int, most: int, dense_bytes: float) -> list[Tensor]:
        self.sent += sum(p.numel() for k, p in enumerate(payloads) if k != self.index)
        self.rounds += 1
        came = [row[self.index] for row in self._all(payloads)]
        assert all(least <= p.numel() <= most for k, p in enumerate(came) if k != self.index)
        return came

    def gather(self, payload: Tensor, limits: list[tuple[int, int]]) -> list[Tensor]:
        self.sent += (self.count - 1) * payload.numel()
        came = self._all(payload)
        assert all(least <= p.numel() <= most for p, (least, most) in zip(came, limits))
        return came


def on_threads(count: int, work: Callable[[ByThreads], T]) -> list[T]:
    """What `work` returns for each of so many replicas, in order."""
    table: list[Any] = [None] * count
    barrier = Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda k: work(ByThreads(k, table, barrier)), range(count)))
