"""When fires start and when their corrections are merged. Pure: the run and the simulator share it.

lockstep   the agenda says both; the swarm waits for a correction that is due
wall       a fire starts in the first tick in which an anchor worker is free, on the newest weights;
           its correction is merged in the first tick in which every rank holds it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from anchor_service.config import AnchorConfig
from anchor_service.lag import Draw, Due, agenda, make_draw

PACE = 0.2  # weight of the newest step in the running mean of a tick's time


class Clock(Protocol):
    """What the run asks, whichever kind it has."""

    waits: bool  # for a correction that is due; else whatever all ranks hold is merged

    def to_start(self, source_tick: int) -> list[Due]:
        """Fires that begin with the weights after `source_tick` ticks."""
        ...

    def due(self, tick: int) -> Due | None:
        """The fire that `tick` is the first to merge, as far as it is known beforehand."""
        ...

    def least_ticks(self, due: Due) -> float:
        """How many tick times a fire that has begun must take at the least."""
        ...

    def finished(self, version: int, void: bool = False) -> None:
        """A fire is done, or is void."""
        ...

    def staffed(self, workers: int) -> None:
        """So many anchor workers are there now."""
        ...

    def merged_at_multiple(self, due: Due, every: int) -> bool:
        """Whether a tick that `every` divides may merge the correction of `due`."""
        ...

    def resume(self, tick: int, newest: int) -> set[int]:
        """Go on after `tick` ticks and version `newest`; versions that must be under way then."""
        ...

    def bound(self) -> int | None:
        """Most fires under way at once; None: nobody knows."""
        ...


class Lockstep:
    """Follows an agenda to the letter."""

    waits = True

    def __init__(self, dues: list[Due]):
        self._by_source: dict[int, list[Due]] = {}
        for due in dues:
            self._by_source.setdefault(due.source_tick, []).append(due)
        self._by_first = {due.first_tick: due for due in dues if due.first_tick is not None}

    def to_start(self, source_tick: int) -> list[Due]:
        """Fires that begin with the weights after `source_tick` ticks."""
        return self._by_source.get(source_tick, [])

    def due(self, tick: int) -> Due | None:
        """The fire that `tick` is the first to merge."""
        return self._by_first.get(tick)

    def least_ticks(self, due: Due) -> float:
        """No time: the swarm waits for it in the tick that merges it, however long that takes."""
        return 0.0

    def finished(self, version: int, void: bool = False) -> None: ...

    def staffed(self, workers: int) -> None: ...

    def merged_at_multiple(self, due: Due, every: int) -> bool:
        """As far as the agenda says."""
        if due.first_tick is None:
            return False
        after = min((first for first in self._by_first if first > due.first_tick), default=None)
        return after is None or -(-due.first_tick // every) * every < after

    def resume(self, tick: int, newest: int) -> set[int]:
        """Versions that must be under way after `tick` ticks."""
        dues = [due for dues in self._by_source.values() for due in dues if due.source_tick < tick]
        return {due.version for due in dues if due.first_tick is not None and due.first_tick > tick}

    def bound(self) -> int:
        """Most fires under way at once."""
        edges = [(d.source_tick, 1) for ds in self._by_source.values() for d in ds]
        edges += [(first, -1) for first in self._by_first]
        alive = most = 0
        for _, change in sorted(edges):
            alive += change
            most = max(most, alive)
        return most


class Wall:
    """Starts a fire whenever a worker is free and the lag model has an anchor at all; several workers take even turns.

    Of W workers whose fires take F ticks one starts every ⌊F/W⌋ ticks at the soonest. Else all that became free
    together would start in ticks in a row, and the last of their corrections be held until they are free again.
    """

    waits = False

    def __init__(
        self, workers: int, draw: Draw, usable: Callable[[int], bool] = lambda source_tick: True, slows: bool = True
    ):
        """`draw`: the lag model; `slows`: whether it slows the real anchor down, or only says where it has an outage."""
        self.workers, self.draw, self.usable, self.slows = workers, draw, usable, slows
        self.version = 0
        self._running: dict[int, int] = {}  # version -> its source tick
        self._offered = self._started = 0  # source ticks: of the last offer, of the last fire
        self._takes: float | None = None  # ticks of the fire that was done last

    def to_start(self, source_tick: int) -> list[Due]:
        """At most one fire a tick; nothing is queued, so what is offered while all are busy is let go."""
        self._offered = source_tick
        busy = len(self._running) >= self.workers or self._early(source_tick)
        if busy or not self.usable(source_tick) or self.lag_of(self.version, source_tick) is None:
            return []
        self.version += 1
        self._running[self.version] = self._started = source_tick
        return [Due(self.version, source_tick, None)]

    def _early(self, source_tick: int) -> bool:
        """Whether its turn is still to come; before any fire is done, as the lag model says."""
        if not self._running:
            return False
        newest = Due(self.version, self._started, None)
        takes = self.least_ticks(newest) if self._takes is None else self._takes
        return source_tick - self._started < takes // self.workers

    def lag_of(self, fire: int, tick: int) -> float | None:
        """How many tick times fire number `fire` (from 0) is slowed to; None in an outage."""
        return self.draw(fire, tick)

    def least_ticks(self, due: Due) -> float:
        return (self.lag_of(due.version - 1, due.source_tick) or 0.0) if self.slows else 0.0

    def due(self, tick: int) -> None:
        return None

    def finished(self, version: int, void: bool = False) -> None:
        """A fire is done, before the next offer; one that is void says nothing of how long they take."""
        source = self._running.pop(version, None)
        if source is not None and not void:
            self._takes = self._offered + 1 - source

    def staffed(self, workers: int) -> None:
        """With none nothing starts."""
        self.workers = workers

    def merged_at_multiple(self, due: Due, every: int) -> bool:
        """Nobody knows yet in which ticks it will be merged."""
        return True

    def resume(self, tick: int, newest: int) -> set[int]:
        """Go on after version `newest`; fires that were under way are lost, none must be there."""
        self.version = newest
        return set()

    def bound(self) -> None:
        """Fires under way are as many as workers, but corrections that are done may wait for all ranks to hold them."""


def make_clock(anchor: AnchorConfig, seed: int, last_tick: int, ticks_per_step: int, beyond: bool = False) -> Clock:
    """The clock that `anchor.clock` names, for a run of `last_tick` ticks; `beyond`: one that may be made longer."""
    if anchor.clock == "lockstep":
        return Lockstep(agenda(anchor, seed, last_tick, beyond))
    shared = anchor.weights == "shared"  # then there are new weights at the end of a step only
    slows = anchor.lag.kind != "fixed"
    return Wall(anchor.workers, make_draw(anchor, seed), lambda s: not shared or s % ticks_per_step == 0, slows)


def next_worker(busy: list[int], version: int) -> int:
    """The worker with the fewest fires under way (`busy`, one number each); they take turns where that decides nothing."""
    return min(range(len(busy)), key=lambda k: (busy[k], (k - version) % len(busy)))


def paced(tick_seconds: float, newest: float) -> float:
    """The running mean of a tick's time, in which lags on the wall clock are counted; 0 where there was none yet."""
    return tick_seconds + (PACE if tick_seconds else 1.0) * (newest - tick_seconds)
