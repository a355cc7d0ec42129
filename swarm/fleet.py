"""The actors of one run, and how they are asked: by name, with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchor_service.actor import Anchor
from anchor_service.calls import ActorHandle, Place, gather, places_of, several
from anchor_service.config import AnchorConfig
from anchor_service.diagnosis import Diagnoser
from rl.config import RolloutConfig
from rl.rollout import RolloutWorker
from swarm.config import SwarmConfig
from swarm.telemetry import Process
from swarm.worker import Worker

GRACE_S = 15.0  # a rank that waits for another has begun to a little after it was asked
SETTLE_S = 5.0  # so long after the first rank that lost its peer Ray says what became of that


@dataclass(frozen=True)
class Fleet:
    """Handles, workers in rank order. `new_engines` kills the engines and starts others."""

    swarm: SwarmConfig
    anchor: AnchorConfig
    rollout: RolloutConfig
    workers: list[ActorHandle[Worker]]
    engines: list[ActorHandle[RolloutWorker]]
    anchors: list[ActorHandle[Anchor]]
    diagnosers: list[ActorHandle[Diagnoser]]
    new_engines: Callable[[], list[ActorHandle[RolloutWorker]]]
    _place: dict[object, Place] = field(default_factory=dict, init=False)  # of each actor that was asked

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
        self, method: str, arguments: Sequence[Sequence[object]], what: str, limit: tuple[float, str] | None = None
    ) -> list[Any]:
        """What `method` returns on every rank, each with arguments of its own; within `swarm_limit` or `limit`."""
        calls = [
            (self.swarm.name_of(rank), getattr(worker, method).remote(*args))
            for rank, (worker, args) in enumerate(zip(self.workers, arguments, strict=True))
        ]
        return gather(calls, what, *(limit or self.swarm_limit), settle=SETTLE_S)

    def weights(self, tick: int, stream: str, whole: bool, exact: bool = True) -> tuple[list[object], int]:
        """References to the weights frames of all stages after `tick` ticks, for one stream of consumers; their bytes."""
        ranks = self._first_replica
        pairs = [several(w.weights.options(num_returns=2).remote(tick, stream, whole, exact)) for w in ranks]
        calls = [(f"worker d0p{p}", size) for p, (_, size) in enumerate(pairs)]
        nbytes = sum(gather(calls, f"the weights of tick {tick}", *self.swarm_limit))
        return [frame for frame, _ in pairs], nbytes

    def nodes(self, actors: Sequence[ActorHandle[Any]]) -> set[str]:
        """Nodes that these actors are on: an object goes once to each. An actor is asked once, before it is busy."""
        unknown = [actor for actor in actors if actor not in self._place]
        self._place.update(zip(unknown, places_of(unknown, *self.swarm_limit), strict=True))
        return {self._place[actor].node for actor in actors}

    def processes(self) -> list[Process]:
        """Of every actor that was asked where it is; waits for nothing."""
        roles = {"worker": self.workers, "engine": self.engines, "anchor": self.anchors, "diagnoser": self.diagnosers}
        return [
            Process(role, index, *self._place[actor])
            for role, held in roles.items()
            for index, actor in enumerate(held)
            if actor in self._place
        ]

    def replicas_of(self, stage: int) -> list[ActorHandle[Worker]]:
        """The ranks that hold it."""
        return self.workers[stage :: self.swarm.pp]

    def records(self, tick: int) -> list[object]:
        """References to the weights of every stage, with what this tick kept; waits for nothing."""
        return [worker.record.remote(tick) for worker in self._first_replica]

    def take_turns(self, method: str, actors: Sequence[ActorHandle[Any]]) -> None:
        """Engines and workers on the same GPUs take turns in their memory."""
        if self.rollout.placement == "colocated":
            calls = [(f"actor {i}", getattr(actor, method).remote()) for i, actor in enumerate(actors)]
            gather(calls, method, *self.engine_limit)

    @property
    def _first_replica(self) -> list[ActorHandle[Worker]]:
        return self.workers[: self.swarm.pp]
