"""When the anchor fires, and the ring of old weights it may still need.

Lockstep contract: before the forward of tick T, a fire happens if T % cadence == 0 and T >= delay_k,
with M = ∇L(θ_{T-delay_k}) on b_{T-delay_k+1}. So θ_s is kept only for s ≡ -delay_k (mod cadence).
Keyed on the cadence of M, never on that of Q.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


def anchor_should_fire(tick: int, cadence: int, delay_k: int) -> bool:
    """Whether a correction is first merged in `tick` (counted from 1)."""
    return tick % cadence == 0 and tick >= delay_k


def q_should_refresh(tick: int, q_cadence: int) -> bool:
    """Whether Q is refreshed before `tick`: on its cadence, and once before tick 2.

    Never before tick 1: there are no statistics of a previous tick yet.
    """
    return tick >= 2 and (tick == 2 or tick % q_cadence == 0)


def ring_bound(cadence: int, delay_k: int) -> int:
    """Most snapshots that are alive at once: taken at s, needed until tick s + delay_k."""
    return -(-delay_k // cadence)


class RingOverflow(RuntimeError):
    """The ring would hold more than its bound: a snapshot was not taken when it was due."""


class SnapshotRing(Generic[T]):
    """What was offered at source tick s, until the fire at tick s + delay_k takes it."""

    def __init__(self, cadence: int, delay_k: int):
        self.cadence, self.delay_k = cadence, delay_k
        self._items: dict[int, T] = {}

    def wants(self, source_tick: int) -> bool:
        """Whether weights after `source_tick` ticks (0: the base policy) will be needed."""
        return anchor_should_fire(source_tick + self.delay_k, self.cadence, self.delay_k)

    def put(self, source_tick: int, item: T) -> None:
        """Raises RingOverflow beyond the bound, ValueError for a tick that no fire will need."""
        if not self.wants(source_tick):
            raise ValueError(f"no fire needs the weights of tick {source_tick}")
        if len(self._items) >= ring_bound(self.cadence, self.delay_k):
            raise RingOverflow(f"ring holds {sorted(self._items)}, cannot add {source_tick}")
        self._items[source_tick] = item

    def take(self, tick: int) -> T:
        """What the fire at `tick` merges; it leaves the ring. Raises KeyError if it was never put."""
        return self._items.pop(tick - self.delay_k)

    def pending(self) -> dict[int, T]:
        """Items not taken yet, by source tick, oldest first."""
        return dict(sorted(self._items.items()))

    def __len__(self) -> int:
        return len(self._items)
