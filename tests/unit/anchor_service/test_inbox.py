"""Corrections on their way: the frame a rank receives, and the inbox that holds it until all ranks do."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from anchor_service.inbox import Inbox
from anchor_service.messages import Correction, joined, pack_correction, pack_head, unpack_correction, unpack_head
from codec.frames import FrameError, pack, unpack


def correction(version: int) -> Correction:
    return Correction(version, 5 * version - 5, 5 * version, torch.zeros(3), f"{version:032x}")


def filled(*versions: int) -> Inbox:
    inbox = Inbox()
    for version in versions:
        inbox.put(correction(version))
    return inbox


# --- the inbox ---------------------------------------------------------------------------------


def test_an_empty_inbox_holds_version_0_which_is_no_correction():
    inbox = Inbox()
    assert inbox.newest() == 0
    with pytest.raises(KeyError):
        inbox.adopt(0)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_the_newest_is_the_highest_version_whatever_the_order_of_arrival(order: tuple[int, ...]):
    assert filled(*order).newest() == 3


def test_adopting_takes_a_version_and_all_older_ones_out_and_keeps_newer_ones():
    inbox = filled(1, 2, 3)
    assert inbox.adopt(2).version == 2
    for gone in (1, 2):
        with pytest.raises(KeyError):
            inbox.adopt(gone)
    assert inbox.adopt(3).version == 3 and inbox.newest() == 0


@pytest.mark.parametrize("version", [2, 4])
def test_adopting_what_is_not_held_is_an_error_and_drops_nothing(version: int):
    inbox = filled(1, 3)
    with pytest.raises(KeyError):
        inbox.adopt(version)
    assert inbox.adopt(1).version == 1 and inbox.adopt(3).version == 3


def test_a_version_that_arrives_again_replaces_itself():
    inbox = filled(1, 2)
    again = correction(2)
    inbox.put(again)
    assert inbox.adopt(2) is again


def test_corrections_may_arrive_from_another_thread_while_the_tick_reads():
    inbox, seen, errors = Inbox(), [], []

    def deliver() -> None:
        try:
            for version in range(1, 2001):
                inbox.put(correction(version))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=deliver)
    thread.start()
    while thread.is_alive() or inbox.newest():
        if newest := inbox.newest():
            seen.append(inbox.adopt(newest).version)
    thread.join()
    assert not errors and seen == sorted(set(seen)) and seen[-1] == 2000


# --- the frame ---------------------------------------------------------------------------------


M = torch.tensor([1.5, -2.0, 0.0, 1e-30, -0.0, 7.0, -1.0, 3.0, -4.0])


@pytest.mark.parametrize("payload", ["sign", "dense"])
def test_a_correction_arrives_as_it_was_sent(payload: str):
    frame = pack_correction(M, payload, version=3, source_tick=10, first_tick=15, stage=1)
    found = unpack_correction(frame, stage=1, numel=9)
    assert (found.version, found.source_tick, found.first_tick) == (3, 10, 15)
    assert torch.equal(found.values, M) if payload == "dense" else torch.equal(found.values.sign(), M.sign().char())
    assert found.digest == xxhash.xxh3_128(frame[24:].tobytes()).hexdigest()


def test_the_values_of_a_dense_correction_can_be_written_to_without_touching_the_frame():
    frame = pack_correction(M, "dense", 1, 0, 5, stage=0)
    before = frame.copy()
    unpack_correction(frame, 0, 9).values.zero_()
    assert np.array_equal(frame, before)


def test_the_digest_differs_for_another_version_of_the_same_values():
    frames = [pack_correction(M, "sign", version, 0, 5, stage=0) for version in (1, 2)]
    assert len({unpack_correction(f, 0, 9).digest for f in frames}) == 2


def test_a_sign_correction_is_a_31st_of_a_dense_one():
    m = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    sign, dense = (pack_correction(m, payload, 1, 0, 5, stage=0).nbytes for payload in ("sign", "dense"))
    assert sign * 31 < dense


def test_a_nan_in_m_is_refused_by_the_anchor_with_the_stage():
    with pytest.raises(ValueError, match="stage 2"):
        pack_correction(torch.tensor([1.0, float("nan")]), "sign", 1, 0, 5, stage=2)


@pytest.mark.parametrize(("stage", "numel", "field"), [(0, 9, "stage"), (1, 8, "numel")])
def test_a_correction_for_another_stage_or_model_is_refused(stage: int, numel: int, field: str):
    frame = pack_correction(M, "sign", 1, 0, 5, stage=1)
    with pytest.raises(FrameError, match=f"the anchor: {field}"):
        unpack_correction(frame, stage, numel)


@pytest.mark.parametrize("payload", ["sign", "dense"])
def test_a_head_has_the_signs_that_are_looked_at_and_fits_its_correction_alone(payload: str):
    frames = [pack_correction(M, payload, version, 5, 8, stage=1) for version in (3, 4)]
    head = unpack_head(pack_head(torch.tensor([-1.0, 0.0]), frames[0]), stage=1, numel=9, look=2)
    assert (head.version, head.source_tick, head.first_tick, head.values) == (3, 5, 8, None)
    wholes = [unpack_correction(frame, stage=1, numel=9) for frame in frames]
    both = joined(head, wholes[0])
    assert both.look is not None and both.values is wholes[0].values
    assert both.look.tolist() == [-1, 0]
    with pytest.raises(FrameError, match=r"digest: .* the head of correction 3"):
        joined(head, wholes[1])


def test_a_head_for_another_rank_or_merger_is_refused_and_a_damaged_one():
    whole = pack_correction(M, "sign", 3, 5, 8, stage=1)
    head = pack_head(torch.tensor([-1.0, 0.0]), whole)
    for (stage, numel, look), field in {(0, 9, 2): "stage", (1, 8, 2): "numel", (1, 9, 3): "look"}.items():
        with pytest.raises(FrameError, match=f"the anchor: {field}"):
            unpack_head(head, stage, numel, look)
    with pytest.raises(FrameError, match="kind: is 'correction', this rank needs 'head'"):
        unpack_head(whole, 1, 9, 2)
    with pytest.raises(FrameError, match="kind: is 'head', this rank needs 'correction'"):
        unpack_correction(head, 1, 9)
    header, arrays = unpack(head, "the anchor")
    for field, damage in {"whole": 5, "source_tick": "five"}.items():
        with pytest.raises(FrameError, match=field):
            unpack_head(pack(header | {field: damage}, arrays), 1, 9, 2)
    with pytest.raises(FrameError, match="arrays"):
        unpack_head(pack(header, {}), 1, 9, 2)


def test_a_damaged_correction_is_refused():
    frame = pack_correction(M, "sign", 1, 0, 5, stage=1)
    frame[-1] ^= 1
    with pytest.raises(FrameError, match="digest"):
        unpack_correction(frame, 1, 9)


HEADER = {
    "kind": "correction",
    "payload": "sign",
    "version": 1,
    "source_tick": 0,
    "first_tick": 5,
    "stage": 0,
    "numel": 9,
}
PLUS = np.zeros(2, np.uint8)
WRONG: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "another kind": ({"kind": "weights"}, {"plus": PLUS}),
    "no version": ({"version": None}, {"plus": PLUS}),
    "a version in words": ({"version": "one"}, {"plus": PLUS}),
    "a first tick in words": ({"first_tick": "five"}, {"plus": PLUS}),
    "no sign plane": ({}, {}),
    "a sign plane too short": ({}, {"plus": PLUS[:1]}),
    "a zero index outside": ({}, {"plus": PLUS, "zero": np.array([9], np.uint32)}),
    "dense but without values": ({"payload": "dense"}, {"plus": PLUS}),
    "dense but too short": ({"payload": "dense"}, {"dense": np.zeros(8, np.float32)}),
    "dense but in halves": ({"payload": "dense"}, {"dense": np.zeros(9, np.float16)}),
    "dense but one number for all": ({"payload": "dense"}, {"dense": np.zeros(1, np.float32)}),
    "no payload": ({"payload": None}, {"plus": PLUS}),
}


@pytest.mark.parametrize(("change", "arrays"), WRONG.values(), ids=WRONG)
def test_a_whole_frame_with_a_wrong_content_is_refused(change: dict[str, Any], arrays: dict[str, np.ndarray]):
    header = {k: v for k, v in (HEADER | change).items() if v is not None}
    with pytest.raises(FrameError, match="the anchor"):
        unpack_correction(pack(header, arrays), stage=0, numel=9)


def test_the_same_frame_without_the_change_is_accepted():
    assert unpack_correction(pack(HEADER, {"plus": PLUS}), stage=0, numel=9).values.sign().tolist() == [-1] * 9
