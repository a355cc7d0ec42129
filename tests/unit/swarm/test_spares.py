"""Workers beside those that train, which are names: nobody who is not wanted any more is left waiting for room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import ActorLost, WaitTimeout
from swarm import spares
from swarm.spares import Spares


class Named:
    """`there`: who is ready; `gone`: who has ended; `slow`: who does not say that it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.there, self.gone, self.slow, self.dismissed, self.started = set[str](), set[str](), set[str](), [], 0
        monkeypatch.setattr(spares, "done_of", lambda refs: ([r for r in refs if r in self.there | self.gone], []))
        monkeypatch.setattr(spares, "raised", lambda ref, who: ActorLost(who, "", "") if ref in self.gone else None)
        monkeypatch.setattr(spares, "replies", self._replies)
        new: Any = self._new
        self.spares = Spares(new, lambda handle: self.dismissed.append(handle.name))  # pyright: ignore

    def _new(self, _: None) -> Any:
        name = f"s{self.started}"
        self.started += 1
        return SimpleNamespace(name=name, __ray_ready__=SimpleNamespace(remote=lambda: name))

    def _replies(self, calls: list[tuple[str, Any]], *_: object) -> list[Any]:
        return [WaitTimeout("it", "an answer", 0.5, "") if name in self.slow else name for _, name in calls]

    @property
    def held(self) -> list[str]:
        return [spare.handle.name for spare in self.spares.held]  # pyright: ignore


def test_those_that_are_not_wanted_any_more_are_dismissed_who_is_not_there_first(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.spares.look(3)
    run.there = {"s1"}
    run.spares.look(2)
    assert run.dismissed == ["s0"] and run.held == ["s1", "s2"]
    run.spares.look(1)
    assert run.dismissed == ["s0", "s2"] and run.held == ["s1"]
    run.spares.look(0)
    assert run.dismissed == ["s0", "s2", "s1"] and run.held == [] and run.started == 3


def test_one_that_has_ended_leaves_its_place_to_another(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.spares.look(1)
    run.gone = {"s0"}
    run.spares.look(1)
    assert run.dismissed == ["s0"] and run.held == ["s1"]


def test_one_that_does_not_answer_is_neither_taken_nor_left_alone(monkeypatch: pytest.MonkeyPatch):
    run = Named(monkeypatch)
    run.spares.look(2)
    run.there, run.slow = {"s0", "s1"}, {"s0"}
    run.spares.look(2)
    taken: Any = run.spares.take()
    assert taken.name == "s1" and run.dismissed == ["s0"] and run.held == []
