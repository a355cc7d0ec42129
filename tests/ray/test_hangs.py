"""A worker that stops is named soon, its stacks are read, and another takes its place."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from anchor_service.calls import gather, process_of
from anchor_service.errors import Hung, WaitTimeout
from deploy.cluster.kept_actors import new_actors
from swarm.coordinator import Coordinator
from swarm.telemetry import Telemetry
from tests.ray.conftest import of_kind, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

LIMITS = "faults.slow_floor_s=3", "faults.hang_floor_s=6", "faults.hang_factor=3"
VICTIM, TICK = 2, 5  # worker d1p0, and the tick before which it is stopped


def stop_before(tick: int, pid: int, coordinator: Coordinator) -> list[float]:
    """Stops a process just before the workers are asked for `tick`; when that was."""
    ask, stopped = coordinator.fleet.ask_workers, list[float]()

    def ask_workers(method: str, *rest: Any, **more: Any) -> list[Any]:
        if method == "tick" and coordinator.progress.tick == tick and not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(time.time())
        return ask(method, *rest, **more)

    coordinator.fleet.ask_workers = ask_workers
    return stopped


def test_a_worker_that_stops_is_named_in_seconds_and_its_stacks_are_kept(tmp_path: Path):
    config = small("swarm.dp=2", "swarm.pp=2", "anchor.enabled=false", "merger.kind=none", "run.steps=3", *LIMITS)
    folder = tmp_path / "hangs"
    folder.mkdir()
    told: list[tuple[float, dict[str, Any]]] = []
    with new_actors(config) as actors:
        pid, _ = process_of(actors.workers[VICTIM])
        assert pid
        process = psutil.Process(pid)
        coordinator = Coordinator(
            config, actors, Telemetry(folder, lambda record: told.append((time.time(), record))), folder
        )
        stopped = stop_before(TICK, pid, coordinator)
        coordinator.run()
    at, event = next((at, r) for at, r in told if r.get("event") == "slow" and r["tick"] == TICK)
    assert event["who"] == "worker d1p0" and event["what"] == "tick 5"
    assert at - stopped[0] < max(3.0, 2.0 * event["usual"]) + 3.0  # of which a second is the look
    (file,) = (folder / "stacks").iterdir()
    assert (
        file.name == "5-worker-d1p0.txt" and "T (stopped)" in file.read_text() and f"process {pid}" in file.read_text()
    )
    (renewed,) = [r for _, r in told if r.get("event") == "workers regrouped"]
    assert renewed["renewed"] == "worker d1p0" and renewed["done"] == TICK - 1
    assert "Hung: worker d1p0" in renewed["reason"] and "does not answer" in renewed["reason"]
    assert [r["tick"] for r in of_kind(folder, "tick")] == list(range(1, 7))
    assert not psutil.pid_exists(pid) or process.wait(timeout=30) is not None


class Bell:
    """An alarm that remembers."""

    slow_after = 0.2

    def __init__(self) -> None:
        self.rung: list[list[str]] = []

    def slow(self, missing: Any) -> None:
        self.rung.append([*missing])

    def over(self, missing: Any) -> WaitTimeout:
        return Hung("the culprit", "a number", 1.0, "patience")


def test_an_alarm_is_rung_once_and_says_what_the_wait_ends_with():
    @ray.remote(num_cpus=0, max_restarts=0)
    class Sleeper:
        def answer(self, after: float) -> float:
            time.sleep(after)
            return after

    actors = [Sleeper.remote() for _ in range(2)]
    gather([("it", actor.answer.remote(0.0)) for actor in actors], "its start", 60, "patience")
    calm, slow, hung = Bell(), Bell(), Bell()
    call = lambda i, after: (f"sleeper {i}", actors[i].answer.remote(after))  # noqa: E731
    assert gather([call(0, 0.0)], "a number", 30, "patience", alarm=calm) == [0.0] and calm.rung == []
    assert gather([call(0, 0.0), call(1, 1.0)], "a number", 30, "patience", alarm=slow) == [0.0, 1.0]
    assert slow.rung == [["sleeper 1"]]
    with pytest.raises(Hung, match="the culprit"):
        gather([call(0, 3.0)], "a number", 1.0, "patience", alarm=hung)
    assert hung.rung == [["sleeper 0"]]
    for actor in actors:
        ray.kill(actor)
