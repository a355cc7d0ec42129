"""Where actors run: on which node, in which process there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray

from anchor_service.calls import ActorHandle, gather


class Place(NamedTuple):
    """Where an actor runs: Ray's id of its node, and its process there."""

    node: str
    pid: int


def places_of(actors: Sequence[tuple[str, ActorHandle[Any]]], seconds: float, knob: str) -> list[Place]:
    """Of actors, all given with their names."""
    return gather([(name, where(actor)) for name, actor in actors], "its node", seconds, knob)


def where(actor: ActorHandle[Any]) -> object:
    """Reference to the place of an actor; it is there once the actor is ready."""
    return actor.__ray_call__.remote(_place_of)


def _place_of(actor: object) -> Place:
    return Place(ray.get_runtime_context().get_node_id(), os.getpid())
