"""Which actors of a run that lost some stay, without a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import ActorLost
from deploy.cluster import kept_actors
from deploy.cluster.kept_actors import ActorGroup
from deploy.cluster.placement import ROLES, counts
from deploy.config import load
from swarm.blame import blamed


def test_one_that_comes_beside_takes_the_bundle_of_one_that_left_unless_its_node_leaves(
    monkeypatch: pytest.MonkeyPatch,
):
    """Else what a gone node's bundles take on another one would never be used."""
    config = load("k5", ["swarm.dp=2", "rollout.replicas=2"])
    actors: dict[str, list[Any]] = {role: [f"{role} {i}" for i in range(n)] for role, n in zip(ROLES, counts(config))}
    group = ActorGroup(config, None, {role: [] for role in ROLES}, actors)  # pyright: ignore
    monkeypatch.setattr(kept_actors.ray, "kill", lambda handle: None)
    made: list[tuple[str, int, bool]] = []
    monkeypatch.setattr(
        group, "_new", lambda role, index, anywhere=False: made.append((role, index, anywhere)) or object()
    )
    leaving = {3}  # bundles: of two workers, then of two engines
    monkeypatch.setattr(kept_actors, "leaves", lambda bundles, bundle: bundle in leaving)
    group.new_beside("worker")
    for handle in ("worker 1", "engine 1"):
        group.dismiss(handle)  # pyright: ignore
    group.new_beside("engine")
    group.new_beside("worker")
    leaving.clear()
    group.new_beside("engine")
    group.new_beside("worker")
    anywhere = [
        ("worker", 0, True),
        ("engine", 0, True),
        ("worker", 1, False),
        ("engine", 1, False),
        ("worker", 0, True),
    ]
    assert made == anywhere and not group.whole


def test_who_took_another_s_bundle_is_not_killed_with_the_one_whose_number_that_bundle_has(
    monkeypatch: pytest.MonkeyPatch,
):
    """After two moves the second engine sits in the first one's bundle."""
    config = load("k5", ["rollout.replicas=2"])
    actors: dict[str, list[Any]] = {role: [f"{role} {i}" for i in range(n)] for role, n in zip(ROLES, counts(config))}
    group, killed = ActorGroup(config, None, {role: [] for role in ROLES}, actors), list[Any]()  # pyright: ignore
    monkeypatch.setattr(kept_actors.ray, "kill", killed.append)
    monkeypatch.setattr(kept_actors, "leaves", lambda bundles, bundle: False)
    monkeypatch.setattr(group, "_new", lambda role, index, anywhere=False: f"new {role} {index} {anywhere}")
    fleet = group.fleet(config, again=lambda: fleet)
    actors["engine"][0] = "moved"
    fleet.engines[:] = ["elsewhere", "moved"]  # pyright: ignore
    assert fleet.renew("engine", 0) == "new engine 0 True" and killed == ["elsewhere"]
    assert fleet.renew("engine", 1) == "new engine 0 False" and set(killed) == {"elsewhere", "moved"}
    assert fleet.engines == ["new engine 0 True", "new engine 0 False"]


def test_one_that_dies_as_it_is_constructed_again_is_named_as_one_that_has_failed(monkeypatch: pytest.MonkeyPatch):
    """Else a run that goes back to its checkpoint would end of it."""
    config = load("k5", ["swarm.pp=2", "swarm.dp=2", "rollout.replicas=2"])
    call = SimpleNamespace(remote=lambda construct, *arguments: object())
    actors: dict[str, list[Any]] = {
        role: [SimpleNamespace(__ray_call__=call) for _ in range(n)] for role, n in zip(ROLES, counts(config))
    }
    plans: Any = {role: [SimpleNamespace(arguments=())] * n for role, n in zip(ROLES, counts(config))}
    group, asked = ActorGroup(config, None, plans, actors), list[str]()  # pyright: ignore
    monkeypatch.setattr(kept_actors, "gather", lambda calls, *_, **__: asked.extend(who for who, _ in calls))
    group.construct_again(plans, config, 0.0, new={("worker", 0)})
    found = [blame for who in asked for blame in blamed(ActorLost(who, "its new run", "killed"), 2)]
    assert [(blame.role, blame.index) for blame in found] == [
        *(("worker", rank) for rank in (1, 2, 3)),
        *(("engine", 0), ("engine", 1), ("anchor", 0)),
    ]


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ([], set()),
        (["anchor.clock=wall"], {"worker"}),
        (["swarm.device=cuda"], {"worker"}),
        (["rollout.engine=vllm", "rollout.device=cuda"], {"engine"}),
    ],
)
def test_others_come_for_those_that_are_silent_and_those_that_serve_one_run(
    overrides: list[str], roles: set[str], monkeypatch: pytest.MonkeyPatch
):
    config = load("k5", ["swarm.pp=2", "rollout.replicas=2", "anchor.workers=2", *overrides])
    ready = SimpleNamespace(remote=lambda: object())
    actors: dict[str, list[Any]] = {
        role: [SimpleNamespace(__ray_ready__=ready) for _ in range(n + 1)] for role, n in zip(ROLES, counts(config))
    }  # one more of each than the run uses
    plans: Any = {role: [None] * n for role, n in zip(ROLES, counts(config))}
    group = ActorGroup(config, None, plans, actors)  # pyright: ignore
    renewed: list[tuple[str, int]] = []
    monkeypatch.setattr(group, "renew", lambda role, index: renewed.append((role, index)))
    # the last that is asked says nothing: of the anchors the second, as there is no diagnoser
    monkeypatch.setattr(kept_actors, "answered", lambda calls, seconds: dict.fromkeys([*calls][:-1]))
    expected = {("anchor", 1)} | {(role, i) for role in roles for i in range(2)}
    assert group.renew_silent() == set(renewed) == expected and len(renewed) == len(expected)
