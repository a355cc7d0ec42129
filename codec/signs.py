"""sign(M) as bit planes: one bit a parameter, lossless including zeros.

One plane holds M > 0, and where M has exact zeros a second one holds M == 0. Zeros are either rare (1.6e-4
of the coordinates of a 1.5B model's gradient) or come in runs (rows of tokens that never occurred, or all of
an M whose batch had no advantage), so compressed they cost next to nothing: 2 to 7 bytes each, or less.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codec.planes import expand, shrink


def encode(m: Tensor, name: str = "M") -> dict[str, np.ndarray]:
    """Flat [n] tensor -> arrays for a frame: bit planes `plus`, and `zero` if there is any; see `codec.planes`.

    Raises ValueError naming `name` if m holds a NaN.
    """
    values = m.detach().reshape(-1).cpu()
    if torch.isnan(values).any():
        raise ValueError(f"the gradient of {name} holds a NaN: a sign cannot be sent")
    arrays = {"plus": _pack(values > 0)}
    zeros = values == 0
    return arrays | {"zero": _pack(zeros)} if zeros.any() else arrays


def decode(arrays: dict[str, np.ndarray], numel: int) -> Tensor:
    """Arrays of `encode` -> int8 [numel] of -1, 0, 1. Raises ValueError if they do not fit `numel`."""
    if "plus" not in arrays or set(arrays) - {"plus", "zero"}:
        raise ValueError(f"sign planes are 'plus' and, where there are zeros, 'zero', not {sorted(arrays)}")
    signs = _unpack(arrays, "plus", numel)
    signs *= 2
    signs -= 1
    if "zero" in arrays:
        nonzero = _unpack(arrays, "zero", numel)
        nonzero ^= 1
        signs *= nonzero
    return torch.from_numpy(signs)


def _pack(mask: Tensor) -> np.ndarray:
    return shrink(np.packbits(mask.numpy(), bitorder="little"))


def _unpack(arrays: dict[str, np.ndarray], field: str, numel: int) -> np.ndarray:
    """0 and 1, int8 [numel]; the bits that fill up the last byte mean nothing."""
    plane = expand(arrays[field], -(-numel // 8), f"sign plane {field!r}")
    return np.unpackbits(plane, count=numel, bitorder="little").view(np.int8)
