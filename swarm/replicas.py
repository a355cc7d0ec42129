"""Replicas of a stage hold the same weights to the bit: compared by digest, and sealed between two ticks."""

from __future__ import annotations

import xxhash
from torch import Tensor

from anchor_service.errors import ReplicaMismatch
from swarm.grid import Grid
from swarm.messages import TickPlan

BLOCK = 1 << 22  # elements: of weights on a GPU the host never holds more than that for a digest


def weights_digest(master: Tensor) -> int:
    """64-bit digest of a stage's weights [n], signed so that it fits an int64 tensor."""
    state = xxhash.xxh3_64()
    for block in master.detach().split(BLOCK):
        state.update(block.cpu().numpy().data)
    return state.intdigest() - (1 << 63)


class Seal:
    """The digest of this rank's weights at the end of the last checked tick."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.digest: int | None = None

    def check(self, plan: TickPlan, master: Tensor) -> None:
        """Nothing may touch the weights between two ticks. Raises ReplicaMismatch."""
        if self.digest is not None and weights_digest(master) != self.digest:
            who = f"{self.grid.name} changed since tick {plan.tick - 1}"
            raise ReplicaMismatch("weights changed outside a tick", plan.tick, plan.version, [who])
        self.digest = None

    def compare(self, plan: TickPlan, master: Tensor) -> None:
        """Seal the weights that all replicas of this stage hold. Raises ReplicaMismatch, naming who holds others."""
        self.digest = weights_digest(master)
        digests = self.grid.gather_dp(self.digest)
        common = max(set(digests), key=digests.count)
        odd = [d for d, found in enumerate(digests) if found != common]
        if odd:
            p = self.grid.p
            names = [f"worker d{d}p{p} holds {found:x}" for d, found in enumerate(digests)]
            raise ReplicaMismatch(f"replicas of stage {p} differ (odd: {odd})", plan.tick, plan.version, names)
