"""The dp x pp grid of one rank: who its neighbours are, and every exchange with them.

Ranks are numbered replica by replica: rank = d·pp + p. Nothing here knows what is exchanged.
Activations and gradients use two process groups: with NCCL, opposite directions on one
communicator can wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from anchor_service.errors import WaitTimeout
from codec.ledger import Ledger
from swarm.doing import Wait
from swarm.meeting import join
from swarm.peers import Peers

_HEADER = 16  # bytes: sequence number and payload size, int64 each


class PeerLost(RuntimeError):
    """An exchange broke off: most often because the process of a peer is gone, which its own error says better."""

    secondhand = True


class Desync(RuntimeError):
    """A neighbour sent something else than this rank expected."""

    def __init__(self, sender: str, expected: list[int], got: list[int]):
        super().__init__(sender, expected, got)
        self.sender, self.expected, self.got = sender, expected, got

    def __str__(self) -> str:
        return f"{self.sender} sent message (number, bytes) {self.got}, expected {self.expected}: the ranks are out of step"


def _new_group(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    """Every rank of the world calls this; only members may use what it returns."""
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=timeout))


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None  # it is, to a rank that is no member of the group
    return work


class Grid:
    """One rank's place. With dp = pp = 1 every method is local and no process group exists."""

    def __init__(
        self, rank: int, dp: int, pp: int, device: torch.device, ledger: Ledger, timeout_s: float = 60.0, init: str = ""
    ):
        self.pp, self.device, self.ledger, self.timeout_s = pp, device, ledger, timeout_s
        self.p = rank % pp
        self.wait: tuple[Wait, float] | None = None  # what this rank waits for, and since when, on the monotonic clock
        self.replicas = self._peers("grad_dp")
        self.ends = self._peers("tied") if self.p in (0, pp - 1) else None
        self.join(rank, dp, init)

    def join(self, rank: int, dp: int, init: str) -> None:
        """Take place `rank` of a grid with `dp` replicas whose ranks meet at `init`; the stage stays the same.

        Of a grid that it was in before nothing is left: its process groups are destroyed by `leave`.
        """
        pp = self.pp
        self.rank, self.dp, self.d = rank, dp, rank // pp
        self._inflight: list[tuple[dist.Work, Tensor]] = []
        self._dp_group: dist.ProcessGroup | None = None
        self._ends: dist.ProcessGroup | None = None  # of the first and the last stage, all replicas
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._sent = {"fwd": 0, "bwd": 0}
        self._received = {"fwd": 0, "bwd": 0}
        if dp * pp > 1:
            with self._waiting("another rank", "its first word", range(dp * pp)):
                self._connect(init)
        self.replicas.join(self._dp_group, range(self.p, dp * pp, pp), rank)
        if self.ends is not None:
            self.ends.join(self._ends, sorted({*range(0, dp * pp, pp), *range(pp - 1, dp * pp, pp)}), rank)

    def _peers(self, channel: str) -> Peers:
        return Peers(channel, self.device, self.ledger, self._waiting)

    @property
    def name(self) -> str:
        return self._name(self.d, self.p)

    @staticmethod
    def _name(d: int, p: int) -> str:
        return f"worker d{d}p{p}"

    @property
    def alone(self) -> bool:
        return self.dp * self.pp == 1

    @property
    def first(self) -> bool:
        return self.p == 0

    @property
    def last(self) -> bool:
        return self.p == self.pp - 1

    def _connect(self, init: str) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=self.timeout_s)
        world = self.dp * self.pp
        dist.init_process_group(backend, store=join(init, timeout), rank=self.rank, world_size=world, timeout=timeout)
        # no device mesh: its groups have torch's own timeout, 30 minutes. Every rank must make every group, in one order
        for d in range(self.dp):
            column = list(range(d * self.pp, (d + 1) * self.pp))
            ways = {way: _new_group(column, timeout) for way in ("fwd", "bwd")}
            if d == self.d:
                self._groups = ways
        for p in range(self.pp):
            across = _new_group(list(range(p, world, self.pp)), timeout)
            if p == self.p:
                self._dp_group = across
        if self.pp > 1:
            self._ends = _new_group([*range(0, world, self.pp), *range(self.pp - 1, world, self.pp)], timeout)
        self._meet()

    def _meet(self) -> None:
        """Speak once in every group and to every neighbour.

        NCCL makes a communicator at first use; in the middle of a tick two of them could wait for each other.
        """
        word = torch.zeros(1, device=self.device)
        for group in (None, self._dp_group, *self._groups.values()):
            dist.all_reduce(word, group=group)
        if self._ends is not None and (self.first or self.last):
            dist.all_reduce(word, group=self._ends)
        for way, step in (("fwd", 1), ("bwd", -1)):
            if 0 <= self.p - step < self.pp:
                dist.recv(word, self.rank - step, group=self._groups[way])
            if 0 <= self.p + step < self.pp:
                dist.send(word, self.rank + step, group=self._groups[way])

    @staticmethod
    def leave() -> None:
        """Destroy all process groups of this process, if there are any."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def part(self) -> None:
        """`leave`, and hold nothing of them either: only then do those who wait for this rank learn that it is gone.

        NCCL's groups are aborted: to destroy them would wait until what is under way has arrived, with a rank that may be
        gone (pytorch#141510). Nobody else learns of an abort at once, but by his own deadline.
        """
        self._inflight, self._dp_group, self._ends, self._groups = [], None, None, {}
        for peers in (self.replicas, self.ends):
            if peers is not None:
                peers.group = None
        if self.device.type == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage] -- there is no other way
        self.leave()

    @contextmanager
    def awaits(self, names: Sequence[str], what: str) -> Generator[None]:
        """While this rank waits: `wait` says for whom."""
        self.wait = Wait(tuple(names), what), time.monotonic()
        try:
            yield
        finally:
            self.wait = None

    @contextmanager
    def _waiting(self, who: str, what: str, ranks: Sequence[int]) -> Generator[None]:
        """For ranks that `who` puts in words; this one may be among them."""
        try:
            with self.awaits([self._name(*divmod(rank, self.pp)) for rank in ranks if rank != self.rank], what):
                yield
        except RuntimeError as error:
            if "imed out" in str(error) or "imeout" in str(error):
                raise WaitTimeout(who, f"{what} to {self.name}", self.timeout_s, "swarm.timeout_s") from error
            raise PeerLost(f"{self.name}: {what} with {who} failed: {error}") from error

    # --- along a pipeline ---------------------------------------------------------------------

    def send(self, way: str, tensor: Tensor) -> None:
        """To the next stage (`fwd`) or the previous (`bwd`), without waiting for it to arrive.

        Its number and size go first: raw P2P reports neither a short message nor a stale one.
        """
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        header = torch.tensor([self._sent[way], raw.numel()], dtype=torch.int64, device=self.device)
        self._sent[way] += 1
        peer = self.rank + (1 if way == "fwd" else -1)
        with self._waiting(self._name(*divmod(peer, self.pp)), "taking what was sent", [peer]):
            for message in (header, raw) if raw.numel() else (header,):
                self._inflight.append((_begun(dist.isend(message, peer, group=self._groups[way])), message))
        self.ledger.add("control", _HEADER, _HEADER)

    def recv(self, way: str, least: int, most: int) -> Tensor:
        """Flat uint8 of `least` to `most` bytes, from the previous stage (`fwd`) or the next (`bwd`).

        Raises WaitTimeout, or Desync if something else came; nothing is allocated before its size is checked.
        """
        peer = self.rank - (1 if way == "fwd" else -1)
        sender = self._name(*divmod(peer, self.pp))
        what = "an activation" if way == "fwd" else "a gradient"
        header = torch.empty(2, dtype=torch.int64, device=self.device)
        with self._waiting(sender, what, [peer]):
            dist.recv(header, peer, group=self._groups[way])
        number, size = header.tolist()
        if number != self._received[way] or not least <= size <= most:
            raise Desync(sender, [self._received[way], most], [number, size])
        self._received[way] += 1
        message = torch.empty(size, dtype=torch.uint8, device=self.device)
        if size:
            with self._waiting(sender, what, [peer]):
                dist.recv(message, peer, group=self._groups[way])
        return message

    def flush(self) -> None:
        """Wait until everything sent has left."""
        beside = [self.rank + step for step in (-1, 1) if 0 <= self.p + step < self.pp]
        with self._waiting("a neighbouring stage", "accepting what was sent", beside):
            for work, _ in self._inflight:
                work.wait()
        self._inflight.clear()

    def sum_pp(self, value: Tensor) -> Tensor:
        """Sum of a small tensor over the stages of this pipeline."""
        if self.pp == 1:
            return value
        value = value.clone()
        column = range(self.d * self.pp, (self.d + 1) * self.pp)
        with self._waiting("the stages of a replica", "a norm", column):
            dist.all_reduce(value, group=self._groups["fwd"])
        self._count_ring("control", value.nbytes, self.pp)
        return value

    # --- over replicas ------------------------------------------------------------------------

    def sum_dp(self, tensor: Tensor, channel: str, dense_bytes: float | None = None) -> None:
        """Sum in place over the replicas of this stage; bit-identical on all of them."""
        if self.dp > 1:
            with self._waiting("the replicas of a stage", f"a sum ({channel})", self.replicas.ranks):
                dist.all_reduce(tensor, group=self._dp_group)
            self._count_ring(channel, tensor.nbytes, self.dp, dense_bytes)

    def from_first_replica(self, tensor: Tensor, channel: str) -> None:
        """Overwrite `tensor` with that of replica 0."""
        if self.dp > 1:
            with self._waiting(self._name(0, self.p), f"a broadcast ({channel})", self.replicas.ranks):
                dist.broadcast(tensor, src=self.p, group=self._dp_group)
            if self.d == 0:
                self.ledger.add(channel, (self.dp - 1) * tensor.nbytes, 0)

    def bytes_from_first_replica(self, raw: Tensor | None, channel: str, most: int) -> Tensor:
        """Flat uint8 of at most `most` bytes, given by replica 0, to all replicas. Raises Desync beyond that."""
        if self.dp == 1:
            assert raw is not None  # the only replica is the first
            return raw
        size = torch.tensor([0 if raw is None else raw.numel()], device=self.device)
        self.from_first_replica(size, "control")
        count = int(size.item())
        if not 0 <= count <= most:
            raise Desync(self._name(0, self.p), [0, most], [0, count])
        raw = torch.empty(count, dtype=torch.uint8, device=self.device) if raw is None else raw.to(self.device)
        if count:
            self.from_first_replica(raw, channel)
        return raw

    def gather_dp(self, value: int) -> list[int]:
        """One signed 64-bit number from each replica of this stage."""
        if self.dp == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        found = [torch.zeros_like(mine) for _ in range(self.dp)]
        with self._waiting("the replicas of a stage", "a digest", self.replicas.ranks):
            dist.all_gather(found, mine, group=self._dp_group)
        self.ledger.add("control", 8 * (self.dp - 1), 0)
        return [int(value) for value in torch.cat(found).tolist()]

    def min_world(self, first: int, second: int) -> tuple[int, int]:
        """The smallest of all ranks' numbers, of each of two."""
        if self.dp * self.pp == 1:
            return first, second
        tensor = torch.tensor([first, second], dtype=torch.int32, device=self.device)
        with self._waiting("all ranks", "the agreement on a version", range(self.dp * self.pp)):
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        self._count_ring("control", tensor.nbytes, self.dp * self.pp, dense_bytes=0)
        first, second = tensor.tolist()
        return first, second

    def _count_ring(self, channel: str, nbytes: int, ranks: int, dense_bytes: float | None = None) -> None:
        share = 2 * (ranks - 1) / ranks
        self.ledger.add(channel, share * nbytes, share * (nbytes if dense_bytes is None else dense_bytes))
