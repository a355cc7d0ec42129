"""Actors of a cluster of one's own are forks of one process; that they compute what others do, test_nodes.py holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.ray.conftest import HELD, run_kept, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone"),
]


def test_every_actor_is_forked(tmp_path: Path):
    def parent(_: Any) -> int:
        import os

        return os.getppid()

    run_kept(small("run.steps=1", "anchor.enabled=false", "merger.kind=none"), tmp_path / "run")
    asked = [actor.__ray_call__.remote(parent) for actors in HELD.group.actors.values() for actor in actors]
    (server,) = set(ray.get(asked, timeout=60))
    assert "deploy.cluster.forkserver" in psutil.Process(server).cmdline()
