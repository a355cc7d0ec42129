"""Whose failure an error is, of errors as they are raised: by `calls.failure`, by a deadline, by an exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

from anchor_service import calls
from anchor_service.errors import ActorLost, NotFinite, ReplicaMismatch, WaitTimeout
from codec.frames import FrameError
from codec.ledger import Ledger
from deploy.config import ConfigError
from rl.engine import EngineFailed
from swarm.blame import Blame, blamed
from swarm.failure_policy import Failure
from swarm.grid import Desync, Grid, PeerLost
from swarm.manifest import CheckpointError

PP = 2
DEATH, HANG, BAD = Failure


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls.ray, "nodes", lambda: [])
    monkeypatch.setattr(calls, "actors", lambda actor_id: {"State": "DEAD"})


@pytest.mark.parametrize(
    ("who", "roles"),
    [
        ("worker d1p1", [("worker", 3)]),
        ("worker d0p0", [("worker", 0)]),
        ("engine 2", [("engine", 2)]),
        ("anchor 1", [("anchor", 1)]),
        ("the anchor", [("anchor", None)]),
        ("the diagnoser", [("diagnoser", None)]),
        ("diagnoser 0", [("diagnoser", 0)]),
        ("a worker", [("worker", None)]),
        ("the swarm", [("worker", None), ("anchor", None)]),
    ],
)
def test_a_process_that_died_is_named(who: str, roles: list[tuple[str, int | None]]):
    expected = [Blame(role, index, DEATH) for role, index in roles]
    for error in (
        ActorDiedError(),
        OutOfMemoryError("the node ran low on memory"),
        NodeDiedError("no heartbeat"),
        ObjectLostError("ab", None, ""),
    ):
        assert blamed(calls.failure(error, who, "tick 3"), PP) == expected


@pytest.mark.parametrize(
    ("who", "roles"),
    [
        ("engine 1", ["worker"]),
        ("worker d0p1", ["anchor"]),
        ("the anchor", ["worker", "anchor"]),
        ("anchor 0", ["worker", "anchor"]),
        ("the diagnoser", ["worker", "anchor"]),
    ],
)
def test_one_whose_delivery_another_was_called_with_is_of_the_roles_that_deliver_to_it(who: str, roles: list[str]):
    error = calls.failure(RayTaskError("gradient", "", ActorDiedError(), pid=1, ip="10.0.0.1"), who, "M")
    assert "gets an argument from" in str(error)
    assert blamed(error, PP) == [Blame(role, None, DEATH) for role in roles]


def test_all_who_are_missing_at_a_deadline_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls.ray, "wait", lambda waiting, **kw: ([], waiting))
    asked = [("worker d0p1", 1), ("engine 0", 2), ("the anchor", 3), ("engine 0", 4)]
    with pytest.raises(WaitTimeout) as caught:
        calls.gather(asked, "tick 3", 0.0, "swarm.timeout_s")
    assert blamed(caught.value, PP) == [
        Blame("worker", 1, HANG),
        Blame("engine", 0, HANG),
        Blame("anchor", None, HANG),
    ]


@pytest.mark.parametrize("who", ["worker d0p1", "the replicas of a stage", "all ranks", "a neighbouring stage"])
def test_an_exchange_that_takes_too_long_is_a_workers_and_one_that_broke_off_nobodys(who: str):
    grid = Grid(0, 1, 1, torch.device("cpu"), Ledger())
    with pytest.raises(WaitTimeout) as slow, grid._waiting(who, "a norm", [1]):
        raise RuntimeError("Timed out waiting 300000ms for recv operation to complete")
    assert blamed(slow.value, PP) == [Blame("worker", 1 if who == "worker d0p1" else None, HANG)]
    with pytest.raises(PeerLost) as broken, grid._waiting(who, "a norm", [1]):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    assert blamed(broken.value, PP) == []


def test_an_engine_that_fails_is_named_by_who_raised_it():
    cause = EngineFailed("new weights for vllm", "RuntimeError: no", "start the run anew")
    error = calls.failure(RayTaskError("load", "(pid=7, ip=10.0.0.1)", cause, pid=7, ip="10.0.0.1"), "engine 1", "W")
    assert blamed(error, PP) == [Blame("engine", 1, BAD)]
    assert blamed(cause.__class__("the problems of the task", "engine 1 has others", "put the same files"), PP) == []


@pytest.mark.parametrize(
    "error",
    [
        NotFinite("the loss is nan", "layer 3", "lower grpo.lr"),
        ReplicaMismatch("weights", 3, None, ["worker d0p0"]),
        ConfigError("no such key"),
        FrameError("the anchor", "tick", "expected 3, got 4"),
        CheckpointError("is damaged"),
        Desync("worker d0p0", [1, 2], [3, 4]),
        ValueError("the reward function wants a str"),
        KeyboardInterrupt(),
        WaitTimeout("the Ray cluster", "room for 4 bundles (PACK): 4 CPU", 300.0, "swarm.start_timeout_s"),
        WaitTimeout("10.0.0.1:6379 (refused)", "an answer", 10.0, "--address, or start Ray there"),
        ActorLost("engine 0", "its model", "it could not be constructed: OSError: no such file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_failure_of_a_process_is_nobodys(error: Any):
    assert blamed(error, PP) == []
