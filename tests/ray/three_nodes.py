"""A run on three raylets of this machine, each with nodes of one role; run as a program, it has Ray to itself.

python -m tests.ray.three_nodes FOLDER section.key=value…        prints who was where and started by whom, and the digests of the weights
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from deploy.cluster.kept_actors import new_actors
from deploy.cluster.launch import cluster, drive
from deploy.config import load

NODES = {"swarm": 4, "engine": 1, "anchor": 1}  # CPUs of the node of each role
BARE = {"no_monitor": True, "include_log_monitor": False, "include_dashboard": False}  # nobody asks for them


def node_of(actor: Any) -> str:
    def tags(_: Any) -> list[str]:
        here = ray.get_runtime_context().get_node_id()
        return [tag for node in ray.nodes() if node["NodeID"] == here for tag in NODES if tag in node["Resources"]]

    (tag,) = ray.get(actor.__ray_call__.remote(tags), timeout=60)
    return tag


def started_by(actor: Any) -> int:
    """The process that an actor's is a child of."""
    return ray.get(actor.__ray_call__.remote(lambda _: os.getppid()), timeout=60)


def main() -> None:
    folder, *overrides = sys.argv[1:]
    asked = [f"{section}.resource={tag}" for section, tag in zip(("swarm", "rollout", "anchor"), NODES)]
    config = load("demo", [*asked, *overrides])
    head, *others = [{"num_cpus": cpus, "resources": {tag: 1}} | BARE for tag, cpus in NODES.items()]
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for node in others:
        nodes.add_node(**node)
    with cluster(config, nodes.address), new_actors(config) as actors:
        roles = {"swarm": actors.workers, "engine": actors.engines, "anchor": actors.anchors}
        places = {role: sorted({node_of(actor) for actor in held}) for role, held in roles.items()}
        (server,) = {started_by(actor) for held in roles.values() for actor in held}
        by = psutil.Process(server).cmdline()
        summary = drive(config, Path(folder), lambda record: None, actors=lambda _: nullcontext(actors))
    print(json.dumps({"places": places, "by": by, "weights_digests": summary["weights_digests"]}))


if __name__ == "__main__":
    main()
