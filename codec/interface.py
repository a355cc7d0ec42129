"""The face of a codec: two ways, X going up the pipeline and dX coming down.

Both ends of a way are one class. Over a wire the sender's process calls `encode` and the receiver's `decode`;
a virtual boundary calls both on one object. What a sender must tell its receiver beside payloads are its
tables: the basis of PowerSGD, the transform of `transform`. They change only between ticks:

    sender      statistics ─▶ (summed over replicas) ─▶ absorb ─▶ refresh ─▶ tables ─▶ load
    receiver                                                                    └────▶ load
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class CodecError(ValueError):
    """A payload or tables that cannot be decoded; says which field and why."""


@dataclass(frozen=True)
class Room:
    """What a payload may be measured against."""

    dense_rows: int  # rows that a dense system would have sent for it
    taken: int = 0  # bytes that travel beside it, exact rows


class Way(Protocol):
    """One way through one boundary. Rows are [N, H]; payloads and tables are flat uint8 tensors."""

    refreshes: bool  # whether it has tables of its own, refreshed on the Q schedule

    def to(self, device: torch.device) -> None: ...

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        """Rows -> payload, and if `observe` is set, what the receiver will make of it.

        `observe` also adds the rows to the statistics.
        """

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """Payload -> rows [n, H]. Raises CodecError."""

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        """The least and the most bytes that a payload of n rows can have."""

    def statistics(self) -> Tensor | None:
        """What the next tables are made of, to be summed over replicas; None: the tables stay this time.

        All replicas of a stage answer alike.
        """

    def absorb(self, summed: Tensor) -> None:
        """Take the summed statistics in; every replica does."""

    def refresh(self) -> Tensor:
        """The next tables, empty if the present ones stay; one rank computes them."""

    def tables_limit(self) -> int:
        """The most bytes that tables can have."""

    def load(self, tables: Tensor) -> dict[str, float]:
        """Take over tables, empty ones meaning "stay"; returns metrics. Raises CodecError."""

    def begin_tick(self) -> None:
        """Before the forward of a tick."""

    def spent(self) -> Tensor | None:
        """Of the tick: what `steer` wants summed over replicas; None if nothing is steered."""

    def steer(self, spent: Tensor) -> None:
        """After the backward of a tick: hold the rate."""

    def count_side(self, nbytes: float) -> None:
        """Tables and statistics that this rank sent for this way."""

    def health(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]:
        """All that changes, for a checkpoint."""

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Stateless:
    """A way that has no tables and steers nothing."""

    refreshes = False

    def to(self, device: torch.device) -> None: ...

    def statistics(self) -> Tensor | None:
        return None

    def begin_tick(self) -> None: ...

    def spent(self) -> Tensor | None:
        return None

    def count_side(self, nbytes: float) -> None: ...

    def health(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...


def as_bytes(tensor: Tensor) -> Tensor:
    """Any tensor as flat uint8, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def as_numbers(raw: Tensor, shape: tuple[int, ...], dtype: torch.dtype, field: str) -> Tensor:
    """Flat uint8 as a tensor of that shape. Raises CodecError if it has another size."""
    expected = torch.Size(shape).numel() * dtype.itemsize
    if raw.numel() != expected:
        raise CodecError(f"{field} has {raw.numel()} bytes, {tuple(shape)} of {dtype} needs {expected}")
    return raw.view(dtype).view(shape)
