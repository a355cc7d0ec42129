"""What fires start from, kept for the diagnosis of the ticks that merge their corrections. References only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anchor_service.clock import Lockstep, Wall
from anchor_service.lag import Due


@dataclass(frozen=True)
class Source:
    """θ_s and b_{s+1} of one fire."""

    due: Due
    records: list[Any]  # reference to a record with the weights, one a stage
    replay: Any  # reference to the batch frame: the whole mini-batch, whatever share of it the anchor uses


class Sources:
    """By version. No more than the fires under way and the correction that is merged now."""

    def __init__(self, every: int | None, clock: Lockstep | Wall):
        self.every, self.clock = every, clock
        self._held: dict[int, Source] = {}

    def diagnosed(self, tick: int) -> bool:
        return self.every is not None and tick % self.every == 0

    def wants(self, due: Due) -> bool:
        """Whether a diagnosed tick may merge the correction of this fire."""
        return self.every is not None and self.clock.merged_at_multiple(due, self.every)

    def keep(self, due: Due, records: list[Any], replay: Any) -> None:
        self._held[due.version] = Source(due, records, replay)

    def settle(self, metrics: dict[str, float]) -> None:
        """Let go of what a tick with these metrics has passed over or refused."""
        held, refused = (int(metrics.get(f"anchor/{name}", 0)) for name in ("version", "refused"))
        self._held = {v: s for v, s in self._held.items() if v == held or v > max(held, refused)}

    def merged(self, metrics: dict[str, float]) -> Source | None:
        """Of the correction that the tick with these metrics merged; None if it merged none that is known here."""
        return self._held.get(int(metrics["anchor/version"])) if "merger/dose" in metrics else None
