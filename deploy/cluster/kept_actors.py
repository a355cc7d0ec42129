"""The actors of a run: started in their bundles, connected, and kept for the next run where it can use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anchor_service.calls import answered, gather
from anchor_service.stacks import listen
from deploy.cluster.actors import ActorPlan, actor_plans
from deploy.cluster.node_forks import node_forks
from deploy.cluster.placement import A_TRACE, BLOCKING, ROLES, SPARE, UNMASKED, counts, demand, placement, tags
from deploy.cluster.room import await_room, leaves, reserve
from deploy.cluster.takedown import bounded
from swarm.failure_policy import Role
from swarm.fleet import Fleet
from swarm.run_config import RunConfig

ANSWER_S = 10.0  # in which an idle actor says that it is there
_ENV = {"TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the latter: rl/device.py
Plans = dict[str, list[ActorPlan]]


@contextmanager
def new_actors(config: RunConfig) -> Generator[Fleet]:
    """All actors, built and connected. They are killed at the end, however the run ends."""
    kept = KeptActors()
    try:
        with kept.lent(config) as fleet:
            yield fleet
    finally:
        kept.close()


class KeptActors:
    """Actors that outlive a run. The next run gets them if it needs no more of them, and none of another kind.

    They are constructed again in their processes, so a run finds what it would find in new ones.
    """

    def __init__(self) -> None:
        self.group: ActorGroup | None = None

    @contextmanager
    def lent(self, config: RunConfig) -> Generator[Fleet]:
        """The actors of one run. Those of a run that raised are not used again: they may wait for each other."""
        try:
            yield self._ready(config)
        except BaseException:
            self.close()
            raise
        # on the wall clock corrections may still be on their way to a rank; vLLM starts once in a process
        if config.anchor.clock == "wall" or config.rollout.engine == "vllm":
            self.close()

    def close(self) -> None:
        """Kill what is held."""
        group, self.group = self.group, None
        if group:
            bounded(group.end)

    def _ready(self, config: RunConfig) -> Fleet:
        plans = actor_plans(config)
        if self.group and not self.group.serves(config):
            self.close()
        if self.group:
            self.group.end_beside()
            since = time.monotonic()
            self.group.construct_again(plans, config, since)
        else:
            self.group = ActorGroup(config, reserve(config), plans)
            since = time.monotonic()
            self.group.start()
        return self._connected(self.group, config, since)

    def _connected(self, group: ActorGroup, config: RunConfig, since: float) -> Fleet:
        fleet = group.fleet(config, again=lambda: self._again(group, config))
        _connect(fleet, config, since)
        return fleet

    def _again(self, group: ActorGroup, config: RunConfig) -> Fleet:
        """Of a run that lost actors: others in their place, and those that are there as if they had done nothing."""
        group.end_beside()
        await_room(group.bundles, config)
        since = time.monotonic()
        group.construct_again(group.plans, config, since, new=group.renew_silent())
        return self._connected(group, config, since)


@dataclass
class ActorGroup:
    """Running actors by role, and the bundles they sit in, which are those of the run `made_for`."""

    made_for: RunConfig
    bundles: PlacementGroup
    plans: Plans  # of the present run
    actors: dict[str, list[ActorHandle[Any]]] = field(default_factory=lambda: {role: [] for role in ROLES})
    beside: list[ActorHandle[Any]] = field(default_factory=list)  # workers that no run was planned with
    dismissed: set[ActorHandle[Any]] = field(default_factory=set)
    whole: bool = True  # whether there are all that there were

    def serves(self, config: RunConfig) -> bool:
        enough = all(len(self.actors[role]) >= n for role, n in zip(ROLES, counts(config)))
        return enough and self.whole and _fixed(self.made_for) == _fixed(config)

    def start(self) -> None:
        """New actors of all roles, each in its bundle; a handle is in `actors` as soon as it is there."""
        for role in ROLES:
            for index in range(len(self.plans[role])):
                self.actors[role].append(self._new(role, index))

    def renew(self, role: Role, index: int) -> ActorHandle[Any]:
        """Another actor in the place of one that is dead or of no use; waits for nothing.

        If its node is gone it starts when Ray has found a place for the bundle.
        """
        ray.kill(self.actors[role][index])
        self.actors[role][index] = new = self._new(role, index)
        return new

    def new_worker(self, old: ActorHandle[Any] | None) -> ActorHandle[Any]:
        """Another in the place of `old`; of None, or of one that has no bundle, wherever there is room. Waits for nothing."""
        return self.new_beside("worker") if old is None else self._other("worker", old)

    def _other(self, role: Role, old: ActorHandle[Any]) -> ActorHandle[Any]:
        """In the bundle of `old`, whose number may be another's by now; wherever there is room if it has none."""
        held = self.actors[role]
        if old in held:
            return self.renew(role, held.index(old))
        ray.kill(old)
        return self.new_beside(role)

    def new_beside(self, role: Role) -> ActorHandle[Any]:
        """One more of a role, in a bundle that is vacant or wherever there is room; waits for nothing."""
        index = self._vacant(role)
        if index is not None:
            return self.renew(role, index)
        self.beside.append(self._new(role, 0, anywhere=True))
        return self.beside[-1]

    def _vacant(self, role: Role) -> int | None:
        """Whose bundle has nobody in it, and a node that does not leave, or none yet: Ray looks for one."""
        seats = placement(self.made_for).of_actor
        empty = (i for i, handle in enumerate(self.actors[role]) if handle in self.dismissed)
        return next((i for i in empty if not leaves(self.bundles, seats[self._number(role, i)])), None)

    def _number(self, role: str, index: int) -> int:
        """Of an actor among those of all roles."""
        return sum(counts(self.made_for)[: ROLES.index(role)]) + index

    def dismiss(self, handle: ActorHandle[Any]) -> None:
        """It is not needed any more."""
        ray.kill(handle)
        self.dismissed.add(handle)
        self.whole = False

    def end_beside(self) -> None:
        """A run begins with those that it was planned with: the room of others is for bundles that wait for a node."""
        while self.beside:
            ray.kill(self.beside.pop())

    def renew_silent(self) -> set[tuple[Role, int]]:
        """Others in the place of all that do not say within ANSWER_S that they are there; which ones.

        Whoever is busy is busy for a run that is over.
        """
        self.whole = True
        every: list[tuple[Role, int]] = [(role, i) for role in ROLES for i in range(len(self.plans[role]))]
        asked = [who for who in every if who[0] not in self._once]
        calls = {f"{role} {i}": self.actors[role][i].__ray_ready__.remote() for role, i in asked}
        there = answered(calls, ANSWER_S)
        new = {who for who in every if "{} {}".format(*who) not in there}
        for role, index in new:
            self.renew(role, index)
        return new

    @property
    def _once(self) -> set[str]:
        """Roles whose processes do not outlive a run that lost one. vLLM starts once in a process, NCCL may not come out
        of an exchange that broke off, and on the wall clock a correction of a tick that is void may be on its way."""
        config = self.made_for
        engines = {"engine"} if config.rollout.engine == "vllm" else set[str]()
        return engines | ({"worker"} if config.anchor.clock == "wall" or config.swarm.device == "cuda" else set())

    def _new(self, role: str, index: int, anywhere: bool = False) -> ActorHandle[Any]:
        """Actor number `index` of its role, in its bundle, or where there is room: so too if the bundle's node is leaving."""
        config, plan = self.made_for, self.plans[role][index]
        number = self._number(role, index)
        env = _ENV | (UNMASKED | BLOCKING if role == "worker" else {}) | {"OMP_NUM_THREADS": str(config.swarm.threads)}
        needs = demand(config, number)
        options: dict[str, Any] = dict(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            max_restarts=0,
            max_task_retries=0,  # a repeated tick would hang the other ranks
            runtime_env={"env_vars": env} | node_forks(config),
        )
        wanted = placement(config)
        bundle = wanted.of_actor[number]
        if not anywhere and not leaves(self.bundles, bundle):
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.bundles, bundle)
        else:
            own = SPARE in ray.cluster_resources()
            asked = wanted.bundles[bundle].keys() - {"CPU", "GPU"}
            options["resources"] = dict.fromkeys([SPARE] if own else asked, A_TRACE)
            options["num_cpus"] = 0 if own else needs["CPU"]
        if role == "worker":  # beside a running tick corrections come and weights go, and it says what it is doing
            options["concurrency_groups"] = {"inbox": 1, "outbox": 1, "watch": 1}
        handle = cast(ActorHandle[Any], ray.remote(**options)(plan.kind).remote(*plan.arguments))
        handle.__ray_call__.remote(listen)
        return handle

    def construct_again(
        self, plans: Plans, config: RunConfig, since: float, new: Collection[tuple[Role, int]] = ()
    ) -> None:
        """All but those that are `new`, in their processes."""

        def construct(actor: Any, *args: object) -> None:  # a closure travels by value: no import in the actor
            vars(actor).clear()  # the old model goes before the new one comes
            actor.__init__(*args)

        self.plans = plans
        calls = [
            (
                config.swarm.name_of(i) if role == "worker" else f"{role} {i}",
                handle.__ray_call__.remote(construct, *plan.arguments),
            )
            for role in ROLES
            for i, (handle, plan) in enumerate(zip(self.actors[role], plans[role]))
            if (role, i) not in new
        ]
        gather(calls, "its new run", config.swarm.start_timeout_s, "swarm.start_timeout_s", since=since)

    def fleet(self, config: RunConfig, again: Callable[[], Fleet]) -> Fleet:
        """As many of each role as the run needs."""
        held = {role: self.actors[role][:n] for role, n in zip(ROLES, counts(config))}

        def renew(role: Role, index: int) -> ActorHandle[Any]:
            held[role][index] = new = self._other(role, held[role][index])
            return new

        return Fleet(
            config.swarm,
            config.anchor,
            config.rollout,
            *held.values(),
            renew=renew,
            new_worker=self.new_worker,
            beside=self.new_beside,
            dismiss=self.dismiss,
            again=again,
        )

    def end(self) -> None:
        for handle in [*self.beside, *(handle for role in ROLES for handle in self.actors[role])]:
            ray.kill(handle)
        remove_placement_group(self.bundles)


def _fixed(config: RunConfig) -> tuple[object, ...]:
    """What an actor cannot change once it runs."""
    devices = config.swarm.device, config.rollout.device, config.anchor.device
    place = config.swarm.placement, config.swarm.pp if config.swarm.placement == "replicas" else None
    place += config.rollout.placement, config.anchor.placement
    return (*devices, config.swarm.threads, config.anchor.clock, *tags(config).items(), *place, config.rollout.engine)


def _connect(fleet: Fleet, config: RunConfig, since: float) -> None:
    """Wait until every actor has loaded its part of the model and the workers have met; the deadline counts from `since`."""
    limit = (config.swarm.start_timeout_s, "swarm.start_timeout_s")
    (init,) = gather([("worker d0p0", fleet.workers[0].address.remote())], "its address", *limit, since=since)
    calls = [(config.swarm.name_of(rank), worker.build.remote(init)) for rank, worker in enumerate(fleet.workers)]
    others = zip(ROLES[1:], (fleet.engines, fleet.anchors, fleet.diagnosers))
    calls += [(f"{role} {i}", actor.__ray_ready__.remote()) for role, held in others for i, actor in enumerate(held)]
    gather(calls, "its part of the model", *limit, since=since)
    fleet.nodes([*fleet.workers, *fleet.engines, *fleet.anchors, *fleet.diagnosers])
