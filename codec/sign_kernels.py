"""Signs of float32 packed into planes on a GPU, and merged from them: one pass over its memory each, by Triton.

The planes and the bits of a gradient are those of `codec/sign_loops.py`: products and sums round one by one (no fused
multiply-add). Triton comes with every torch for CUDA, and asks for a C compiler the first time that a kernel is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads annotations as code:
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportArgumentType=false


@dataclass(frozen=True)
class KernelBlocks:
    """How a kernel's work is parted. Of those tried on an H200, which has 132 multiprocessors, the fastest for each."""

    rows: int  # bytes of a plane in a block, and eight times as many numbers
    programs: int  # at most, each taking every so many blocks


PACKING, MERGING = KernelBlocks(256, 8 * 132), KernelBlocks(64, 16 * 132)


def packed(values: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """float32 [n], contiguous -> bits of values > 0 and of zeros, if there are any, uint8 [n/8 rounded up] each, on its
    device; whether there is a NaN. Bits beyond n are 0."""
    rows = -(-values.numel() // 8)
    plus, zero = (torch.empty(rows, dtype=torch.uint8, device=values.device) for _ in range(2))
    nans, zeros = _counted(_pack, PACKING, values, plus, zero)
    return plus, zero if zeros else None, nans > 0


def merge_planes(g: Tensor, plus: Tensor, zero: Tensor | None, a: float, b: float) -> tuple[int, int]:
    """g ← g + a·b·(|g|·sign - g), float32 [n], contiguous, in its place; signs as `packed` gives them.

    How many signs were those of g, and how many of g it has turned.
    """
    assert g.is_contiguous()
    planes = (plus, plus if zero is None else zero)
    return _counted(_merge, MERGING, g, *planes, a, b, ZEROS=zero is not None, enable_fp_fusion=False)


def _counted(kernel: object, blocks: KernelBlocks, values: Tensor, *given: object, **known: object) -> tuple[int, int]:
    """Run over `values`; the sums of the two counts of each program, on the host: a sum there would be a kernel more."""
    programs = min(blocks.programs, -(-values.numel() // (8 * blocks.rows)))
    if not programs:
        return 0, 0
    counts = torch.empty(2, programs, dtype=torch.int32, device=values.device)
    cast(Any, kernel)[(programs,)](values, *given, counts, values.numel(), ROWS=blocks.rows, **known)
    first, second = counts.cpu().numpy().sum(1).tolist()
    return first, second


@triton.jit
def _pack(values, plus, zero, counts, n, ROWS: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, 8)
    bits = (1 << lanes)[None, :]
    nans, zeros = tl.zeros([ROWS, 8], tl.int32), tl.zeros([ROWS], tl.int32)
    for block in tl.range(program, tl.cdiv(n, 8 * ROWS), programs):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at, inside = rows[:, None] * 8 + lanes[None, :], rows * 8 < n
        x = tl.load(values + at, mask=at < n, other=-1.0)  # neither positive nor 0
        none = tl.sum(tl.where(x == 0.0, bits, 0), axis=1)
        tl.store(plus + rows, tl.sum(tl.where(x > 0.0, bits, 0), axis=1).to(tl.uint8), mask=inside)
        tl.store(zero + rows, none.to(tl.uint8), mask=inside)
        nans += (x != x).to(tl.int32)
        zeros += (none != 0).to(tl.int32)
    tl.store(counts + program, tl.sum(nans))
    tl.store(counts + programs + program, tl.sum(zeros))


@triton.jit
def _merge(g, plus, zero, a, b, counts, n, ZEROS: tl.constexpr, ROWS: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, 8)
    bits = (1 << lanes)[None, :]
    agree, flips = tl.zeros([ROWS, 8], tl.int32), tl.zeros([ROWS, 8], tl.int32)
    for block in tl.range(program, tl.cdiv(n, 8 * ROWS), programs):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at, inside = rows[:, None] * 8 + lanes[None, :], rows * 8 < n
        x = tl.load(g + at, mask=at < n, other=0.0)
        sign = tl.where((tl.load(plus + rows, mask=inside, other=0)[:, None] & bits) != 0, 1.0, -1.0)
        same = x * sign > 0.0
        if ZEROS:
            is_zero = (tl.load(zero + rows, mask=inside, other=0)[:, None] & bits) != 0
            sign = tl.where(is_zero, 0.0, sign)
            same = tl.where(is_zero, x == 0.0, same) & (at < n)
        merged = (tl.abs(x) * sign - x) * a * b + x
        tl.store(g + at, merged, mask=at < n)
        agree += same.to(tl.int32)
        flips += (merged * x < 0.0).to(tl.int32)
    tl.store(counts + program, tl.sum(agree))
    tl.store(counts + programs + program, tl.sum(flips))
