"""How much of a correction is applied: d = dose · age_decay^age · λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merger.interface import MergerCost, Norm
from merger.settings import MergerSettings

if TYPE_CHECKING:
    from merger.interface import Gradient


def dose_at(config: MergerSettings, age: int, delta: Callable[[], Gradient], g_comp: Gradient, norm: Norm) -> float:
    """The dose d of a correction at `age` ticks since its first merge.

    With the ratio gate, c = ‖δ‖/‖G_comp‖ over all parameters and λ = min(lambda_cap, 1/c);
    1/c is taken as infinite where δ is 0. Only then is the direction `delta()` formed.
    """
    d = config.dose * config.age_decay**age
    if config.adaptive_lambda_mode == "ratio":
        size = norm(delta())
        d *= min(config.lambda_cap, norm(g_comp) / size) if size > 0 else config.lambda_cap
    return d


def cost_of_dose(config: MergerSettings) -> MergerCost:
    """The ratio gate takes the norms of δ and of G_comp."""
    return MergerCost(norms=2 if config.adaptive_lambda_mode == "ratio" else 0)
