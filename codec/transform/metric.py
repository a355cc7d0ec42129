"""What an error in X costs: not its size alone, but what the loss makes of it.

An error e of a row moves the policy by about  KL ≈ ½ eᵀ F e  with F = E[dX dXᵀ], as dX is the gradient of a
log-probability times an advantage. The tables of the way back hold F's large directions, and the sender of X has
them anyway, so it costs no byte to count errors in

    S  =  (1 - share) · I  +  share · F · H / tr F

In coordinates S^½ x all errors are alike again: there the axes are principal, and there bits are allotted.
The variances along X's own axes alone, weighted by F's diagonal there, gain nothing: F and X's covariance
have other axes.

References: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 5,
which weighs errors in weights by such a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """S, from the tables of dX."""

    basis: Tensor  # [H, k] of dX
    deviations: Tensor  # [k], along it
    raw: Tensor  # the bytes they came in, uint8
    share: float  # of S that is dX's; 0 <= share < 1

    def times(self, x: Tensor) -> Tensor:
        """S · x for x [H, m], float64."""
        x, basis, variances = x.double(), self.basis.double(), self.deviations.double().square()
        trace = (basis.square().sum(0) * variances).sum().clamp_min(1e-300)  # 0 only if somebody forged the tables
        weights = variances * (self.share * len(x) / trace)
        return (1 - self.share) * x + basis @ (weights[:, None] * (basis.T @ x))

    def roots(self) -> tuple[Tensor, Tensor]:
        """S^½ and S^-½, float64 [H, H]."""
        values, vectors = torch.linalg.eigh(self.times(torch.eye(len(self.basis), device=self.basis.device)))
        root = values.clamp_min(1 - self.share).sqrt()
        return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
