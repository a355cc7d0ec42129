"""Room for the bundles of a run: reserved, waited for, said to be missing, and on nodes that are about to leave."""

from __future__ import annotations

import time

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from anchor_service.errors import WaitTimeout
from anchor_service.places import draining
from deploy.cluster.placement import lacking, placement
from swarm.run_config import RunConfig


def reserve(config: RunConfig) -> PlacementGroup:
    """Its bundles, each on a node. Raises WaitTimeout."""
    wanted = placement(config)
    group = placement_group(wanted.bundles, strategy=wanted.strategy)
    ready, _ = ray.wait([group.ready()], timeout=config.swarm.start_timeout_s)
    if not ready:
        remove_placement_group(group)
        raise _no_room(config)
    return group


def leaves(group: PlacementGroup, bundle: int) -> bool:
    """Whether the node of a bundle is draining: nothing starts there any more."""
    leaving = draining()
    return bool(leaving) and placement_group_table(group)["bundles_to_node_id"].get(bundle) in leaving


def await_room(group: PlacementGroup, config: RunConfig) -> None:
    """Until every bundle has a node: Ray looks for another one for those whose node is gone."""
    deadline = time.monotonic() + config.swarm.start_timeout_s
    while placement_group_table(group).get("state") != "CREATED":
        if time.monotonic() > deadline:
            raise _no_room(config)
        time.sleep(0.2)


def _no_room(config: RunConfig) -> WaitTimeout:
    wanted = placement(config)
    have, free = ray.cluster_resources(), ray.available_resources()
    return WaitTimeout(
        "the Ray cluster",
        f"room for {len(wanted.bundles)} bundles ({wanted.strategy}): {lacking(wanted.total, have, free)}",
        config.swarm.start_timeout_s,
        "swarm.start_timeout_s, or lower swarm.dp (`northstar doctor --address` says what does not fit)",
    )
