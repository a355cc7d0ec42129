"""Workers that leave in order, by a real `Regroup` on workers that are names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import ARGUMENT, ActorLost
from anchor_service.line import NoFires
from deploy.config import load
from swarm import regroup
from swarm.failure_policy import FailurePolicy
from swarm.grid import PeerLost
from swarm.progress import Progress
from swarm.regroup import Regroup


class Told:
    """A worker that remembers what it was told, in a diary of all."""

    def __init__(self, name: str, diary: list[tuple[Any, ...]]):
        self.name, self.diary = name, diary

    def __getattr__(self, method: str) -> Any:
        def remote(*args: object) -> str:
            self.diary.append((self.name, method, *args))
            return f"{method} of {self.name}"

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Run:
    """Of two stages. `fails`: what a wait for raises; `who` is lost then, if it is not the first that was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dp: int, fails: str = "", who: str = ""):
        config = load(
            "k5", [f"swarm.dp={dp}", "swarm.pp=2", "grpo.ppo_mini_batch_size=12", "grpo.train_batch_size=24"], given=()
        )
        self.diary, self.events = list[tuple[Any, ...]](), list[tuple[str, dict[str, Any]]]()
        self.dismissed: list[str] = []

        def gather(calls: list[tuple[str, object]], what: str, *_: object) -> list[Any]:
            if what == fails:
                raise ActorLost(who or calls[0][0], what, "killed")
            return [100 if what.startswith("the state of") else reference for _, reference in calls]

        monkeypatch.setattr(regroup, "gather", gather)
        fleet: Any = SimpleNamespace(
            swarm=config.swarm,
            swarm_limit=(1.0, "swarm.timeout_s"),
            workers=[self.worker(f"w{rank}") for rank in range(2 * dp)],
            new_worker=None,
            dismiss=lambda worker: self.dismissed.append(worker.name),
            nodes=lambda workers: set(),
        )
        event = lambda step, tick, name, **more: self.events.append((name, more))  # noqa: E731
        self.progress = Progress(SimpleNamespace(event=event))  # pyright: ignore
        self.progress.tick = 6
        self.regroup = Regroup(config, fleet, self.progress, FailurePolicy(config.faults), NoFires())

    def worker(self, name: str) -> Any:
        return Told(name, self.diary)

    @property
    def names(self) -> list[str]:
        return [worker.name for worker in self.regroup.fleet.workers]  # pyright: ignore


def test_who_takes_a_place_gets_the_state_of_the_one_before_it_and_the_others_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
):
    run = Run(monkeypatch, 2)
    run.regroup.replace({1: run.worker("n1")}, "because")
    assert run.names == ["w0", "n1", "w2", "w3"] and run.dismissed == ["w1"]
    init = "address of w0"
    assert run.diary == [
        ("w1", "copied", True),  # before anybody waits for it
        ("w0", "address"),
        ("w0", "meet", 0, 2, init, False),
        ("n1", "build", init, 1, 2),
        ("w2", "meet", 2, 2, init, False),
        ("w3", "meet", 3, 2, init, False),
        ("n1", "become", "copied of w1", 6),
    ]
    ((name, said),) = run.events
    assert name == "workers regrouped" and (said["reason"], said["renewed"]) == ("because", "worker d0p1")
    assert (said["done"], said["exact"]) == (6, True) and [*run.progress.ledger.state()["control"]] == [100, 0]


@pytest.mark.parametrize("fails", ["its place in the new grid", "the state of the one before it"])
def test_who_was_to_leave_is_dismissed_also_where_somebody_is_lost_on_the_way(
    monkeypatch: pytest.MonkeyPatch, fails: str
):
    run = Run(monkeypatch, 2, fails)
    with pytest.raises(ActorLost):
        run.regroup.replace({1: run.worker("n1")}, "because")
    assert run.dismissed == ["w1"] and run.names == ["w0", "n1", "w2", "w3"] and run.events == []


def test_of_a_replica_that_is_given_up_who_does_not_leave_waits_with_the_newcomers(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, 3)
    run.regroup.give_up((1,), (2,), [run.worker("n2")], "because")
    assert run.names == ["w0", "w1", "w4", "w5"] and run.dismissed == ["w2"] and run.regroup.dp == 2
    assert [spare.handle.name for spare in run.regroup.spares.held] == ["w3", "n2"]  # pyright: ignore
    assert [told[:4] for told in run.diary if told[1] == "meet"] == [(n, "meet", i, 2) for i, n in enumerate(run.names)]
    assert run.events == [("replica missing", {"replicas": 2, "reason": "because"})]


def test_nobody_waits_for_one_that_is_lost_where_the_ranks_meet(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, 2, "its place in the new grid")
    with pytest.raises(ActorLost):
        run.regroup.replace({1: run.worker("n1")}, "because")
    assert run.diary[-1] == ("w0", "adjourn")


def test_whose_state_others_wait_for_is_a_worker(monkeypatch: pytest.MonkeyPatch):
    """Nobody is named then: who is lost does not say where it stands."""
    what = "the state of the one before it"
    run = Run(monkeypatch, 2, what, f"{ARGUMENT}worker d0p1 gets an argument from")
    with pytest.raises(PeerLost, match="gets an argument from"):
        run.regroup.replace({1: run.worker("n1")}, "because")


class Ready(Run):
    """With a replica more that is ready to be taken in. `fires`: deliveries to those who come late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = ""):
        super().__init__(monkeypatch, 2, fails)
        run, self.after, self.fires = self.regroup, list[tuple[Exception, int]](), list[tuple[Any, list[int]]]()
        spares: Any = SimpleNamespace(
            look=lambda wanted: None, ready=lambda: [self.worker("n4"), self.worker("n5")], leave=lambda handles: None
        )
        line: Any = SimpleNamespace(
            delivered=lambda: ["a fire"], deliver_to=lambda fire, ranks: self.fires.append((fire, sorted(ranks)))
        )
        run.spares, run.line = spares, line
        monkeypatch.setattr(run, "after", lambda failure, tick: self.after.append((failure, tick)))


def test_a_replica_that_is_taken_in_gets_the_corrections_that_the_others_have_got(monkeypatch: pytest.MonkeyPatch):
    run = Ready(monkeypatch)
    run.regroup.between_steps(3)
    assert run.names == ["w0", "w1", "w2", "w3", "n4", "n5"] and run.fires == [("a fire", [4, 5])]
    assert run.events == [("replicas changed", {"replicas": 3})] and run.after == []


def test_who_is_lost_between_two_steps_is_a_failure_like_any_other(monkeypatch: pytest.MonkeyPatch):
    run = Ready(monkeypatch, "its place in the new grid")
    run.regroup.between_steps(3)
    ((failure, tick),) = run.after
    assert isinstance(failure, ActorLost) and tick == 6
