"""A run whose nodes come and go; run as a program, it has Ray to itself.

python -m tests.ray.moving_nodes FOLDER section.key=value…        prints the records of its ticks and events as they came

    one node has a worker, the other one a worker, the engine and the anchor
    tick 2     the other one is to leave, and nobody has room
    tick 3     a node comes, as an autoscaler's does for what waits for one
    tick 7     the one that was to leave is gone
    tick 8     a replica more is asked for; tick 9: for which a node comes, a large one
    tick 11    the node that had come first is lost

On the wall clock the anchor moves when it owes nothing, so the node is gone at tick 16, and that is all.
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
from deploy.cluster.launch import drive
from deploy.cluster.loopback import ADDRESS, SETUP, loopback
from swarm import scale
from swarm.coordinator import Coordinator
from swarm.fleet import Fleet
from swarm.run_config import RunConfig
from tests.ray.conftest import small

ROLES = {"swarm": "swarm", "rollout": "engine", "anchor": "anchor"}  # section, and the tag of its nodes
HEAD = {"num_cpus": 1, "resources": {"swarm": 1}, "include_dashboard": False, "node_ip_address": ADDRESS}
NODE = {"num_cpus": 3, "resources": dict.fromkeys(ROLES.values(), 1), "node_ip_address": ADDRESS}
QUICK = {"period_ms": "500", "timeout_ms": "2000", "failure_threshold": "2"}  # a lost node is called dead in seconds
WAIT_S = 100.0


class Nodes:
    """Those of this machine, and what happens to them in the run of `fleet` in the folder `run`."""

    def __init__(self, run: Path, clock: str):
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=HEAD)
        self.run, self.leaves, self.came = run, self.cluster.add_node(**NODE), list[Any]()
        self.fleet: Fleet | None = None
        self.at: dict[int, Callable[[], None]] = {
            2: self.drain,
            3: lambda: self.come(3, lambda run: [ready for _, ready in run.leaving._newcomers.values()]),
        }
        self.at |= (
            {16: self.go}
            if clock == "wall"
            else {
                7: self.go,
                8: lambda: scale.ask_for(self.run, 3),
                9: lambda: self.come(4, lambda run: [spare.answer for spare in run.regroup.spares.held]),
                11: lambda: _kill(self.came[0]),
            }
        )

    def drain(self) -> None:
        """As whoever is told that a spot instance will be taken away."""
        gcs = ray._raylet.GcsClient(address=self.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = gcs.drain_node(self.leaves.node_id, reason, "spot", int((time.time() + 600) * 1000))
        assert accepted, why

    def come(self, cpus: int, awaited: Callable[[Coordinator], list[Any]]) -> None:
        """A node, when Ray says that something waits for one; until all that are `awaited` are ready."""
        deadline = time.monotonic() + WAIT_S
        while not get_cluster_status(self.cluster.address).resource_demands.ray_task_actor_demand:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.came.append(self.cluster.add_node(**NODE | {"num_cpus": cpus}))
        waiting = awaited(self.fleet.mend.__self__)
        assert waiting and not ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_S)[1]

    def go(self) -> None:
        places = self.fleet.places()
        assert len(places) == 4 and self.leaves.node_id not in {place.node for place in places.values()}, places
        _kill(self.leaves)

    def listen(self, record: dict[str, Any]) -> None:
        if record["kind"] in ("tick", "event"):
            print(json.dumps(record), flush=True)
        if record["kind"] == "tick" and record["tick"] in self.at:
            try:
                self.at.pop(record["tick"])()
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # a run goes on without a listener that fails


def _kill(node: Any) -> None:
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def run(config: RunConfig, folder: Path, environment: dict[str, str]) -> None:
    nodes = Nodes(folder, config.anchor.clock)

    @contextmanager
    def actors(config: RunConfig) -> Iterator[Fleet]:
        with new_actors(config) as nodes.fleet:
            yield nodes.fleet

    try:
        ray.init(address=nodes.cluster.address, log_to_driver=False, runtime_env=environment)
        drive(config, folder, nodes.listen, actors=actors)
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


def main() -> None:
    folder, *overrides = sys.argv[1:]
    os.environ.update({f"RAY_health_check_{name}": value for name, value in QUICK.items()})
    Drains.EVERY_S = 0.0  # a step takes less than a second here
    Drains.PATIENCE_S = 30.0  # an answer takes more where much is done beside
    config = small(*(f"{section}.resource={tag}" for section, tag in ROLES.items()), *overrides)
    with loopback(), forkserver(config.swarm.threads) as environment:
        ray_constants.SETUP_WORKER_FILENAME = SETUP
        run(config, Path(folder), environment)


if __name__ == "__main__":
    main()
