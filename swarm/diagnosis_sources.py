"""What fires start from, kept for the diagnosis of the ticks that merge their corrections. References only."""

from __future__ import annotations

from dataclasses import dataclass

from anchor_service.clock import Clock
from anchor_service.lag import Due
from swarm.messages import MergeOutcome


@dataclass(frozen=True)
class Source:
    """θ_s of one fire, and b_{s+1} or the window that it replays."""

    due: Due
    records: list[object]  # reference to a record with the weights, one a stage
    replay: object  # reference to the frame: of one mini-batch the whole, whatever share of it the anchor uses


class Sources:
    """By version. No more than the fires under way and the correction that is merged now."""

    def __init__(self, every: int | None, clock: Clock):
        self.every, self.clock = every, clock
        self._held: dict[int, Source] = {}

    def diagnosed(self, tick: int) -> bool:
        return self.every is not None and tick % self.every == 0

    def wants(self, due: Due) -> bool:
        """Whether a diagnosed tick may merge the correction of this fire."""
        return self.every is not None and self.clock.merged_at_multiple(due, self.every)

    def keep(self, due: Due, records: list[object], replay: object) -> None:
        self._held[due.version] = Source(due, records, replay)

    def settle(self, outcome: MergeOutcome) -> None:
        """Let go of what a tick with this outcome has passed over or refused."""
        self._held = {v: s for v, s in self._held.items() if v == outcome.version or v > outcome.newest}

    def merged(self, outcome: MergeOutcome) -> Source | None:
        """Of the correction that was merged; None if none was, or one that is not known here."""
        return self._held.get(outcome.version) if outcome.merged and outcome.version else None
