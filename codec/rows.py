"""The rows of a microbatch, and which of them need to cross a boundary at all.

A causal model's hidden state depends only on the tokens up to its own. Samples of one GRPO group share their
prompt, so their first rows are equal: one of them stands for all, and the gradients of all are summed before
they go back, which is exact. Both ends know the tokens, so nothing is sent for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from codec.keyed import mix, row_keys


@dataclass(frozen=True)
class Rows:
    """The real tokens of a microbatch in packed order, N of them."""

    first: Tensor  # bool [N]: token 0 of a sample, whose hidden state is out of all proportion
    keeper: Tensor  # int64 [N]: the first row with the same tokens up to and including its own
    keys: Tensor  # int64 [N]: what a codec may draw random numbers from, new in every tick; both ends know them
    distinct: bool = False  # whether hidden states hold the n kept rows alone (`rl.distinct`), else all N

    def __len__(self) -> int:
        return len(self.keeper)

    @cached_property
    def kept(self) -> Tensor:
        """Rows that stand for themselves, int64 [n]."""
        return (self.keeper == torch.arange(len(self), device=self.keeper.device)).nonzero().squeeze(1)

    @cached_property
    def source(self) -> Tensor:
        """Where each row is found among the kept ones, int64 [N]."""
        return torch.searchsorted(self.kept, self.keeper)

    @cached_property
    def parted(self) -> tuple[Tensor, Tensor]:
        """Rows that are not token 0 of a sample, and those that are, int64."""
        return _parted(self.first)

    @cached_property
    def kept_parted(self) -> tuple[Tensor, Tensor]:
        """The same, counted among the kept rows."""
        return _parted(self.first[self.kept])

    def redrawn(self, draw: int) -> Rows:
        """The same rows with other keys, for each `draw` others."""
        return replace(self, keys=mix(self.keys + draw))

    # hidden states [N or n, H] as they are held, and what crosses: n rows where prefixes are shared, else N

    def leaving(self, x: Tensor, shared: bool) -> Tensor:
        if shared == self.distinct:
            return x
        return x.index_select(0, self.kept if shared else self.source)

    def arrived(self, x: Tensor, shared: bool) -> Tensor:
        if shared == self.distinct:
            return x
        return x.index_select(0, self.source if shared else self.kept)

    def leaving_back(self, dx: Tensor, shared: bool) -> Tensor:
        """Of gradients: the sum of all stands with the kept row."""
        if shared == self.distinct:
            return dx
        return self._summed(dx) if shared else self._alone(dx)

    def arrived_back(self, dx: Tensor, shared: bool) -> Tensor:
        if shared == self.distinct:
            return dx
        return self._alone(dx) if shared else self._summed(dx)

    def _summed(self, dx: Tensor) -> Tensor:
        """[N, H] -> [n, H]"""
        sums = dx.new_zeros(len(self.kept), dx.shape[1], dtype=torch.float32)
        return sums.index_add_(0, self.source, dx.float()).to(dx.dtype)

    def _alone(self, dx: Tensor) -> Tensor:
        """[n, H] -> [N, H], zeros where a row is not kept."""
        return dx.new_zeros(len(self), dx.shape[1]).index_copy_(0, self.kept, dx)


def _parted(first: Tensor) -> tuple[Tensor, Tensor]:
    return (~first).nonzero().squeeze(1), first.nonzero().squeeze(1)


def rows_of(ids: np.ndarray, real: np.ndarray, device: torch.device, tick: int = 0, distinct: bool = False) -> Rows:
    """Tokens [B, L] and the mask of real ones, right-padded; `tick` trains them."""
    at = np.cumsum(real.reshape(-1)).reshape(real.shape) - 1  # [B, L]: position in packed order
    keeper, prefix = at.copy(), np.zeros(len(ids), np.int64)
    for t in range(ids.shape[1]):
        alive = np.flatnonzero(real[:, t])
        pairs = np.stack([prefix[alive], ids[alive, t]], 1)
        _, first, prefix[alive] = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        if len(first) == len(alive):
            break  # no two samples agree any longer
        keeper[alive, t] = at[alive[first[prefix[alive]]], t]
    starts = np.zeros(real.shape, bool)
    starts[:, 0] = True
    found = starts[real], keeper[real], row_keys(ids, real, tick)
    return Rows(*(torch.from_numpy(array).to(device) for array in found), distinct=distinct)


def pack_rows(hidden: Tensor, real: Tensor) -> Tensor:
    """[B, L, H] and the mask of real tokens [B, L] -> the real rows [N, H], differentiable."""
    return hidden[real]


def unpack_rows(rows: Tensor, real: Tensor) -> Tensor:
    """Real rows [N, H] -> [B, L, H] with zeros at the padding, differentiable."""
    return rows.new_zeros(*real.shape, rows.shape[-1]).index_put((real,), rows)
