"""delta: add what the codec lost at the source tick, δ = M̄ - G_comp(source), held from the fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.config import MergerConfig
from merger.dose import Norm, dose_at, local_norm

if TYPE_CHECKING:
    from torch import Tensor


class Delta:
    """G = G_comp + d·δ. Needs M̄ in full, and every rank keeps its G_comp of the ticks a fire may come from."""

    payload = "dense"

    def __init__(self, config: MergerConfig):
        self.config = config
        self.dose = 0.0

    def prepare(self, g_comp: Tensor, correction: Tensor, age: int, norm: Norm = local_norm) -> None:
        """Set the dose for this tick."""
        self.dose = dose_at(self.config, age, lambda: correction, g_comp, norm)

    def apply(self, g_comp: Tensor, correction: Tensor) -> Tensor:
        """`g_comp` fp32 [n], `correction` δ fp32 [n], or any block of both -> merged fp32 [n]."""
        return g_comp + self.dose * correction

    def __call__(self, g_comp: Tensor, correction: Tensor, age: int, norm: Norm = local_norm) -> Tensor:
        self.prepare(g_comp, correction, age, norm)
        return self.apply(g_comp, correction)
