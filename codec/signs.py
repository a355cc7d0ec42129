"""sign(M) as bit planes: one bit a parameter, lossless including zeros.

One plane holds M > 0, and where M has exact zeros a second one holds M == 0. Zeros are either rare (1.6e-4
of the coordinates of a 1.5B model's gradient) or come in runs (rows of tokens that never occurred, or all of
an M whose batch had no advantage), so compressed they cost next to nothing: 2 to 7 bytes each, or less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codec.planes import COMPILED_FROM, expand, shrink


@dataclass(frozen=True)
class SignPlanes:
    """Signs of `numel` numbers, uint8 [numel/8 rounded up] a plane; what fills up the last byte means nothing."""

    plus: Tensor  # bits that are set where a number is > 0
    zero: Tensor | None  # where it is 0; None if there is none
    numel: int

    def sign(self) -> Tensor:
        """-1, 0 or 1, int8 [numel]; by the name that a tensor has for it."""
        signs = self._bits(self.plus)
        signs *= 2
        signs -= 1
        if self.zero is not None:
            nonzero = self._bits(self.zero)
            nonzero ^= 1
            signs *= nonzero
        return signs

    def to(self, device: torch.device | str) -> SignPlanes:
        """By the name that a tensor has for it."""
        return SignPlanes(self.plus.to(device), None if self.zero is None else self.zero.to(device), self.numel)

    def _bits(self, plane: Tensor) -> Tensor:
        if plane.device.type == "cpu":
            bits = np.unpackbits(plane.numpy(), count=self.numel, bitorder="little")
            return torch.from_numpy(bits.view(np.int8))
        bits = (plane[:, None] >> torch.arange(8, dtype=torch.uint8, device=plane.device)) & 1
        return bits.flatten()[: self.numel].char()


def encode(m: Tensor, name: str = "M") -> dict[str, np.ndarray]:
    """Flat [n] tensor -> arrays for a frame: bit planes `plus`, and `zero` if there is any; see `codec.planes`.

    Raises ValueError naming `name` if m holds a NaN.
    """
    planes = planes_of(m, name).to("cpu")
    arrays = {"plus": shrink(planes.plus.numpy())}
    return arrays if planes.zero is None else arrays | {"zero": shrink(planes.zero.numpy())}


def decode(arrays: dict[str, np.ndarray], numel: int) -> Tensor:
    """Arrays of `encode` -> int8 [numel] of -1, 0, 1. Raises ValueError if they do not fit `numel`."""
    return expanded(arrays, numel).sign()


def planes_of(m: Tensor, name: str = "M") -> SignPlanes:
    """Of a tensor of any shape, flat, on its device. Raises ValueError naming `name` if it holds a NaN."""
    values = m.detach().reshape(-1).contiguous()
    if values.dtype == torch.float32 and values.is_cuda:
        from codec.sign_kernels import packed as packed_there

        plus, zero, nan = packed_there(values)
    else:
        plus, zero, nan = _packed_here(values.cpu())
    if nan:
        raise ValueError(f"the gradient of {name} holds a NaN: a sign cannot be sent")
    return SignPlanes(plus, zero, values.numel())


def _packed_here(values: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    if values.dtype == torch.float32 and values.numel() >= COMPILED_FROM:
        from codec.sign_loops import packed  # LLVM is loaded where there is enough to do

        plus, zero, nan = packed(values.numpy())
    else:
        plus, zero, nan = plain_planes(values)
    return torch.from_numpy(plus), None if zero is None else torch.from_numpy(zero), nan


def plain_planes(values: Tensor) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """`codec.sign_loops.packed` in whole arrays, of any dtype."""
    nan = bool(torch.isnan(values).any())
    zeros = values == 0
    return _pack(values > 0), _pack(zeros) if zeros.any() else None, nan


def expanded(arrays: dict[str, np.ndarray], numel: int) -> SignPlanes:
    """Arrays of `encode` -> planes of their own memory. Raises ValueError if they do not fit `numel`."""
    if "plus" not in arrays or set(arrays) - {"plus", "zero"}:
        raise ValueError(f"sign planes are 'plus' and, where there are zeros, 'zero', not {sorted(arrays)}")
    planes = {field: _expanded(array, field, numel) for field, array in arrays.items()}
    return SignPlanes(planes["plus"], planes.get("zero"), numel)


def _expanded(array: np.ndarray, field: str, numel: int) -> Tensor:
    """A copy: a plane that was stored as it is lies in a frame, and would keep that alive."""
    return torch.from_numpy(expand(array, -(-numel // 8), f"sign plane {field!r}").copy())


def _pack(mask: Tensor) -> np.ndarray:
    return np.packbits(mask.numpy(), bitorder="little")
