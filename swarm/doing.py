"""What ranks are doing, and who of them keeps the others waiting."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wait:
    """An exchange that a rank has begun and the others have not: `what`, with all of `names`."""

    names: tuple[str, ...]  # workers, or an anchor worker; not the rank itself
    what: str

    def parties(self, name: str) -> tuple[str, frozenset[str]]:
        """The exchange as a whole, for the wait of `name`: who is in the same one keeps nobody in it waiting."""
        return self.what, frozenset((*self.names, name))


@dataclass(frozen=True)
class Doing:
    """worker -> coordinator: what it is at, for how many seconds, and whom it waits for if it does."""

    what: str
    seconds: float
    wait: Wait | None = None

    def __str__(self) -> str:
        waits = f", waits for {', '.join(self.wait.names)} ({self.wait.what})" if self.wait else ""
        return f"{self.what}{waits}, for {self.seconds:.1f} s"


def culprits(doings: Mapping[str, Doing], silent: Collection[str] = (), done: Collection[str] = ()) -> list[str]:
    """Who keeps a request from being done, of those that are still at it (`doings`) or give no answer at all (`silent`).

    Waits are followed to their ends: who waits for nobody, a ring of ranks that wait for each other, or one from
    outside, as an anchor. A rank that is `done` is no end; of several ends those count that somebody waits for.
    """
    if silent:
        return sorted(silent)
    edges = {name: _blockers(name, doings, done) for name in doings}
    reach = {name: _reached(name, edges) for name in {*edges, *(k for ends in edges.values() for k in ends)}}
    ends = [name for name in sorted(reach) if all(name in reach[other] for other in reach[name])]
    awaited = [end for end in ends if any(end in reach[name] and name not in reach[end] for name in reach)]
    return awaited or ends


def _blockers(name: str, doings: Mapping[str, Doing], done: Collection[str]) -> set[str]:
    """Whom it waits for, without those that are in the same exchange already."""
    wait = doings[name].wait
    if wait is None:
        return set()
    theirs = {other: doings[other].wait if other in doings else None for other in wait.names}
    there = {k for k, other in theirs.items() if other and other.parties(k) == wait.parties(name)}
    return set(wait.names) - there - set(done)


def _reached(name: str, edges: Mapping[str, set[str]]) -> set[str]:
    """Everybody at the end of a chain of waits from `name`, itself included."""
    found, ahead = {name}, [name]
    while ahead:
        new = edges.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found
