"""PowerSGD of weight gradients with error feedback, between replicas; its factors dense or in few bits.

In the order of PyTorch's `powerSGD_hook`, which the tests hold it to:  add error → orth(Q) → P = MQ → Σ → orth(P) → Q = MᵀP → Σ → M̂ = PQᵀ.
The gradient here is a sum over replicas (the loss has one global denominator), not a mean. What a replica keeps as its error is
what it has put in less what of it has arrived, M - P(its own Q as it was added)ᵀ: over all replicas that is the hook's ΣM - M̂, and it
does not pile up what one replica's gradients have apart from another's, which few bits would have to carry on.

A P in few bits spans a slightly other space, which costs nothing but a little of what M̂ catches; what a Q in few bits loses is kept.

References: Vogels, Karimireddy, Jaggi 2019, "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from codec.coded_sum import Replicas, coded_sum
from codec.costs import is_factored
from codec.powersgd import orthonormalise
from codec.vector import VectorCoder


class PowerSGDSum:
    """Rank-r factors of every weight matrix; vectors and matrices too small to gain travel whole, beside P.

    `shapes` describe the parameters in the order they lie in the flat gradient; without a `coder` numbers travel as fp32.
    `error` and `q` are this replica's state; `q` is equal on all replicas.
    """

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        rank: int,
        replicas: Replicas,
        seed: int,
        device: torch.device,
        coder: VectorCoder | None = None,
    ):
        self.replicas, self.coder = replicas, coder
        self.matrices: list[tuple[slice, tuple[int, int], int]] = []
        self.whole: list[slice] = []
        start = 0
        for shape in shapes:
            n = prod(shape)
            where, start = slice(start, start + n), start + n
            if len(shape) == 2 and is_factored(shape, rank):
                self.matrices.append((where, shape, min(rank, *shape)))
            else:
                self.whole.append(where)
        self.error = torch.zeros(start, device=device)
        # one generator a matrix: a tied embedding on two stages gets the same start wherever it lies
        self.q = [
            torch.randn(shape[1], r, generator=torch.Generator().manual_seed(seed)).to(device)
            for _, shape, r in self.matrices
        ]

    def __call__(self, grad: Tensor) -> None:
        """Replace the flat gradient by the sum's approximation, the same on every replica."""
        dense_bytes = grad.nbytes
        self.error += grad
        inputs = [self.error[where].view(shape) for where, shape, _ in self.matrices]
        vectors = [self.error[where] for where in self.whole]
        bases = [orthonormalise(q) for q in self.q]
        summed, lost = self._sum([*vectors, *(m @ q for m, q in zip(inputs, bases))], dense_bytes)
        for where, total, left in zip(self.whole, summed, lost):
            grad[where], self.error[where] = total, left
        ps = [orthonormalise(p) for p in summed[len(vectors) :]]
        own = [m.T @ p for m, p in zip(inputs, ps)]
        self.q, lost = self._sum(own, 0.0)
        for (where, _, _), m, p, q, mine, left in zip(self.matrices, inputs, ps, self.q, own, lost):
            grad[where] = (p @ q.T).view(-1)
            m -= p @ (mine - left).T  # a view of the error

    def _sum(self, parts: list[Tensor], dense_bytes: float) -> tuple[list[Tensor], list[Tensor]]:
        """Sums over replicas in one exchange, and what of them this replica has to send again."""
        if not parts:
            return [], []
        flat = torch.cat([part.reshape(-1) for part in parts])
        if self.coder is None:
            lost = torch.zeros_like(flat)
            self.replicas.sum(flat, dense_bytes)
        else:
            flat, lost = coded_sum(flat, self.coder, self.replicas, dense_bytes)
        sizes = [part.numel() for part in parts]
        total, left = ([f.view(part.shape) for f, part in zip(vector.split(sizes), parts)] for vector in (flat, lost))
        return total, left

    def state(self) -> dict[str, Tensor]:
        return {"error": self.error} | {f"q.{i}": q for i, q in enumerate(self.q)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.error.copy_(state["error"])
        self.q = [state[f"q.{i}"].to(self.error.device) for i in range(len(self.q))]
