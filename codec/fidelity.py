"""How well a way keeps what it carries, over the microbatches of one tick."""

from __future__ import annotations

import torch
from torch import Tensor


class Fidelity:
    """Sums over rows; the sender knows both what it sent and what arrives. They stay where the rows are until they are
    asked for: a GPU would be waited for in every microbatch."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: Tensor | None = None  # float64: of the error, x and x_hat the squares, and x · x_hat
        self.total: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Rows [n, H] and what the receiver makes of them."""
        x, x_hat = x.float(), x_hat.float()
        sums = torch.stack([(x - x_hat).square().sum(), x.square().sum(), x_hat.square().sum(), (x * x_hat).sum()])
        total = x.double().sum(0)
        self.rows += len(x)
        self.sums = sums.double() if self.sums is None else self.sums + sums
        self.total = total if self.total is None else self.total + total

    @property
    def error(self) -> float:
        """Σ‖x-x̂‖²."""
        return 0.0 if self.sums is None else self.sums[0].item()

    def fvu(self, name: str) -> dict[str, float]:
        """Fraction of variance unexplained, Σ‖x-x̂‖²/Σ‖x-μ‖²: it orders codecs by what they do to the policy.

        The error relative to ‖X‖² does not: a few massive directions that hardly vary hold nearly all of it.
        """
        if self.sums is None or self.total is None:
            return {}
        error, square, _, _ = self.sums.tolist()
        variance = square - self.total.square().sum().item() / max(1, self.rows)
        return {name: error / variance} if variance > 0 else {}

    def cosine(self, name: str) -> dict[str, float]:
        if self.sums is None:
            return {}
        _, square, square_hat, dot = self.sums.tolist()
        norm = (square * square_hat) ** 0.5
        return {name: dot / norm} if norm else {}
