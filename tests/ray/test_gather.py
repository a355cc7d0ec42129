"""`gather` with real processes that are slow, fail or die: who is named, and how soon."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from anchor_service.calls import gather
from anchor_service.errors import ActorLost, WaitTimeout, described
from swarm.grid import PeerLost

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


@ray.remote(num_cpus=0, max_restarts=0)
class Failing:
    def __init__(self, reason: str = "") -> None:
        if reason:
            raise ValueError(reason)

    def answer(self, *values: int) -> int:
        return len(values)

    def fail(self, reason: str) -> None:
        raise KeyError("batch", reason)

    def fail_by_an_error_that_cannot_travel(self) -> None:
        raise TwoParts("weights", "first line\nsecond line")

    def lose_its_peer(self) -> None:
        raise PeerLost("worker d0p0: a sum with the replicas of a stage failed: connection closed by peer")

    def die(self, after: float) -> None:
        time.sleep(after)
        os._exit(3)


class TwoParts(Exception):
    """Pickled it has one argument, and wants two."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")


@pytest.fixture(scope="module")
def failing(ray_cluster: None) -> Iterator[Any]:
    actor = Failing.remote()
    yield actor
    ray.kill(actor)


def failure_of(*references: object, settle: float = 0.0) -> Exception:
    calls = [(f"peer {i}", reference) for i, reference in enumerate(references)]
    with pytest.raises(Exception) as caught:
        gather(calls, "a number", 60, "patience", settle=settle)
    return caught.value


def test_an_error_of_several_lines_is_whole_and_says_where_it_was_raised(failing: Any):
    error = failure_of(failing.fail.remote("one\ntwo"))
    assert type(error) is KeyError and error.args == ("batch", "one\ntwo")
    said = described(error)
    assert said.startswith("KeyError: ('batch', 'one\\ntwo')\nraised by peer 0, asked for a number (process ")
    assert f"{__file__}, line " in said and "in fail" in said and "ray::" not in said
    assert "ray::" in str(error.__cause__)  # the whole trace is there for whoever wants it


def test_an_error_that_cannot_travel_still_says_all_it_said(failing: Any):
    said = described(failure_of(failing.fail_by_an_error_that_cannot_travel.remote()))
    assert "TwoParts: weights: first line\nsecond line\nraised by peer 0" in said and "ray::" not in said


def test_an_actor_that_cannot_be_constructed_says_why(ray_cluster: None):
    error = failure_of(Failing.remote("one\ntwo").answer.remote())
    assert isinstance(error, ActorLost) and error.reason == "it could not be constructed: ValueError: one\ntwo"


def test_a_rank_that_lost_its_peer_leaves_the_word_to_what_became_of_that(failing: Any):
    """What died says how and where; who only needed something of it is not named in its place."""
    dying = Failing.remote()
    died = dying.die.remote(0.5)
    error = failure_of(failing.lose_its_peer.remote(), died, settle=60.0)
    assert isinstance(error, ActorLost) and error.who == "peer 1"
    assert "process has died" in error.reason and "\nprocess " in error.reason and "class_name" not in error.reason
    error = failure_of(failing.answer.remote(died))
    assert str(error).startswith("an actor that peer 0 gets an argument from ended before it delivered a number: ")


def test_a_lost_peer_is_said_where_nobody_says_more(failing: Any, peers: list):
    assert isinstance(failure_of(failing.lose_its_peer.remote(), failing.answer.remote(), settle=60.0), PeerLost)
    slow = peers[0].answer.remote(1, 2)
    assert isinstance(failure_of(failing.lose_its_peer.remote(), slow, settle=0.1), PeerLost)


def test_waits_that_share_a_deadline_end_together(peers: list):
    since = time.monotonic() - 60
    with pytest.raises(WaitTimeout, match="within 60 s"):
        gather([("the sleeper", peers[0].answer.remote(1, 2))], "a number", 60, "patience", since=since)
