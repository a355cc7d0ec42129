"""signed_ema: the magnitude of the compressed gradient, the sign of the anchor's.

    S = α·G_comp + (1-α)·|G_comp|·sign(M̄)        G = G_comp + d·(S - G_comp)

Each coordinate is multiplied by 1 where the signs agree, by 1-2d(1-α) where they differ and by
1-d(1-α) where M̄ is 0. So a stale wrong sign reverses the coordinate once d > 1/(2(1-α)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.config import MergerConfig
from merger.dose import Norm, dose_at, local_norm

if TYPE_CHECKING:
    from torch import Tensor


class SignedEMA:
    """Needs only sign(M̄), so a correction costs one bit a parameter."""

    payload = "sign"

    def __init__(self, config: MergerConfig):
        self.config = config
        self.dose = 0.0  # of the last `prepare`

    def prepare(self, g_comp: Tensor, correction: Tensor, age: int, norm: Norm = local_norm) -> None:
        """Set the dose for this tick; only the ratio gate looks at the tensors, which are whole here."""
        self.dose = dose_at(self.config, age, lambda: self._delta(g_comp, correction), g_comp, norm)

    def apply(self, g_comp: Tensor, correction: Tensor) -> Tensor:
        """`g_comp` fp32 [n], `correction` M̄ or its sign [n], or any block of both -> merged fp32 [n]."""
        return self._delta(g_comp, correction).mul_(self.dose).add_(g_comp)

    def _delta(self, g_comp: Tensor, correction: Tensor) -> Tensor:
        return g_comp.abs().mul_(correction.sign()).sub_(g_comp).mul_(1 - self.config.alpha)

    def __call__(self, g_comp: Tensor, correction: Tensor, age: int, norm: Norm = local_norm) -> Tensor:
        self.prepare(g_comp, correction, age, norm)
        return self.apply(g_comp, correction)
