"""After workers were lost: from which replica the others go on, and from which tick. Pure.

A replica is whole if all of its stages are there. One that is whole gives its state to those that are not:

    tick T ended on a whole replica        all go on after T, from its state
    T broke off on all that are whole      they go back to before T, and T is taken again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.messages import Standing


@dataclass(frozen=True)
class Reunion:
    """How the ranks meet again."""

    done: int  # ticks that count as taken
    source: int  # the replica whose state the copies get
    copies: tuple[int, ...]  # replicas that get it
    back: tuple[int, ...]  # replicas that take their tick back
    exact: bool  # whether all goes on as if nothing had been lost


def reunion(standings: Sequence[Standing | None], pp: int, tick: int) -> Reunion | None:
    """Of ranks in order, None being lost, while `tick` was to be taken. None: no replica is whole, or none can go back."""
    replicas = [standings[first : first + pp] for first in range(0, len(standings), pp)]
    there = {d: [s for s in ranks if s is not None] for d, ranks in enumerate(replicas)}
    whole = {d: ranks for d, ranks in there.items() if len(ranks) == pp}
    ended = [d for d, ranks in whole.items() if all(s.done == tick for s in ranks)]
    if ended:
        copies = tuple(d for d in there if d not in ended)
        own = any(s.own_after for s in whole[ended[0]])
        return Reunion(tick, ended[0], copies, (), not copies or not own)
    # a rank that has not begun the tick is before it already
    able = [d for d, ranks in whole.items() if all(s.done == tick - 1 and s.marked in (tick, tick - 1) for s in ranks)]
    if not able:
        return None
    copies = tuple(d for d in there if d not in able)
    back = tuple(d for d in able if any(s.marked == tick for s in whole[d]))
    own = any(s.own_before if s.marked == tick else s.own_after for s in whole[able[0]])
    return Reunion(tick - 1, able[0], copies, back, not copies or not own)
