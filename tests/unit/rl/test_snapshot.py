"""Weights by stream: what a receiver holds is what the stage had, bit for bit, or what its sender says; also after losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from codec.bf16 import from_bf16, to_bf16
from codec.frames import FrameError, pack, unpack
from rl.config import SnapshotConfig
from rl.snapshot import BaseLost, Receiver, Sender

SIZES = (1500, 701)
LR = 1e-4  # so large that a lossless delta in bf16 is beyond the rate
RATED = SnapshotConfig(rate=0.05)


def files() -> list[Tensor]:
    """Two stages as the model's files have them."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=rng) * 0.02 for n in SIZES]


def trained(ticks: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Weights after 0, 1, 2, … ticks of a step as large as Adam's, in one buffer a stage."""
    rng, stages = torch.Generator().manual_seed(1), files()
    for tick in range(ticks):
        yield tick, stages
        for flat in stages:
            flat += LR * torch.randn(len(flat), generator=rng)


def senders(config: SnapshotConfig, bf16: bool) -> list[Sender]:
    return [Sender(config, bf16, config.rate) for _ in SIZES]


def frames(ends: list[Sender], stages: list[Tensor], tick: int, whole: bool = False, exact: bool = True):
    return [end.frame(flat, tick, p, whole, exact) for p, (end, flat) in enumerate(zip(ends, stages))]


def as_sent(stages: list[Tensor], bf16: bool) -> Tensor:
    flat = torch.cat(stages)
    return flat.bfloat16().float() if bf16 else flat


@pytest.mark.parametrize("encoding", ["delta", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_receiver_holds_what_the_stages_had(encoding: str, bf16: bool):
    config, master = SnapshotConfig(encoding=encoding), torch.cat(files())
    ends, receiver = senders(config, bf16), Receiver(config)
    for tick, stages in trained(4):
        parts = frames(ends, stages, tick)
        receiver.load(parts, tick, master)
        assert torch.equal(master, as_sent(stages, bf16))
        bases = [unpack(part, "test")[0]["base_tick"] for part in parts]
        assert bases == [max(0, tick - 1) if encoding == "delta" else None] * 2


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stream_begins_with_the_models_files_for_which_nothing_is_sent(bf16: bool):
    ends, (_, stages) = senders(SnapshotConfig(), bf16), next(trained(1))
    parts = frames(ends, stages, 0)
    assert all(sum(a.nbytes for a in unpack(part, "test")[1].values()) < 64 for part in parts)
    master = torch.cat(files())
    Receiver(SnapshotConfig()).load(parts, 0, master)
    assert torch.equal(master, as_sent(files(), bf16))


def test_a_receiver_with_other_files_says_so_and_a_whole_snapshot_mends_it():
    ends, receiver, master = senders(SnapshotConfig(), False), Receiver(SnapshotConfig()), torch.cat(files()) + 1e-3
    before = master.clone()
    for tick, stages in trained(1):
        with pytest.raises(BaseLost, match="the model's files have them: put the same on every node"):
            receiver.load(frames(ends, stages, tick), tick, master)
        assert torch.equal(master, before)
        receiver.load(frames(ends, stages, tick, whole=True), tick, master)
        assert torch.equal(master, torch.cat(stages))


def test_a_sender_that_was_restored_begins_with_a_whole_snapshot():
    for tick, stages in trained(3):
        parts = frames(senders(RATED, True), stages, tick, exact=False)
        whole = [unpack(part, "test")[0]["base_tick"] is None for part in parts]
        assert whole == [tick > 0] * 2


def test_a_delta_is_smaller_than_a_whole_snapshot():
    sender, sizes = Sender(SnapshotConfig(), bf16=True), []
    for tick, stages in trained(4):
        sizes.append(sender.frame(stages[0], tick, 0, whole=tick in (0, 2)).nbytes)
    assert sizes[1] < 0.6 * sizes[0] and sizes[3] < 0.6 * sizes[2]


def test_a_lost_base_is_noticed_and_a_whole_snapshot_mends_it():
    ends, receiver, master = senders(SnapshotConfig(), False), Receiver(SnapshotConfig()), torch.cat(files())
    for tick, stages in trained(5):
        parts = frames(ends, stages, tick, whole=tick == 3)
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


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [SnapshotConfig(), RATED], ids=["exact", "at a rate"])
def test_a_newcomer_gets_what_the_others_hold_and_they_go_on_as_if_nobody_had_asked(config: SnapshotConfig, bf16: bool):
    """A whole frame of the tick that was sent last, asked for when the stage is ticks ahead of it."""
    calm, torn = senders(config, bf16), senders(config, bf16)
    receiver, master = Receiver(config), torch.cat(files())
    for tick, stages in trained(9):
        if tick % 3 == 0:
            parts, same = (frames(ends, stages, tick, exact=tick == 0) for ends in (calm, torn))
            assert all(np.array_equal(a, b) for a, b in zip(parts, same))
            receiver.load(parts, tick, master)
        new, theirs = Receiver(config), torch.zeros_like(master)
        new.load(frames(torn, stages, tick - tick % 3, whole=True), tick - tick % 3, theirs)
        assert torch.equal(theirs, master) and new.tick == receiver.tick


@pytest.mark.parametrize("bf16", [False, True])
def test_exact_deltas_are_taken_back_to_the_bit_and_loaded_again(bf16: bool):
    ends, receiver, master = senders(SnapshotConfig(), bf16), Receiver(SnapshotConfig()), torch.cat(files())
    sent, held = [], []
    for tick, stages in trained(5):
        sent.append(frames(ends, stages, tick, whole=tick == 0))
        receiver.load(sent[-1], tick, master)
        held.append(master.clone())
    for tick in (4, 3, 2):
        receiver.take_back(sent[tick], master)
        assert receiver.tick == tick - 1 and torch.equal(master, held[tick - 1])
    for tick in (2, 3, 4):
        receiver.load(sent[tick], tick, master)
        assert torch.equal(master, held[tick])


def test_what_is_no_delta_of_what_is_held_is_not_taken_back():
    ends, receiver, master = senders(SnapshotConfig(), False), Receiver(SnapshotConfig()), torch.cat(files())
    sent = [frames(ends, stages, tick, whole=tick == 1) for tick, stages in trained(3)]
    for tick in (0, 1):
        receiver.load(sent[tick], tick, master)
    with pytest.raises(FrameError, match="nothing leads back"):
        receiver.take_back(sent[1], master)
    with pytest.raises(FrameError, match="tick"):
        receiver.take_back(sent[2], master)
    receiver.load(sent[2], 2, master)
    damaged = sent[2][1].copy()
    damaged[-3] ^= 4
    with pytest.raises(FrameError, match="digest"):
        receiver.take_back([sent[2][0], damaged], master)
    master[3] += 1e-3
    before = master.clone()
    with pytest.raises(BaseLost, match="others are held"):
        receiver.take_back(sent[2], master)
    assert torch.equal(master, before) and receiver.tick == 2


def test_parts_of_another_tick_stage_or_size_are_refused_and_nothing_is_applied():
    ends, receiver, master = senders(SnapshotConfig(), False), Receiver(SnapshotConfig()), torch.zeros(sum(SIZES))
    first, second = frames(ends, files(), 0, whole=True)
    for parts, at, word in (([first, second], 1, "tick"), ([second, first], 0, "stage"), ([first], 0, "weights")):
        with pytest.raises(FrameError, match=word):
            receiver.load(parts, at, master)
    damaged = second.copy()
    damaged[-3] ^= 4
    with pytest.raises(FrameError, match="digest"):
        receiver.load([first, damaged], 0, master)
    assert not master.any()


@pytest.mark.parametrize("config", [SnapshotConfig(), RATED], ids=["exact", "at a rate"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_was_sent_does_not_change_when_the_stage_does(config: SnapshotConfig, bf16: bool):
    (sender, _), flat = senders(config, bf16), files()[0]
    sender.frame(flat, 0, 0)
    kept = sender.held.copy()
    flat.zero_()
    np.testing.assert_array_equal(sender.held, kept)


# --- at a rate -----------------------------------------------------------------------------------


def big(ticks: int) -> Iterator[tuple[int, Tensor]]:
    """One stage, large enough that frame headers are nothing."""
    rng = torch.Generator().manual_seed(2)
    flat = torch.randn(99_000, generator=rng) * 0.02
    for tick in range(ticks):
        yield tick, flat
        flat += LR * torch.randn(len(flat), generator=rng)


@pytest.mark.parametrize("bf16", [False, True])
def test_coded_frames_keep_their_rate_and_what_they_lose_does_not_add_up(bf16: bool):
    sender, receiver = Sender(RATED, bf16, RATED.rate), Receiver(RATED)
    master, errors = next(big(1))[1].clone(), []
    for tick, flat in big(30):
        part = sender.frame(flat, tick, 0, exact=tick in (0, 20))
        receiver.load([part], tick, master)
        np.testing.assert_array_equal(master.numpy(), sender.held)
        errors.append(float((flat - master).square().mean().sqrt()) / LR)
        if tick in (0, 20):
            assert torch.equal(master, as_sent([flat], bf16))
        else:
            assert unpack(part, "test")[0]["encoding"] == "coded"
            assert part.nbytes == pytest.approx(RATED.rate * 2 * len(flat), rel=0.05)
    assert max(errors) < 1.5
    assert 0.3 < np.mean(errors[10:20]) < 1.2  # of one step: a stream without feedback is at 0.7 √10 by then


def test_an_exact_frame_of_a_stream_at_a_rate_is_a_small_delta():
    """Between bf16 patterns of what is held and of the weights, few differ."""
    sender = Sender(RATED, True, RATED.rate)
    for tick, flat in big(11):
        exact = sender.frame(flat, tick, 0, exact=tick in (0, 10)).nbytes
    assert unpack(sender.frame(flat, 10, 0), "test")[0]["bf16"]
    assert exact < 0.3 * 2 * len(flat)


def test_where_few_weights_move_a_lossless_delta_within_the_rate_is_sent():
    sender, receiver, master = Sender(RATED, True, RATED.rate), Receiver(RATED), files()[0]
    flat = master.clone()
    for tick in range(5):
        part = sender.frame(flat, tick, 0, exact=False)
        receiver.load([part], tick, master)
        assert torch.equal(master, as_sent([flat], True)) and unpack(part, "test")[0]["encoding"] == "delta"
        flat[tick * 7 : tick * 7 + 4] += 1e-2
    assert len(flat) == 1500 and part.nbytes < 1500


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stream_begun_anew_at_an_exact_frame_goes_on_as_if_it_had_never_stopped(bf16: bool):
    """A resumed run: other senders, other receivers, a whole frame at the checkpoint."""
    ends, receiver, master = senders(RATED, bf16), Receiver(RATED), torch.cat(files())
    others, late, theirs = senders(RATED, bf16), Receiver(RATED), torch.cat(files())
    for tick, stages in trained(12):
        exact = tick in (0, 5, 9)
        parts = frames(ends, stages, tick, exact=exact)
        receiver.load(parts, tick, master)
        if tick >= 5:
            again = frames(others, stages, tick, exact=exact)
            late.load(again, tick, theirs)
            assert torch.equal(master, theirs)
            assert tick == 5 or all(np.array_equal(a, b) for a, b in zip(parts, again))


@pytest.mark.parametrize("made", [False, True], ids=["in a later tick", "of the tick that was lost"])
def test_a_whole_frame_of_a_stream_at_a_rate_gives_what_was_held_had_nothing_been_lost(made: bool):
    calm, torn = Sender(RATED, True, RATED.rate), Sender(RATED, True, RATED.rate)
    receiver, other, master = Receiver(RATED), Receiver(RATED), files()[0]
    theirs = master.clone()
    for tick, stages in trained(8):
        receiver.load([calm.frame(stages[0], tick, 0, exact=tick == 0)], tick, master)
        part = torn.frame(stages[0], tick, 0, whole=tick == 4 and not made, exact=tick == 0)
        if tick == 4 and made:
            part = torn.frame(stages[0], tick, 0, whole=True, exact=False)
        if tick == 4:
            other, theirs = Receiver(RATED), torch.zeros_like(theirs)  # an engine started anew
        other.load([part], tick, theirs)
        assert torch.equal(master, theirs)


def test_a_coded_frame_against_other_weights_is_a_lost_base_and_one_without_a_rate_is_refused():
    sender, receiver, master = Sender(RATED, False, RATED.rate), Receiver(RATED), files()[0]
    for tick, stages in trained(3):
        part = sender.frame(stages[0], tick, 0, exact=tick == 0)
        if tick == 2:
            with pytest.raises(FrameError, match=r"snapshot\.rate is not set here"):
                stranger = Receiver(SnapshotConfig())
                stranger.tick = 1
                stranger.load([part], tick, master)
            master[7] += 1e-6
            with pytest.raises(BaseLost, match="weights of tick 1, others are held"):
                receiver.load([part], tick, master)
        else:
            receiver.load([part], tick, master)


@pytest.mark.parametrize("change", [{"numel": -1}, {"numel": 10**12}, {"encoding": "coded"}, {"base_tick": "0"}, {}])
def test_a_header_that_says_something_else_is_refused(change: dict[str, object]):
    sender, master = Sender(RATED, True, RATED.rate), files()[0]
    header, arrays = unpack(sender.frame(master, 0, 0), "test")
    if not change:
        del header["numel"]
    with pytest.raises((FrameError, BaseLost)):
        Receiver(RATED).load([pack(header | change, arrays)], 0, master)


def test_held_weights_that_were_rounded_to_bf16_are_rounded_to_themselves():
    """So a receiver may take its base of a bf16 stream from fp32 weights."""
    patterns = np.arange(1 << 16).astype(np.uint16)
    finite = patterns[np.isfinite(from_bf16(patterns))]
    np.testing.assert_array_equal(to_bf16(from_bf16(finite)), finite)
