"""What the actors of a run ask of a cluster, and which of them share a node. No torch, no Ray."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from anchor_service.config import AnchorConfig
from rl.config import RolloutConfig
from swarm.config import SwarmConfig
from swarm.failure_policy import Role
from swarm.run_config import RunConfig

# Ray's masking of GPUs makes NCCL slow or hang on some machines: a worker sees all of them and picks its own. Engines
# and anchors use no NCCL; each sees, by that mask, the one GPU that it was given
UNMASKED = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
# Without it NCCL's wait returns at once, and at a deadline its watchdog kills the process, which then says nothing
BLOCKING = {"TORCH_NCCL_BLOCKING_WAIT": "1"}
ROLES: tuple[Role, ...] = ("worker", "engine", "anchor", "diagnoser")
# Of a GPU, for each who shares a worker's: the worker asks for the rest, so Ray puts no two on one. Eighths add up exactly
GUEST_SHARE = 0.125
SPARE = (
    "northstar_spare"  # of a cluster of our own: workers that are added while a run goes on need no logical CPU there
)
A_TRACE = 0.001  # of a node's custom resource: there is room for any number of bundles


@dataclass(frozen=True)
class Placement:
    """Bundles of one placement group. A bundle lies on one node; its actors are found by their index."""

    bundles: list[dict[str, float]]
    of_actor: list[int]  # the bundle of each actor: workers by rank, then the other roles in the order of ROLES
    strategy: str  # Ray's: what it tries between bundles

    @property
    def total(self) -> dict[str, float]:
        """Every resource that all of it needs, CPUs first."""
        return dict(sum((Counter(bundle) for bundle in self.bundles), Counter()))


@dataclass(frozen=True)
class OwnCluster:
    """What a cluster of our own has: one node, this machine."""

    cpus: int  # logical, so that a small machine can run every role; each process uses `swarm.threads` threads
    tags: tuple[str, ...]  # custom resources

    @classmethod
    def of(cls, config: RunConfig, lanes: int = 1) -> OwnCluster:
        """With room for `lanes` runs like `config` side by side."""
        needed = lanes * int(placement(config).total["CPU"])
        return cls(max(os.cpu_count() or 1, needed), (SPARE, *tags(config).values()))


def counts(config: RunConfig) -> tuple[int, int, int, int]:
    """Actors of each role."""
    anchors = config.anchor.workers if config.anchor.enabled else 0
    return config.swarm.dp * config.swarm.pp, config.rollout.replicas, anchors, int(bool(config.diagnostics.every))


def guests(config: RunConfig) -> tuple[int, int, int]:
    """Engines, anchor workers and diagnosers that share GPUs of workers, of the first ones."""
    sections = config.rollout, config.anchor, config.anchor
    found = (n if section.placement == "colocated" else 0 for section, n in zip(sections, counts(config)[1:]))
    engines, anchors, diagnosers = found
    return engines, anchors, diagnosers


def placement(config: RunConfig) -> Placement:
    """One bundle an actor; with `swarm.placement = "replicas"` one for all stages of a replica.

    Who is colocated sits in the bundle of the worker of its number.
    """
    swarm, (workers, *others) = config.swarm, counts(config)
    apart = swarm.placement == "replicas"
    together = swarm.pp if apart else 1
    replicas = workers // together
    bundles = [_bundle(swarm, together) for _ in range(replicas)]
    seats = [rank // together for rank in range(workers)]
    # the anchor's node has room for anchor workers alone
    anywhere = config.anchor.model_copy(update={"resource": None})
    for section, count in zip((config.rollout, config.anchor, anywhere), others):
        if section.placement == "colocated":
            for seat in seats[:count]:
                bundles[seat]["CPU"] += 1
            seats += seats[:count]
        else:
            seats += range(len(bundles), len(bundles) + count)
            bundles += [_bundle(section) for _ in range(count)]
    return Placement(bundles, seats, "SPREAD" if apart else "PACK")


def largest(configs: Iterable[RunConfig]) -> RunConfig:
    """The one that needs the most CPUs, the first of several."""
    return max(configs, key=lambda config: placement(config).total["CPU"])


def runs_that_fit(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many runs of these bundles the nodes hold at once, by their resources: what asks for most comes first, and
    goes where least else could be asked for."""
    left = [dict(node) for node in sorted(nodes, key=len)]
    wanted = sorted(bundles, key=len, reverse=True)
    runs = 0
    while all(_taken(bundle, left) for bundle in wanted):
        runs += 1
    return runs


def _taken(bundle: Mapping[str, float], left: Sequence[dict[str, float]]) -> bool:
    for node in left:
        if all(node.get(name, 0) >= n for name, n in bundle.items()):
            for name, n in bundle.items():
                node[name] -= n
            return True
    return False


def demand(config: RunConfig, actor: int) -> dict[str, float]:
    """CPUs and GPUs of one actor, by its place in `Placement.of_actor`."""
    workers, *others = counts(config)
    if actor < workers:
        gpu = 1 - GUEST_SHARE * sum(actor < n for n in guests(config)) if config.swarm.device == "cuda" else 0.0
    else:
        sections = config.rollout, config.anchor, config.anchor
        section = [section for section, n in zip(sections, others) for _ in range(n)][actor - workers]
        gpu = {"cpu": 0.0, "cuda": GUEST_SHARE if section.placement == "colocated" else 1.0}[section.device]
    return {"CPU": 1, "GPU": gpu}


def tags(config: RunConfig) -> dict[str, str]:
    """Custom resources that nodes must have, by the key that asks for them."""
    asked = {"swarm": config.swarm, "rollout": config.rollout, "anchor": config.anchor}
    return {f"{name}.resource": section.resource for name, section in asked.items() if section.resource}


def lacking(wanted: Mapping[str, float], have: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Why a cluster with so much in all, and so much free now, has no room, by resource."""
    said = [
        f"{n:g} {name} (of {have.get(name, 0):g} in the cluster {free.get(name, 0):g} are free)"
        for name, n in wanted.items()
    ]
    missing = [name for name in wanted if not have.get(name)]
    short = [name for name in wanted if have.get(name, 0) < wanted[name] and name not in missing]
    taken = [name for name in wanted if free.get(name, 0) < wanted[name] <= have.get(name, 0)]
    if missing:
        why = f"no node has {' or '.join(missing)}: start one with it, or correct the .resource and .device keys"
    elif short:
        why = f"the cluster has too little {' and '.join(short)} in all"
    elif taken:
        why = (
            f"other jobs, actors or placement groups hold the rest of {' and '.join(taken)}: wait for them, or end them"
        )
    else:
        why = "all of it is free, but no node has what one bundle needs"
    return f"{', '.join(said)}; {why}"


def _bundle(section: SwarmConfig | RolloutConfig | AnchorConfig, actors: int = 1) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": actors}
    if section.device == "cuda":
        bundle["GPU"] = actors
    if section.resource:
        bundle[section.resource] = A_TRACE
    return bundle
