"""Signs of float32 packed into planes on a GPU, and merged from them: one pass over its memory each, by Triton.

The planes and the bits of a gradient are those of `codec/sign_loops.py`: products and sums round one by one (no fused
multiply-add). Triton comes with every torch for CUDA, and asks for a C compiler the first time that a kernel is started.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads annotations as code:
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportArgumentType=false

ROWS = 256  # bytes of a plane that one program takes, and eight times as many numbers


def packed(values: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """float32 [n], contiguous -> bits of values > 0 and of zeros, if there are any, uint8 [n/8 rounded up] each, on its
    device; whether there is a NaN. Bits beyond n are 0."""
    rows = -(-values.numel() // 8)
    plus, zero = (torch.empty(rows, dtype=torch.uint8, device=values.device) for _ in range(2))
    programs = triton.cdiv(rows, ROWS)
    seen = torch.empty(2, programs, dtype=torch.int32, device=values.device)
    if rows:
        cast(Any, _pack)[(programs,)](values, plus, zero, seen, values.numel(), ROWS=ROWS)
    nans, zeros = seen.sum(1).tolist()
    return plus, zero if zeros else None, nans > 0


def merge_planes(g: Tensor, plus: Tensor, zero: Tensor | None, a: float, b: float) -> tuple[int, int]:
    """g ← g + a·b·(|g|·sign - g), float32 [n], contiguous, in its place; signs as `packed` gives them.

    How many signs were those of g, and how many of g it has turned.
    """
    assert g.is_contiguous()
    programs = triton.cdiv(g.numel(), 8 * ROWS)
    counts = torch.empty(2, programs, dtype=torch.int32, device=g.device)
    if programs:
        planes = (plus, plus if zero is None else zero)
        kernel: Any = cast(Any, _merge)[(programs,)]
        kernel(g, *planes, counts, g.numel(), a, b, ZEROS=zero is not None, ROWS=ROWS, enable_fp_fusion=False)
    agree, flips = counts.sum(1).tolist()
    return agree, flips


@triton.jit
def _pack(values, plus, zero, seen, n, ROWS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    rows, lanes = program * ROWS + tl.arange(0, ROWS), tl.arange(0, 8)
    at = rows[:, None] * 8 + lanes[None, :]
    x = tl.load(values + at, mask=at < n, other=-1.0)  # neither positive nor 0
    bits = (1 << lanes)[None, :]
    zeros = tl.where(x == 0.0, bits, 0)
    inside = rows * 8 < n
    tl.store(plus + rows, tl.sum(tl.where(x > 0.0, bits, 0), axis=1).to(tl.uint8), mask=inside)
    tl.store(zero + rows, tl.sum(zeros, axis=1).to(tl.uint8), mask=inside)
    tl.store(seen + program, tl.sum(tl.sum((x != x).to(tl.int32), axis=1)))
    tl.store(seen + tl.num_programs(0) + program, tl.sum(tl.sum((zeros > 0).to(tl.int32), axis=1)))


@triton.jit
def _merge(g, plus, zero, counts, n, a, b, ZEROS: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    rows, lanes = program * ROWS + tl.arange(0, ROWS), tl.arange(0, 8)
    at, inside = rows[:, None] * 8 + lanes[None, :], rows * 8 < n
    x = tl.load(g + at, mask=at < n, other=0.0)
    is_plus = ((tl.load(plus + rows, mask=inside, other=0)[:, None] >> lanes[None, :]) & 1) != 0
    sign = tl.where(is_plus, 1.0, -1.0)
    same = tl.where(is_plus, x > 0.0, x < 0.0)
    if ZEROS:
        is_zero = ((tl.load(zero + rows, mask=inside, other=0)[:, None] >> lanes[None, :]) & 1) != 0
        sign = tl.where(is_zero, 0.0, sign)
        same = tl.where(is_zero, (x <= 0.0) & (x >= 0.0), same) & (at < n)
    merged = (tl.abs(x) * sign - x) * a * b + x
    tl.store(g + at, merged, mask=at < n)
    tl.store(counts + program, tl.sum(tl.sum(same.to(tl.int32), axis=1)))
    tl.store(counts + tl.num_programs(0) + program, tl.sum(tl.sum((merged * x < 0.0).to(tl.int32), axis=1)))
