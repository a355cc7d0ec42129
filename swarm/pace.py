"""How long what is asked for usually takes, and from when on it is slow, or hangs. Pure: times come from outside."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import median

from swarm.config import FaultsConfig

SEEN = 3  # before so many of a kind were seen nothing is judged: the first ones compile and warm up
REMEMBERED = 20  # the newest ones say what is usual

TICK, DUE_TICK, FIRE = "tick", "tick in which a correction is due", "fire"
WITHIN = {DUE_TICK: FIRE}  # what one of a kind may have to wait for as a whole


class Pace:
    """Of one run, by kind of request: `tick`, `weights`, `generate train`, …"""

    def __init__(self, faults: FaultsConfig, patience: Mapping[str, float] | None = None):
        """`patience`: seconds more than `faults.hang_floor_s` that some kinds have, as they may rightly wait for others."""
        self.faults, self.patience = faults, patience or {}
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def observe(self, kind: str, seconds: float) -> None:
        """One of its kind took so long."""
        self._took[kind].append(seconds)

    def usual(self, kind: str) -> float | None:
        """Median of the newest, seconds; None until SEEN were seen."""
        took = self._took.get(kind, ())
        return median(took) if len(took) >= SEEN else None

    def slow_after(self, kind: str) -> float:
        """Seconds after which one is slow; infinite while nobody knows what is usual."""
        usual = self.usual(kind)
        return math.inf if usual is None else max(self.faults.slow_floor_s, self.faults.slow_factor * usual)

    def hung_after(self, kind: str, limit: tuple[float, str]) -> tuple[float, str]:
        """Seconds after which one is not waited for any longer, and the knob that says so; never more than `limit`."""
        usual = [self.usual(one) for one in (kind, WITHIN.get(kind, kind))]
        known = [seconds for seconds in usual if seconds is not None]
        if len(known) < len(usual):
            return limit
        floor = self.faults.hang_floor_s + self.patience.get(kind, 0.0), "faults.hang_floor_s"
        return min(limit, max(floor, (self.faults.hang_factor * max(known), "faults.hang_factor")))
