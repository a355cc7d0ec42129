"""A correction merged in place of the gradient, and signs counted on the way, in one pass over memory where that is known how.

packed signs ─▶ machine code: by LLVM on a CPU (codec/sign_loops.py), by Triton on a GPU (codec/sign_kernels.py)
all else ─▶ the merger's own `apply`, block by block, so that its temporaries stay in the cache
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from codec.signs import SignPlanes, planes_of
from codec.state import under
from merger import holds_planes
from merger.along_signs import AlongSigns
from merger.interface import Merger

CACHED, WIDE = 1 << 16, 1 << 22  # elements of a block: on a CPU temporaries of a merge stay in the second-level cache


def held_form(merger: Merger, values: Tensor | SignPlanes, device: str) -> Tensor | SignPlanes:
    """In which a correction is held: signs packed, for a merger that merges them so, and else a tensor on its device."""
    numel = values.numel if isinstance(values, SignPlanes) else values.numel()
    if holds_planes(type(merger), device, numel):
        return (values if isinstance(values, SignPlanes) else planes_of(values)).to(device)
    return (values.sign() if isinstance(values, SignPlanes) else values).to(device)


def stored(name: str, values: Tensor | SignPlanes | None) -> dict[str, Tensor]:
    """For a checkpoint: a tensor as it is, packed signs as they are held."""
    if isinstance(values, SignPlanes):
        planes = {"plus": values.plus, "zero": values.zero}
        return {f"{name}.{k}": plane for k, plane in planes.items() if plane is not None}
    return {} if values is None else {name: values}


def restored(name: str, state: dict[str, Tensor], numel: int) -> Tensor | SignPlanes | None:
    """Inverse of `stored`."""
    planes = under(name, state)
    return SignPlanes(planes["plus"], planes.get("zero"), numel) if planes else state.get(name)


def merge_in_place(merger: Merger, g_comp: Tensor, correction: Tensor | SignPlanes) -> tuple[int, int]:
    """Of the gradient, fp32 [n]. How many of its signs the correction has, and how many the merge has turned."""
    if isinstance(correction, SignPlanes):
        factors = cast(AlongSigns, merger).factors()
        if factors is not None:
            return _merge_planes(g_comp, correction, *factors)
        correction = correction.sign()
    agree, flips = g_comp.new_zeros((), dtype=torch.int64), g_comp.new_zeros((), dtype=torch.int64)
    block = CACHED if g_comp.device.type == "cpu" else WIDE
    for g, c in zip(g_comp.split(block), correction.split(block)):
        merged = merger.apply(g, c)
        agree += (c.sign() == g.sign()).sum()
        flips += (merged * g < 0).sum()
        g.copy_(merged)
    return int(agree.item()), int(flips.item())


def _merge_planes(g_comp: Tensor, signs: SignPlanes, a: float, b: float) -> tuple[int, int]:
    if g_comp.is_cuda:
        from codec.sign_kernels import merge_planes as merge_there

        return merge_there(g_comp, signs.plus, signs.zero, a, b)
    from codec.sign_loops import merge_planes  # LLVM is loaded where there is enough to do

    zero = None if signs.zero is None else signs.zero.numpy()
    return merge_planes(g_comp.numpy(), signs.plus.numpy(), zero, a, b)
