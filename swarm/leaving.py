"""Nodes that leave in order: a spot notice, a cluster that is made smaller. What is on one goes elsewhere while it is there.

    draining ─▶ for each actor on it a newcomer, in the background, wherever there is room
             ─▶ ready, and a step is over: it gets all that the other one has, and its place
             └▶ no room, and the node is gone soon: a replica less goes on, until there is one

No tick is taken again, and nothing that one actor alone holds is lost. What is not done in time is lost with the node.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from anchor_service.calls import ActorHandle, done_of, raised, take
from anchor_service.places import Drains
from swarm.anchor_faults import AnchorFaults
from swarm.engine_line import EngineLine
from swarm.failure_policy import Role
from swarm.fleet import Fleet
from swarm.progress import Progress
from swarm.regroup import LOST, Regroup

Who = tuple[Role, int]

REASON = "its node is draining"
STEPS, MARGIN_S = 2.0, 5.0  # so many times a step's usual time, and beside it: the node may be gone in the next step


@dataclass(frozen=True)
class Orders:
    """What is done now, that a step is over."""

    start: tuple[Who, ...] = ()  # for these a newcomer starts
    move: tuple[Who, ...] = ()  # the newcomers of these take their places
    give_up: tuple[int, ...] = ()  # replicas that the others go on without


def orders(
    left: Mapping[Who, float], ready: Mapping[Who, bool], pp: int, dp: int, step_s: float, share: Callable[[int], bool]
) -> Orders:
    """`left`: seconds until the node of each is gone; `ready`: newcomers that were started, and whether each is there.

    A replica moves as a whole. It is given up if its node may be gone in the next step of `step_s` seconds, and if as many
    replicas as stay can `share` a tick's samples: else it goes on, and may be in time.
    """
    replicas: defaultdict[int, list[Who]] = defaultdict(list)
    for role, index in left:
        if role == "worker":
            replicas[index // pp].append((role, index))
    move = [who for who in left if who[0] != "worker" and ready.get(who)]
    give_up: list[int] = []
    for d, ranks in sorted(replicas.items()):
        if all(ready.get(who) for who in ranks):
            move += ranks
        elif min(left[who] for who in ranks) < STEPS * step_s + MARGIN_S:
            give_up.append(d)
    stay = dp - len(give_up)
    possible = stay > 0 and share(stay)
    return Orders(tuple(who for who in left if who not in ready), tuple(move), tuple(give_up) if possible else ())


class Leaving:
    """Of one run. `drains`: which nodes are to leave, and when."""

    def __init__(
        self,
        fleet: Fleet,
        progress: Progress,
        regroup: Regroup,
        engines: EngineLine,
        anchors: AnchorFaults,
        drains: Drains,
    ):
        self.fleet, self.progress, self.regroup, self.engines, self.anchors = fleet, progress, regroup, engines, anchors
        self.drains = drains
        self._told: set[str] = set()  # nodes
        self._newcomers: dict[object, tuple[ActorHandle[Any], object]] = {}  # by whom they follow; when they are ready

    def between_steps(self) -> None:
        """Look whether a node that actors of the run are on is about to leave; waits for nobody who is not ready."""
        draining = self.drains.look()
        if not (draining or self._newcomers):
            return
        now = time.time()
        on = {who: place.node for who, place in self.fleet.places().items() if place.node in draining}
        for node in {*on.values()} - self._told:
            self._tell(node, draining[node] - now, [who for who, its in on.items() if its == node])
        self._forget(on)
        found = orders(
            {who: draining[node] - now for who, node in on.items()},
            {who: self._ready(who) for who in on if self._actor(who) in self._newcomers},
            self.regroup.pp,
            self.regroup.dp,
            self.progress.tick_seconds * self.regroup.config.grpo.ticks_per_step,
            self.regroup.can_share,
        )
        self._obey(found, on)

    def _obey(self, found: Orders, on: Collection[Who]) -> None:
        for who in found.start:
            newcomer = self.fleet.beside(who[0])
            self._newcomers[self._actor(who)] = newcomer, self.fleet.arrival(newcomer)
        for who in found.move:
            if who[0] != "worker":
                self._move(who)
        ranks = [index for role, index in found.move if role == "worker"]
        try:
            if ranks:
                self.regroup.replace({rank: self._take(("worker", rank)) for rank in ranks}, REASON)
            elif found.give_up:  # at another step's end if some have moved: they have other numbers then
                gone = [i for role, i in on if role == "worker" and i // self.regroup.pp in found.give_up]
                waiting = [self._newcomers.pop(self.fleet.workers[rank])[0] for rank in gone]
                self.regroup.give_up(found.give_up, gone, waiting, REASON)
        except LOST as failure:  # somebody was lost on the way
            self.regroup.after(failure, self.progress.tick)

    def _move(self, who: Who) -> None:
        """An engine, an anchor or a diagnoser."""
        role, index = who
        if role == "anchor" and not self.anchors.may_leave(index):
            return
        if role == "diagnoser":
            old, self.fleet.diagnosers[index] = self.fleet.diagnosers[index], self._take(who)
            self.fleet.dismiss(old)
            self.progress.event("diagnoser renewed", reason=REASON)
        else:
            (self.engines if role == "engine" else self.anchors).replace(index, self._take(who), REASON)

    def _tell(self, node: str, seconds: float, who: Collection[Who]) -> None:
        self._told.add(node)
        names = ", ".join(self.fleet.name_of(*each) for each in who)
        self.progress.event("node draining", node=node, actors=names, seconds=None if math.isinf(seconds) else seconds)

    def _forget(self, on: Collection[Who]) -> None:
        """Newcomers for those that are not there any more, for another reason, and those that failed before they were ready:
        others start for these."""
        there = {self._actor(who) for who in on}
        for actor, (newcomer, ready) in list(self._newcomers.items()):
            if actor not in there or (done_of([ready])[0] and raised(ready, "a newcomer")):
                del self._newcomers[actor]
                self.fleet.dismiss(newcomer)

    def _actor(self, who: Who) -> ActorHandle[Any]:
        return self.fleet.roles[who[0]][who[1]]

    def _ready(self, who: Who) -> bool:
        _, ready = self._newcomers[self._actor(who)]
        return bool(done_of([ready])[0])

    def _take(self, who: Who) -> ActorHandle[Any]:
        newcomer, ready = self._newcomers.pop(self._actor(who))
        self.fleet.arrived(newcomer, take(ready, "a newcomer", "its node"))
        return newcomer
