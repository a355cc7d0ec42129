"""What ranks are sent of a step: the microbatches made of it are those of the whole mini-batch, to the bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from codec.frames import FrameError
from rl.batch import Batch, deal
from rl.objective import MicroBatch, microbatches
from swarm.shares import mini_batches, shares
from tests.unit.rl.test_batch import random_batch

CPU = torch.device("cpu")
MINIS = [random_batch(12, seed, ref=True, shortest=1) for seed in range(3)]
LOSS = {"advantages", "rollout_logprobs", "ref_logprobs"}


def values(micro: MicroBatch) -> dict[str, list]:
    found = {field.name: getattr(micro, field.name) for field in fields(micro)}
    rows, (row, position) = found.pop("rows"), found.pop("predicts")
    found |= {"first": rows.first, "keeper": rows.keeper, "row": row, "position": position}
    return {
        name: [value.dtype, value.tolist()] if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
    }


@pytest.mark.parametrize(("dp", "pp"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
def test_microbatches_of_a_share_are_those_of_the_whole_batch(dp: int, pp: int):
    frames = [share.frame for share in shares(MINIS, dp, pp) for _ in range(share.ranks)]
    assert len(frames) == dp * pp
    for rank, frame in enumerate(frames):
        d, last = rank // pp, rank % pp == pp - 1
        for mini, (share, denominator) in zip(MINIS, mini_batches(frame), strict=True):
            assert denominator == mini.response_tokens
            expected = microbatches(mini, deal(mini, dp)[d], 2, CPU)
            found = microbatches(share, np.arange(len(share)), 2, CPU)
            for ours, theirs in zip(found, expected, strict=True):
                ours, theirs = values(ours), values(theirs)
                if not last:
                    assert ours["rollout_logprobs"] == ours["advantages"] == [torch.float32, []]
                    ours, theirs = ({k: v for k, v in each.items() if k not in LOSS} for each in (ours, theirs))
                assert ours == theirs


def test_stages_below_the_last_share_one_frame_without_what_the_loss_reads():
    (low, high), (low2, high2) = (list(shares(MINIS, 2, 3))[i : i + 2] for i in (0, 2))
    assert [low.ranks, high.ranks, low2.ranks, high2.ranks] == [2, 1, 2, 1]
    assert low.frame.nbytes < high.frame.nbytes / 2
    whole = [mini.pick(deal(mini, 2)[0]) for mini in MINIS]
    assert low.dense == 4 * sum(m.tokens.size + 2 * len(m) for m in whole)
    assert high.dense == low.dense + 4 * sum(len(m) + 2 * m.response_tokens for m in whole)


@pytest.mark.parametrize("denominators", [None, [], [1, 2, 3, 4, 5], ["1"], {"a": 1}])
def test_a_share_that_says_no_denominators_is_refused(denominators: object):
    header = {} if denominators is None else {"denominators": denominators}
    with pytest.raises(FrameError) as caught:
        mini_batches(random_batch(12).to_frame(**header))
    assert (caught.value.sender, caught.value.field) == ("the coordinator", "denominators")


def test_what_validation_is_told_has_no_tokens():
    batch = random_batch(64)
    told = Batch.from_frame(batch.only("rewards", "truncated").to_frame(), "an engine")[1]
    assert told.rewards.tolist() == batch.rewards.tolist() and told.truncated.tolist() == batch.truncated.tolist()
    assert told.response_lengths.tolist() == batch.response_lengths.tolist() and not len(told.tokens)
