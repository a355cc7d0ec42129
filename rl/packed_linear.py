"""Weights of an engine on a CPU as oneDNN wants them, so that a product of few rows does not lay them out anew each time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rl.config import PACKED_FROM

_ROWS = 16  # for how many the layout is made; other numbers are multiplied with it too


class PackedLinears:
    """The large matrices of a model, once more: a copy in oneDNN's layout. There are none where oneDNN cannot, or on a GPU."""

    def __init__(self, model: nn.Module):
        found = (m for m in model.modules() if isinstance(m, nn.Linear))
        large = [m for m in found if m.weight.numel() >= PACKED_FROM and m.weight.device.type == "cpu"]
        self.layers = large if large and _can_pack(large[0].weight.dtype) else []
        self._packed: list[Callable[[Tensor], Tensor]] = []

    def forget(self) -> None:
        """The weights have changed."""
        self._packed = []

    @contextmanager
    def in_use(self) -> Generator[None]:
        """The model's matrices multiply by the copies, made first if the weights have changed. Without gradients alone."""
        if not self._packed:
            self._packed = [_product(layer) for layer in self.layers]
        for layer, product in zip(self.layers, self._packed):
            vars(layer)["forward"] = product
        try:
            yield
        finally:
            for layer in self.layers:
                del vars(layer)["forward"]  # the class has its own


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN, and this CPU what oneDNN needs: in bf16 more than for a plain product."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), _ROWS)
    except (AttributeError, RuntimeError):
        return False
    return True


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
    bias: Tensor | None = layer.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
