"""Faults as text and by seed; and the judge, on records of runs that never were."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import Fault, Injector, Records, Struck, random_faults
from benchmarks.judge import Row, Surroundings, all_kept, effective, judged, recoveries, scheduled_prompts, table
from benchmarks.soak import NODES, WEIGHTS
from deploy.config import load
from swarm.coordinator import PROMPTS
from tests.ray.conftest import small

KILL = Fault.parse("kill worker 1 at 3.4")


@pytest.mark.parametrize(
    "text",
    ["kill worker 1 at 3.40", "hang engine 0 at 5.00", "pause anchor 0 for 2 at 5.50", "kill driver 0 at checkpoint 4"],
)
def test_a_fault_is_read_as_it_is_written(text: str):
    assert str(Fault.parse(text)) == text


@pytest.mark.parametrize("text", ["stop worker 1 at 3", "kill worker 1", "pause anchor 0 at soon"])
def test_what_is_no_fault_is_refused(text: str):
    with pytest.raises(ValueError, match="is no fault: `kill worker 1 at"):
        Fault.parse(text)


def test_random_faults_follow_from_the_seed_and_lie_within_the_run():
    config = load("demo", ["run.checkpoint_every=10"])
    found = random_faults(3, 400, config, WEIGHTS, len(NODES))
    assert found == random_faults(3, 400, config, WEIGHTS, len(NODES)) != random_faults(4, 400, config, WEIGHTS, 3)
    assert {fault.when for fault in found if fault.in_checkpoint} == {10.0, 20.0}
    assert all(1 <= fault.when <= 59 for fault in found)
    assert {f"{fault.kind} {fault.role}" for fault in found} == set(WEIGHTS)
    assert {fault.index for fault in found if fault.role == "worker"} == {0, 1, 2, 3}


def write(run: Path, records: list[dict[str, Any]]) -> None:
    """As a run does that goes on from an earlier step: another file under the name."""
    partial = run / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(partial, run / "metrics.jsonl")


def tick(number: int, seconds: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"kind": "tick", "step": (number + 1) // 2, "tick": number, "timing_s/tick": seconds} | fields


def test_records_are_followed_through_a_rewind(tmp_path: Path):
    records = Records(tmp_path, 2)
    records.look()  # there is nothing yet
    write(tmp_path, [tick(1), tick(2), tick(3)])
    records.look()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(tick(4))[:20])
        file.flush()
        records.look()
        assert records.tick == 3
        file.write(json.dumps(tick(4))[20:] + "\n")
    records.look()
    write(tmp_path, [tick(1), tick(2), tick(3, seconds=2.0)])  # the third is another one
    records.look()
    assert [number for _, number in records.ticks()] == [1, 2, 3, 4, 3] and records.tick == 4


def after(run: Path, times: list[tuple[float, dict[str, Any]]]) -> Records:
    records = Records(run, 2)
    records.seen = times
    return records


def test_a_fault_costs_what_it_takes_beyond_the_usual_and_the_ticks_that_were_undone(tmp_path: Path):
    """A tick a second; after tick 5 a kill, 10 s of nothing, and ticks 4 and 5 again."""
    times = [(float(n), tick(n)) for n in range(1, 6)] + [(11.0 + n, tick(n, seconds=2.0)) for n in (4, 5, 6, 7)]
    records = after(tmp_path, times)
    write(tmp_path, [record for _, record in times[:3] + times[5:]])
    (found,) = recoveries(records, [Struck(KILL, 5.5, 5, 77), Struck(KILL, 6.0, 5, None)])
    assert found.next_tick == pytest.approx(9.5) and found.undone == 2
    assert found.cost == pytest.approx(13 - 4)  # from second 5 to second 18 there are four usual ones
    assert effective(records) == pytest.approx(7 / 17)
    amid = Struck(Fault.parse("kill anchor 0 at 5"), 15.2, 5, 78)  # tick 4 is there again, tick 5 is not
    assert recoveries(records, [Struck(KILL, 5.5, 5, 77), amid]) == []  # which of them cost what?
    late = Struck(amid.fault, 17.5, 6, 78)
    assert [each.undone for each in recoveries(records, [Struck(KILL, 5.5, 5, 77), late])] == [2, 0]


def folder(run: Path, trained: list[str], status: str = "completed") -> Records:
    ends = {"status": status, "steps": 6, "weights_digests": ["a", "a"]}
    (run / "summary.json").write_text(json.dumps(ends))
    lines = [tick(n, **{PROMPTS: digest}) for n, digest in enumerate(trained, 1)]
    write(run, lines)
    return after(run, [(float(n), line) for n, line in enumerate(lines)])


def test_prompts_are_counted_against_the_schedule(tmp_path: Path):
    config = small("swarm.dp=2")
    scheduled = scheduled_prompts(config)
    assert len(set(scheduled)) == 12
    rows = judged(tmp_path, config, folder(tmp_path, scheduled), [])
    assert all_kept(rows), table(rows)
    twice = [*scheduled[:5], scheduled[4], *scheduled[6:]]
    for wrong, said in (
        (twice, "12 mini-batches, 1 never, 1 beyond"),
        (scheduled[:-1], "11 mini-batches, 1 never, 0 beyond"),
    ):
        rows = {row.name: row for row in judged(tmp_path, config, folder(tmp_path, wrong), [])}
        assert rows["every prompt trained once"].kept is False and said in rows["every prompt trained once"].value
    failed = judged(tmp_path, config, folder(tmp_path, scheduled, "failed"), [])
    assert failed[0].kept is False and "FAIL  last step" in table(failed)


def test_a_process_that_is_left_is_found_by_its_mark_and_a_pause_ends_with_the_injector(tmp_path: Path):
    """By the pid of `processes.json`, if it is still one of Ray's."""
    idle = "import sys, time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen(  # as Ray names an actor's process
        ["ray::Anchor", "-c", idle], executable=sys.executable, env=os.environ | {"MARK": "7"}, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout and process.stdout.read(1)
        (tmp_path / "processes.json").write_text(json.dumps([{"role": "anchor", "index": 0, "pid": process.pid}]))
        (tmp_path / "checkpoints" / "step-000004.partial").mkdir(parents=True)
        assert list(Surroundings("MARK=7").processes()) == [process.pid]
        with Injector(tmp_path, [Fault.parse("pause anchor 0 for 50 at checkpoint 4")], 2) as injector:
            deadline = time.monotonic() + 10
            while not injector.struck and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [each.pid for each in injector.struck] == [process.pid] and _state(process.pid) == "T"
        assert _state(process.pid) != "T"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_shared_memory_that_another_program_uses_is_not_left_behind():
    """Tests run beside each other; what nobody uses any more is."""
    around, left = Surroundings("MARK=8"), Path("/dev/shm") / f"left-{os.getpid()}"
    used = multiprocessing.get_context("spawn").Lock()  # has a name while it lives, unlike a fork's
    try:
        assert used and all_kept(around.left())
        left.touch()
        assert around.left()[-1] == Row("shared memory left", left.name, False)
    finally:
        left.unlink(missing_ok=True)


def _state(pid: int) -> str:
    time.sleep(0.05)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
