"""How well a way keeps what it carries, over the microbatches of one tick."""

from __future__ import annotations

import torch
from torch import Tensor


class Fidelity:
    """Sums over rows; the sender knows both what it sent and what arrives."""

    def __init__(self) -> None:
        self.rows = 0
        self.error = self.square = self.square_hat = self.dot = 0.0
        self.total: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Rows [n, H] and what the receiver makes of them."""
        x, x_hat = x.float(), x_hat.float()
        sums = torch.stack([(x - x_hat).square().sum(), x.square().sum(), x_hat.square().sum(), (x * x_hat).sum()])
        error, square, square_hat, dot = sums.tolist()
        self.rows += len(x)
        self.error, self.square = self.error + error, self.square + square
        self.square_hat, self.dot = self.square_hat + square_hat, self.dot + dot
        total = x.double().sum(0)
        self.total = total if self.total is None else self.total + total

    def fvu(self, name: str) -> dict[str, float]:
        """Fraction of variance unexplained, Σ‖x-x̂‖²/Σ‖x-μ‖²: it orders codecs by what they do to the policy.

        The error relative to ‖X‖² does not: a few massive directions that hardly vary hold nearly all of it.
        """
        if self.total is None:
            return {}
        variance = self.square - self.total.square().sum().item() / max(1, self.rows)
        return {name: self.error / variance} if variance > 0 else {}

    def cosine(self, name: str) -> dict[str, float]:
        norm = (self.square * self.square_hat) ** 0.5
        return {name: self.dot / norm} if norm else {}
