"""How much of a correction is applied: d = dose · age_decay^age · λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merger.config import MergerConfig

if TYPE_CHECKING:
    from torch import Tensor

Norm = Callable[["Tensor"], float]


def local_norm(x: Tensor) -> float:
    """‖x‖ of a tensor that is all there is; a swarm passes one that sums over its stages."""
    return x.double().norm().item()


def dose_at(config: MergerConfig, age: int, delta: Callable[[], Tensor], g_comp: Tensor, norm: Norm) -> float:
    """The dose d of a correction at `age` ticks since its first merge.

    With the ratio gate, c = ‖δ‖/‖G_comp‖ over all parameters and λ = min(lambda_cap, 1/c);
    1/c is taken as infinite where δ is 0. Only then is the direction `delta()` formed.
    """
    d = config.dose * config.age_decay**age
    if config.adaptive_lambda_mode == "ratio":
        size = norm(delta())
        d *= min(config.lambda_cap, norm(g_comp) / size) if size > 0 else config.lambda_cap
    return d
