"""How few errors a number of bits can leave: the bound that orders directions, and tells what tables are worth.

References: Cover and Thomas, "Elements of Information Theory", 2nd ed. 2006, 10.3.3 (reverse water-filling).
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 100  # of the water level's interval


def reverse_water_filling(variances: Tensor, bits: float) -> tuple[float, float]:
    """Variances [k] -> least mean square error of Gaussians with `bits` in total, and the water level θ.

    D = Σ min(λ_i, θ) where Σ ½log2(λ_i/θ)⁺ = bits.
    """
    variances = variances.double().clamp_min(0)
    low, high = 0.0, float(variances.max()) if variances.numel() else 0.0
    for _ in range(HALVINGS):
        level = (low + high) / 2
        spent = 0.5 * torch.log2((variances / max(level, 1e-300)).clamp_min(1)).sum().item()
        low, high = (level, high) if spent > bits else (low, level)
    return torch.minimum(variances, variances.new_tensor(high)).sum().item(), high
