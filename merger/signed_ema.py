"""signed_ema: the magnitude of the compressed gradient, the sign of the anchor's.

    S = α·G_comp + (1-α)·|G_comp|·sign(M̄)        G = G_comp + d·(S - G_comp)

Each coordinate is multiplied by 1 where the signs agree, by 1-2d(1-α) where they differ and by
1-d(1-α) where M̄ is 0. So a stale wrong sign reverses the coordinate once d > 1/(2(1-α)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.along_signs import AlongSigns
from merger.dose import cost_of_dose, dose_at
from merger.interface import MergerCost, Norm, local_norm, towards_signs
from merger.settings import MergerSettings

if TYPE_CHECKING:
    from merger.holds import Holds
    from merger.interface import Gradient, Held


class SignedEMA(AlongSigns):
    """Keeps α of G_comp whatever the signs say."""

    @classmethod
    def cost(cls, config: MergerSettings, n: int) -> MergerCost:
        return cost_of_dose(config)

    @classmethod
    def has_effect(cls, config: MergerSettings) -> bool:
        return config.dose > 0

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        """Set the dose for this tick; only the ratio gate looks at the tensors, which are whole here."""
        self.dose = dose_at(self.config, age, lambda: self._delta(g_comp, correction), g_comp, norm)
        share = 1 - self.config.alpha
        if self.config.hold_cap and share:
            self.dose = min(self.dose, self.holds.bound(self.config.cap, age) / share)

    @classmethod
    def capped(cls, config: MergerSettings, holds: Holds) -> float | None:
        asked = config.dose * (1 - config.alpha)  # in the first merge, before λ
        return asked if config.hold_cap and asked > holds.bound(config.cap) else None

    def factors(self) -> tuple[float, float]:
        return 1 - self.config.alpha, self.dose

    def _delta(self, g_comp: Gradient, correction: Held) -> Gradient:
        """S - G_comp, in one new tensor."""
        d = towards_signs(g_comp, correction)
        d *= 1 - self.config.alpha
        return d
