"""PowerSGD of weight gradients with error feedback, on the data-parallel axis.

In the order of PyTorch's `powerSGD_hook`, which the tests hold it to:  add error → orth(Q) → P = MQ → Σ → orth(P) → Q = MᵀP → Σ → M̂ = PQᵀ → error.
The gradient here is a sum over replicas (the loss has one global denominator), not a mean.

References: Vogels, Karimireddy, Jaggi 2019, "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from codec.costs import is_factored
from codec.powersgd import orthonormalise

Sum = Callable[[Tensor, float], None]  # sum in place over replicas; second: bytes a dense system would send


class DenseSum:
    """No compression: one sum of the flat gradient."""

    def __init__(self, sum_over_replicas: Sum):
        self.sum = sum_over_replicas

    def __call__(self, grad: Tensor) -> None:
        self.sum(grad, grad.nbytes)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...


class PowerSGDSum:
    """Rank-r factors of every weight matrix; vectors and matrices too small to gain go dense.

    `shapes` describe the parameters in the order they lie in the flat gradient. `error` and `q` are
    this replica's state; `q` is equal on all replicas.
    """

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        rank: int,
        replicas: int,
        seed: int,
        sum_over_replicas: Sum,
        device: torch.device,
    ):
        self.replicas, self.sum = replicas, sum_over_replicas
        self.matrices: list[tuple[slice, tuple[int, int], int]] = []
        self.dense: list[slice] = []
        start = 0
        for shape in shapes:
            n = prod(shape)
            where, start = slice(start, start + n), start + n
            if len(shape) == 2 and is_factored(shape, rank):
                self.matrices.append((where, shape, min(rank, *shape)))
            else:
                self.dense.append(where)
        self.error = torch.zeros(start, device=device)
        # one generator a matrix: a tied embedding on two stages gets the same start wherever it lies
        self.q = [
            torch.randn(shape[1], r, generator=torch.Generator().manual_seed(seed)).to(device)
            for _, shape, r in self.matrices
        ]

    def __call__(self, grad: Tensor) -> None:
        """Replace the flat gradient by the sum's approximation, the same on every replica."""
        self._sum_dense(grad)
        inputs = [(grad[where] + self.error[where]).view(shape) for where, shape, _ in self.matrices]
        bases = [orthonormalise(q) for q in self.q]
        ps = self._summed([m @ q for m, q in zip(inputs, bases)], sum(m.nbytes for m in inputs))
        ps = [orthonormalise(p) for p in ps]
        self.q = self._summed([m.T @ p for m, p in zip(inputs, ps)], 0)
        for (where, _, _), m, p, q in zip(self.matrices, inputs, ps, self.q):
            approximation = p @ q.T
            self.error[where] = (m - approximation / self.replicas).view(-1)
            grad[where] = approximation.view(-1)

    def _sum_dense(self, grad: Tensor) -> None:
        if self.dense:
            flat = torch.cat([grad[where] for where in self.dense])
            self.sum(flat, flat.nbytes)
            for where, part in zip(self.dense, flat.split([w.stop - w.start for w in self.dense])):
                grad[where] = part

    def _summed(self, parts: list[Tensor], dense_bytes: float) -> list[Tensor]:
        if not parts:
            return []
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.sum(flat, dense_bytes)
        return [f.view(part.shape) for f, part in zip(flat.split([p.numel() for p in parts]), parts)]

    def state(self) -> dict[str, Tensor]:
        return {"error": self.error} | {f"q.{i}": q for i, q in enumerate(self.q)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.error.copy_(state["error"])
        self.q = [state[f"q.{i}"].to(self.error.device) for i in range(len(self.q))]
