"""The face of a codec: what carries rows one way through a boundary, X up the pipeline or dX down.

Both ends of a way are one class. Over a wire the sender's process calls `encode` and the receiver's `decode`;
a virtual boundary calls both on one object. A kind of codec is a function `(config, hidden, seed) -> (forward,
backward)` of two codecs. Two parts are there only where a codec has them:

    Tables   what a sender tells its receiver beside payloads: PowerSGD's basis, the directions of `transform`
    Rate     bytes that are held at a share of dense, by the books of all replicas

Tables change only between ticks, on the Q schedule (codec/schedule.py):

    sender      statistics ─▶ (summed over replicas) ─▶ absorb ─▶ refresh ─▶ tables ─▶ load
    receiver                                                                    └────▶ load
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor


class CodecError(ValueError):
    """A payload or tables that cannot be decoded; says which field and why."""


@dataclass(frozen=True)
class Room:
    """What a payload may be measured against."""

    dense_rows: int  # rows that a dense system would have sent for it
    taken: int = 0  # bytes that travel beside it, exact rows


class Codec(Protocol):
    """One way through one boundary. A codec writes `encode`, `decode` and `limits`, and inherits what it does not need:

    class Half(Codec):
        def __init__(self, hidden):
            self.hidden = hidden

        def encode(self, x, room, observe):
            half = x.half()
            return as_bytes(half), half.to(x.dtype) if observe else None

        def decode(self, payload, n, dtype):
            return as_numbers(payload, (n, self.hidden), torch.float16, "halves").to(dtype)

        def limits(self, n, dtype):
            return 2 * n * self.hidden, 2 * n * self.hidden
    """

    tables: Tables | None = None
    rate: Rate | None = None
    keyed: bool = False  # it draws random numbers: `rekey` comes before each encode and decode
    summed: tuple[str, ...] = ()  # names in `state` of what replicas are still to sum, each having gathered its own

    @abstractmethod
    def encode(
        self, x: Float[Tensor, "n h"], room: Room, observe: bool
    ) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, "n h"] | None]:
        """Rows -> payload, and if `observe` is set, what the receiver will make of it.

        `observe` also adds the rows to the statistics.
        """

    @abstractmethod
    def decode(self, payload: UInt8[Tensor, " bytes"], n: int, dtype: torch.dtype) -> Float[Tensor, "n h"]:
        """Payload -> rows. Raises CodecError."""
        ...

    @abstractmethod
    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        """The least and the most bytes that a payload of n rows can have."""
        ...

    def rekey(self, keys: Int64[Tensor, " n"]) -> None:
        """A number for each row to come: both ends have the same, and others in another tick (codec/keyed.py)."""

    def to(self, device: torch.device) -> None:
        """Before the first tick: where rows will lie."""

    def begin_tick(self) -> None:
        """Before the forward of a tick."""

    def health(self) -> dict[str, float]:
        """Metrics of what was sent since the tick began."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """All that changes, tables and rate included, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, bit for bit."""

    def own(self, due: bool) -> bool:
        """Whether another replica's state would not do in its place, where new tables are `due` in the next tick or not."""
        return bool(self.state())


class Tables(Protocol):
    """What both ends of a way share beside payloads. Tables travel as flat uint8, empty ones meaning "stay"."""

    def statistics(self) -> Float[Tensor, "*statistics"] | None:
        """What the next tables are made of, to be summed over replicas; None: the tables stay this time.

        All replicas of a stage answer alike.
        """
        ...

    def absorb(self, summed: Float[Tensor, "*statistics"]) -> None:
        """Take the summed statistics in; every replica does."""

    def refresh(self) -> UInt8[Tensor, " bytes"]:
        """The next tables, empty if the present ones stay; one rank computes them."""
        ...

    def limit(self) -> int:
        """The most bytes that tables can have."""
        ...

    def load(self, tables: UInt8[Tensor, " bytes"]) -> dict[str, float]:
        """Take over tables; returns metrics. Raises CodecError."""
        ...


class Rate(Protocol):
    """Bytes of a way, tables included, held at a share of what a dense bf16 system would send."""

    @property
    def share(self) -> float:
        """What is held."""
        ...

    @property
    def side(self) -> float:
        """Bytes of tables and statistics that this rank has sent since the last `steer`."""
        ...

    def count_side(self, nbytes: float) -> None:
        """Tables and statistics that this rank sent for this way."""

    def spent(self) -> Float[Tensor, " books"]:
        """The books of the tick, to be summed over replicas."""
        ...

    def steer(self, spent: Float[Tensor, " books"]) -> None:
        """After the backward of a tick, with the sum: aim the next tick at the share."""

    def aim(self, share: float) -> None:
        """Forget the books, and hold `share` from here on."""


def checked_codecs(kind: str, made: object) -> tuple[Codec, Codec]:
    """The two codecs that somebody's function made. Raises ValueError naming what they lack of the faces above."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"codec.kind = {kind!r} gives a {type(made).__name__}, not a tuple of two codecs")
    forward, backward = made
    for way, codec in (("forward", forward), ("backward", backward)):
        _check(kind, way, codec, Codec)
        for part, face in ((codec.tables, Tables), (codec.rate, Rate)):
            if part is not None:
                _check(kind, way, part, face)
    return forward, backward


def _check(kind: str, way: str, part: object, face: type) -> None:
    lacking = [name for name in vars(face) if not name.startswith("_") and not hasattr(part, name)]
    if lacking:
        raise ValueError(
            f"codec.kind = {kind!r}: its {way} {type(part).__name__} lacks {', '.join(lacking)}; "
            f"class {face.__name__} in codec/interface.py says what is needed"
        )


def as_bytes(tensor: Shaped[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Any tensor as flat uint8, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def as_numbers(
    raw: UInt8[Tensor, " bytes"], shape: tuple[int, ...], dtype: torch.dtype, field: str
) -> Shaped[Tensor, "*shape"]:
    """Flat uint8 as a tensor of that shape. Raises CodecError if it has another size."""
    expected = torch.Size(shape).numel() * dtype.itemsize
    if raw.numel() != expected:
        raise CodecError(f"{field} has {raw.numel()} bytes, {tuple(shape)} of {dtype} needs {expected}")
    return raw.view(dtype).view(shape)
