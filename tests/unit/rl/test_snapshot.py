"""Weights by stream: what a receiver holds is what the stage had, bit for bit, also after losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codec.frames import FrameError, unpack
from rl.config import SnapshotConfig
from rl.snapshot import BaseLost, Receiver, Sender

SIZES = (1000, 501)


def run(config: SnapshotConfig, bf16: bool, ticks: int = 4):
    """Two stages that change a little each tick, a sender each, and one receiver."""
    rng = torch.Generator().manual_seed(0)
    stages = [torch.randn(n, generator=rng) * 0.02 for n in SIZES]
    senders, receiver = [Sender(config, bf16) for _ in SIZES], Receiver(config)
    for tick in range(ticks):
        for flat in stages:
            flat += 1e-6 * torch.randn(len(flat), generator=rng)
        yield tick, stages, senders, receiver


@pytest.mark.parametrize("encoding", ["delta", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_receiver_holds_what_the_stages_had(encoding: str, bf16: bool):
    master = torch.zeros(sum(SIZES))
    for tick, stages, senders, receiver in run(SnapshotConfig(encoding=encoding), bf16):
        parts = [s.frame(flat, tick, p, whole=False) for p, (s, flat) in enumerate(zip(senders, stages))]
        receiver.load(parts, tick, master)
        expected = torch.cat(stages)
        expected = expected.bfloat16().float() if bf16 else expected
        assert torch.equal(master, expected)
        deltas = [unpack(part, "test")[0]["base_tick"] for part in parts]
        assert deltas == [tick - 1 if encoding == "delta" and tick else None] * 2


def test_a_delta_is_smaller_than_a_whole_snapshot():
    sizes = []
    for tick, stages, senders, _ in run(SnapshotConfig(), bf16=True):
        sizes.append(senders[0].frame(stages[0], tick, 0, whole=tick == 2).nbytes)
    assert sizes[1] < 0.5 * sizes[0] and sizes[3] < 0.5 * sizes[2]


def test_a_lost_base_is_noticed_and_a_whole_snapshot_mends_it():
    master = torch.zeros(sum(SIZES))
    for tick, stages, senders, receiver in run(SnapshotConfig(), bf16=False, ticks=5):
        parts = [s.frame(flat, tick, p, whole=tick == 3) for p, (s, flat) in enumerate(zip(senders, stages))]
        if tick == 1:
            continue  # never arrives
        if tick == 2:
            before = master.clone()
            with pytest.raises(BaseLost, match="stage 0 sent a delta against tick 1, held is 0"):
                receiver.load(parts, tick, master)
            assert torch.equal(master, before)
        else:
            receiver.load(parts, tick, master)
            assert torch.equal(master, torch.cat(stages))


def test_parts_of_another_tick_stage_or_size_are_refused_and_nothing_is_applied():
    master = torch.zeros(sum(SIZES))
    for tick, stages, senders, receiver in run(SnapshotConfig(), bf16=False, ticks=1):
        first, second = (s.frame(flat, tick, p, False) for p, (s, flat) in enumerate(zip(senders, stages)))
        for parts, at, word in (([first, second], 1, "tick"), ([second, first], 0, "stage"), ([first], 0, "weights")):
            with pytest.raises(FrameError, match=word):
                receiver.load(parts, at, master)
        damaged = second.copy()
        damaged[-3] ^= 4
        with pytest.raises(FrameError, match="digest"):
            receiver.load([first, damaged], 0, master)
        assert not master.any()


def test_what_was_sent_does_not_change_when_the_stage_does():
    config, flat = SnapshotConfig(), torch.randn(100)
    sender = Sender(config, bf16=False)
    sender.frame(flat, 0, 0, False)
    kept = sender.base.copy()
    flat.zero_()
    np.testing.assert_array_equal(sender.base, kept)
