"""A step's samples after workers were lost: who is given what, by a real `Dealt` and the coordinator's own ticks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy.config import load
from swarm import dealt
from swarm.coordinator import Coordinator
from swarm.dealt import Dealt
from swarm.messages import TickPlan
from swarm.regroup import Met
from swarm.replay_choice import MiniFrame
from swarm.shares import mini_batches
from tests.unit.rl.test_batch import random_batch

MINIS = [MiniFrame(random_batch(12, seed, shortest=1), None, 0) for seed in range(2)]
TICK = 5


class Run:
    """In the first of two ticks of a step. `mets`: what comes of one failure after another, and the replicas there are then;
    `fails`: how often each kind of call does."""

    def __init__(self, dp: int, mets: list[tuple[Met, int]], clock: str = "lockstep", **fails: int):
        self.mets, self.fails = mets, dict[str, int]()
        self.said = list[tuple[Any, ...]]()
        sizes = "grpo.ppo_mini_batch_size=12", "grpo.train_batch_size=24"
        config = load("k5", [f"swarm.dp={dp}", "swarm.pp=1", f"anchor.clock={clock}", *sizes], given=())
        self.regroup = SimpleNamespace(dp=dp, after=self.after)
        self.fleet: Any = SimpleNamespace(begin_step=self.begin_step, give=self.give, ask_workers=self.tick)
        self.fleet.workers, self.fleet.tick_limit = [None] * dp, lambda due: (1.0, "")
        self.progress = SimpleNamespace(
            tick=TICK - 1, control=lambda *n: None, event=lambda name, **of: self.said.append((name, of["replicas"]))
        )
        parts: Any = config, self.fleet, self.progress, self.regroup, lambda frame: frame
        self.dealt = Dealt(*parts)
        self.config, self.corrections = config, SimpleNamespace(may_be_fetched=False)
        self.dealt.begin(MINIS, TICK)
        self.said.clear()
        self.fails = fails

    def after(self, failure: Exception, tick: int) -> Met:
        met, self.regroup.dp = self.mets.pop(0)
        self.fleet.workers = [None] * self.regroup.dp
        return met

    def _may_fail(self, what: str) -> None:
        self.fails[what] = self.fails.get(what, 0) - 1
        if self.fails[what] >= 0:
            raise RuntimeError(f"a worker is lost in {what}")

    def begin_step(self, given: list[tuple[int, Any]]) -> tuple[list[Any], list[object]]:
        self._may_fail("begin_step")
        samples = [[len(batch) for batch, _ in mini_batches(share)] for _, share in given]
        self.said.append(("begin", {first for first, _ in given}, samples))
        return [], [f"old of {rank} of {len(given)}" for rank in range(len(given))]

    def give(self, shares: dict[int, tuple[object, ...]]) -> None:
        self._may_fail("give")
        self.said.append(("give", {rank: share[2] for rank, share in shares.items()}))

    def tick(self, method: str, *_: object) -> list[Any]:
        self._may_fail(method)
        self.said.append((method, len(self.fleet.workers)))
        return ["reports"]

    def mend(self) -> None:
        Coordinator._mend(self, RuntimeError("between"))  # pyright: ignore

    def take(self) -> list[Any]:
        return Coordinator._take(self, [TickPlan(TICK, 0, None, 0)], MINIS)  # pyright: ignore


def fewer(done: int, reports: list[Any] | None = None, fresh: tuple[int, ...] = ()) -> Met:
    return Met(done, reports or [], list(fresh), True)


def renewed(done: int, *fresh: int, reports: list[Any] | None = None) -> Met:
    return Met(done, reports or [], list(fresh), False)


def test_a_replica_that_was_lost_between_two_ticks_leaves_its_samples_to_the_others():
    run = Run(3, [(fewer(TICK - 1), 2)])
    run.mend()
    assert run.take() == ["reports"]
    assert run.said == [("begin", {TICK}, [[6, 6]] * 2), ("step dealt anew", 2), ("tick", 2)]


def test_workers_lost_between_two_ticks_are_given_the_shares_of_those_before_them():
    run = Run(3, [(renewed(TICK - 1, 1), 3)])
    run.mend()
    run.take()
    assert run.said == [("give", {1: "old of 1 of 3"}), ("tick", 3)]


def test_what_was_lost_between_two_steps_is_no_matter_of_the_next_one():
    run = Run(3, [(fewer(TICK - 1), 2)])
    run.mend()
    run.dealt.begin(MINIS, TICK)
    run.said.clear()
    run.take()
    assert run.said == [("tick", 2)]


def test_a_death_while_a_step_is_dealt_anew_deals_it_anew_once_more():
    """Not to the newcomer alone: the shares are new, and what the others have made of theirs is half of it."""
    run = Run(3, [(fewer(TICK - 1), 2), (renewed(TICK - 1, 1), 2)], tick=1, begin_step=1)
    assert run.take() == ["reports"]
    assert run.said == [("begin", {TICK}, [[6, 6]] * 2), ("step dealt anew", 2), ("tick", 2)]
    run.said.clear()
    run.take()
    assert run.said == [("tick", 2)]  # that was that


def test_a_tick_that_was_taken_stands_though_all_who_took_it_are_lost_as_the_rest_is_dealt_anew():
    run = Run(3, [(fewer(TICK, ["taken"]), 2), (renewed(TICK, 0), 2)], tick=1, begin_step=1)
    assert run.take() == ["taken"]
    assert run.said == [("begin", {TICK + 1}, [[6, 6]] * 2), ("step dealt anew", 2)]


@pytest.mark.parametrize("clock", ["wall", "lockstep"])
def test_old_log_probs_that_went_with_a_node_are_taken_anew_by_all_on_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch, clock: str
):
    """In lockstep giving them fails, and the run goes back to its checkpoint."""
    monkeypatch.setattr(dealt, "lost", lambda held: "old of 1 of 2" in held)
    run = Run(2, [(renewed(TICK - 1, 1), 2), (renewed(TICK - 1, 0), 2)], clock, tick=1, begin_step=1)
    run.take()
    anew = [("begin", {TICK}, [[6, 6]] * 2), ("step dealt anew", 2)]
    assert run.said == [*(anew if clock == "wall" else [("give", {1: "old of 1 of 2"})]), ("tick", 2)]


def test_old_log_probs_of_ranks_that_are_there_may_be_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dealt, "lost", lambda held: "old of 0 of 2" in held)
    run = Run(2, [(renewed(TICK - 1, 1), 2)], "wall", tick=1)
    run.take()
    assert run.said == [("give", {1: "old of 1 of 2"}), ("tick", 2)]
