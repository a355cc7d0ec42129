"""Workers beside those that train: one that is there is taken first, one that is gone is not, and another starts."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from swarm.spares import Spares

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Idle:
    """A process without a model."""


def _end(handle: Any) -> None:
    ray.kill(handle)
    with pytest.raises(RayActorError):
        ray.get(handle.__ray_ready__.remote(), timeout=60)


def test_one_that_is_there_is_taken_first_and_one_that_is_gone_is_not():
    started: list[Any] = []

    def new(_: None) -> Any:
        started.append(ray.remote(num_cpus=0)(Idle).remote())
        return started[-1]

    spares = Spares(new)
    assert spares.take() is None
    spares.look(2)
    assert spares.ready() == []
    first, second = started
    assert spares.take() is first  # starting for longest
    spares.look(2)
    third = started[2]
    ray.get([second.__ray_ready__.remote(), third.__ray_ready__.remote()], timeout=60)
    spares.look(2)
    assert spares.ready() == [second, third]
    _end(second)
    assert spares.take() is third
    spares.look(1)
    ray.get(started[3].__ray_ready__.remote(), timeout=60)
    spares.look(1)
    assert len(started) == 4 and spares.ready() == [started[3]]
    _end(started[3])
    spares.look(1)  # hears of it, or asks again
    spares.look(1)
    assert len(started) <= 5
    for handle in started:
        ray.kill(handle)
