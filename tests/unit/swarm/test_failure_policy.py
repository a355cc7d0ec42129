"""Decisions about failures, without a process."""

from __future__ import annotations

import pytest

from swarm.config import FaultsConfig
from swarm.failure_policy import Decision, Failure, FailurePolicy, Status


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
