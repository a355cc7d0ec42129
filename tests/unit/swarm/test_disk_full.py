"""A disk that takes no more: what could not be written is named, a run that cannot be read stops, a checkpoint is left out."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from swarm import checkpoint
from swarm.coordinator import Coordinator
from swarm.manifest import NotWritten
from swarm.telemetry import Process, Telemetry

RANK = SimpleNamespace(
    grid=SimpleNamespace(d=0, p=1, name="worker d0p1"), state=lambda: ({"weights": torch.zeros(1000)}, {})
)


@contextmanager
def no_room() -> Iterator[None]:
    """Files of more than 100 bytes are refused, as a full disk refuses them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(run: Path, name: str) -> Path:
    """The run, whose file of that name takes nothing."""
    (run / name).symlink_to("/dev/full")
    return run


def test_an_error_of_a_full_disk_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(NotWritten("a/rank-d0p1.safetensors", "No space left on device")))
    assert str(error) == "a/rank-d0p1.safetensors could not be written: No space left on device"


@pytest.mark.parametrize("name", ["metrics.jsonl", "corrections.jsonl"])
def test_a_record_that_cannot_be_written_stops_the_run_and_is_named(name: str, tmp_path: Path):
    telemetry = Telemetry(full(tmp_path, name), lambda record: None)
    fire = dict.fromkeys(("version", "source_tick", "first_tick", "digest", "bytes"), 1)
    with pytest.raises(NotWritten, match=rf"{name} could not be written: No space left on device"):
        telemetry.fire(1, 2, fire)
    telemetry.finish("failed", {})  # how it ended can be said, and is
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_summary_that_cannot_be_written_is_an_error_of_a_completed_run_alone(tmp_path: Path):
    with pytest.raises(NotWritten, match=r"summary\.json"), no_room():
        Telemetry(tmp_path, lambda record: None).finish("completed", {})
    with pytest.warns(UserWarning, match=r"how the run ended is not written down: .*summary\.json"), no_room():
        assert Telemetry(tmp_path, lambda record: None).finish("failed", {})["status"] == "failed"


def test_a_line_that_was_cut_is_dropped_when_the_run_goes_on(tmp_path: Path):
    whole = {"kind": "tick", "step": 1, "tick": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole) + '\n{"kind": "event", "step": 1, "of": {"a": 1}')
    telemetry = Telemetry(tmp_path, lambda record: None)
    telemetry.drop(1, 0)
    telemetry.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [whole]


def test_a_rank_names_the_file_that_it_cannot_write(tmp_path: Path):
    with pytest.raises(NotWritten, match=r"rank-d0p1\.safetensors could not be written: .*File too large"), no_room():
        checkpoint.save_rank(cast(Any, RANK), str(tmp_path), 3)


def coordinator(run: Path, step: int, events: list[dict[str, Any]], frame: int) -> Any:
    """What `Coordinator.save` needs of one, at `step`; the checkpoint has a frame of so many bytes."""
    progress = SimpleNamespace(
        step=step, state=lambda: {"step": step}, event=lambda name, **fields: events.append({"event": name} | fields)
    )
    found = SimpleNamespace(run_folder=run, progress=progress)
    found.fleet = SimpleNamespace(workers=[None], ask_mended=lambda *asked: [])
    found.corrections = SimpleNamespace(save=lambda: ({}, {"m_bar": np.zeros(frame, np.uint8)}))
    found.rollouts = SimpleNamespace(save=lambda: ({}, {}))
    found._write_checkpoint = lambda: Coordinator._write_checkpoint(found)
    return found


def test_a_checkpoint_that_finds_no_room_is_left_out_and_the_next_one_is_written(tmp_path: Path):
    events: list[dict[str, Any]] = []
    Coordinator.save(coordinator(tmp_path, 1, events, frame=8))
    with pytest.warns(UserWarning, match="step 2 has no checkpoint, the run goes on"), no_room():
        Coordinator.save(coordinator(tmp_path, 2, events, frame=1000))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.newest_good(tmp_path) == (tmp_path / "checkpoints" / "step-000001", [])
    Coordinator.save(coordinator(tmp_path, 3, events, frame=1000))
    assert checkpoint.newest_good(tmp_path) == (tmp_path / "checkpoints" / "step-000003", [])
    assert [event["event"] for event in events] == ["checkpoint", "checkpoint not written", "checkpoint"]
    assert "step-000002.partial could not be written: File too large" in events[1]["reason"]


def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path):
    (tmp_path / "checkpoints" / "step-000001.partial").mkdir(parents=True)
    Coordinator.save(coordinator(tmp_path, 2, [], frame=8))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_the_processes_of_a_run_are_written_down_when_they_change(tmp_path: Path):
    telemetry, file = Telemetry(tmp_path, lambda record: None), tmp_path / "processes.json"
    telemetry.processes([Process("worker", 0, "beef", 7)])
    first = json.loads(file.read_text())
    assert [(p["role"], p["index"]) for p in first] == [("driver", 0), ("worker", 0)] and first[1]["pid"] == 7
    file.unlink()
    telemetry.processes([Process("worker", 0, "beef", 7)])
    assert not file.exists()
    telemetry.processes([Process("worker", 0, "beef", 8)])
    assert json.loads(file.read_text())[1]["pid"] == 8
    telemetry.close()
