"""Mergers that move each coordinate along the sign of M̄: G = G_comp + a·b·(|G_comp|·sign(M̄) - G_comp).

Each of the products is rounded, a first. On a CPU such a merge is one pass over the gradient, from packed signs
(`codec/sign_loops.py`); `apply` is the same in whole arrays, for every other device and for `northstar plan`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from merger.interface import Merger, Payload, towards_signs

if TYPE_CHECKING:
    from merger.interface import Gradient, Held


class AlongSigns(Merger):
    """Needs only sign(M̄), so a correction costs one bit a parameter."""

    payload: ClassVar[Payload | None] = "sign"

    @abstractmethod
    def factors(self) -> tuple[float, float] | None:
        """a and b of the last `prepare`; None: G_comp is left as it is."""

    def apply(self, g_comp: Gradient, correction: Held) -> Gradient:
        """`g_comp` fp32, `correction` M̄ or its sign, whole or any block of both -> merged, fp32."""
        factors = self.factors()
        if factors is None:
            return g_comp
        merged = towards_signs(g_comp, correction)
        for factor in factors:
            if factor != 1:
                merged *= factor
        merged += g_comp
        return merged
