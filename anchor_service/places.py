"""Where actors run: on which node, in which process there; and which nodes are about to leave."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray._private.state import state

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


def draining() -> dict[str, float]:
    """Nodes that are to leave, by Ray's id, and until when, in seconds since the epoch: infinite where nobody has said."""
    with suppress(Exception):  # with the control store gone nobody knows
        return {node: ms / 1000 if ms else math.inf for node, ms in state.get_draining_nodes().items()}
    return {}


class Drains:
    """`draining` for one that never waits for it: asked at most every EVERY_S, in a thread, which has PATIENCE_S to answer."""

    EVERY_S, PATIENCE_S = 1.0, 0.2

    def __init__(self, ask: Callable[[], dict[str, float]] = draining):
        self._ask, self._found, self._asked = ask, dict[str, float](), -math.inf
        self._thread: threading.Thread | None = None

    def look(self) -> dict[str, float]:
        """What was answered last."""
        now = time.monotonic()
        if now - self._asked >= self.EVERY_S and not (self._thread and self._thread.is_alive()):
            self._asked, self._thread = now, threading.Thread(target=self._look, daemon=True)
            self._thread.start()
            self._thread.join(self.PATIENCE_S)
        return self._found

    def _look(self) -> None:
        self._found = self._ask()


def carried(actor: ActorHandle[Any], reference: object) -> object:
    """Reference to a copy of an object that lies on the node of this actor."""
    return actor.__ray_call__.remote(_same, reference)


def _same(actor: object, value: Any) -> Any:
    return value
