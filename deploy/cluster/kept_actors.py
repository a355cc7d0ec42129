"""The actors of a run: started in their bundles, connected, and kept for the next run where it can use them."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anchor_service.calls import gather
from anchor_service.errors import WaitTimeout
from deploy.cluster.actors import ActorPlan, actor_plans
from deploy.cluster.placement import BLOCKING, ROLES, UNMASKED, counts, demand, lacking, placement, tags
from deploy.cluster.takedown import bounded
from swarm.fleet import Fleet
from swarm.run_config import RunConfig

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
            since = time.monotonic()
            self.group.construct_again(plans, config, since)
        else:
            self.group = ActorGroup(config, _reserve(config))
            since = time.monotonic()
            for role in ROLES:
                self.group.start(role, plans[role])
        fleet = self.group.fleet(plans, config)
        _connect(fleet, config, since)
        return fleet


@dataclass
class ActorGroup:
    """Running actors by role, and the bundles they sit in, which are those of the run `made_for`."""

    made_for: RunConfig
    bundles: PlacementGroup
    actors: dict[str, list[ActorHandle[Any]]] = field(default_factory=lambda: {role: [] for role in ROLES})

    def serves(self, config: RunConfig) -> bool:
        enough = all(len(self.actors[role]) >= n for role, n in zip(ROLES, counts(config)))
        return enough and _fixed(self.made_for) == _fixed(config)

    def start(self, role: str, plans: list[ActorPlan]) -> None:
        """New actors of one role, each in its bundle; a handle is in `actors` as soon as it is there."""
        config, held = self.made_for, self.actors[role]
        place, first = placement(config), sum(counts(config)[: ROLES.index(role)])
        env = _ENV | (UNMASKED | BLOCKING if role == "worker" else {}) | {"OMP_NUM_THREADS": str(config.swarm.threads)}
        for index, plan in enumerate(plans, first):
            needs = demand(config, index)
            options: dict[str, Any] = dict(
                num_cpus=needs["CPU"],
                num_gpus=needs["GPU"],
                max_restarts=0,
                max_task_retries=0,  # a repeated tick would hang the other ranks
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.bundles, placement_group_bundle_index=place.of_actor[index]
                ),
                runtime_env={"env_vars": env},
            )
            if role == "worker" and config.anchor.clock == "wall":
                options["concurrency_groups"] = {"inbox": 1}  # corrections arrive beside a running tick
            handle = ray.remote(**options)(plan.kind).remote(*plan.arguments)
            held.append(cast(ActorHandle[Any], handle))

    def construct_again(self, plans: Plans, config: RunConfig, since: float) -> None:
        def construct(actor: Any, *args: object) -> None:  # a closure travels by value: no import in the actor
            vars(actor).clear()  # the old model goes before the new one comes
            actor.__init__(*args)

        calls = [
            (f"{role} {i}", handle.__ray_call__.remote(construct, *plan.arguments))
            for role in ROLES
            for i, (handle, plan) in enumerate(zip(self.actors[role], plans[role]))
        ]
        gather(calls, "its new run", config.swarm.start_timeout_s, "swarm.start_timeout_s", since=since)

    def fleet(self, plans: Plans, config: RunConfig) -> Fleet:
        """As many of each role as the run needs."""
        roles = [self.actors[role][:n] for role, n in zip(ROLES, counts(config))]
        return Fleet(
            config.swarm,
            config.anchor,
            config.rollout,
            *roles,
            new_engines=lambda: self._new_engines(plans["engine"], config),
        )

    def end(self) -> None:
        for handle in [handle for role in ROLES for handle in self.actors[role]]:
            ray.kill(handle)
        remove_placement_group(self.bundles)

    def _new_engines(self, plans: list[ActorPlan], config: RunConfig) -> list[ActorHandle[Any]]:
        """Other engines in the place of all there are, ready for weights."""
        engines = self.actors["engine"]
        while engines:
            ray.kill(engines.pop())
        self.start("engine", plans)
        calls = [(f"engine {i}", engine.__ray_ready__.remote()) for i, engine in enumerate(engines)]
        gather(calls, "its model", config.swarm.start_timeout_s, "swarm.start_timeout_s")
        return list(engines)


def _fixed(config: RunConfig) -> tuple[object, ...]:
    """What an actor cannot change once it runs."""
    devices = config.swarm.device, config.rollout.device, config.anchor.device
    place = config.swarm.placement, config.swarm.pp if config.swarm.placement == "replicas" else None
    engines = config.rollout.engine, config.rollout.placement
    return (*devices, config.swarm.threads, config.anchor.clock, *tags(config).items(), *place, *engines)


def _reserve(config: RunConfig) -> PlacementGroup:
    wanted = placement(config)
    group = placement_group(wanted.bundles, strategy=wanted.strategy)
    ready, _ = ray.wait([group.ready()], timeout=config.swarm.start_timeout_s)
    if not ready:
        remove_placement_group(group)
        have, free = ray.cluster_resources(), ray.available_resources()
        raise WaitTimeout(
            "the Ray cluster",
            f"room for {len(wanted.bundles)} bundles ({wanted.strategy}): {lacking(wanted.total, have, free)}",
            config.swarm.start_timeout_s,
            "swarm.start_timeout_s, or lower swarm.dp (`northstar doctor --address` says what does not fit)",
        )
    return group


def _connect(fleet: Fleet, config: RunConfig, since: float) -> None:
    """Wait until every actor has loaded its part of the model and the workers have met; the deadline counts from `since`."""
    limit = (config.swarm.start_timeout_s, "swarm.start_timeout_s")
    (init,) = gather([("worker d0p0", fleet.workers[0].address.remote())], "its address", *limit, since=since)
    calls = [(config.swarm.name_of(rank), worker.build.remote(init)) for rank, worker in enumerate(fleet.workers)]
    others = zip(ROLES[1:], (fleet.engines, fleet.anchors, fleet.diagnosers))
    calls += [(f"{role} {i}", actor.__ray_ready__.remote()) for role, held in others for i, actor in enumerate(held)]
    gather(calls, "its part of the model", *limit, since=since)
    fleet.nodes([*fleet.workers, *fleet.engines, *fleet.anchors, *fleet.diagnosers])
