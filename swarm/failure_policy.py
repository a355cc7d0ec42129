"""What is done about a failure: status in, decision out. No actors, no clock: only what was counted so far.

              engine      anchor, wall     anchor, lockstep     worker               diagnoser
    death     renew       renew            renew                regroup or rewind    renew
    hang      renew       renew            renew                regroup or rewind    renew
    bad       renew       renew            end                  end                  end

A worker is regrouped where a live twin can give its successor the state to the bit; an anchor or an engine in lockstep is
renewed where the swarm still has the weights of what it owes. Else the run rewinds: it goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from anchor_service.errors import ActorLost, WaitTimeout
from swarm.config import FaultsConfig

Role = Literal["worker", "engine", "anchor", "diagnoser"]


class Failure(StrEnum):
    """What a role did."""

    DEATH = "death"  # its process, or its node
    HANG = "hang"  # a deadline passed, and its process is there
    BAD = "bad answer"


def failure_of(error: Exception) -> Failure:
    """What somebody did of whom this error was raised."""
    kinds = {ActorLost: Failure.DEATH, WaitTimeout: Failure.HANG}
    return next((failure for kind, failure in kinds.items() if isinstance(error, kind)), Failure.BAD)


class Decision(StrEnum):
    """What the run does."""

    RENEW = "renew"  # a new actor in its place, which is given what the old one held
    REGROUP = "regroup"  # the other workers meet again, with a new one or without; the tick is taken again
    REWIND = "rewind"  # everything from the newest checkpoint
    WITHOUT = "without"  # go on without it
    END = "end"


@dataclass(frozen=True)
class Status:
    """One failure: who, how, and when."""

    role: Role
    failure: Failure
    tick: int
    recoverable: bool = True  # whether what it held can be had from others, to the bit where the run promises bits
    waits: bool = True  # whether the run waits for what it was to deliver


class FailurePolicy:
    """Decides, and counts: within a budget a run, and a smaller one between two ticks."""

    def __init__(self, faults: FaultsConfig):
        self.faults = faults
        self.dealt: Counter[str] = Counter()  # by role
        self._tick = -1
        self._at_tick: Counter[str] = Counter()

    def decide(self, status: Status) -> Decision:
        """What to do about it. Going on without is for an anchor that nothing waits for, once its budget is spent."""
        if status.tick != self._tick:
            self._tick, self._at_tick = status.tick, Counter()
        self.dealt[status.role] += 1
        self._at_tick[status.role] += 1
        spent = self.dealt.total() > self.faults.budget or self._at_tick[status.role] > self.faults.a_tick
        optional = status.role == "anchor" and not status.waits
        if spent:
            return Decision.WITHOUT if optional else Decision.END
        if status.failure is Failure.BAD and not (optional or status.role == "engine"):
            return Decision.END
        if not status.recoverable:
            return Decision.REWIND
        return Decision.REGROUP if status.role == "worker" else Decision.RENEW
