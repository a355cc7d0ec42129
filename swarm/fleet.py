"""The actors of one run, and how they are asked: by name, with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchor_service.actor import Anchor
from anchor_service.calls import ActorHandle, Alarm, Calls, gather, several
from anchor_service.config import AnchorConfig
from anchor_service.diagnosis import Diagnoser
from anchor_service.places import Place, places_of, where
from rl.config import RolloutConfig
from rl.rollout import RolloutWorker
from swarm.config import SwarmConfig
from swarm.failure_policy import Role
from swarm.lookout import Lookout
from swarm.messages import Report
from swarm.telemetry import Process
from swarm.worker import Worker

GRACE_S = 15.0  # a rank that waits for another has begun to a little after it was asked
SETTLE_S = 5.0  # so long after the first rank that lost its peer Ray says what became of that


def _as_it_is(failure: Exception) -> None:
    raise failure


@dataclass
class Fleet:
    """Handles, workers in rank order. `renew` puts a new actor in the place of one, here too; it waits for nothing.

    `new_worker`: one in the place of another, or beside all there are; `beside`: one more of a role, wherever there is room;
    `dismiss`: one is not needed any more.
    `again` makes all of them what they were before the run, with others for those that are dead or do not answer.
    """

    swarm: SwarmConfig
    anchor: AnchorConfig
    rollout: RolloutConfig
    workers: list[ActorHandle[Worker]]
    engines: list[ActorHandle[RolloutWorker]]
    anchors: list[ActorHandle[Anchor]]
    diagnosers: list[ActorHandle[Diagnoser]]
    renew: Callable[[Role, int], ActorHandle[Any]]
    new_worker: Callable[[ActorHandle[Worker] | None], ActorHandle[Worker]]
    beside: Callable[[Role], ActorHandle[Any]]
    dismiss: Callable[[ActorHandle[Any]], None]
    again: Callable[[], Fleet]
    mend: Callable[[Exception], None] = field(
        default=_as_it_is, init=False
    )  # workers that a failure between ticks names
    _place: dict[object, Place] = field(default_factory=dict, init=False)  # of each actor that was asked
    lookout: Lookout | None = field(default=None, init=False)  # that of the run, once it has begun

    @property
    def swarm_limit(self) -> tuple[float, str]:
        """Seconds and their knob, for what a rank is asked for. Its own deadline says more and is GRACE_S shorter."""
        return self.swarm.timeout_s + GRACE_S, "swarm.timeout_s"

    def tick_limit(self, due: bool) -> tuple[float, str]:
        """For a tick, in which a rank may have to wait for a correction that is `due`."""
        if not due:
            return self.swarm_limit
        seconds, knob = self.swarm_limit
        return seconds + self.anchor.timeout_s, f"{knob} or anchor.timeout_s"

    @property
    def engine_limit(self) -> tuple[float, str]:
        return self.rollout.timeout_s, "rollout.timeout_s"

    @property
    def anchor_limit(self) -> tuple[float, str]:
        return self.anchor.timeout_s, "anchor.timeout_s"

    def ask_workers(
        self,
        method: str,
        arguments: Sequence[Sequence[object]],
        what: str,
        limit: tuple[float, str] | None = None,
        kind: str | None = None,
    ) -> list[Any]:
        """What `method` returns on every rank, each with arguments of its own; within `swarm_limit` or `limit`.

        `kind`: of what takes as long as this, if not every call of `method` does.
        """
        calls = [
            (self.swarm.name_of(rank), getattr(worker, method).remote(*args))
            for rank, (worker, args) in enumerate(zip(self.workers, arguments, strict=True))
        ]
        return self.gather(calls, what, limit or self.swarm_limit, kind or method, settle=SETTLE_S)

    def gather(
        self,
        calls: Sequence[tuple[str, object]],
        what: str,
        limit: tuple[float, str],
        kind: str,
        since: float | None = None,
        settle: float = 0.0,
    ) -> list[Any]:
        """What these deliver, looked into if it takes longer than is usual for its `kind`; `since`: when it was asked for."""
        if self.lookout is None:
            return gather(calls, what, *limit, settle=settle)
        with self.lookout.wait(kind, what, limit, since) as alarm:
            return gather(calls, what, alarm.seconds, alarm.knob, settle=settle, alarm=alarm)

    def alarm(self, kind: str, what: str, limit: tuple[float, str]) -> Alarm | None:
        """Of a wait that begins now; none before the run has a lookout."""
        return self.lookout.alarm(kind, what, limit) if self.lookout else None

    def named(self) -> dict[str, ActorHandle[Any]]:
        """Every actor by the name that messages have for it."""
        return {self.name_of(role, i): actor for role, held in self.roles.items() for i, actor in enumerate(held)}

    @property
    def roles(self) -> dict[Role, list[ActorHandle[Any]]]:
        """All actors, in the order of their numbers."""
        return {"worker": self.workers, "engine": self.engines, "anchor": self.anchors, "diagnoser": self.diagnosers}

    def name_of(self, role: Role, index: int) -> str:
        """What messages call it."""
        return self.swarm.name_of(index) if role == "worker" else f"{role} {index}"

    def ask_mended(self, method: str, arguments: Sequence[object], what: str) -> list[Any]:
        """`ask_workers`, all for the same, between two ticks; once more where workers are lost."""
        while True:
            try:
                return self.ask_workers(method, [arguments] * len(self.workers), what)
            except Exception as failure:
                self.mend(failure)

    def begin_step(self, arguments: Sequence[Sequence[object]]) -> tuple[list[Report], list[object]]:
        """What each rank reports, and references to the old log-probs of its samples."""
        pairs = [
            several(worker.begin_step.options(num_returns=2).remote(*args))
            for worker, args in zip(self.workers, arguments, strict=True)
        ]
        calls = [(self.swarm.name_of(rank), report) for rank, (report, _) in enumerate(pairs)]
        found = self.gather(calls, "the start of a step", self.swarm_limit, "begin_step", settle=SETTLE_S)
        return found, [old for _, old in pairs]

    def give(self, shares: Mapping[int, Sequence[object]]) -> None:
        """Ranks that are new their share of the step that is under way."""
        calls = [
            (self.swarm.name_of(rank), self.workers[rank].begin_step.remote(*args)) for rank, args in shares.items()
        ]
        gather(calls, "its share of the step", *self.swarm_limit)

    def weights(self, tick: int, stream: str, whole: bool, exact: bool = True) -> tuple[list[object], int, bool]:
        """References to the weights frames of all stages after `tick` ticks, for one stream of consumers; their bytes; and
        whether one is whole, asked for or not: those of a rank that is new are."""
        while True:
            ranks = self._first_replica
            pairs = [several(w.weights.options(num_returns=2).remote(tick, stream, whole, exact)) for w in ranks]
            calls = [(f"worker d0p{p}", said) for p, (_, said) in enumerate(pairs)]
            try:
                said = self.gather(calls, f"the weights of tick {tick}", self.swarm_limit, "weights")
            except Exception as failure:
                self.mend(failure)
                whole = True  # stages that are left have made the step that nobody got
            else:
                sizes, wholes = zip(*said)
                return [frame for frame, _ in pairs], sum(sizes), any(wholes)

    def weights_beside(self, tick: int, stream: str, whole: bool) -> tuple[list[object], Calls]:
        """References as from `weights`, and calls that deliver the size of each and whether it is whole; waits for nothing: the
        frames are made beside the next tick. They are gone with a rank that is lost before."""
        for worker in self._first_replica:
            worker.keep.remote(tick)
        ask = [worker.kept.options(num_returns=2, concurrency_group="outbox") for worker in self._first_replica]
        pairs = [several(kept.remote(tick, stream, whole)) for kept in ask]
        return [frame for frame, _ in pairs], [(f"worker d0p{p}", said) for p, (_, said) in enumerate(pairs)]

    def nodes(self, actors: Sequence[ActorHandle[Any]]) -> set[str]:
        """Nodes that these actors are on: an object goes once to each. An actor is asked once, before it is busy."""
        unknown = [actor for actor in actors if actor not in self._place]
        named = [(self._name_of(actor), actor) for actor in unknown]
        self._place.update(zip(unknown, places_of(named, *self.swarm_limit), strict=True))
        return {self._place[actor].node for actor in actors}

    def processes(self) -> list[Process]:
        """Of every actor that was asked where it is; waits for nothing."""
        return [Process(role, index, *place) for (role, index), place in self.places().items()]

    def places(self) -> dict[tuple[Role, int], Place]:
        """By role and number; likewise."""
        return {
            (role, index): self._place[actor]
            for role, held in self.roles.items()
            for index, actor in enumerate(held)
            if actor in self._place and self._place[actor].pid
        }

    def succeeds(self, newcomer: ActorHandle[Any], old: ActorHandle[Any]) -> None:
        """Until it has arrived: it is in the same bundle, in a process that nobody knows yet."""
        self._place[newcomer] = Place(self._place[old].node, 0)

    def arrival(self, newcomer: ActorHandle[Any]) -> object:
        """Reference to where a newcomer is, which is there once it is ready; to be asked of it before all else."""
        return where(newcomer)

    def wait_for(self, name: str, ready: object, since: float) -> Place:
        """Until a newcomer is ready, whose start has a deadline of its own: it began at `since` on the monotonic clock."""
        limit = self.swarm.start_timeout_s, "swarm.start_timeout_s"
        (place,) = gather([(name, ready)], "its model", *limit, since=since)
        return place

    def arrived(self, newcomer: ActorHandle[Any], place: Place) -> None:
        """That is where it is."""
        self._place[newcomer] = place

    def replicas_of(self, stage: int) -> list[ActorHandle[Worker]]:
        """The ranks that hold it."""
        return self.workers[stage :: self.swarm.pp]

    def records(self, tick: int) -> list[object]:
        """References to the weights of every stage, with what this tick kept; waits for nothing."""
        return [worker.record.remote(tick) for worker in self._first_replica]

    def take_turns(self, method: str, actors: Sequence[ActorHandle[Any]]) -> None:
        """Engines and workers on the same GPUs take turns in their memory."""
        if self.rollout.placement == "colocated":
            calls = [(self._name_of(actor), getattr(actor, method).remote()) for actor in actors]
            gather(calls, method, *self.engine_limit)

    def _name_of(self, actor: ActorHandle[Any]) -> str:
        """What messages call it."""
        return next((name for name, other in self.named().items() if other == actor), "an actor")

    @property
    def _first_replica(self) -> list[ActorHandle[Worker]]:
        return self.workers[: self.swarm.pp]
