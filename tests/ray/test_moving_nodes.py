"""Nodes that are to leave, that come and that are lost, in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.leaving import REASON
from tests.ray.conftest import lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CONFIG = (
    "swarm.dp=2",
    "codec.kind=powersgd",
    "codec.q_cadence=4",
    "grpo.train_batch_size=6",
    "grpo.ppo_mini_batch_size=3",  # 12 samples a tick: two replicas can share them, and three
    "run.steps=7",
)
SAME = ("actor/pg_loss", "actor/grad_norm", "training/prompts_digest", "anchor/sign_agreement")


def test_a_run_leaves_a_node_in_order_takes_in_one_that_comes_and_survives_one_that_is_lost(tmp_path: Path):
    """To the bit as long as there are as many replicas."""
    run_kept(small(*CONFIG), tmp_path / "alone")
    run = tmp_path / "moved"
    said = _moved(run, *CONFIG)
    ticks = [record for record in said if record["kind"] == "tick"][:10]  # as long as there are two replicas
    assert [_same(tick) for tick in ticks] == [_same(tick) for tick in of_kind(tmp_path / "alone", "tick")[:10]]
    events = [record for record in said if record["kind"] == "event"]
    left = [event for event in events if event.get("reason") == REASON]
    assert sorted(event["event"] for event in left) == ["anchor renewed", "engine renewed", "workers regrouped"]
    assert next(event["replicas"] for event in events if event["event"] == "replicas changed") == 3
    after = [event for event in events if event["event"] in ("workers regrouped", "rewound") and event not in left]
    assert after and all("died" in event["reason"] for event in after)
    assert [tick["tick"] for tick in of_kind(run, "tick")] == list(range(1, 15))


def test_on_the_wall_clock_too_nothing_is_lost_with_a_node_that_is_left_in_order(tmp_path: Path):
    run, steps = tmp_path / "moved", 10
    said = _moved(run, *CONFIG, "anchor.clock=wall", f"run.steps={steps}")
    events = [record for record in said if record["kind"] == "event"]
    left = {event["event"]: event["tick"] for event in events if event.get("reason") == REASON}
    assert sorted(left) == ["anchor renewed", "engine renewed", "workers regrouped"]
    at_times = {"codec changes the policy"}  # it is a small one
    others = {event["event"] for event in events} - left.keys() - at_times
    assert others == {"started", "node draining"}
    ticks = of_kind(run, "tick")
    assert [tick["tick"] for tick in ticks] == list(range(1, 2 * steps + 1))
    assert len({tick["training/prompts_digest"] for tick in ticks}) == 2 * steps
    corrections = lines(run, "corrections.jsonl")
    assert [c["version"] for c in corrections] == list(range(1, len(corrections) + 1))
    assert max(c["source_tick"] for c in corrections if c["first_tick"] is not None) >= left["anchor renewed"]


def _moved(run: Path, *overrides: str) -> list[dict[str, Any]]:
    """What the program said of its ticks and events."""
    command = [sys.executable, "-m", "tests.ray.moving_nodes", run, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _same(tick: dict[str, Any]) -> list[Any]:
    return [tick["tick"], *(tick.get(name) for name in SAME)]
