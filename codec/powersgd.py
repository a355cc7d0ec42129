"""PowerSGD of hidden states: a rank-r sketch through a warm-started orthonormal basis.

Vogels et al. 2019, "PowerSGD", arXiv:1905.13727: one power-iteration step a refresh, the basis
carried over. Here the matrix is the hidden state X [tokens, H] of one boundary, and the basis Q
[H, r] is shared by both sides of the link, so only Y = XQ [tokens, r] crosses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import Room, Stateless, Way, as_bytes, as_numbers


def orthonormalise(v: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `v` [H, r], in fp32.

    QR with the sign of R's diagonal made positive, which makes Q unique. Gram-Schmidt is not used:
    one pass of it lost orthogonality by 0.23 on nearly dependent columns.

    Raises ValueError if r > H or if `v` holds a NaN or an infinity.
    """
    if v.ndim != 2 or v.shape[1] > v.shape[0]:
        raise ValueError(f"cannot orthonormalise a {tuple(v.shape)} matrix: needs [H, r] with r <= H")
    if not torch.isfinite(v).all():
        raise ValueError("cannot orthonormalise: the matrix holds a NaN or an infinity")
    q, r = torch.linalg.qr(v.float())
    # contiguous: QR returns column-major, a received copy is row-major, and a product may round by layout
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def random_basis(hidden: int, rank: int, seed: int) -> Tensor:
    """Seeded random orthonormal [hidden, rank], the same on every machine."""
    return orthonormalise(torch.randn(hidden, rank, generator=torch.Generator().manual_seed(seed)))


class PowerSGD(Stateless):
    """Forward way of one boundary: X̂ = (XQ)Qᵀ, and V = Σ Xᵀ(XQ) gathered for the next refresh."""

    refreshes = True

    def __init__(self, hidden: int, rank: int, seed: int):
        self.hidden, self.rank = hidden, rank
        self.basis = random_basis(hidden, rank, seed)
        self.device = torch.device("cpu")
        self.begin_tick()

    def to(self, device: torch.device) -> None:
        self.device = device
        self.restore(self.state())

    def begin_tick(self) -> None:
        """Forget the gathered statistics."""
        self.v = torch.zeros_like(self.basis)
        self.energy = torch.zeros(2, device=self.device)  # ‖X‖², ‖Y‖²

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        """[N, H] -> Y [N, r] in the dtype of x."""
        y = x @ self.basis.to(x.dtype)
        if observe:
            wide, narrow = x.float(), y.float()
            self.v.addmm_(wide.T, narrow)
            self.energy += torch.stack([wide.square().sum(), narrow.square().sum()])
        return as_bytes(y), self._up(y) if observe else None

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return self._up(as_numbers(payload, (n, self.rank), dtype, "sketch Y"))

    def _up(self, y: Tensor) -> Tensor:
        return y @ self.basis.to(y.dtype).T

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        size = n * self.rank * dtype.itemsize
        return size, size

    def statistics(self) -> Tensor:
        return self.v

    def absorb(self, summed: Tensor) -> None:
        self.v = summed

    def refresh(self) -> Tensor:
        """Q ← orth(V)."""
        return as_bytes(orthonormalise(self.v))

    def tables_limit(self) -> int:
        return 4 * self.basis.numel()

    def load(self, tables: Tensor) -> dict[str, float]:
        """Take over a new basis; returns how it differs from the last one."""
        basis = as_numbers(tables, (self.hidden, self.rank), torch.float32, "basis Q").to(self.device, copy=True)
        metrics = {"codec/q_drift": max(0.0, 1.0 - (self.basis.T @ basis).square().sum().item() / self.rank)}
        if self.v.any():  # the sender's side
            metrics["codec/q_condition"] = self._condition()
        self.basis = basis
        return metrics

    def _condition(self) -> float:
        """Condition number of V: how unequal the directions are that the basis is made of."""
        s = torch.linalg.svdvals(self.v)
        return (s[0] / s[-1].clamp_min(1e-30)).item()

    def health(self) -> dict[str, float]:
        """`q_error`: relative reconstruction error of the tokens observed since the tick began.

        ‖X - X̂‖² = ‖X‖² - ‖Y‖² because Q is orthonormal, so nothing is reconstructed for it.
        """
        x2, y2 = self.energy.tolist()
        return {"codec/q_error": max(0.0, 1.0 - y2 / x2) ** 0.5} if x2 else {}

    def state(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "v": self.v, "energy": self.energy}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.basis, self.v, self.energy = (state[k].to(self.device) for k in ("basis", "v", "energy"))


class SharedBasis(Stateless):
    """Backward way as published: dX̂ = (dX Q)Qᵀ with the forward's Q, so no second basis crosses the link."""

    def __init__(self, forward: PowerSGD):
        self.forward = forward

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        y = x @ self.forward.basis.to(x.dtype)
        return as_bytes(y), self.forward._up(y) if observe else None

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return self.forward.decode(payload, n, dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.forward.limits(n, dtype)


class OwnBasis(PowerSGD):
    """Backward way with a basis made of dX itself: one from X is a random projection for dX."""

    def health(self) -> dict[str, float]:
        return {}  # `codec/q_error` is the forward's


def powersgd(config: CodecConfig, hidden: int, seed: int) -> tuple[Way, Way]:
    """The two ways of one boundary. Raises ValueError if the rank exceeds the hidden size."""
    rank = config.rank_for(hidden)
    forward = PowerSGD(hidden, rank, seed)
    return forward, OwnBasis(hidden, rank, seed + 0x5EED) if config.backward_basis == "own" else SharedBasis(forward)
