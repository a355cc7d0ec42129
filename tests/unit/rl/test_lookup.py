"""torch's own embedding is the oracle: the same gradients, bit for bit."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rl.config import GrpoConfig
from rl.lookup import Lookup
from rl.objective import loss_terms, microbatches
from rl.policy import Stage
from rl.spans import spans
from tests.conftest import make_batch

CPU = torch.device("cpu")


def gradients(
    folder: Path, boundaries: list[int], dtype: torch.dtype, share: bool, by_rows: bool
) -> list[torch.Tensor]:
    """Of each stage, after three microbatches."""
    stages = [Stage(folder, span, dtype, CPU) for span in spans(4, boundaries, len(boundaries) + 1)]
    lookup = stages[0].embed
    assert isinstance(lookup, Lookup) and lookup.by_rows
    lookup.by_rows = by_rows
    for micro in microbatches(make_batch(12), np.arange(12), 4, CPU, share=share):
        x = micro.ids
        for stage in stages:
            x = stage(x, micro.real, {}, micro.distinct)
        loss_terms(stages[-1], x, micro, None, 7.0, GrpoConfig(), 1.0).loss.backward()
        for stage in stages:
            stage.weights.collect()
        assert not lookup.waiting
    return [stage.weights.grad for stage in stages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("boundaries", [[], [2]], ids=["one stage", "two stages"])
def test_gradients_are_those_of_torch(model: Path, boundaries: list[int], share: bool, dtype: torch.dtype):
    found, expected = (gradients(model, boundaries, dtype, share, by_rows) for by_rows in (True, False))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, expected, strict=True))
    assert all(grad.abs().max() > 0 for grad in found)


@pytest.mark.parametrize("tied", [False, True])
def test_padding_has_no_gradient_and_ids_that_come_again_add_up_in_their_order(tied: bool):
    ids, before = torch.tensor([[5, 0, 3, 5], [3, 3, 0, 5]]), torch.randn(7, 6)
    passed, rows = torch.randn(2, 4, 6), torch.randn(2, 7)
    found = []
    for by_rows in (True, False):
        embed = nn.Embedding(7, 6, padding_idx=0)
        with torch.no_grad():
            embed.weight.copy_(torch.arange(42.0).view(7, 6))
        embed.weight.grad = before.clone()
        lookup = Lookup(embed, tied)
        lookup.by_rows = by_rows
        loss = (lookup(ids) * passed).sum()
        (loss + ((rows @ embed.weight) ** 2).sum() if tied else loss).backward()
        found.append(embed.weight.grad)
    assert torch.equal(*found) and torch.equal(found[0][0], before[0]) is not tied


def test_an_embedding_that_does_more_than_look_up_is_left_to_torch():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    embed = Scaled(5, 2)
    lookup = Lookup(embed, tied=False)
    lookup(torch.tensor([1, 1])).sum().backward()
    assert not lookup.by_rows and embed.weight.grad is not None and embed.weight.grad[1].tolist() == [6, 6]


def test_a_stage_that_nobody_holds_is_gone_at_once(tied_model: Path):
    (span,) = spans(4, [], 1)
    stage = Stage(tied_model, span, torch.float32, CPU)
    gone = weakref.ref(stage.weights)
    del stage
    assert gone() is None
