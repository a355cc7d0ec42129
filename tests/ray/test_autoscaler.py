"""A real autoscaler, with Ray's provider of nodes that are raylets of this machine: it brings what a run waits for, and takes it away."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.chaos_runs import MARK, command, marked
from benchmarks.judge import Surroundings
from deploy.cluster.loopback import ADDRESS, loopback
from tests.ray.conftest import SMALL

pytestmark = pytest.mark.slow

CONFIG = ("swarm.dp=1", "codec.kind=powersgd", "run.steps=4000", "grpo.train_batch_size=4", "val.every=4000")
CPUS = 3.0  # of a node: what a replica, an engine and an anchor need
WAIT_S = 120.0
PROVIDER = {
    "type": "fake_multinode",
    "use_node_id_as_ip": True,  # all nodes have one address here
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
NODES: dict[str, Any] = {
    "cluster_name": "test",
    "max_workers": 3,
    "idle_timeout_minutes": 0.05,
    "upscaling_speed": 10,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "node": {"resources": {"CPU": CPUS}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    **{f"{name}_commands": [] for name in COMMANDS},
}


@contextmanager
def autoscaled(folder: Path, marker: str) -> Iterator[str]:
    """The address of a head that computes nothing, and whose autoscaler may bring three nodes."""
    with socket.create_server((ADDRESS, 0)) as free:
        address = f"{ADDRESS}:{free.getsockname()[1]}"
    config = NODES | {"provider": PROVIDER | {"gcs_address": address}}
    written = folder / "autoscaler.json"
    written.write_text(json.dumps(config))
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    words += [f"--port={address.rpartition(':')[2]}", f"--node-ip-address={ADDRESS}", f"--autoscaling-config={written}"]
    words += ["--include-dashboard=false", "--disable-usage-stats"]
    environment = marked(marker) | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with (folder / "head.log").open("w") as log:
        subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield address
    finally:
        around = Surroundings(f"{MARK}={marker}")
        for pid in around.processes():  # told to end, raylets wait half a minute for what drains
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _until(lambda: not around.processes(), "its processes end")


def _until(there: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := there()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found, what
    return found


def _raylets(marker: str) -> int:
    return sum(Path(c.split(" ", 1)[0]).name == "raylet" for c in Surroundings(f"{MARK}={marker}").processes().values())


def _records(run: Path, kind: str, event: str = "") -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [r for r in found if r["kind"] == kind and (not event or r["event"] == event)]


def _replicas(run: Path) -> int:
    changes = _records(run, "event", "replicas changed")
    return changes[-1]["replicas"] if changes else 1


def test_an_autoscaler_brings_the_nodes_that_a_run_and_its_growth_wait_for_and_takes_away_what_is_idle(tmp_path: Path):
    marker, run = f"autoscaler-{os.getpid()}", tmp_path / "run"
    with loopback(), autoscaled(tmp_path, marker) as address:
        _until(lambda: _raylets(marker) == 1, "a head")
        with (tmp_path / "driver.log").open("w") as log:
            words = command("k5", [*SMALL, *CONFIG], run, address)
            driver = subprocess.Popen(words, env=marked(marker), stdout=log, stderr=log)
        try:
            _until(lambda: _records(run, "tick"), "a first tick")
            assert _raylets(marker) == 2
            for replicas, nodes in ((2, 3), (1, 2)):
                scale = [sys.executable, "-m", "northstar", "scale", str(run), "--dp", str(replicas)]
                subprocess.run(scale, check=True, capture_output=True, env=marked(marker))
                _until(lambda n=replicas: _replicas(run) == n, f"{replicas} replicas")
                _until(lambda n=nodes: _raylets(marker) == n, f"{nodes} nodes, the head among them")
            before = len(_records(run, "tick"))
            _until(lambda: len(_records(run, "tick")) > before + 2, "it goes on")
            driver.send_signal(signal.SIGINT)
            driver.wait(60)
        finally:
            with suppress(psutil.Error):
                driver.kill()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    ticks = [record["tick"] for record in _records(run, "tick")]
    assert ticks == list(range(1, len(ticks) + 1))
