"""When the anchor fires, and how many old snapshots may be alive.

Lockstep contract: before the forward of tick T, a fire happens if T % cadence == 0 and T >= delay_k,
with M = ∇L(θ_{T-delay_k}) on b_{T-delay_k+1}. So θ_s is kept only for s ≡ -delay_k (mod cadence).
Keyed on the cadence of M, never on that of Q.
"""

from __future__ import annotations


def anchor_should_fire(tick: int, cadence: int, delay_k: int) -> bool:
    """Whether a correction is first merged in `tick` (counted from 1)."""
    return tick % cadence == 0 and tick >= delay_k


def ring_bound(cadence: int, delay_k: int) -> int:
    """Most snapshots that are alive at once: taken at s, needed until tick s + delay_k."""
    return -(-delay_k // cadence)


class RingOverflow(RuntimeError):
    """The ring would hold more than its bound: a snapshot was not taken when it was due."""
