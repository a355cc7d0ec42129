"""What the driver counts of a correction: all of it where ranks took the whole, its head where that was enough."""

from __future__ import annotations

from typing import Any, cast

import pytest

from anchor_service.clock import Lockstep
from anchor_service.lag import Due
from anchor_service.line import Fire, FireLine
from deploy.config import load
from swarm.corrections import Corrections
from swarm.engine_line import EngineLine
from swarm.failure_policy import FailurePolicy
from swarm.fleet import Fleet
from swarm.messages import MergeOutcome
from swarm.progress import Progress
from swarm.telemetry import Telemetry

HEADS, REST = (10, 12), (100, 300)  # bytes, a stage
NODES = (1, 3)  # that hold replicas of a stage


class Line(FireLine):
    """Its fires are done."""

    def __init__(self, parts: int):
        super().__init__([], 2, parts, 1.0, None)

    def report(self, fire: Fire) -> dict[str, Any]:
        sizes = [list(each) for each in zip(HEADS, REST)] if self.parts > 1 else [[size] for size in REST]
        return {"version": fire.due.version, "perf/max_memory_gb": 0.0, "stage_bytes": sizes}


class Nodes:
    lookout = None

    def replicas_of(self, stage: int) -> int:
        return stage

    def nodes(self, stage: int) -> range:
        return range(NODES[stage])


class Fires:
    """What was written down of them."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int | None, int]] = []

    def fire(self, step: int, tick: int, report: dict[str, Any]) -> None:
        self.written.append((report["version"], report["first_tick"], report["bytes"]))

    def event(self, *args: Any, **fields: Any) -> None: ...


def settled(parts: int, outcome: MergeOutcome, delivered_whole: int | None = None) -> tuple[float, list[Any]]:
    """Bytes counted, and what was written, of versions 1 and 2 in tick 7."""
    fires, line = Fires(), Line(parts)
    for version in (1, 2):
        line.add(Fire(Due(version, version, None), 0, None, None, [], True, whole=version == delivered_whole))
    progress = Progress(cast("Telemetry", fires))
    progress.tick = 7
    fleet = cast("Fleet", Nodes())
    config, engines = load("k5", ["swarm.pp=2"]), cast("EngineLine", None)
    policy = FailurePolicy(config.faults)
    corrections = Corrections(config, fleet, progress, line, Lockstep([]), id, engines, policy)
    corrections.log(outcome, 1.0)
    return progress.ledger.sent["correction"], fires.written


def counted(sizes: tuple[int, int]) -> int:
    return sum(n * size for n, size in zip(NODES, sizes))


HEAD, WHOLE = counted(HEADS), counted(HEADS) + counted(REST)


@pytest.mark.parametrize(
    ("outcome", "delivered_whole", "expected", "bytes_"),
    [
        (MergeOutcome(2, whole=True, merged=True), None, HEAD + WHOLE, [22, 422]),  # version 1 was passed over
        (MergeOutcome(2, merged=True), None, 2 * HEAD, [22, 22]),
        (MergeOutcome(2, merged=True), 2, HEAD + WHOLE, [22, 422]),  # ahead of its tick, in vain
        (MergeOutcome(2, whole=True, merged=True), 1, 2 * WHOLE, [422, 422]),
        (MergeOutcome(1, whole=True, refused=2), None, WHOLE + HEAD, [422, 22]),
    ],
)
def test_a_correction_counts_as_far_as_it_was_sent(
    outcome: MergeOutcome, delivered_whole: int | None, expected: int, bytes_: list[int]
):
    sent, written = settled(2, outcome, delivered_whole)
    assert sent == expected and [b for _, _, b in written] == bytes_
    assert [first for _, first, _ in written] == [7 if v == outcome.version else None for v in (1, 2)]


def test_one_without_a_head_counts_whatever_became_of_it():
    sent, written = settled(1, MergeOutcome(1, merged=True, refused=2))
    assert sent == 2 * counted(REST) and [b for _, _, b in written] == [sum(REST)] * 2
