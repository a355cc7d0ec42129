"""Decisions about failures, without a process."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from anchor_service.errors import ActorLost
from swarm import coordinator
from swarm.config import FaultsConfig
from swarm.coordinator import PAUSED_S, Coordinator
from swarm.failure_policy import Decision, Failure, FailurePolicy, Status
from swarm.messages import MergeOutcome


@pytest.mark.parametrize(
    "role, failure, recoverable, waits, decision",
    [
        ("engine", Failure.DEATH, True, True, Decision.RENEW),
        ("engine", Failure.BAD, True, True, Decision.RENEW),
        ("anchor", Failure.HANG, True, False, Decision.RENEW),
        ("anchor", Failure.BAD, True, False, Decision.RENEW),
        ("anchor", Failure.DEATH, True, True, Decision.RENEW),
        ("anchor", Failure.DEATH, False, True, Decision.REWIND),
        ("anchor", Failure.BAD, True, True, Decision.END),
        ("worker", Failure.DEATH, True, True, Decision.REGROUP),
        ("worker", Failure.HANG, False, True, Decision.REWIND),
        ("worker", Failure.BAD, True, True, Decision.END),
        ("diagnoser", Failure.HANG, True, True, Decision.RENEW),
    ],
)
def test_the_table(role, failure, recoverable, waits, decision):
    assert FailurePolicy(FaultsConfig()).decide(Status(role, failure, 1, recoverable, waits)) is decision


def test_a_run_has_a_budget_and_so_has_each_tick():
    policy = FailurePolicy(FaultsConfig(budget=4, a_tick=2))
    decisions = [policy.decide(Status("engine", Failure.DEATH, tick)) for tick in (1, 1, 1, 2, 3)]
    assert decisions == [Decision.RENEW, Decision.RENEW, Decision.END, Decision.RENEW, Decision.END]


def test_nothing_that_the_run_waits_for_is_gone_without():
    policy = FailurePolicy(FaultsConfig(budget=0))
    assert policy.decide(Status("anchor", Failure.DEATH, 1, waits=False)) is Decision.WITHOUT
    assert policy.decide(Status("anchor", Failure.DEATH, 1, waits=True)) is Decision.END
    assert policy.decide(Status("engine", Failure.DEATH, 1)) is Decision.END


@pytest.mark.parametrize("budget", [0, 1])
def test_a_diagnoser_that_fails_is_renewed_and_costs_the_diagnosis_of_its_tick(
    monkeypatch: pytest.MonkeyPatch, budget: int
):
    lost, renewed, events = ActorLost("the diagnoser", "the diagnosis of tick 4", "killed"), [], []

    def gather(*_: object) -> None:
        raise lost

    monkeypatch.setattr(coordinator, "gather", gather)
    diagnoser = SimpleNamespace(diagnose=SimpleNamespace(remote=lambda *args: None))
    run = SimpleNamespace(
        progress=SimpleNamespace(tick=4, event=lambda name, **more: events.append(name)),
        fleet=SimpleNamespace(
            diagnosers=[diagnoser],
            records=lambda tick: [],
            anchor_limit=(1.0, "anchor.timeout_s"),
            renew=lambda role, k: renewed.append((role, k)),
        ),
        corrections=SimpleNamespace(sources=SimpleNamespace(merged=lambda outcome: None)),
        policy=FailurePolicy(FaultsConfig(budget=budget)),
    )
    diagnose = partial(Coordinator._diagnose, run, SimpleNamespace(reference=None), MergeOutcome())
    if not budget:
        with pytest.raises(ActorLost):
            diagnose()
        return
    assert set(diagnose()) == {PAUSED_S} and renewed == [("diagnoser", 0)] and events == ["diagnosis left out"]


def test_a_diagnosis_without_anything_in_it_is_told(monkeypatch: pytest.MonkeyPatch):
    events, peak = list[str](), {"perf/max_memory_gb": 1.0}
    monkeypatch.setattr(coordinator, "gather", lambda *_: [dict(peak)])
    run = SimpleNamespace(
        progress=SimpleNamespace(tick=4, event=lambda name, **more: events.append(name), remember=lambda *_: None),
        fleet=SimpleNamespace(
            diagnosers=[SimpleNamespace(diagnose=SimpleNamespace(remote=lambda *args: None))],
            records=lambda tick: [],
            anchor_limit=(1.0, "anchor.timeout_s"),
        ),
        corrections=SimpleNamespace(sources=SimpleNamespace(merged=lambda outcome: None)),
    )
    diagnose = partial(Coordinator._diagnose, run, SimpleNamespace(reference=None), MergeOutcome())
    assert set(diagnose()) == {PAUSED_S} and events == ["diagnosis left out"]
    peak["diagnostics/cos_merged"] = 0.5
    assert set(diagnose()) == {PAUSED_S, "diagnostics/cos_merged"} and len(events) == 1
