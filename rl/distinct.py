"""Rows that samples have in common computed once: what a prompt's G samples share goes through the model a single time.

    samples     P P P a a          distinct rows      P P P a a b c c d       n of N
                P P P b c c        attention          q of a sample's own rows, k and v of all that are before them
                P P P d

Exact: a causal model's hidden state depends only on the tokens up to its own, and gradients of rows that are read more than
once add up. All but the attention sees the n rows without padding; the attention sees samples again:

    a sample that is mostly its own   all its rows, causal
    else                              its own rows against all of its rows, by a mask

Reference: prefix grouper (Liu et al. 2025, arXiv:2506.05433), there with one shared prefix a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from codec.rows import Rows

_NAME = "sdpa_of_distinct_rows"


@dataclass(frozen=True)
class Distinct:
    """n distinct rows of a microbatch, and where its samples find theirs. At padding an index is 0: nobody reads that."""

    positions: Int[Tensor, " n"]  # in their samples
    whole: Int[Tensor, "s l"]  # rows of each sample that is mostly its own
    own: Int[Tensor, "t o"]  # of the others, t of them, those that are their own
    seen: Int[Tensor, "t m"]  # and all of theirs
    mask: Bool[Tensor, "t 1 o m"]  # whether the former sees the latter
    back: Int[Tensor, " n"]  # where each row is found in what comes of `whole`, then of `own`


def distinct_of(real: np.ndarray, rows: Rows) -> Distinct:
    """Of right-padded samples, `real` [B, L]."""
    grid, alone = np.zeros(real.shape, np.int64), np.zeros(real.shape, bool)
    grid[real] = rows.source.cpu().numpy()
    alone[real] = (rows.keeper == torch.arange(len(rows), device=rows.keeper.device)).cpu().numpy()
    total, own = real.sum(1), alone.sum(1)  # what a sample has in common comes first
    wide = 2 * own > total
    first, then = np.flatnonzero(wide), np.flatnonzero(~wide & (own > 0))
    longest, m, o = (int(lengths.max(initial=0)) for lengths in (total[first], total[then], own[then]))
    columns = np.arange(real.shape[1])
    at = (total - own)[then][:, None] + np.arange(o)  # [t, o]: positions of own rows, beyond the end at padding
    where = np.zeros(real.shape, np.int64)
    where[first] = np.arange(len(first))[:, None] * longest + columns
    where[then] = len(first) * longest + np.arange(len(then))[:, None] * o + columns - (total - own)[then][:, None]
    _, position = np.nonzero(real)
    kept, device = alone[real], rows.keeper.device
    found = {
        "positions": position[kept],
        "whole": grid[first, :longest],
        "own": np.take_along_axis(grid[then], np.minimum(at, real.shape[1] - 1), 1),
        "seen": grid[then, :m],
        "mask": (np.arange(m) <= at[:, :, None])[:, None],
        "back": where[real][kept],
    }
    return Distinct(**{name: torch.from_numpy(value).to(device) for name, value in found.items()})


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b g l d"],
    value: Float[Tensor, "b g l d"],
    attention_mask: Tensor | None,
    distinct: Distinct | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`_grouped`; with `distinct` of rows that samples share, b = 1 and l = n. Returns [b, l, h, d]."""
    if distinct is None:
        return _grouped(module, query, key, value, attention_mask, **options), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    blocks = [(distinct.whole, distinct.whole, None), (distinct.own, distinct.seen, distinct.mask)]
    found = [
        _grouped(module, _taken(q, own), _taken(k, seen), _taken(v, seen), mask, **options)
        for own, seen, mask in blocks
        if own.numel()
    ]
    out = torch.cat([block.flatten(0, 1) for block in found])
    return out.flatten(1).index_select(0, distinct.back).view(1, *q.shape), None


def _grouped(
    module: nn.Module,
    query: Float[Tensor, "b h o d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m d"],
    mask: Tensor | None,
    **options: Any,
) -> Float[Tensor, "b o h d"]:
    """transformers' sdpa, which beside a mask repeats keys and values for all h heads of g groups: on a CPU the kernel
    reads them where they are, for the same outputs to the bit.

    Of more than one query a sample a CPU makes it in fp32, as in bf16 its backward takes 3 to 12 times as long (T 20 to 150).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] > 1:
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return _grouped(module, query.float(), key.float(), value.float(), mask, **options).to(query.dtype)
    if mask is None or query.device.type != "cpu" or "position_bias" in options:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous()


def _taken(x: Float[Tensor, "n h d"], rows: Int[Tensor, "s l"]) -> Float[Tensor, "s h l d"]:
    return x.flatten(1).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)


def registered() -> str:
    """The name under which transformers now finds `attend`."""
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _NAME
