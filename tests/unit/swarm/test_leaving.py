"""Who on a node that is about to leave is replaced, moves or is given up, and when; on actors that are names."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import ActorLost
from anchor_service.places import Drains, Place
from swarm import leaving
from swarm.leaving import MARGIN_S, STEPS, Leaving, Orders, orders
from swarm.progress import Progress

SOON, LATER = STEPS * 10.0 + MARGIN_S - 1, STEPS * 10.0 + MARGIN_S + 1  # with steps of ten seconds


def _orders(left: dict[Any, float], ready: dict[Any, bool], pp: int = 2, dp: int = 2, samples: int = 12) -> Orders:
    return orders(left, ready, pp, dp, 10.0, lambda replicas: samples % replicas == 0)


def _worker(rank: int) -> tuple[str, int]:
    return "worker", rank


ENGINE = ("engine", 0)


@pytest.mark.parametrize(
    ("left", "ready", "expected"),
    [
        ({}, {}, Orders()),
        ({_worker(2): LATER, ENGINE: math.inf}, {}, Orders(start=(_worker(2), ENGINE))),
        ({_worker(2): LATER, ENGINE: LATER}, {_worker(2): False, ENGINE: True}, Orders(move=(ENGINE,))),
        # both stages of a replica, or neither
        ({_worker(2): LATER, _worker(3): LATER}, {_worker(2): True, _worker(3): False}, Orders()),
        (
            {_worker(2): LATER, _worker(3): LATER},
            {_worker(2): True, _worker(3): True},
            Orders(move=(_worker(2), _worker(3))),
        ),
        # no room: it stays as long as there is time, for ever where nobody has said when the node goes
        ({_worker(3): SOON}, {_worker(3): False}, Orders(give_up=(1,))),
        ({_worker(3): math.inf}, {_worker(3): False}, Orders()),
        ({_worker(3): SOON}, {}, Orders(start=(_worker(3),), give_up=(1,))),
        ({_worker(3): SOON}, {_worker(3): True}, Orders(move=(_worker(3),))),
        # one replica moves, the other one is given up
        (
            {_worker(0): SOON, _worker(3): SOON},
            {_worker(0): True, _worker(3): False},
            Orders(move=(_worker(0),), give_up=(1,)),
        ),
        # nobody would be left
        ({_worker(0): SOON, _worker(3): SOON}, {_worker(0): False, _worker(3): False}, Orders()),
    ],
)
def test_orders(left: dict[Any, float], ready: dict[Any, bool], expected: Orders):
    assert _orders(left, ready) == expected


def test_a_replica_is_not_given_up_where_the_others_cannot_share_its_samples():
    left, ready = {_worker(3): SOON}, {_worker(3): False}
    assert _orders(left, ready, pp=1, dp=4, samples=12).give_up == (3,)
    assert _orders(left, ready, pp=1, dp=4, samples=16).give_up == ()


class Named:
    """A run whose actors are names, and a newcomer is ready when it is in `ready`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ready, self.told, self.events = set[str](), list[tuple[Any, ...]](), list[tuple[str, dict[str, Any]]]()
        self.places = {"w0": "here", "w1": "there", "e0": "there", "a0": "there", "d0": "there"}
        self.draining: dict[str, float] = {}
        self.count, self.busy, self.failed, self.fails = 0, set[int](), set[str](), ""
        roles = {"worker": ["w0", "w1"], "engine": ["e0"], "anchor": ["a0"], "diagnoser": ["d0"]}
        self.fleet = SimpleNamespace(
            roles=roles,
            workers=roles["worker"],
            diagnosers=roles["diagnoser"],
            places=lambda: {
                (role, i): Place(self.places[actor], 1)
                for role, held in roles.items()
                for i, actor in enumerate(held)
                if actor in self.places
            },
            name_of=lambda role, index: f"{role} {index}",
            beside=self._beside,
            arrival=lambda newcomer: newcomer,
            arrived=lambda newcomer, place: self.places.update({newcomer: place}),
            dismiss=lambda actor: self.told.append(("dismissed", actor)),
        )
        event = lambda step, tick, name, **more: self.events.append((name, more))  # noqa: E731
        self.progress = Progress(SimpleNamespace(event=event))
        self._patch(monkeypatch)
        self.leaving = self._leaving()

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leaving, "done_of", lambda refs: ([r for r in refs if r in self.ready], []))
        monkeypatch.setattr(leaving, "raised", lambda ref, who: ref in self.failed)
        monkeypatch.setattr(leaving, "take", lambda ref, *_: "elsewhere")

    def _leaving(self) -> Leaving:
        regroup = SimpleNamespace(
            pp=1,
            dp=2,
            config=SimpleNamespace(grpo=SimpleNamespace(ticks_per_step=2)),
            can_share=lambda replicas: True,
            replace=self._replace,
            give_up=lambda *what: self.told.append(("given up", *what)),
            after=lambda failure, tick: self.told.append(("regrouped", failure)),
        )
        engines = SimpleNamespace(replace=lambda *what: self._put("engine", *what))
        anchors = SimpleNamespace(
            may_leave=lambda k: k not in self.busy, replace=lambda *what: self._put("anchor", *what)
        )
        drains: Any = SimpleNamespace(look=lambda: self.draining)
        return Leaving(self.fleet, self.progress, regroup, engines, anchors, drains)

    def _beside(self, role: str) -> str:
        self.count += 1
        return f"new {role}"

    def _put(self, role: str, index: int, newcomer: str, reason: str) -> None:
        self.fleet.roles[role][index] = newcomer
        self.told.append((role, newcomer))

    def _replace(self, others: dict[int, str], reason: str) -> None:
        for rank, newcomer in others.items():
            self._put("worker", rank, newcomer, reason)
        if self.fails:
            raise ActorLost(self.fails, "its state", "killed")


def test_all_that_is_on_a_node_which_leaves_goes_elsewhere_as_it_gets_ready(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.leaving.between_steps()
    assert run.events == [] and run.count == 0
    run.draining = {"there": time.time() + 1000, "a node of others": 0.0}
    for _ in range(3):
        run.leaving.between_steps()
    ((name, said),) = run.events
    assert name == "node draining" and said["node"] == "there" and 990 < said["seconds"] <= 1000
    assert said["actors"] == "worker 1, engine 0, anchor 0, diagnoser 0"
    assert run.count == 4 and run.told == []
    run.busy, run.ready = {0}, {"new engine", "new anchor"}
    run.leaving.between_steps()
    assert run.told == [("engine", "new engine")]  # the anchor is not done yet
    run.busy, run.ready = set(), {"new anchor", "new worker", "new diagnoser"}
    for _ in range(3):
        run.leaving.between_steps()
    assert sorted(run.told[1:]) == [("anchor", "new anchor"), ("dismissed", "d0"), ("worker", "new worker")]
    assert run.fleet.roles == {
        role: ["w0", "new worker"] if role == "worker" else [f"new {role}"] for role in run.fleet.roles
    }
    assert run.count == 4 and [name for name, _ in run.events] == ["node draining", "diagnoser renewed"]


def test_a_replica_is_given_up_with_a_newcomer_that_waits_for_room(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.draining = {"there": time.time() + 1.0}
    run.leaving.between_steps()
    assert run.told == [("given up", (1,), [1], ["new worker"], leaving.REASON)]


def test_who_is_lost_on_the_way_is_a_failure_like_any_other(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.draining, run.ready, run.fails = {"there": time.time() + 1000}, {"new worker"}, "worker 1"
    for _ in range(2):
        run.leaving.between_steps()
    ((what, failure),) = [told for told in run.told if told[0] == "regrouped"]
    assert what and isinstance(failure, ActorLost) and failure.who == "worker 1"


def test_a_newcomer_is_dismissed_where_another_has_come_for_its_forerunner(monkeypatch: pytest.MonkeyPatch):
    """It died before its node left."""
    run = Named(monkeypatch)
    run.draining = {"there": time.time() + 1000}
    run.leaving.between_steps()
    run.fleet.workers[1] = "w2"  # of which it is not known yet where it is
    run.leaving.between_steps()
    assert run.told == [("dismissed", "new worker")]


def test_another_newcomer_starts_for_one_that_failed_before_it_was_ready(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.draining = {"there": time.time() + 1000}
    run.leaving.between_steps()
    run.ready = run.failed = {"new engine"}
    run.leaving.between_steps()
    assert run.told == [("dismissed", "new engine")] and run.count == 5
    run.failed = set()
    run.leaving.between_steps()
    assert run.told[1:] == [("engine", "new engine")]


def test_whoever_looks_for_nodes_that_leave_waits_for_no_answer():
    asked: list[float] = []

    def silent() -> dict[str, float]:
        asked.append(time.monotonic())
        time.sleep(0.5)
        return {"there": 1.0}

    drains, start = Drains(silent), time.monotonic()
    drains.EVERY_S, drains.PATIENCE_S = 0.0, 0.05
    assert drains.look() == {} == drains.look() and time.monotonic() - start < 0.4 and len(asked) == 1
    time.sleep(0.6)
    assert drains.look() == {"there": 1.0}
    often = Drains(lambda: asked.append(0.0) or {})
    for _ in range(5):
        often.look()
    assert len(asked) == 3  # the second look of the first, and one in a second
