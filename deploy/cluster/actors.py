"""The actors of a run: placed, built, connected, and kept for the next run where it can use them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anchor_service.actor import Anchor
from anchor_service.calls import gather
from anchor_service.dense_gradient import DenseSetup
from anchor_service.diagnosis import Diagnoser
from anchor_service.errors import WaitTimeout
from deploy.cluster.placement import BLOCKING, ROLES, UNMASKED, counts, demand, lacking, placement, tags
from deploy.cluster.takedown import bounded
from merger import MERGERS
from rl.model_files import model_shape, resolve
from rl.policy import spans
from rl.rollout import RolloutWorker
from rl.tasks import located
from swarm.fleet import Fleet
from swarm.rank import RankSetup
from swarm.run_config import RunConfig
from swarm.worker import Worker, WorkerSetup

_ENV = {"TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the latter: rl/device.py


@contextmanager
def fleet(config: RunConfig) -> Iterator[Fleet]:
    """All actors, built and connected. They are killed at the end, however the run ends."""
    held = Held()
    try:
        with held.fleet(config) as actors:
            yield actors
    finally:
        held.close()


class Held:
    """Actors that outlive a run. The next run gets them if it needs no more of them, and none of another kind.

    They are constructed again in their processes, so a run finds what it would find in new ones.
    """

    def __init__(self) -> None:
        self.group: PlacementGroup | None = None
        self.roles: list[list[Any]] = []  # handles, in the order of ROLES
        self.kind: tuple[Any, ...] = ()
        self.made_for: RunConfig | None = None  # the run that the bundles are of

    @contextmanager
    def fleet(self, config: RunConfig) -> Iterator[Fleet]:
        """The actors of one run. Those of a run that raised are not used again: they may wait for each other."""
        try:
            actors = self._ready(config)
            yield actors
        except BaseException:
            self.close()
            raise
        # on the wall clock corrections may still be on their way to a rank; vLLM starts once in a process
        if config.anchor.clock == "wall" or config.rollout.engine == "vllm":
            self.close()

    def close(self) -> None:
        """Kill what is held."""
        handles, group = [handle for role in self.roles for handle in role], self.group
        self.group, self.roles, self.kind, self.made_for = None, [], (), None

        def end() -> None:
            for handle in handles:
                ray.kill(handle)
            if group is not None:
                remove_placement_group(group)

        if handles or group:
            bounded(end)

    def _ready(self, config: RunConfig) -> Fleet:
        needed, kind = counts(config), _kind(config)
        plans = _constructors(config)
        enough = self.kind == kind and all(len(role) >= n for role, n in zip(self.roles, needed))
        if not enough:
            self.close()
            self.group, self.made_for = _reserve(config), config
        since = time.monotonic()
        if enough:
            self._construct_again(config, plans, since)
        else:
            self.kind, self.roles = kind, [[] for _ in ROLES]
            for role, plan in zip(ROLES, plans):
                self._start(role, plan)
        roles = [role[:n] for role, n in zip(self.roles, needed)]
        actors = Fleet(
            config.swarm,
            config.anchor,
            config.rollout,
            *roles,
            new_engines=lambda: self._new_engines(config, plans[ROLES.index("engine")]),
        )
        _build(config, actors, since)
        return actors

    def _start(self, role: str, plan: list[tuple]) -> None:
        """New actors of one role, each in its bundle; a handle is in `roles` as soon as it is there."""
        config, held = self.made_for, self.roles[ROLES.index(role)]
        place, first = placement(config), sum(counts(config)[: ROLES.index(role)])
        env = _ENV | (UNMASKED | BLOCKING if role == "worker" else {}) | {"OMP_NUM_THREADS": str(config.swarm.threads)}
        for index, (cls, *args) in enumerate(plan, first):
            needs = demand(config, index)
            options = dict(
                num_cpus=needs["CPU"],
                num_gpus=needs["GPU"],
                max_restarts=0,
                max_task_retries=0,  # a repeated tick would hang the other ranks
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=place.of_actor[index]
                ),
                runtime_env={"env_vars": env},
            )
            if role == "worker" and config.anchor.clock == "wall":
                options["concurrency_groups"] = {"inbox": 1}  # corrections arrive beside a running tick
            held.append(ray.remote(**options)(cls).remote(*args))

    def _new_engines(self, config: RunConfig, plan: list[tuple]) -> list[Any]:
        """Other engines in the place of all there are, ready for weights."""
        engines = self.roles[ROLES.index("engine")]
        while engines:
            ray.kill(engines.pop())
        self._start("engine", plan)
        calls = [(f"engine {i}", engine.__ray_ready__.remote()) for i, engine in enumerate(engines)]
        gather(calls, "its model", config.swarm.start_timeout_s, "swarm.start_timeout_s")
        return list(engines)

    def _construct_again(self, config: RunConfig, plans: list[list[tuple]], since: float) -> None:
        def construct(actor: Any, *args: Any) -> None:  # a closure travels by value: no import in the actor
            vars(actor).clear()  # the old model goes before the new one comes
            actor.__init__(*args)

        calls = [
            (f"{role} {i}", handle.__ray_call__.remote(construct, *args))
            for role, handles, wanted in zip(ROLES, self.roles, plans)
            for i, (handle, (_, *args)) in enumerate(zip(handles, wanted))
        ]
        gather(calls, "its new run", config.swarm.start_timeout_s, "swarm.start_timeout_s", since=since)


def _kind(config: RunConfig) -> tuple[Any, ...]:
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


def _constructors(config: RunConfig) -> list[list[tuple]]:
    """(class, argument, ...) of every actor, by role."""
    rank = RankSetup(
        model=config.model,
        codec=config.codec,
        swarm=config.swarm,
        grpo=config.grpo,
        anchor=config.anchor,
        merger=config.merger,
        q_cadence=config.q_cadence,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
    )
    worker_count, engine_count, anchor_count, diagnoser_count = counts(config)
    workers = [(Worker, WorkerSetup(index, rank, config.snapshot)) for index in range(worker_count)]
    engine = (
        RolloutWorker,
        config.model,
        located(config.task),
        config.grpo,
        config.rollout,
        config.snapshot,
        config.run.seed,
        config.val.size,
        config.swarm.threads,
    )
    dense = _dense(config)
    anchors, diagnosers = [(Anchor, dense, _payload(config))], [(Diagnoser, dense)]
    return [workers, [engine] * engine_count, anchors * anchor_count, diagnosers * diagnoser_count]


def _dense(config: RunConfig) -> DenseSetup:
    layers = model_shape(str(resolve(config.model.path))).layers
    return DenseSetup(
        anchor=config.anchor,
        model=config.model,
        grpo=config.grpo,
        snapshot=config.snapshot,
        stages=spans(layers, config.swarm.boundaries, config.swarm.pp),
        temperature=config.rollout.temperature,
        checkpointing=config.swarm.activation_checkpointing,
        threads=config.swarm.threads,
    )


def _payload(config: RunConfig) -> str:
    """How corrections travel."""
    return "dense" if config.anchor.payload == "dense" else MERGERS[config.merger.kind].payload or "sign"


def _build(config: RunConfig, actors: Fleet, since: float) -> None:
    """Wait until every actor has loaded its part of the model and the workers have met; the deadline counts from `since`."""
    limit = (config.swarm.start_timeout_s, "swarm.start_timeout_s")
    (init,) = gather([("worker d0p0", actors.workers[0].address.remote())], "its address", *limit, since=since)
    calls = [(config.swarm.name_of(rank), worker.build.remote(init)) for rank, worker in enumerate(actors.workers)]
    others = zip(ROLES[1:], (actors.engines, actors.anchors, actors.diagnosers))
    calls += [(f"{role} {i}", actor.__ray_ready__.remote()) for role, held in others for i, actor in enumerate(held)]
    gather(calls, "its part of the model", *limit, since=since)
