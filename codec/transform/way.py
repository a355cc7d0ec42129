"""Transform coding of hidden states: few bits for every direction, by importance.

Where PowerSGD sends a few directions exactly, this sends all that matter, coarsely: rows are rotated onto the
eigenvectors of their covariance, and bits go where they take away most error (reverse water-filling). At the
same bytes that leaves a tenth of the KL between the compressed and the true policy. An error in X is counted by what
the gradients say it costs (codec/transform/metric.py), which leaves a seventh less.

    x ─(− mean) · analysis─▶ z ─coder─▶ body ═══▶ body ─coder─▶ ẑ ─ · synthesis (+ mean)─▶ x̂

The directions are its tables (codec/transform/tables.py), the coder's knob is turned by its rate (rate.py).

References: Goyal 2001, "Theoretical Foundations of Transform Coding", IEEE Signal Processing Magazine 18(5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import Codec, CodecError, Room
from codec.state import prefixed, under
from codec.transform.coders import Coder, make_coder
from codec.transform.directions import Directions, packed_size
from codec.transform.moments import Moments
from codec.transform.payload import HEADER_BYTES, Payload, pack_payload, unpack_payload
from codec.transform.rate import Books, HeldRate, float32
from codec.transform.tables import PrincipalAxes


class Transform(Codec):
    """One way. `centred`: rows have a mean worth subtracting (X); else a scale that moves (dX).

    `back`: the way of the gradients, by which errors are weighed.
    """

    summed = ("moments.fresh",)

    def __init__(
        self,
        config: CodecConfig,
        hidden: int,
        share: float,
        centred: bool,
        back: Transform | None = None,
        seed: int = 0,
    ):
        self.hidden, self.centred = hidden, centred
        self.keyed, self.seed = config.dither, seed
        self.sender, self.receiver = make_coder(config), make_coder(config)
        self.rate = self.held = HeldRate(share, config.side_share, self.sender)
        gradients = None if back is None else back.axes
        self.tables = self.axes = PrincipalAxes(
            hidden, centred, self.sender, self.receiver, self.held, gradients, config.sensitivity
        )
        self.bits = self.symbols = self.escapes = self.rows = 0.0  # of this tick

    def rekey(self, keys: Tensor) -> None:
        for coder in (self.sender, self.receiver):
            coder.rekey(keys ^ self.seed)

    def to(self, device: torch.device) -> None:
        self.axes.to(device)

    def begin_tick(self) -> None:
        self.axes.age += 1
        self.bits = self.symbols = self.escapes = self.rows = 0.0

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        """[N, H] -> payload; tables come with it if the receiver has none. Raises CodecError on a NaN."""
        x = x.float()
        energy = x.square().mean().item() if len(x) else 0.0
        if not math.isfinite(energy):
            raise CodecError("rows to be sent hold a NaN or an infinity")
        scale = 1.0 if self.centred else float32(math.sqrt(energy))
        if not len(x) or scale == 0.0:  # nothing but zeros: all rewards of a microbatch were equal
            return self._send(Payload(len(x), 1.0, 0.0, 0, _nothing(x), _nothing(x)), room, 0), torch.zeros_like(x)
        x, tables = x if scale == 1.0 else x / scale, _nothing(x)
        directions = self.axes.directions
        if directions is None:
            directions = self._bootstrap(x, room)
            tables = directions.raw
        agreement = _agreement(directions, self.sender)
        body, z_hat, escapes = self.sender.encode(directions.analyse(x), self.held.knob)
        payload = self._send(Payload(len(x), self.held.knob, scale, agreement, tables, body), room, escapes)
        if not observe:
            return payload, None
        self.axes.moments.add(x)
        return payload, _scaled(directions.synthesise(z_hat), scale)

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """Raises CodecError if the payload is damaged, or was made with other tables than this side has."""
        found = unpack_payload(payload, n)
        if found.scale == 0.0:
            return torch.zeros(n, self.hidden, dtype=dtype, device=payload.device)
        directions = self.axes.directions
        if directions is None:
            if not found.tables.numel():
                raise CodecError("tables: a payload came before any tables did")
            directions = self.axes.adopt(found.tables)
        if found.agreement != _agreement(directions, self.receiver):
            raise CodecError("agreement: the payload was made with other tables than this side has")
        try:
            z_hat = self.receiver.decode(found.body, n, found.knob)
        except ValueError as error:
            raise CodecError(f"body: {error}") from error
        return _scaled(directions.synthesise(z_hat), found.scale).to(dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        most = HEADER_BYTES + packed_size(self.hidden, self.hidden) + self.sender.most_bytes(n, self.hidden)
        return HEADER_BYTES, most

    def _bootstrap(self, x: Tensor, room: Room) -> Directions:
        """The first tables, and a knob that spends on these rows what the rate allows."""
        bits = self.held.first_bits(2 * self.hidden * room.dense_rows, HEADER_BYTES + room.taken, len(x))
        directions = self.axes.bootstrap(x, bits)
        self.held.start(directions.analyse(x), bits)
        return directions

    def _send(self, payload: Payload, room: Room, escapes: int) -> Tensor:
        """Packed, and booked."""
        raw, tables = pack_payload(payload), payload.tables.numel()
        own = raw.numel() - tables + room.taken
        coded = payload.rows if payload.body.numel() else 0  # zeros say nothing of what a knob spends
        self.held.books.count(own, 2 * self.hidden * room.dense_rows, coded, HEADER_BYTES + room.taken)
        if tables:
            self.held.count_side(tables)
        self.bits += 8 * own
        self.rows += room.dense_rows
        self.escapes += escapes
        directions = self.axes.directions
        self.symbols += payload.rows * (0 if directions is None else len(directions.deviations))
        return raw

    def health(self) -> dict[str, float]:
        name = "" if self.centred else "backward_"
        found = self.held.books.metrics(name)
        if self.rows:
            found[f"codec/{name}bits_per_token"] = self.bits / self.rows
            found[f"codec/{name}stats_age"] = float(self.axes.age)
            found[f"codec/{name}escape_rate"] = self.escapes / max(1.0, self.symbols)
        return found

    def state(self) -> dict[str, Tensor]:
        axes, held = self.axes, self.held
        numbers = torch.tensor([held.knob, held.wanted, axes.refreshed, axes.age], dtype=torch.float64)
        found = {"numbers": numbers} | axes.state()
        if self.keyed:
            found["seed"] = torch.tensor(self.seed)
        for name, part in self._parts().items():
            found |= prefixed(name, part.state())
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        axes, held = self.axes, self.held
        axes.restore(state)
        held.knob, held.wanted, refreshed, age = state["numbers"].tolist()
        axes.refreshed, axes.age = bool(refreshed), int(age)
        if self.keyed:
            self.seed = int(state["seed"])
        for name, part in self._parts().items():
            part.restore(under(name, state))

    def _parts(self) -> dict[str, Moments | Books | Coder]:
        """What keeps a state of its own, by its prefix in a checkpoint."""
        return {
            "moments": self.axes.moments,
            "control": self.held.books,
            "sender": self.sender,
            "receiver": self.receiver,
        }


def _agreement(directions: Directions, coder: Coder) -> int:
    """Digest of all that both ends must have alike, 64 bits."""
    return (directions.digest ^ coder.digest()) & (2**64 - 1)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """In place."""
    return rows if scale == 1.0 else rows.mul_(scale)


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=like.device)


def transform(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    """The two ways of one boundary; dX has directions of its own, as a basis from X is a random one for it."""
    forward, backward = config.rates
    back = Transform(config, hidden, backward, centred=False, seed=2 * seed + 1)
    return Transform(config, hidden, forward, centred=True, back=back, seed=2 * seed), back
