"""Where actors sit: bundles of a placement group, with engines of their own or on the workers' GPUs."""

from __future__ import annotations

from deploy.config import load
from deploy.fleet import bundles, counts, seats

GRID = ("swarm.dp=2", "swarm.pp=2", "rollout.replicas=2", "rollout.engine=vllm")
GPUS = (*GRID, "swarm.device=cuda", "rollout.device=cuda")


def test_every_actor_has_a_bundle_of_its_own():
    config = load("k5", [*GRID])
    assert seats(config) == [[0, 1, 2, 3], [4, 5], [6], []]
    assert bundles(config) == [{"CPU": 1}] * 7


def test_roles_on_gpus_have_one_each():
    config = load("k5", [*GPUS])
    assert bundles(config) == [{"CPU": 1, "GPU": 1}] * 6 + [{"CPU": 1}]


def test_colocated_engines_sit_with_the_first_workers_and_share_their_gpus():
    config = load("k5", [*GPUS, "rollout.placement=colocated"])
    assert seats(config) == [[0, 1, 2, 3], [0, 1], [4], []]
    assert bundles(config) == [{"CPU": 2, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 1}]
    sitting = [seat for role in seats(config) for seat in role]
    assert len(sitting) == sum(counts(config)) == sum(bundle["CPU"] for bundle in bundles(config))
