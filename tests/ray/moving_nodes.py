"""A run whose nodes come and go; run as a program, it has Ray to itself.

python -m tests.ray.moving_nodes FOLDER section.key=value…        prints the digests of the weights at its end

    here (a worker)   there (a worker, the engine, the anchor)
    tick 2            there is to leave, and nobody has room
    tick 3            a node comes, as an autoscaler's does for what waits for one
    tick 7            there is gone
    tick 9            another node comes, and the one that had come is lost
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from anchor_service.places import Drains
from deploy.cluster.forkserver import forkserver
from deploy.cluster.kept_actors import new_actors
from deploy.cluster.launch import SETUP, drive
from deploy.cluster.loopback import ADDRESS, loopback
from swarm.fleet import Fleet
from swarm.leaving import Leaving
from swarm.run_config import RunConfig
from tests.ray.conftest import small

HERE = {"num_cpus": 1, "resources": {"swarm": 1}, "node_ip_address": ADDRESS, "include_dashboard": False}
THERE = {"num_cpus": 3, "resources": {"swarm": 1, "engine": 1, "anchor": 1}, "node_ip_address": ADDRESS}
TAGS = [f"{section}.resource={tag}" for section, tag in zip(("swarm", "rollout", "anchor"), ("swarm", "engine", "anchor"))]
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "2"}
WAIT_S = 60.0


class Nodes:
    """Those of this machine; `fleet`: of the run on them."""

    def __init__(self) -> None:
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=HERE)
        self.there = self.cluster.add_node(**THERE)
        self.fleet: Fleet | None = None

    def drain(self) -> None:
        """As a spot instance's agent does when it is told."""
        gcs = ray._raylet.GcsClient(address=self.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = gcs.drain_node(self.there.node_id, reason, "spot", int((time.time() + 2 * WAIT_S) * 1000))
        assert accepted, why

    def come(self) -> None:
        """When what waits for room says so; until all who wait are ready."""
        until(lambda: get_cluster_status(self.cluster.address).resource_demands.ray_task_actor_demand)
        self.gone, self.there = self.there, self.cluster.add_node(**THERE)
        waiting = [ready for _, ready in self.leaving._newcomers.values()]
        assert len(waiting) == 3 and not ray.wait(waiting, num_returns=3, timeout=WAIT_S)[1]

    def go(self) -> None:
        places = self.fleet.places() if self.fleet else {}
        assert len(places) == 4 and self.gone.node_id not in {place.node for place in places.values()}, places
        self._kill(self.gone)

    def lose(self) -> None:
        self.cluster.add_node(**THERE)
        self._kill(self.there)

    def _kill(self, node: Any) -> None:
        for processes in node.all_processes.values():
            for info in processes:
                os.kill(info.process.pid, signal.SIGKILL)
        self.cluster.worker_nodes.discard(node)

    @property
    def leaving(self) -> Leaving:
        return self.fleet.mend.__self__.leaving


def until(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def run(config: RunConfig, folder: Path, nodes: Nodes) -> dict[str, Any]:
    at = {2: nodes.drain, 3: nodes.come, 7: nodes.go, 9: nodes.lose}

    @contextmanager
    def actors(config: RunConfig) -> Iterator[Fleet]:
        with new_actors(config) as nodes.fleet:
            yield nodes.fleet

    def listen(record: dict[str, Any]) -> None:
        begin = time.time()
        if record["kind"] == "tick" and record["tick"] in at:
            try:
                at.pop(record["tick"])()
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # a run goes on without a listener that fails
        print(f"{time.time() - START:.1f} {time.time() - begin:.1f}", {k: record[k] for k in ("kind", "tick", "event", "reason", "renewed") if k in record}, file=sys.stderr)

    return drive(config, folder, listen, actors=actors)


START = time.time()


def main() -> None:
    folder, *overrides = sys.argv[1:]
    os.environ.update(QUICK)
    Drains.EVERY_S = 0.0  # a step takes less than a second here
    config = small(*TAGS, *overrides)
    with loopback(), forkserver(1) as environment:
        ray_constants.SETUP_WORKER_FILENAME = SETUP
        nodes = Nodes()
        print("nodes", time.time() - START, file=sys.stderr)
        ray.init(address=nodes.cluster.address, log_to_driver=False, runtime_env=environment)
        try:
            summary = run(config, Path(folder), nodes)
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
    print(json.dumps({"weights_digests": summary["weights_digests"], "status": summary["status"]}))


if __name__ == "__main__":
    main()
