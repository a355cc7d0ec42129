"""`northstar doctor` on a cluster: it asks each node, and takes nothing from the runs there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from deploy.doctor.checks import merge
from deploy.doctor.examine import _connected
from deploy.doctor.facts import node_facts
from tests.ray.conftest import HELD, small

pytestmark = pytest.mark.slow


def _settled() -> float:
    """Free CPUs of the cluster, once earlier tests hold none but those of the kept actors."""
    deadline, kept = time.monotonic() + 60, sum(map(len, HELD.group.actors.values())) if HELD.group else 0
    while (free := ray.available_resources().get("CPU")) != (total := ray.cluster_resources()["CPU"]) - kept:
        assert time.monotonic() < deadline, f"{free} of {total} CPUs are free, {kept} actors are kept"
        time.sleep(0.2)
    return free


def test_every_node_of_a_cluster_is_asked_and_nothing_is_left_behind(ray_cluster: None, tmp_path: Path):
    before = _settled()
    found = merge(_connected(small("run.checkpoint_every=2"), node_facts(str(tmp_path)), tmp_path / "run", nodes=1))
    about = {f.about: f.level for f in found}
    assert about["nodes"] == about["files"] == about["clocks"] == about["room"] == "ok"
    assert "node" not in about and "same everywhere" not in about
    assert not list((tmp_path / "run").iterdir())
    assert ray.available_resources().get("CPU") == before


def test_a_run_that_the_cluster_cannot_hold_is_found_out(ray_cluster: None, tmp_path: Path):
    found = merge(_connected(small("anchor.resource=nowhere"), node_facts(str(tmp_path)), tmp_path / "run", nodes=1))
    (room,) = (f for f in found if f.about == "room")
    assert room.level == "error" and "nowhere" in room.fix
