"""The weights that fires start from, by their own streams, and what they cost."""

from __future__ import annotations

from anchor_service.calls import Calls, gather
from anchor_service.config import AnchorConfig
from anchor_service.errors import ActorLost
from swarm.anchor_faults import AnchorFaults, stream_of
from swarm.fleet import Fleet
from swarm.progress import Progress


class Snapshots:
    """Of one run. On the wall clock they are made beside the tick that changes the weights."""

    def __init__(self, anchor: AnchorConfig, fleet: Fleet, progress: Progress, faults: AnchorFaults):
        self.anchor, self.fleet, self.progress, self.faults = anchor, fleet, progress, faults
        self._leaving: dict[int, Calls] = {}  # sizes of those that are made beside this tick, by version of the fire

    def of(self, worker: int, version: int | None = None) -> list[object]:
        """References to the present weights, for an anchor worker; none if it shares the engines' stream.

        `version`: of a fire for which they may be made beside the next tick.
        """
        if self.anchor.weights == "shared":
            return []
        stream = stream_of(worker)
        whole = stream in self.faults.begin_whole
        self.faults.begin_whole.discard(stream)
        if version is None:
            references, nbytes, whole = self.fleet.weights(self.progress.tick, stream, whole)
            self.progress.ledger.add("snapshot", nbytes, 0)
            if whole:
                self.faults.begun[stream] = self.progress.tick
        else:
            references, self._leaving[version] = self.fleet.weights_beside(self.progress.tick, stream, whole)
        return references

    def settle(self) -> None:
        """After the tick beside which they were made. One that was lost with a rank is none: its fire is void."""
        while self._leaving:
            version, calls = self._leaving.popitem()
            try:
                sizes = gather(calls, f"the snapshot of correction {version}", *self.fleet.swarm_limit)
            except ActorLost as failure:
                self.faults.unsent(version, failure)
            else:
                self.progress.ledger.add("snapshot", sum(nbytes for nbytes, _ in sizes), 0)
