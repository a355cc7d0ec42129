"""Weights of an engine on a CPU as oneDNN wants them, so that a product of few rows does not lay them out anew each time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rl.config import PACKED_FROM

_ROWS = 16  # for how many the layout is made; other numbers are multiplied with it too


class PackedLinears:
    """The large matrices of a model, once more: a copy in oneDNN's layout. On another device than a CPU there are none."""

    def __init__(self, model: nn.Module):
        there = torch.backends.mkldnn.is_available()
        found = (m for m in model.modules() if isinstance(m, nn.Linear)) if there else ()
        self.layers = [m for m in found if m.weight.numel() >= PACKED_FROM and m.weight.device.type == "cpu"]
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


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
    bias: Tensor | None = layer.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
