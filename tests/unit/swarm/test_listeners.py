"""What a user sees of a run cannot end it: a display shows any record, and one that fails is left out."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from deploy import cli
from deploy.cluster import sweep_lanes as lanes
from deploy.config import load
from deploy.display import run_display, sweep_display
from deploy.display.run_display import RunDisplay
from swarm.listeners import Board
from swarm.telemetry import Telemetry

STEP = {
    "kind": "step",
    "step": 1,
    "tick": 2,
    "critic/rewards/mean": 0.25,
    "response_length/mean": 12.0,
    "comm/bytes_ratio": 0.05,
    "comm/total_ratio": 0.4,
}
RECORDS: list[dict[str, Any]] = [
    {"kind": "event", "step": 0, "tick": 0, "event": "started", "workers": 1},
    {"kind": "event", "step": 1, "tick": 2, "event": "engine renewed", "reason": "two\nlines [/of] it"},
    {"kind": "restored", "step": 4, "tick": 8, "accuracy": 0.5},
    {"kind": "val", "step": 0, "tick": 0, "accuracy": 0.75, "val-core/sums/acc/mean@1": 0.75},
    {"kind": "tick", "step": 1, "tick": 1, "anchor/lag": 3, "anchor/age": 0.0},
    {"kind": "fire", "step": 1, "tick": 2, "version": 1, "anchor/grad_norm": 1.0},
    STEP,
]
ALWAYS = {"kind", "step", "tick", "event"}


@pytest.fixture(params=[False, True], ids=["plain", "live"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the displays print, to a terminal or elsewhere."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=request.param, width=200, color_system=None, highlight=False)
    for module in (run_display, sweep_display):
        monkeypatch.setattr(module, "console", console)
    return out


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['kind']}-{record['step']}")
def test_a_display_shows_every_record_with_or_without_each_of_its_fields(record: dict, shown: io.StringIO):
    for left_out in [None, *(set(record) - ALWAYS)]:
        with RunDisplay(load("k5"), Path("runs/k5")) as display:
            display({name: value for name, value in record.items() if name != left_out})
            display({name: value for name, value in record.items() if name in ALWAYS})
            display(STEP)
    assert "step" in shown.getvalue()


def test_a_resumed_display_shows_the_accuracy_from_before(shown: io.StringIO):
    with RunDisplay(load("k5"), Path("runs/k5")) as display:
        display(STEP)
        assert "val –" in shown.getvalue() or display.live
        display({"kind": "restored", "step": 4, "tick": 8, "accuracy": 0.625})
        display(STEP | {"step": 5})
        assert display.progress.tasks[0].fields["facts"].startswith("tick 2  reward 0.250  length 12.0  val 0.625")
    assert "goes on from here, accuracy 0.625" in shown.getvalue()


def test_telemetry_tells_a_resumed_display_what_was_measured_last(tmp_path: Path):
    told: list[dict] = []
    telemetry = Telemetry(tmp_path, told.append)
    state = {"validations": [{"step": 0, "tick": 0, "accuracy": 0.1}, {"step": 4, "tick": 8, "accuracy": 0.3}]}
    telemetry.restore(state | {"seconds": {}}, 4, 0)
    telemetry.finish("completed", {})
    assert told == [{"kind": "restored", "step": 4, "tick": 8, "accuracy": 0.3}]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_on_paper(folder: Path, listener: Any) -> list[str]:
    """Three ticks; the warnings they gave."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        telemetry = Telemetry(folder, listener)
        for tick in (1, 2, 3):
            telemetry.tick(tick, tick, {"actor/pg_loss": 0.5})
        assert telemetry.finish("completed", {})["status"] == "completed"
    return [str(w.message) for w in warned]


@pytest.mark.parametrize("error", [TypeError("no\nformat"), SystemExit(1), BrokenPipeError(32, "gone")])
def test_a_listener_that_raises_costs_one_event_and_one_warning(tmp_path: Path, error: BaseException):
    told: list[int] = []

    def listener(record: dict) -> None:
        told.append(record["tick"])
        if record["tick"] == 2:
            raise error

    warned = run_on_paper(tmp_path, listener)
    assert told == [1, 2]
    assert [record["kind"] for record in written(tmp_path)] == ["tick", "tick", "event", "tick"]
    (event,) = (record for record in written(tmp_path) if record["kind"] == "event")
    assert event["event"] == "listener_failed" and event["listener"] == "display"
    assert event["reason"] == f"{type(error).__name__}: {error}"
    assert sum("listener display failed, the run goes on without it" in said for said in warned) == 1


def test_a_full_disk_costs_the_tensorboard_events_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swarm.listeners.FileWriter.add_summary", full)
    told: list[str] = []
    (tmp_path / "late").mkdir()
    run_on_paper(tmp_path / "late", lambda record: told.append(record["kind"]))
    assert told == ["tick", "event", "tick", "tick"]
    monkeypatch.setattr("swarm.listeners.FileWriter.__init__", full)
    (tmp_path / "early").mkdir()
    run_on_paper(tmp_path / "early", lambda record: None)
    for name in ("late", "early"):
        (event,) = (record for record in written(tmp_path / name) if record["kind"] == "event")
        assert event["listener"] == "tensorboard" and "No space left" in event["reason"]


def test_ctrl_c_in_a_listener_still_ends_the_run(tmp_path: Path):
    def stop(record: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Telemetry(tmp_path, stop).tick(1, 1, {})


class Watcher:
    def changed(self, run: Any) -> None:
        raise TypeError("of a change")

    def record(self, run: Any, record: dict) -> None:
        raise TypeError("of a record")


def a_run(folder: Path) -> Any:
    return SimpleNamespace(folder=folder, config=None, state="waiting", error=None)


def test_a_display_that_fails_ends_no_sweep_and_the_sweep_can_still_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each run writes two records; the second run's first record finds that the sweep was stopped."""
    stopped: list[str] = []

    def drive(config: Any, folder: Path, listen: Any, actors: Any) -> dict[str, Any]:
        try:
            listen({"kind": "val", "step": 1})
            if folder.name == "b":
                lane.stop.set()
            listen({"kind": "val", "step": 2})
        except KeyboardInterrupt:
            stopped.append(folder.name)
            return {"status": "interrupted"}
        return {"status": "completed"}

    monkeypatch.setattr(lanes, "drive", drive)
    monkeypatch.setattr(lanes, "KeptActors", lambda: SimpleNamespace(lent=None, close=lambda: None))
    runs = [a_run(tmp_path / name) for name in "abc"]
    lane = lanes.Lanes(runs, Watcher())
    with pytest.warns(UserWarning, match="the sweep goes on without it: TypeError: of a change"):
        assert not lane.run(1)
    assert [run.state for run in runs] == ["completed", "interrupted", "waiting"] and stopped == ["b"]


@pytest.mark.parametrize("status", ["completed", "interrupted"])
def test_a_summary_that_cannot_be_shown_does_not_change_the_exit_code(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deploy.cluster.launch.execute", lambda *args: {"status": status})  # no name, no seconds
    found = CliRunner().invoke(cli.app, ["run", "k5", "--out", str(tmp_path / "run")])
    assert found.exit_code == {"completed": 0, "interrupted": 130}[status]
    assert "the summary was not shown: KeyError" in found.stderr


def test_a_failed_run_is_told_by_type_and_whole_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        error = ValueError("first line\nsecond line")
        error.add_note("raised by worker d0p1, asked for tick 3")
        raise error

    monkeypatch.setattr("deploy.cluster.launch.execute", fail)
    found = CliRunner().invoke(cli.app, ["run", "k5", "--out", str(tmp_path / "run")])
    assert found.exit_code == 1 and "Traceback" not in found.output
    assert "ValueError: first line\nsecond line\nraised by worker d0p1, asked for tick 3" in found.stderr


def test_the_live_table_of_a_sweep_shows_runs_in_any_state(shown: io.StringIO):
    def planned(state: str) -> Any:
        run = SimpleNamespace(steps=3)
        job = SimpleNamespace(name="a", seed=0)
        return SimpleNamespace(state=state, job=job, config=SimpleNamespace(run=run), error=None, label="a")

    runs = [planned(state) for state in ("completed", "starting", "running", "failed", "waiting")]
    runs[3].error = "two\nlines [/of] it"
    with sweep_display.SweepDisplay(runs) as display:
        for run in runs:
            display.changed(run)
            for record in RECORDS:
                display.record(run, {name: value for name, value in record.items() if name in ALWAYS})
        assert display._table().row_count == len(runs)
    assert "1 of 5 runs completed, 1 failed" in shown.getvalue()


def test_tensorboard_has_every_number_of_every_record_on_the_axis_of_its_kind(tmp_path: Path):
    board = Board(tmp_path)
    for record in RECORDS:
        board(record)
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    values = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    expected = {"val-core/sums/acc/mean@1": [(0, 0.75)], "anchor/lag": [(1, 3)], "anchor/age": [(1, 0)]}
    of_step = {f"step/{name}": [(1, pytest.approx(value))] for name, value in STEP.items() if "/" in name}
    assert values == expected | {"anchor/grad_norm": [(2, 1)]} | of_step
