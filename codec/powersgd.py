"""PowerSGD of hidden states: a rank-r sketch through a warm-started orthonormal basis.

One power-iteration step a refresh, the basis carried over. Here the matrix is the hidden state X [tokens, H] of
one boundary, and the basis Q [H, r] is shared by both sides of the link, so only Y = XQ [tokens, r] crosses it.

References: Vogels, Karimireddy, Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", arXiv:1905.13727, algorithm 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import Codec, Room, Tables, as_bytes, as_numbers


def orthonormalise(v: Float[Tensor, "h r"]) -> Float32[Tensor, "h r"]:
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


def random_basis(hidden: int, rank: int, seed: int) -> Float32[Tensor, "hidden rank"]:
    """Seeded random orthonormal, the same on every machine."""
    return orthonormalise(torch.randn(hidden, rank, generator=torch.Generator().manual_seed(seed)))


class Basis(Tables):
    """Q of one way, and V = Σ Xᵀ(XQ), gathered in the tick for the next Q."""

    q: Float32[Tensor, "h r"]
    v: Float32[Tensor, "h r"]

    def __init__(self, hidden: int, rank: int, seed: int):
        self.q = random_basis(hidden, rank, seed)
        self.v = torch.zeros_like(self.q)

    def project(self, x: Float[Tensor, "n h"]) -> Float[Tensor, "n r"]:
        return x @ self.q.to(x.dtype)

    def reconstruct(self, y: Float[Tensor, "n r"]) -> Float[Tensor, "n h"]:
        return y @ self.q.to(y.dtype).T

    def statistics(self) -> Float32[Tensor, "h r"]:
        return self.v

    def absorb(self, summed: Float32[Tensor, "h r"]) -> None:
        self.v = summed

    def refresh(self) -> UInt8[Tensor, " bytes"]:
        """Q ← orth(V). Where V is of no rows, after a tick that was skipped, Q stays."""
        return as_bytes(orthonormalise(self.v)) if self.v.any() else torch.empty(0, dtype=torch.uint8)

    def limit(self) -> int:
        return 4 * self.q.numel()

    def load(self, tables: UInt8[Tensor, " bytes"]) -> dict[str, float]:
        """Take over a new basis; returns how it differs from the last one."""
        if not tables.numel():
            return {}
        q = as_numbers(tables, tuple(self.q.shape), torch.float32, "basis Q").to(self.q.device, copy=True)
        metrics = {"codec/q_drift": max(0.0, 1.0 - (self.q.T @ q).square().sum().item() / q.shape[1])}
        if self.v.any():  # the sender's side
            metrics["codec/q_condition"] = self._condition()
        self.q = q
        return metrics

    def _condition(self) -> float:
        """Condition number of V: how unequal the directions are that the basis is made of."""
        s = torch.linalg.svdvals(self.v)
        return (s[0] / s[-1].clamp_min(1e-30)).item()


class PowerSGD(Codec):
    """Forward way of one boundary: X̂ = (XQ)Qᵀ."""

    summed = ("v",)

    def __init__(self, hidden: int, rank: int, seed: int):
        self.rank = rank
        self.basis = self.tables = Basis(hidden, rank, seed)
        self.energy = torch.zeros(2)  # ‖X‖², ‖Y‖²

    def to(self, device: torch.device) -> None:
        self.basis.q, self.basis.v, self.energy = (t.to(device) for t in (self.basis.q, self.basis.v, self.energy))

    def begin_tick(self) -> None:
        """Forget the gathered statistics."""
        self.basis.v = torch.zeros_like(self.basis.q)
        self.energy = torch.zeros_like(self.energy)

    def encode(
        self, x: Float[Tensor, "n h"], room: Room, observe: bool
    ) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, "n h"] | None]:
        """X -> Y [n, r] in the dtype of X."""
        y = self.basis.project(x)
        if observe:
            wide, narrow = x.float(), y.float()
            self.basis.v.addmm_(wide.T, narrow)
            self.energy += torch.stack([wide.square().sum(), narrow.square().sum()])
        return as_bytes(y), self.basis.reconstruct(y) if observe else None

    def decode(self, payload: UInt8[Tensor, " bytes"], n: int, dtype: torch.dtype) -> Float[Tensor, "n h"]:
        return self.basis.reconstruct(as_numbers(payload, (n, self.rank), dtype, "sketch Y"))

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        size = n * self.rank * dtype.itemsize
        return size, size

    def health(self) -> dict[str, float]:
        """`q_error`: relative reconstruction error of the tokens observed since the tick began.

        ‖X - X̂‖² = ‖X‖² - ‖Y‖² because Q is orthonormal, so nothing is reconstructed for it.
        """
        x2, y2 = self.energy.tolist()
        return {"codec/q_error": max(0.0, 1.0 - y2 / x2) ** 0.5} if x2 else {}

    def state(self) -> dict[str, Tensor]:
        return {"basis": self.basis.q, "v": self.basis.v, "energy": self.energy}

    def restore(self, state: dict[str, Tensor]) -> None:
        device = self.energy.device
        self.basis.q, self.basis.v, self.energy = (state[k].to(device) for k in ("basis", "v", "energy"))

    def own(self, due: bool) -> bool:
        """V is of this replica's rows, and asked for by a refresh alone."""
        return due


class SharedBasis(Codec):
    """Backward way as published: dX̂ = (dX Q)Qᵀ with the forward's Q, so no second basis crosses the link."""

    def __init__(self, forward: PowerSGD):
        self.forward = forward

    def encode(
        self, x: Float[Tensor, "n h"], room: Room, observe: bool
    ) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, "n h"] | None]:
        y = self.forward.basis.project(x)
        return as_bytes(y), self.forward.basis.reconstruct(y) if observe else None

    def decode(self, payload: UInt8[Tensor, " bytes"], n: int, dtype: torch.dtype) -> Float[Tensor, "n h"]:
        return self.forward.decode(payload, n, dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.forward.limits(n, dtype)


class OwnBasis(PowerSGD):
    """Backward way with a basis made of dX itself: one from X is a random projection for dX."""

    def health(self) -> dict[str, float]:
        return {}  # `codec/q_error` is the forward's


def powersgd(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    """The two ways of one boundary. Raises ValueError if the rank exceeds the hidden size."""
    rank = config.rank_for(hidden)
    forward = PowerSGD(hidden, rank, seed)
    return forward, OwnBasis(hidden, rank, seed + 0x5EED) if config.backward_basis == "own" else SharedBasis(forward)
