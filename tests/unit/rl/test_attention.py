"""Attention in bf16 on a CPU is that of fp32, rounded once; one query against a cache is left to the kernel of bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rl.distinct import attend

B, HEADS, GROUPS, T, D = 3, 4, 2, 7, 16


def module() -> nn.Module:
    """What transformers' attention reads of a layer."""
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, HEADS // GROUPS
    return layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, T])
def test_bf16_is_widened_where_there_is_a_backward(queries: int, masked: bool):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, HEADS, queries, D, generator=generator).bfloat16().requires_grad_()
    k, v = (torch.randn(B, GROUPS, T, D, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    mask = torch.ones(B, 1, queries, T, dtype=torch.bool).tril(T - queries) if masked else None
    out, _ = attend(module(), q, k, v, mask)
    widened = [x.float() if queries > 1 else x for x in (q, k, v)]
    causal = mask is None and queries > 1
    plain = scaled_dot_product_attention(*widened, attn_mask=mask, is_causal=causal, enable_gqa=True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain.bfloat16().transpose(1, 2))
    upstream = torch.randn(out.shape, generator=generator).bfloat16()
    found = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    expected = torch.autograd.grad(plain.bfloat16().transpose(1, 2), (q, k, v), upstream)
    assert all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2) for a, b in zip(found, expected))
