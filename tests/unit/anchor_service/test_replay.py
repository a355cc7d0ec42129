"""The frame of a replay: one denominator, or one for each mini-batch; damage is named."""

from __future__ import annotations

import numpy as np
import pytest

from anchor_service.replay import pack_replay, unpack_replay
from codec.frames import FrameError
from tests.conftest import make_batch


def test_samples_of_several_mini_batches_arrive_each_with_its_denominator():
    parts = [(make_batch(2, seed=1), 7.5), (make_batch(3, seed=2), 11.0)]
    batch, over = unpack_replay(pack_replay(parts), "the replay of tick 3")
    assert over.dtype == np.float32 and over.tolist() == [7.5, 7.5, 11, 11, 11]
    assert batch.take(2, 5).tokens.tolist() == parts[1][0].tokens.tolist()


def test_one_mini_batch_has_one_number():
    batch = make_batch(4)
    found, over = unpack_replay(batch.to_frame(denominator=batch.response_tokens), "a replay")
    assert over == batch.response_tokens and len(found) == 4


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({}, "denominator"),
        ({"denominator": 0}, "denominator"),
        ({"denominator": float("nan")}, "denominator"),
        ({"denominator": "9"}, "denominator"),
        ({"parts": 3}, "parts"),
        ({"parts": [[2, 5.0], 3]}, "parts"),
        ({"parts": [[2, 5.0], [1, 5.0]]}, "parts"),
        ({"parts": [[5, 5.0], [-1, 5.0]]}, "parts"),
        ({"parts": [[2, 5.0], [2, -1.0]]}, "parts"),
    ],
)
def test_what_does_not_add_up_is_refused_by_sender_and_field(header: dict, field: str):
    with pytest.raises(FrameError, match=f"the replay of tick 3.*{field}"):
        unpack_replay(make_batch(4).to_frame(**header), "the replay of tick 3")
