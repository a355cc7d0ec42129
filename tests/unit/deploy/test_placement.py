"""What actors ask of a cluster: the bundles hold exactly their actors, and put together what belongs together."""

from __future__ import annotations

from itertools import product

import pytest

from deploy.cluster.placement import counts, demand, lacking, placement, runs_that_fit, tags
from deploy.config import load
from swarm.run_config import RunConfig

LAYOUTS = [
    (f"swarm.dp={dp}", f"swarm.pp={pp}", f"swarm.placement={kind}", f"anchor.workers={anchors}", *devices)
    for dp, pp, kind, anchors in product((1, 2, 4), (1, 2), ("pack", "replicas"), (1, 2))
    for devices in ((), ("swarm.device=cuda",), ("rollout.device=cuda", "anchor.device=cuda", "diagnostics.every=2"))
]
SHARED = ("rollout.placement=colocated", "swarm.device=cuda", "rollout.device=cuda")
COLOCATED = [
    (f"swarm.dp={dp}", f"swarm.pp={pp}", f"swarm.placement={kind}", *SHARED, *engine)
    for (dp, pp), kind in product(((4, 1), (2, 2), (4, 2)), ("pack", "replicas"))
    for engine in (("rollout.engine=vllm", "rollout.kv_cache_gb=1"), ())
]
ANCHORS = ("anchor.placement=colocated", "anchor.device=cuda", "swarm.device=cuda", "diagnostics.every=2")
WITH_ANCHORS = [
    (f"swarm.dp={dp}", f"swarm.pp={pp}", f"swarm.placement={kind}", f"anchor.workers={anchors}", *ANCHORS, *engines)
    for (dp, pp), kind in product(((4, 1), (2, 2)), ("pack", "replicas"))
    for anchors, engines in product((1, 3), ((), SHARED))
]


def config(*overrides: str) -> RunConfig:
    return load("k5", [*overrides, "rollout.replicas=3"])


@pytest.mark.parametrize("overrides", LAYOUTS + COLOCATED + WITH_ANCHORS, ids=" ".join)
def test_each_bundle_holds_its_actors_and_nothing_more(overrides: tuple[str, ...]):
    c = config(*overrides)
    place = placement(c)
    assert len(place.of_actor) == sum(counts(c))
    for index, bundle in enumerate(place.bundles):
        inside = [demand(c, actor) for actor, where in enumerate(place.of_actor) if where == index]
        assert inside
        for name in ("CPU", "GPU"):
            assert bundle.get(name, 0) == sum(needs[name] for needs in inside)


@pytest.mark.parametrize("overrides", LAYOUTS, ids=" ".join)
def test_a_replica_shares_a_node_with_itself_alone_if_asked_to(overrides: tuple[str, ...]):
    c = config(*overrides)
    place, (workers, *_) = placement(c), counts(c)
    replica = [rank // c.swarm.pp for rank in range(workers)]
    if c.swarm.placement == "replicas":
        assert place.of_actor[:workers] == replica and place.strategy == "SPREAD"
    else:
        assert place.of_actor[:workers] == list(range(workers)) and place.strategy == "PACK"
    assert not set(place.of_actor[:workers]) & set(place.of_actor[workers:])


@pytest.mark.parametrize("overrides", COLOCATED, ids=" ".join)
def test_a_colocated_engine_shares_a_gpu_with_one_worker_and_no_two_workers_fit_on_one(overrides: tuple[str, ...]):
    c = config(*overrides)
    place, (workers, engines, *_) = placement(c), counts(c)
    assert place.of_actor[workers : workers + engines] == place.of_actor[:engines]
    gpus = [demand(c, actor)["GPU"] for actor in range(workers + engines)]
    assert all(a + b > 1 for a in gpus[:workers] for b in gpus[:workers])
    assert all(gpus[i] + gpus[workers + i] == 1 for i in range(engines))
    assert place.total["GPU"] == workers


@pytest.mark.parametrize("overrides", WITH_ANCHORS, ids=" ".join)
def test_colocated_anchors_and_a_diagnoser_take_no_gpu_of_their_own(overrides: tuple[str, ...]):
    c = config(*overrides)
    place, (workers, engines, anchors, diagnosers) = placement(c), counts(c)
    assert place.of_actor[workers + engines :] == [*place.of_actor[:anchors], *place.of_actor[:diagnosers]]
    gpus = [demand(c, actor)["GPU"] for actor in range(workers)]
    assert all(a + b > 1 for a in gpus for b in gpus)
    assert place.total["GPU"] == workers


@pytest.mark.parametrize("overrides", [(), ("anchor.enabled=false", "merger.kind=none")], ids=" ".join)
def test_one_gpu_holds_a_preset(overrides: tuple[str, ...]):
    built_in = "model.path=builtin:tiny", "swarm.boundaries=[2]"  # the preset's own must be fetched
    assert placement(load("smollm2-gpu", [*built_in, *overrides])).total["GPU"] == 1


def test_a_run_needs_the_same_wherever_its_actors_are():
    for dp, pp in product((1, 2), (1, 2)):
        layout = (f"swarm.dp={dp}", f"swarm.pp={pp}")
        needs = [placement(config(*layout, f"swarm.placement={kind}")).total for kind in ("pack", "replicas")]
        assert needs[0] == needs[1]


def test_each_role_asks_for_its_nodes_and_many_actors_fit_on_one():
    asked = ("swarm.resource=swarm", "rollout.resource=engine", "anchor.resource=anchor")
    c = config(*asked, "swarm.dp=4", "swarm.pp=2", "anchor.workers=4", "diagnostics.every=2")
    place = placement(c)
    roles = [role for role, count in zip(("swarm", "engine", "anchor", None), counts(c)) for _ in range(count)]
    for actor, role in enumerate(roles):
        assert set(place.bundles[place.of_actor[actor]]) == {"CPU"} | ({role} if role else set())
    assert all(place.total[tag] <= 1 for tag in tags(c).values())


def test_only_the_anchor_asks_for_its_node_and_many_of_its_workers_fit_there():
    c = config("anchor.resource=anchor", "anchor.workers=4", "swarm.dp=2")
    place, (workers, engines, anchors, _) = placement(c), counts(c)
    asking = [index for index, bundle in enumerate(place.bundles) if "anchor" in bundle]
    assert asking == place.of_actor[workers + engines :] and len(asking) == anchors == 4
    assert place.total["anchor"] <= 1
    assert all("anchor" not in bundle for bundle in placement(config("anchor.workers=4")).bundles)


@pytest.mark.parametrize(
    ("anchor_cpus", "overrides", "runs"),
    [
        (1, (), 1),  # only one has an anchor worker's place, whatever else is free
        (3, (), 3),
        (9, (), 5),  # of five actors each, on 29 CPUs
        (9, ("swarm.dp=4", "swarm.pp=2", "swarm.placement=replicas"), 2),
        (1, ("anchor.enabled=false", "merger.kind=none"), 5),
        (1, ("swarm.device=cuda",), 0),
    ],
)
def test_a_sweep_has_as_many_lanes_as_nodes_hold_whole_runs(anchor_cpus: int, overrides: tuple[str, ...], runs: int):
    wanted = config(*(("anchor.resource=anchor",) if "anchor.enabled=false" not in overrides else ()), *overrides)
    nodes = [{"CPU": anchor_cpus, "anchor": 1}, *({"CPU": 5.0} for _ in range(4))]
    assert runs_that_fit(placement(wanted).bundles, nodes) == runs


def test_a_run_without_an_anchor_asks_for_none():
    c = config("anchor.resource=anchor", "anchor.enabled=false", "merger.kind=none")
    assert "anchor" not in placement(c).total


def test_the_names_of_real_resources_are_no_names_for_the_anchors():
    for name in ("CPU", "GPU", "node:10.0.0.1"):
        with pytest.raises(ValueError, match=r"anchor\.resource"):
            config(f'anchor.resource="{name}"')
        with pytest.raises(ValueError, match=r"rollout\.resource"):
            config(f'rollout.resource="{name}"')


def test_engines_beside_workers_have_no_nodes_of_their_own():
    with pytest.raises(ValueError, match=r"set swarm\.resource instead"):
        config(*COLOCATED[0], "rollout.resource=engine")


@pytest.mark.parametrize(
    ("have", "free", "why"),
    [
        ({"CPU": 7, "far": 1}, {"CPU": 3, "far": 1}, "other jobs, actors or placement groups hold the rest of CPU"),
        ({"CPU": 7, "far": 1}, {"far": 1}, "hold the rest of CPU"),  # Ray leaves out what there is none of
        ({"CPU": 4, "far": 1}, {"CPU": 4, "far": 1}, "the cluster has too little CPU in all"),
        ({"CPU": 9}, {"CPU": 9}, "no node has far: start one with it, or correct the .resource"),
        ({"CPU": 7, "far": 1}, {"CPU": 7, "far": 1}, "no node has what one bundle needs"),
    ],
)
def test_a_cluster_without_room_says_what_is_free_and_why_it_is_not_enough(have: dict, free: dict, why: str):
    said = lacking({"CPU": 5, "far": 0.001}, have, free)
    assert f"5 CPU (of {have['CPU']} in the cluster {free.get('CPU', 0)} are free)" in said and why in said
