"""transformers' own cache is the oracle: the same keys and values, bit for bit, through whatever an engine does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rl.growing_cache import ROOM, GrowingLayer, growing_cache

HEADS, WIDTH = 2, 3
TINY = dict(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=4)


@settings(deadline=None, max_examples=60)
@example(["prompt", "repeat", "token", "prompt", "token", "select", "token", "many"], 0)
@given(st.lists(st.sampled_from(["prompt", "token", "repeat", "select", "many"]), max_size=12), st.integers(0, 2**31))
def test_it_holds_what_a_cache_that_copies_holds(steps: list[str], seed: int):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs, rows = GrowingLayer(), DynamicLayer(), 3
    for step in steps:
        if step == "repeat":
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
            rows *= 2 if theirs.get_seq_length() else 1
        elif step == "select":
            kept = (torch.rand(rows, generator=generator) < 0.7).nonzero().squeeze(1)
            if theirs.get_seq_length():
                rows = len(kept)
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
        for _ in range({"token": 1, "prompt": 1, "many": ROOM + 3}.get(step, 0)):
            states = torch.randn(2, rows, HEADS, 5 if step == "prompt" else 1, WIDTH, generator=generator)
            for mine, expected in zip(ours.update(*states), theirs.update(*states)):
                assert torch.equal(mine, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if rows == 0:
            break


def test_a_token_copies_no_more_than_itself_while_there_is_room():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 1, HEADS, 5, WIDTH))
    layer.update(*torch.randn(2, 1, HEADS, 1, WIDTH))
    places = set[int]()
    for _ in range(ROOM):
        keys, _ = layer.update(*torch.randn(2, 1, HEADS, 1, WIDTH))
        places.add(keys.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("window", [None, 4])
def test_layers_with_a_window_stay_what_they_are(window: int | None):
    config = MistralConfig(**TINY, sliding_window=window)
    kinds = {None: GrowingLayer, 4: DynamicSlidingWindowLayer}
    assert {type(layer) for layer in growing_cache(config).layers} == {kinds[window]}
    assert len(growing_cache(LlamaConfig(**TINY)).layers) == len(DynamicCache(config=LlamaConfig(**TINY)).layers)
