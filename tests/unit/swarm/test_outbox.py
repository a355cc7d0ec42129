"""Frames of kept weights are those that would have been sent at once, whatever the weights are by then."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from anchor_service.errors import WaitTimeout
from rl.config import ModelConfig, SnapshotConfig
from rl.snapshot import BaseLost
from swarm.outbox import Outbox


def outbox() -> Outbox:
    return Outbox(SnapshotConfig(), ModelConfig(path="any", dtype="float32"))


def test_what_is_kept_is_sent_as_it_was_and_in_the_order_of_ticks():
    now, beside = outbox(), outbox()
    weights, whole = torch.randn(1000), False
    for tick in (0, 2, 3, 7):
        expected, said = now.frame(weights, tick, 1, "anchor 0", tick, whole)
        beside.keep(weights, tick)
        weights += 0.1
        kept = beside.take(tick, 1.0)
        frame, beside_said = beside.frame(kept, tick, 1, "anchor 0", tick, whole)
        np.testing.assert_array_equal(frame, expected)
        assert beside_said == said == (frame.nbytes, False)


def test_whoever_takes_waits_for_what_is_kept_and_passes_over_what_nobody_took():
    box = outbox()
    box.keep(torch.zeros(3), 4)
    later = threading.Timer(0.05, box.keep, (torch.ones(3), 5))
    later.start()
    assert box.take(5, 10.0).tolist() == [1, 1, 1]
    later.join()
    with pytest.raises(WaitTimeout, match=r"the weights of tick 6 within 0.01 s; .* raise swarm.timeout_s"):
        box.take(6, 0.01)


def test_earlier_weights_of_a_stream_that_another_has_sent_are_not_known():
    box = outbox()
    with pytest.raises(BaseLost):
        box.frame(torch.zeros(3), 4, 0, "anchor 0", 5, True)
    box.frame(torch.zeros(3), 5, 0, "anchor 0", 5, True)


def test_a_frame_of_a_stream_of_deltas_says_whether_it_is_whole():
    """After no ticks both ends hold the weights of the model's files; a rank that is new does not know what was sent."""
    first, new, full = outbox(), outbox(), Outbox(SnapshotConfig(encoding="full"), ModelConfig(path="any"))
    said = [first.frame(torch.zeros(3), tick, 0, "engines", tick, whole=tick == 2)[1][1] for tick in range(4)]
    assert said == [False, False, True, False]
    assert [new.frame(torch.zeros(3), tick, 0, "engines", tick, False)[1][1] for tick in (4, 5)] == [True, False]
    assert full.frame(torch.zeros(3), 4, 0, "engines", 4, False)[1][1] is False
