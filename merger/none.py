"""No merger: G = G_comp. The floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.config import MergerConfig

if TYPE_CHECKING:
    from torch import Tensor


class NoMerger:
    """Leaves the compressed gradient as it is, whatever the anchor says."""

    payload = None  # what the anchor must publish for this merger

    def __init__(self, config: MergerConfig):
        self.dose = 0.0

    def __call__(self, g_comp: Tensor, correction: Tensor, age: int, norm=None) -> Tensor:
        return g_comp
