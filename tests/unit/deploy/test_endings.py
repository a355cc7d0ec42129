"""SIGTERM with grace and without, and which ends a run can go on after."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from ray.exceptions import RaySystemError, RayTaskError

from anchor_service.errors import ActorLost, NotFinite, WaitTimeout
from deploy.cluster.endings import Notice, Terminated, can_go_on
from rl.snapshot import BaseLost
from swarm.grid import PeerLost

LOST = ActorLost("worker d0p1", "tick 3", "killed")
NO_ROOM = WaitTimeout("the Ray cluster", "room for 4 bundles (PACK)", 300.0, "swarm.start_timeout_s")


@pytest.fixture
def notice() -> Iterator[Notice]:
    notice = Notice()
    previous = signal.signal(signal.SIGTERM, notice.on_signal)
    yield notice
    signal.signal(signal.SIGTERM, previous)


def _told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_without_grace_a_signal_acts_at_once(notice: Notice):
    with pytest.raises(Terminated):
        _told()
    with pytest.raises(Terminated), notice.grace(0.0):
        _told()
    with notice.grace(9.0):
        pass
    with pytest.raises(Terminated):
        _told()


def test_with_grace_it_is_given_and_the_second_acts(notice: Notice):
    with notice.grace(9.0):
        _told()
        assert notice.given
        with pytest.raises(Terminated):
            _told()


def test_when_the_grace_is_over_it_acts_and_not_if_the_run_is(notice: Notice):
    with notice.grace(0.1):
        _told()
        with pytest.raises(Terminated):
            time.sleep(5)
    other = Notice()
    signal.signal(signal.SIGTERM, other.on_signal)
    with other.grace(0.1):
        _told()
    time.sleep(0.2)


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (None, False),
        (KeyboardInterrupt(), False),
        (Terminated(), True),
        (LOST, True),
        (PeerLost("worker d0p0: a norm failed"), True),
        (BaseLost(0, 4, None), True),
        (BaseLost(0, 0, 0), False),  # the model's files differ
        (RaySystemError("the control store is gone"), True),
        (RayTaskError("tick", "", ValueError("x"), pid=1, ip=""), False),
        (NotFinite("the loss is nan", "layer 3", "lower grpo.lr"), False),
        (ActorLost("engine 0", "its model", "it could not be constructed: OSError"), False),
        (OSError(28, "No space left on device"), False),
        (NO_ROOM, False),  # as it may be too large a config for this cluster
        (_from(WaitTimeout(*NO_ROOM.args), LOST), True),  # there was room before a node went
    ],
    ids=repr,
)
def test_a_run_can_go_on_where_a_process_was_lost(failure: BaseException | None, again: bool):
    assert can_go_on(failure, 2) is again
