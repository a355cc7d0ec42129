"""What a call that failed is said to have failed of, where a real cluster would take long to fail so."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayTaskError

from anchor_service import calls
from anchor_service.errors import ActorLost
from anchor_service.places import Place
from deploy.config import load
from swarm import fleet
from swarm.fleet import Fleet
from swarm.telemetry import Process

NODE = {"NodeID": "beef", "NodeManagerHostname": "gpu-7", "NodeManagerAddress": "10.0.0.7", "Alive": True}
OTHER = NODE | {"NodeID": "cafe", "NodeManagerHostname": "gpu-8", "Alive": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A node that the control store calls dead at the third look, as one that sends no heartbeats."""
    looks = {"left": 3}

    def nodes() -> list[dict]:
        looks["left"] -= 1
        alive = looks["left"] > 0
        reason = {} if alive else {"DeathReasonMessage": "missed too many heartbeats"}
        return [NODE | {"Alive": alive} | reason, OTHER]

    monkeypatch.setattr(calls.ray, "nodes", nodes)
    monkeypatch.setattr(calls, "actors", lambda actor_id: {"State": "ALIVE", "Address": {"NodeID": "beef"}})
    monkeypatch.setattr(calls.time, "sleep", lambda seconds: None)
    return looks


def test_an_actor_that_cannot_be_reached_is_asked_after_until_its_node_is_known_to_be_dead(cluster: dict):
    error = calls.failure(ActorUnavailableError("Socket closed", b"\x01" * 16), "worker d0p1", "tick 3")
    assert isinstance(error, ActorLost)
    said = "worker d0p1 ended before it delivered tick 3: node gpu-7 (10.0.0.7) died: missed too many heartbeats\n"
    assert str(error).startswith(said) and "Socket closed" in str(error) and "gpu-8" not in str(error)


def test_an_actor_that_died_on_a_living_node_is_not_waited_for(cluster: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "actors", lambda actor_id: {"State": "DEAD", "Address": {"NodeID": "beef"}})
    error = calls.failure(ActorUnavailableError("Socket closed", b"\x01" * 16), "worker d0p1", "tick 3")
    assert cluster["left"] == 2 and "gpu" not in str(error)


def test_an_object_that_is_lost_names_the_nodes_that_died(cluster: dict):
    error = calls.failure(ObjectLostError("ab", None, ""), "the anchor", "a correction")
    assert isinstance(error, ActorLost) and "have been lost due to node failure" in error.reason
    assert "node gpu-8 (10.0.0.7) died" in error.reason and "RAY_record_ref_creation_sites" not in error.reason


def test_an_object_is_lost_with_its_node_or_when_its_owner_has_an_error_in_its_place(monkeypatch: pytest.MonkeyPatch):
    places = {
        "there": ["beef"],
        "gone": ["cafe"],
        "twice": ["cafe", "beef"],
        "small": [],
        "bad": ["home"],
        "own": ["home"],
    }
    monkeypatch.setattr(calls, "get_object_locations", lambda refs: {ref: {"node_ids": places[ref]} for ref in refs})
    monkeypatch.setattr(calls.ray, "nodes", lambda: [NODE, OTHER])
    monkeypatch.setattr(
        calls.ray, "get_runtime_context", lambda: type("Context", (), {"get_node_id": staticmethod(lambda: "home")})
    )
    monkeypatch.setattr(calls, "raised", lambda ref, who: ObjectLostError("ab", None, "") if ref == "bad" else None)
    assert [ref for ref in places if calls.lost([ref])] == ["gone", "bad"]
    assert calls.lost(["there", "gone"]) and not calls.lost([])


def test_a_call_whose_argument_is_lost_is_not_its_own_actors_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls.ray, "nodes", lambda: [NODE, OTHER])
    task = RayTaskError("publish", "a traceback", ObjectLostError("ab", None, ""))
    error = calls.failure(task, "anchor 1", "correction 3")
    assert isinstance(error, ActorLost) and error.who == "an actor that anchor 1 gets an argument from"
    assert "node gpu-8 (10.0.0.7) died" in error.reason


def test_a_control_store_that_is_gone_does_not_hide_what_happened(monkeypatch: pytest.MonkeyPatch):
    def gone(*args: Any) -> None:
        raise ConnectionError("no control store")

    monkeypatch.setattr(calls.ray, "nodes", gone)
    monkeypatch.setattr(calls, "actors", gone)
    error = calls.failure(ActorUnavailableError("Socket closed", b"\x01" * 16), "engine 0", "samples")
    assert isinstance(error, ActorLost) and "Socket closed" in error.reason


class Asked:
    """A worker of which anything may be asked."""

    def __getattr__(self, method: str) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *args: object())})


UNUSED: Any = (None, None)  # `renew` and `again` of a fleet that is whole


def test_every_actor_is_asked_once_for_its_node(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def places_of(actors: list, seconds: float, knob: str) -> list[Place]:
        asked.append(len(actors))
        return [Place(f"node {i // 2}", 100 + i) for i, _ in enumerate(actors)]

    monkeypatch.setattr(fleet, "places_of", places_of)
    config = load("demo")
    workers, new = [Asked() for _ in range(4)], Asked()
    changes = (lambda role, index: new, lambda old: new, lambda role: new, lambda handle: None, lambda: found)
    found = Fleet(config.swarm, config.anchor, config.rollout, workers, [Asked()], [], [], *changes)
    assert found.nodes(workers) == {"node 0", "node 1"}
    assert found.replicas_of(1) == [workers[1], workers[3]] and found.nodes(found.replicas_of(1)) == {
        "node 0",
        "node 1",
    }
    assert found.nodes([workers[3], new]) == {"node 1", "node 0"} and found.nodes([]) == set()
    assert [n for n in asked if n] == [4, 1]
    assert found.processes() == [
        Process("worker", i, f"node {i // 2}", 100 + i) for i in range(4)
    ]  # no engine was asked


def test_every_wait_has_one_deadline(monkeypatch: pytest.MonkeyPatch):
    """With the defaults a worker that hangs outside a tick is named after 315 s, not after 1,200."""
    waited: list[tuple[float, str]] = []

    def gather(asked: list, what: str, seconds: float, knob: str, **rest: float) -> list[int]:
        waited.append((seconds, knob))
        return [0 for _ in asked]

    monkeypatch.setattr(fleet, "gather", gather)
    config = load("k5")
    swarm, anchor = config.swarm.timeout_s, config.anchor.timeout_s
    changes = (
        lambda role, index: Asked(),
        lambda old: Asked(),
        lambda role: Asked(),
        lambda handle: None,
        lambda: found,
    )
    found = Fleet(config.swarm, config.anchor, config.rollout, [Asked()], [Asked()], [Asked()], [], *changes)
    found.ask_workers("begin_step", [()], "the start of a step")
    found.ask_workers("tick", [()], "tick 1", found.tick_limit(due=False))
    found.ask_workers("tick", [()], "tick 2", found.tick_limit(due=True))
    usual = (swarm + fleet.GRACE_S, "swarm.timeout_s")
    assert waited == [usual, usual, (usual[0] + anchor, "swarm.timeout_s or anchor.timeout_s")]
    assert fleet.GRACE_S <= 0.1 * swarm
