"""sign(M) as bit planes: one bit a parameter, lossless including zeros.

One plane holds M > 0. Exact zeros are rare (1.6e-4 of the coordinates of a 1.5B model's gradient),
so their indices are listed instead of a second plane, unless the plane is smaller.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def encode(m: Tensor, name: str = "M") -> dict[str, np.ndarray]:
    """Flat [n] tensor -> arrays for a frame: `plus` (bit plane), and `zero` (indices or bit plane) if any.

    Raises ValueError naming `name` if m holds a NaN.
    """
    values = m.detach().reshape(-1).cpu()
    if torch.isnan(values).any():
        raise ValueError(f"the gradient of {name} holds a NaN: a sign cannot be sent")
    arrays = {"plus": np.packbits((values > 0).numpy(), bitorder="little")}
    zeros = (values == 0).numpy()
    count = int(zeros.sum())
    if count == 0:
        return arrays
    index_type = np.uint32 if zeros.size <= 2**32 else np.int64
    if count * np.dtype(index_type).itemsize < -(-zeros.size // 8):
        arrays["zero"] = np.flatnonzero(zeros).astype(index_type)
    else:
        arrays["zero_plane"] = np.packbits(zeros, bitorder="little")
    return arrays


def decode(arrays: dict[str, np.ndarray], numel: int) -> Tensor:
    """Arrays of `encode` -> int8 [numel] of -1, 0, 1. Raises ValueError if they do not fit `numel`."""
    if "plus" not in arrays:
        raise ValueError(f"no sign plane 'plus' among {sorted(arrays)}")
    planes = -(-numel // 8)
    for key in ("plus", "zero_plane"):
        if key in arrays and (arrays[key].shape != (planes,) or arrays[key].dtype != np.uint8):
            found = f"{arrays[key].dtype} {arrays[key].shape}"
            raise ValueError(f"sign plane {key!r} is {found}, {numel} parameters need uint8 ({planes},)")
    signs = np.unpackbits(arrays["plus"], count=numel, bitorder="little").view(np.int8)
    signs = signs * np.int8(2) - np.int8(1)
    if "zero_plane" in arrays:
        signs[np.unpackbits(arrays["zero_plane"], count=numel, bitorder="little").view(bool)] = 0
    if "zero" in arrays:
        zero = arrays["zero"]
        if zero.ndim != 1 or zero.dtype.kind not in "ui":
            raise ValueError(f"zero indices are {zero.dtype} {zero.shape}, not a row of integers")
        if zero.size and not 0 <= int(zero.min()) <= int(zero.max()) < numel:
            raise ValueError(f"zero indices {int(zero.min())} to {int(zero.max())} are outside {numel} parameters")
        signs[zero] = 0
    return torch.from_numpy(signs)
