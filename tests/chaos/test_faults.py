"""Faults in a real run, by script: what it survives, it survives without a trace in its weights and its record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.chaos import Fault, Injector
from benchmarks.chaos_runs import MARK, command, completed
from benchmarks.judge import Surroundings, all_kept, judged, table
from tests.ray.conftest import SMALL, of_kind, small

pytestmark = pytest.mark.slow

HUNG = ("faults.slow_floor_s=3", "faults.hang_floor_s=10", "faults.hang_factor=3")  # found in ten seconds
SIZE = ("swarm.dp=2", "run.checkpoint_every=2", "run.steps=8", *HUNG)
FAULTS = (  # a row here is a line of docs/reliability.md
    "kill engine 0 at 1.3",
    "kill worker 0 at 2.4",
    "pause worker 1 for 1 at 3.5",
    "pause anchor 0 for 1 at 4.2",
    "kill anchor 0 at 5.2",
    "hang anchor 0 at 11.2",
    "hang engine 0 at 13.3",
)


def test_a_run_under_faults_ends_well_and_has_trained_every_prompt_once(tmp_path: Path):
    marker, config = f"test-{os.getpid()}", small(*SIZE)
    around = Surroundings(f"{MARK}={marker}")
    injector = Injector(tmp_path / "run", [Fault.parse(text) for text in FAULTS], config.grpo.ticks_per_step)
    with injector:
        words = command("k5", [*SMALL, *SIZE], tmp_path / "run", None)
        starts = completed(words, injector, marker, limit_s=200)
    rows = [*judged(tmp_path / "run", config, injector.records, injector.struck), *around.left()]
    assert all_kept(rows) and [start.code for start in starts] == [0], table(rows)
    assert {str(each.fault) for each in injector.struck if each.pid} == {str(Fault.parse(text)) for text in FAULTS}
    said = [record for _, record in injector.records.seen if record["kind"] == "event"]
    events = [record["event"] for record in said]
    assert events.count("engine renewed") == events.count("anchor renewed") == 2
    hung = [record for record in said if str(record.get("reason", "")).startswith("Hung")]
    assert {record["event"] for record in hung} == {"engine renewed", "anchor renewed"}, hung
    assert {"workers regrouped", "rewound"} & {*events}  # by whether the tick that it fell in has a refresh of Q
    assert [record["tick"] for record in of_kind(tmp_path / "run", "tick")] == list(range(1, 17))
