"""`gather` with real processes that are slow, fail or die: who is named, and how soon."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray

from anchor_service.calls import gather
from anchor_service.errors import ActorLost, WaitTimeout

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0, max_restarts=0)
class Peer:
    def answer(self, value: int, after: float = 0.0) -> int:
        time.sleep(after)
        return value

    def fail(self) -> None:
        raise ValueError("no such batch")

    def die(self) -> None:
        os._exit(1)


@pytest.fixture(scope="module")
def peers(ray_cluster: None) -> Iterator[list]:
    actors = [Peer.remote() for _ in range(3)]
    gather([(f"peer {i}", actor.__ray_ready__.remote()) for i, actor in enumerate(actors)], "its start", 60, "patience")
    yield actors
    for actor in actors:
        ray.kill(actor)


def test_answers_are_in_the_order_of_the_calls_whoever_is_first(peers: list):
    calls = [("slow", peers[0].answer.remote(1, after=0.3)), ("fast", peers[1].answer.remote(2))]
    assert gather(calls, "a number", 30, "patience") == [1, 2]
    assert gather([], "nothing", 30, "patience") == []


def test_a_passed_deadline_names_each_of_the_missing_once_and_the_knob(peers: list):
    calls = [("done", peers[0].answer.remote(1)), *[("the sleeper", peers[1].answer.remote(2, 2)) for _ in range(2)]]
    with pytest.raises(WaitTimeout) as caught:
        gather(calls, "a number", 1.0, "patience")
    assert str(caught.value) == "the sleeper did not deliver a number within 1 s; if it is only slow, raise patience"


def test_a_failure_is_raised_before_the_slower_have_answered(peers: list):
    slow = peers[0].answer.remote(1, 5)
    with pytest.raises(ValueError, match="no such batch"):
        gather([("slow", slow), ("broken", peers[2].fail.remote())], "a number", 30, "patience")
    assert not ray.wait([slow], timeout=0)[0]


def test_a_dead_process_is_named(peers: list):
    victim = Peer.remote()
    with pytest.raises(ActorLost, match=r"^the victim ended before it delivered a number: \S"):
        gather([("alive", peers[1].answer.remote(1)), ("the victim", victim.die.remote())], "a number", 60, "patience")
