"""The actors of a run: placed, built, connected, and kept for the next run where it can use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anchor_service.actor import Anchor
from anchor_service.diagnosis import Diagnoser
from anchor_service.errors import WaitTimeout
from deploy.config import RunConfig
from merger import MERGERS
from rl.model_files import model_shape, resolve
from rl.policy import spans
from rl.rollout import RolloutWorker
from swarm.coordinator import Fleet, gather
from swarm.tick import Rules
from swarm.worker import Worker, WorkerSetup

_ENV = {"TOKENIZERS_PARALLELISM": "false"}
# Ray's masking of GPUs makes NCCL slow or hang on some machines; a worker picks its device itself. The other roles
# have no NCCL and need the masking: each computes on the one GPU that it sees
_WORKER_ENV = {**_ENV, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


ROLES = ("worker", "engine", "anchor", "diagnoser")


def counts(config: RunConfig) -> tuple[int, int, int, int]:
    """Actors of each role."""
    anchors = config.anchor.workers if config.anchor.enabled else 0
    return config.swarm.dp * config.swarm.pp, config.rollout.replicas, anchors, int(bool(config.diagnostics.every))


def seats(config: RunConfig) -> list[list[int]]:
    """The bundle of every actor, by role: one each, but colocated engines sit with the first workers."""
    found, taken = [], 0
    for role, count in zip(ROLES, counts(config)):
        shares = role == "engine" and config.rollout.placement == "colocated"
        found.append(list(range(0 if shares else taken, count if shares else taken + count)))
        taken += 0 if shares else count
    return found


def bundles(config: RunConfig) -> list[dict[str, float]]:
    """Resources of each placement-group bundle: a CPU for every actor in it, and one GPU where they compute on one."""
    devices = config.swarm.device, config.rollout.device, config.anchor.device, config.anchor.device
    found: dict[int, dict[str, float]] = {}
    for device, role in zip(devices, seats(config)):
        for seat in role:
            held = found.setdefault(seat, {"CPU": 0} | ({"GPU": 1} if device == "cuda" else {}))
            held["CPU"] += 1
    return [found[seat] for seat in sorted(found)]


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
        self.engine_seats: list[int] = []  # bundles of the engines
        self.kind: tuple[Any, ...] = ()

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
        for handle in [handle for role in self.roles for handle in role]:
            ray.kill(handle)
        if self.group is not None:
            remove_placement_group(self.group)
        self.group, self.roles, self.kind = None, [], ()

    def _ready(self, config: RunConfig) -> Fleet:
        needed, kind = counts(config), _kind(config)
        plans = _constructors(config)
        enough = self.kind == kind and all(len(role) >= n for role, n in zip(self.roles, needed))
        if enough:
            self._construct_again(config, plans)
        else:
            self.close()
            self.group = _reserve(config)
            self.kind, self.roles = kind, [[] for _ in ROLES]
            self.engine_seats = seats(config)[ROLES.index("engine")]
            _start(config, self.group, plans, self.roles)
        roles = [role[:n] for role, n in zip(self.roles, needed)]
        actors = Fleet(*roles, new_engines=lambda: self._new_engines(config, plans[ROLES.index("engine")]))
        _build(config, actors)
        return actors

    def _new_engines(self, config: RunConfig, plan: list[tuple]) -> list[Any]:
        """Other engines in the place of all there are, ready for weights."""
        engines = self.roles[ROLES.index("engine")]
        while engines:
            ray.kill(engines.pop())
        for seat, (cls, *args) in zip(self.engine_seats, plan):
            engines.append(_actor(config, self.group, seat, cls, args))
        calls = [(f"engine {i}", engine.__ray_ready__.remote()) for i, engine in enumerate(engines)]
        gather(calls, "its model", config.swarm.start_timeout_s, "swarm.start_timeout_s")
        return list(engines)

    def _construct_again(self, config: RunConfig, plans: list[list[tuple]]) -> None:
        def construct(actor: Any, *args: Any) -> None:  # a closure travels by value: no import in the actor
            vars(actor).clear()  # the old model goes before the new one comes
            actor.__init__(*args)

        calls = [
            (f"{role} {i}", handle.__ray_call__.remote(construct, *args))
            for role, handles, wanted in zip(ROLES, self.roles, plans)
            for i, (handle, (_, *args)) in enumerate(zip(handles, wanted))
        ]
        gather(calls, "its new run", config.swarm.start_timeout_s, "swarm.start_timeout_s")


def _kind(config: RunConfig) -> tuple[Any, ...]:
    """What an actor cannot change once it runs."""
    devices = config.swarm.device, config.rollout.device, config.anchor.device
    return (*devices, config.swarm.threads, config.anchor.clock, config.rollout.engine)


def _reserve(config: RunConfig) -> PlacementGroup:
    wanted = bundles(config)
    group = placement_group(wanted, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=config.swarm.start_timeout_s)
    if not ready:
        remove_placement_group(group)
        have, need = ray.cluster_resources(), {k: sum(b.get(k, 0) for b in wanted) for k in ("CPU", "GPU")}
        what = (
            f"{need['CPU']:g} CPUs and {need['GPU']:g} GPUs (it has {have.get('CPU', 0):g} and {have.get('GPU', 0):g})"
        )
        raise WaitTimeout(
            "the Ray cluster", what, config.swarm.start_timeout_s, "swarm.start_timeout_s, or lower swarm.dp"
        )
    return group


def _start(config: RunConfig, group: PlacementGroup, plans: list[list[tuple]], roles: list[list[Any]]) -> None:
    """New actors; a handle is in `roles` as soon as it is there."""
    for plan, role, places in zip(plans, roles, seats(config)):
        for (cls, *args), seat in zip(plan, places):
            role.append(_actor(config, group, seat, cls, args))


def _actor(config: RunConfig, group: PlacementGroup, seat: int, cls: type, args: list[Any]) -> Any:
    """A new actor in bundle `seat`; two in one bundle share its GPU."""
    held = group.bundle_specs[seat]
    env = _WORKER_ENV if cls is Worker else _ENV
    options = dict(
        num_cpus=1,
        num_gpus=held.get("GPU", 0) / held["CPU"],
        max_restarts=0,
        max_task_retries=0,  # a repeated tick would hang the other ranks
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat),
        runtime_env={"env_vars": {**env, "OMP_NUM_THREADS": str(config.swarm.threads)}},
    )
    if cls is Worker and config.anchor.clock == "wall":
        options["concurrency_groups"] = {"inbox": 1}  # corrections arrive beside a running tick
    return ray.remote(**options)(cls).remote(*args)


def _constructors(config: RunConfig) -> list[list[tuple]]:
    """(class, argument, ...) of every actor, by role."""
    rules = Rules(
        grpo=config.grpo,
        anchor=config.anchor,
        merger=config.merger,
        q_cadence=config.q_cadence,
        temperature=config.rollout.temperature,
        check_every=config.swarm.check_every,
        seed=config.run.seed,
    )
    worker_count, engine_count, anchor_count, diagnoser_count = counts(config)
    shared = config.run.seed, config.model, config.codec, config.snapshot, config.swarm, rules
    workers = [(Worker, WorkerSetup(rank, *shared)) for rank in range(worker_count)]
    engine = (
        RolloutWorker,
        config.model,
        config.task,
        config.grpo,
        config.rollout,
        config.snapshot,
        config.run.seed,
        config.val.size,
        config.swarm.threads,
    )
    anchors = [_anchor(config)] * anchor_count if anchor_count else []
    diagnosers = [(Diagnoser, *_dense(config), config.swarm.threads)] if diagnoser_count else []
    return [workers, [engine] * engine_count, anchors, diagnosers]


def _dense(config: RunConfig) -> tuple:
    """What every actor that computes dense gradients is built from."""
    layers = model_shape(str(resolve(config.model.path))).layers
    stages = spans(layers, config.swarm.boundaries, config.swarm.pp)
    return config.anchor, config.model.path, config.model.dtype, stages, config.grpo, config.rollout.temperature


def _anchor(config: RunConfig) -> tuple:
    payload = MERGERS[config.merger.kind].payload or "sign"
    return (
        Anchor,
        *_dense(config),
        config.snapshot,
        "dense" if config.anchor.payload == "dense" else payload,
        config.swarm.threads,
    )


def _build(config: RunConfig, actors: Fleet) -> None:
    """Wait until every actor has loaded its part of the model and the workers have met."""
    limit = (config.swarm.start_timeout_s, "swarm.start_timeout_s")
    (init,) = gather([("worker d0p0", actors.workers[0].address.remote())], "its address", *limit)
    calls = [(f"worker {rank}", worker.build.remote(init)) for rank, worker in enumerate(actors.workers)]
    others = zip(ROLES[1:], (actors.engines, actors.anchors, actors.diagnosers))
    calls += [(f"{role} {i}", actor.__ray_ready__.remote()) for role, held in others for i, actor in enumerate(held)]
    gather(calls, "its part of the model", *limit)
