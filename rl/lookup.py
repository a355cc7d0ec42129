"""An embedding whose gradient is added to the rows that were looked up.

torch makes one as large as the vocabulary for each microbatch, all zeros but these rows, and adds it to that of a tied head and to
what was there: of SmolLM2 three passes over 113 MB, 4 % of a microbatch's time. To the bit the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

Rows = tuple[Int[Tensor, " u"], Float[Tensor, "u h"]]  # which, in ascending order, and what is to be added to each


class Lookup(nn.Module):
    """Ids [...] -> `embed`'s rows [..., H]. `tied`: its weight is that of a head too, which every backward pass goes through."""

    def __init__(self, embed: nn.Embedding, tied: bool):
        super().__init__()
        self.embed = embed
        weight = embed.weight
        # other kinds scale what they look up; on a GPU nobody has compared the bits
        self.by_rows = type(embed) is nn.Embedding and weight.requires_grad and weight.is_cpu
        self.waiting: list[Rows] | None = [] if tied else None
        if self.by_rows and self.waiting is not None:
            weight.register_hook(partial(_with_rows, self.waiting))  # holds neither the module nor its weight

    def forward(self, ids: Tensor) -> Tensor:
        if not (self.by_rows and torch.is_grad_enabled()):
            return self.embed(ids)
        return _Looked.apply(self.embed.weight, ids, self.embed.padding_idx, self.waiting)


class _Looked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, waiting: list[Rows] | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding, ctx.waiting = weight, padding, waiting
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *passed: Tensor) -> tuple[None, ...]:
        """None for the weight: a head's gradient, which comes before, then goes on alone, and meets `_with_rows`."""
        (ids,), (grad,) = ctx.saved_tensors, passed
        rows, at = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad, at, len(rows), -1, False)
        kept = rows != (-1 if ctx.padding is None else ctx.padding)  # padding has no gradient
        found = rows[kept], sums[kept]
        if ctx.waiting is None:
            ctx.weight.grad.index_add_(0, *found)
        else:
            ctx.waiting.append(found)
        return None, None, None, None


def _with_rows(waiting: list[Rows], of_head: Tensor) -> Tensor:
    """In its place: nobody else holds it."""
    while waiting:
        of_head.index_add_(0, *waiting.pop())
    return of_head
