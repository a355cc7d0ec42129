"""How long corrections are held, and what that allows.

A sign that is wrong pushes its coordinate the same way in every tick in which it is held, and again while M̄ remembers it: for

    τ = C (1+β) / (1-β)        ticks; C: the mean hold, β of M̄

Of estimates of one direction the best mixture weighs each by its signal over its noise, and what is felt for τ ticks has τ
times the noise of what is new in each. So a share is within cap / τ, with `cap` from a hold at which a full dose is known to be
good: the published {5, 5}, τ = 15, with a share of 0.75.
"""

from __future__ import annotations

from typing import Any


class Holds:
    """Of one run's corrections. `cadence` counts as one hold, until there are others."""

    def __init__(self, cadence: float = 1.0, beta: float = 0.0):
        self.beta = beta
        self.sum, self.count = float(cadence), 1
        self.since: int | None = None  # the tick in which the correction that is held was first merged

    def fire(self, tick: int) -> None:
        """In `tick` a correction is merged for the first time."""
        if self.since is not None:
            self.sum, self.count = self.sum + tick - self.since, self.count + 1
        self.since = tick

    def mean(self, age: int = 0) -> float:
        """Ticks; at least those for which the present one has been held. That is how one that never ends fades."""
        return max(self.sum / self.count, age + 1)

    def tau(self, age: int = 0) -> float:
        return self.mean(age) * self.averaged

    @property
    def averaged(self) -> float:
        """Corrections whose noise M̄ averages."""
        return (1 + self.beta) / (1 - self.beta)

    def bound(self, cap: float, age: int = 0) -> float:
        """The largest share of a step."""
        return cap / self.tau(age)

    def fields(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count, "since": self.since}

    def restore(self, fields: dict[str, Any]) -> None:
        self.sum, self.count, self.since = fields["sum"], fields["count"], fields["since"]
