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

    def redrawn(self, draw: int) -> Rows:
        """The same rows with other keys, for each `draw` others."""
        return replace(self, keys=mix(self.keys + draw))


def rows_of(ids: np.ndarray, real: np.ndarray, device: torch.device, tick: int = 0) -> Rows:
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
    return Rows(*(torch.from_numpy(array).to(device) for array in found))


def pack_rows(hidden: Tensor, real: Tensor) -> Tensor:
    """[B, L, H] and the mask of real tokens [B, L] -> the real rows [N, H], differentiable."""
    return hidden[real]


def unpack_rows(rows: Tensor, real: Tensor) -> Tensor:
    """Real rows [N, H] -> [B, L, H] with zeros at the padding, differentiable."""
    return rows.new_zeros(*real.shape, rows.shape[-1]).index_put((real,), rows)
