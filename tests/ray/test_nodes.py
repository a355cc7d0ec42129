"""The demo on three nodes, one for each role, is the demo on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import load
from tests.ray.conftest import lines, run_kept

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SHORT = ["run.steps=3", "val.size=8", "rollout.replicas=1"]


def test_on_three_nodes_each_role_is_on_its_own_and_the_run_is_the_same_to_the_bit(tmp_path: Path):
    command = [sys.executable, "-m", "tests.ray.three_nodes", tmp_path / "three", *SHORT]
    env = os.environ | {"RAY_prestart_worker_first_driver": "0"}  # else idle ones start, a second of a core each
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["places"] == {role: [role] for role in ("swarm", "engine", "anchor")}
    assert "deploy.cluster.forkserver" in found["by"]  # of all: there is one machine
    one = run_kept(load("demo", SHORT), tmp_path / "one")
    assert found["weights_digests"] == one["weights_digests"]
    assert lines(tmp_path / "three", "corrections.jsonl") == lines(tmp_path / "one", "corrections.jsonl")
