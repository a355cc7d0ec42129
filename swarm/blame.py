"""Whose failure an exception is: from what `gather` and the exchanges call those they wait for, to roles and numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchor_service.errors import ARGUMENT, SWARM, ActorLost, WaitTimeout
from rl.engine import EngineFailed
from swarm.failure_policy import Failure, Role

NOT_CONSTRUCTED = (
    "it could not be constructed"  # how `ActorLost.reason` begins then: it will not be the next time either
)

_SPOKEN: dict[str, tuple[Role, ...]] = {  # of a role one does not know which; of two not even that
    "the anchor": ("anchor",),
    "the diagnoser": ("diagnoser",),
    "an engine": ("engine",),
    "a worker": ("worker",),
    "another rank": ("worker",),
    "all ranks": ("worker",),
    "a neighbouring stage": ("worker",),
    "the stages of a replica": ("worker",),
    "the replicas of a stage": ("worker",),
    SWARM: ("worker", "anchor"),  # its fire failed with it: workers that meet again do not mend that
}
_ARGUMENTS: dict[str, tuple[Role, ...]] = {  # who delivers what a role is called with
    "worker": ("anchor",),
    "engine": ("worker",),
    "anchor": ("worker", "anchor"),
    "diagnoser": ("worker", "anchor"),
}
_WORKER = re.compile(r"worker d(\d+)p(\d+)")
_OTHER = re.compile(r"(engine|anchor|diagnoser) (\d+)")
_DELIVERS = re.compile(ARGUMENT + r"(?:the )?(\w+)\b.* gets an argument from")
_RAISED_BY = re.compile(r"raised by ([^,]+), asked for ")


@dataclass(frozen=True)
class Blame:
    """One that failed: its number in its role, a worker's rank; None where nobody knows which it was."""

    role: Role
    index: int | None
    failure: Failure


def blamed(error: BaseException, pp: int) -> list[Blame]:
    """Who has failed, in a swarm of `pp` stages. Nobody for what is no failure of a process, and for an echo of one."""
    if getattr(error, "secondhand", False):
        return []
    if isinstance(error, WaitTimeout):
        return _all_of(error.who, Failure.HANG, pp)
    if isinstance(error, ActorLost) and not error.reason.startswith(NOT_CONSTRUCTED):
        return _all_of(error.who, Failure.DEATH, pp)
    if isinstance(error, EngineFailed):  # raised by the driver it is about files that differ, and no engine's fault
        said = [_RAISED_BY.match(note) for note in getattr(error, "__notes__", ())]
        return [blame for by in said if by for blame in _all_of(by[1], Failure.BAD, pp)]
    return []


def _all_of(who: str, failure: Failure, pp: int) -> list[Blame]:
    """Of the names that a wait gives, joined by commas; those that are no role's are left out."""
    return [Blame(role, index, failure) for name in who.split(", ") for role, index in _one(name, pp)]


def _one(name: str, pp: int) -> list[tuple[Role, int | None]]:
    if worker := _WORKER.fullmatch(name):
        d, p = map(int, worker.groups())
        return [("worker", d * pp + p)]
    if other := _OTHER.fullmatch(name):
        role: Role = "engine" if other[1] == "engine" else "anchor" if other[1] == "anchor" else "diagnoser"
        return [(role, int(other[2]))]
    if name.startswith("those who hold a copy"):  # of a gradient, by channel
        return [("worker", None)]
    if asked := _DELIVERS.fullmatch(name):
        return [(role, None) for role in _ARGUMENTS.get(asked[1], ())]
    return [(role, None) for role in _SPOKEN.get(name, ())]
