"""Workers beside those that train: one that is there is taken first, one that is gone is not, and another starts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from swarm.spares import Spares

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Idle:
    """A process without a model."""


def _end(handle: Any) -> None:
    """Until Ray has heard of it."""
    ray.kill(handle)
    with pytest.raises(RayActorError):
        for _ in range(600):
            ray.get(handle.__ray_ready__.remote(), timeout=60)
            time.sleep(0.1)


def test_one_that_is_there_is_taken_and_one_that_is_gone_or_on_its_way_is_not():
    started: list[Any] = []

    def new(_: None) -> Any:
        started.append(ray.remote(num_cpus=0)(Idle).remote())
        return started[-1]

    spares = Spares(new, ray.kill)
    spares.look(2)
    first, second = started
    assert spares.ready() == [] and spares.take() is None
    ray.get([first.__ray_ready__.remote(), second.__ray_ready__.remote()], timeout=60)
    spares.look(2)
    assert spares.ready() == [first, second]
    _end(first)
    assert spares.take() is second and spares.take() is None
    spares.look(1)
    third = started[2]
    ray.get(third.__ray_ready__.remote(), timeout=60)
    spares.look(1)
    assert spares.ready() == [third]
    _end(third)
    spares.look(1)  # hears of it, or asks once more
    spares.look(1)
    assert len(started) == 4 and spares.ready() == []
    _end(second)
    _end(started[3])
