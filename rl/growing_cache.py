"""A key-value cache with room to grow: transformers' own copies all keys and values for each token that comes."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, tokens, head_dim] are the beginning of larger tensors, of ROOM more tokens when full."""

    _stores: tuple[Tensor, Tensor] | None = None  # None: keys and values are tensors of their own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before, new = self.get_seq_length(), key_states.shape[-2]
        after = before + new
        if before == 0 or new > 1:  # a prompt: nothing grows yet
            self._stores = None
            return super().update(key_states, value_states)
        if self._stores is None or after > self._stores[0].shape[-2]:
            self._stores = _with_room(self.keys, after + ROOM), _with_room(self.values, after + ROOM)
        found: list[Tensor] = []
        for store, states in zip(self._stores, (key_states, value_states)):
            filled = store[: len(states), :, :after]
            filled[:, :, before:] = states
            found.append(filled)
        self.keys, self.values = found
        return found[0], found[1]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._stores = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """`indices`: ascending. Rows that stay move up to where others were."""
        if self._stores is None:
            return super().batch_select_indices(indices)
        kept, length = indices.tolist(), self.get_seq_length()
        for _, run in groupby(enumerate(kept), lambda at: at[1] - at[0]):  # rows that move up as far, at once
            (to, row), *others = run
            count = 1 + len(others)
            for store in self._stores if to != row else ():
                store[to : to + count, :, :length] = store[row : row + count, :, :length].clone()
        self.keys, self.values = (store[: len(kept), :, :length] for store in self._stores)


def _with_room(states: Tensor | None, tokens: int) -> Tensor:
    assert states is not None  # something is held
    rows, heads, length, width = states.shape
    store = states.new_empty(rows, heads, tokens, width)
    store[:, :, :length] = states
    return store


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model; layers with a window or without keys stay what transformers makes of them."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
