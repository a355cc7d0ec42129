"""A run that loses a worker goes on by itself, from its newest checkpoint, in the same command."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ray._private.state import actors

from deploy.cluster.launch import drive
from tests.ray.conftest import HELD, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CONFIG = small("swarm.pp=2", "run.steps=4", "val.every=4", "run.checkpoint_every=2")


def _workers() -> dict[str, int]:
    """Process of every worker that is there, by the id of its actor."""
    return {i: a["Pid"] for i, a in actors().items() if a["ActorClassName"] == "Worker" and a["State"] == "ALIVE"}


def test_a_run_ends_as_if_no_worker_had_been_killed(tmp_path: Path):
    """Once before its first checkpoint, where it begins anew, and once between two, with a fire under way."""
    calm = run_kept(CONFIG, tmp_path / "calm")
    killed: list[int] = []

    def kill(record: dict[str, Any]) -> None:
        if record["kind"] == "tick" and record["tick"] in (3, 7) and record["tick"] not in killed:
            killed.append(record["tick"])
            used = [handle._actor_id.hex() for handle in HELD.group.actors["worker"][:2]]
            os.kill(_workers()[used[len(killed) - 1]], signal.SIGKILL)

    run = tmp_path / "run"
    summary = drive(CONFIG, run, kill, actors=HELD.lent)
    assert killed == [3, 7] and summary["status"] == "completed"
    assert summary["weights_digests"] == calm["weights_digests"]
    assert summary["validations"] == calm["validations"]
    assert lines(run, "corrections.jsonl") == lines(tmp_path / "calm", "corrections.jsonl")
    assert [r["tick"] for r in of_kind(run, "tick")] == list(range(1, 9))
    first, second = [e for e in of_kind(run, "event") if e["event"] == "rewound"]
    assert first["reason"].startswith("ActorLost: worker d0p0 ended") and "worker d0p1 ended" in second["reason"]
    assert [(e["from_tick"], e["to_tick"]) for e in (first, second)] == [(3, 0), (7, 4)]
    assert all(0 < e["seconds"] < 60 for e in (first, second))
