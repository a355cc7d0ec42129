"""delta: add what the codec lost at the source tick, δ = M̄ - G_comp(source), from the fire on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from merger.dose import cost_of_dose, dose_at
from merger.interface import Merger, MergerCost, Norm, Payload, local_norm
from merger.settings import MergerSettings

if TYPE_CHECKING:
    from merger.interface import Gradient, Held


class Delta(Merger):
    """G = G_comp + d·δ. Needs M̄ in full, and every rank keeps its G_comp of the ticks a fire may come from."""

    payload: ClassVar[Payload | None] = "dense"
    needs_source: ClassVar[bool] = True

    @classmethod
    def cost(cls, config: MergerSettings, n: int) -> MergerCost:
        return cost_of_dose(config)

    @classmethod
    def has_effect(cls, config: MergerSettings) -> bool:
        return config.dose > 0

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        """Set the dose for this tick."""
        self.dose = dose_at(self.config, age, lambda: correction, g_comp, norm)
        if self.config.spend == "spread":
            self.dose /= self.holds.mean(age)
        elif self.config.spend == "once" and age > 0:
            self.dose = 0.0

    def apply(self, g_comp: Gradient, correction: Held) -> Gradient:
        """`g_comp` and `correction` δ, whole or any block of both -> merged, fp32."""
        return g_comp + self.dose * correction
