"""Transform coding of hidden states: few bits for every direction, by importance.

Where PowerSGD sends a few directions exactly, this sends all that matter, coarsely: rows are rotated onto the
eigenvectors of their covariance, and bits go where they take away most error (reverse water-filling). At the
same bytes that leaves a tenth of the KL between the compressed and the true policy.

    x ─(− mean) · analysis─▶ z ─coder─▶ body ═══▶ body ─coder─▶ ẑ ─ · synthesis (+ mean)─▶ x̂

The first payload of a way carries tables made of its own rows; from then on they change on the Q schedule,
if their bytes fit into `side_share` of all bytes and the covariance has moved.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import CodecError, Room, Way
from codec.transform.coders import CODERS
from codec.transform.moments import Moments
from codec.transform.payload import HEADER_BYTES, Payload, unpack
from codec.transform.rate import RateControl
from codec.transform.tables import Tables, distortion, pack, size
from codec.transform.tables import unpack as unpack_tables

MOVED = 1.02  # new tables are sent if they lower the error at equal bits by more than 2 %
RIDGE = 1e-4  # of the mean variance, added to every direction's


class Transform:
    """One way. `centred`: rows have a mean worth subtracting (X); else a scale that moves (dX)."""

    refreshes = True

    def __init__(self, config: CodecConfig, hidden: int, rate: float, centred: bool):
        self.hidden, self.centred = hidden, centred
        self.device = torch.device("cpu")
        self.tables: Tables | None = None
        self.sender, self.receiver = CODERS[config.coder](), CODERS[config.coder]()
        self.moments, self.control = Moments(hidden), RateControl(rate, config.side_share)
        self.knob = 0.0  # the coder's, steered
        self.wanted = 1.0  # bits for each coded row that the knob was last set for
        self.refreshed = False
        self.age = 0  # ticks since the tables came
        self.bits = self.symbols = self.escapes = self.rows = 0.0

    def to(self, device: torch.device) -> None:
        self.device = device
        self.moments.to(device)

    def begin_tick(self) -> None:
        self.age += 1
        self.bits = self.symbols = self.escapes = self.rows = 0.0

    # --- rows ---------------------------------------------------------------------------------------

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        """[N, H] -> payload; tables come with it if the receiver has none. Raises CodecError on a NaN."""
        x = x.float()
        energy = x.square().mean().item() if len(x) else 0.0
        if not math.isfinite(energy):
            raise CodecError("rows to be sent hold a NaN or an infinity")
        scale = 1.0 if self.centred else _float32(math.sqrt(energy))
        if not len(x) or scale == 0.0:  # nothing but zeros: all rewards of a microbatch were equal
            return self._send(Payload(len(x), 1.0, 0.0, 0, _nothing(x), _nothing(x)), room, 0), torch.zeros_like(x)
        x = x / scale
        fresh = self.tables is None
        if fresh:
            self._bootstrap(x, room)
        agreement = self._agreement(self.sender)
        z = (x - self.tables.mean) @ self.tables.analysis
        body, z_hat, escapes = self.sender.encode(z, self.knob)
        tables = self.tables.raw if fresh else _nothing(x)
        payload = self._send(Payload(len(x), self.knob, scale, agreement, tables, body), room, escapes)
        if not observe:
            return payload, None
        self.moments.add(x)
        return payload, self._up(z_hat, scale)

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """Raises CodecError if the payload is damaged, or was made with other tables than this side has."""
        found = unpack(payload, n)
        if found.scale == 0.0:
            return torch.zeros(n, self.hidden, dtype=dtype, device=payload.device)
        if self.tables is None:
            if not found.tables.numel():
                raise CodecError("tables: a payload came before any tables did")
            self._adopt(found.tables)
        if found.agreement != self._agreement(self.receiver):
            raise CodecError("agreement: the payload was made with other tables than this side has")
        try:
            z_hat = self.receiver.decode(found.body, n, found.knob)
        except ValueError as error:
            raise CodecError(f"body: {error}") from error
        return self._up(z_hat, found.scale).to(dtype)

    def _send(self, payload: Payload, room: Room, escapes: int) -> Tensor:
        """Packed, and booked."""
        raw, tables = payload.pack(), payload.tables.numel()
        own = raw.numel() - tables + room.taken
        coded = payload.rows if payload.body.numel() else 0  # zeros say nothing of what a knob spends
        fixed = HEADER_BYTES + room.taken
        self.control.count(own, 2 * self.hidden * room.dense_rows, coded, fixed)
        self.control.count_side(tables)
        self.bits += 8 * own
        self.rows += room.dense_rows
        self.escapes += escapes
        self.symbols += payload.rows * (0 if self.tables is None else len(self.tables.deviations))
        return raw

    def _up(self, z_hat: Tensor, scale: float) -> Tensor:
        return (z_hat @ self.tables.synthesis + self.tables.mean) * scale

    def _agreement(self, coder) -> int:
        return (self.tables.digest ^ coder.digest()) & (2**64 - 1)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        most = HEADER_BYTES + size(self.hidden, self.hidden) + self.sender.most_bytes(n, self.hidden)
        return HEADER_BYTES, most

    # --- tables -------------------------------------------------------------------------------------

    def _bootstrap(self, x: Tensor, room: Room) -> None:
        """Tables from the rows at hand, which are also the receiver's first; the next refresh replaces them."""
        moments = Moments(self.hidden)
        moments.to(x.device)
        moments.add(x)
        moments.absorb(moments.gathered())
        dense, fixed = 2 * self.hidden * room.dense_rows, HEADER_BYTES + room.taken
        bits = self.wanted = _bits_a_row(self.control.rate, dense, fixed, len(x))
        self._adopt(self._make(moments, bits))
        self.knob = _float32(self.sender.first_knob((x - self.tables.mean) @ self.tables.analysis, bits))

    def _make(self, moments: Moments, bits: float) -> Tensor:
        """Packed tables for that many bits a row."""
        mean, covariance = moments.mean_and_covariance()
        # a little of everything: a direction that too few rows have shown is not thought to be empty
        floor = RIDGE * covariance.trace() / self.hidden
        values, vectors = torch.linalg.eigh(covariance + floor * torch.eye(self.hidden).to(covariance))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        k = max(1, self.sender.worthwhile(values, bits))
        mean = mean if self.centred else torch.zeros_like(mean)
        return pack(mean, vectors[:, :k], values[:k].sqrt().clamp_min(1e-20))

    def _adopt(self, raw: Tensor) -> None:
        self.tables = unpack_tables(raw, self.hidden, self.device)
        self.sender.rebase(self.tables.deviations)
        self.receiver.rebase(self.tables.deviations)
        self.age = 0

    def statistics(self) -> Tensor | None:
        first = self.tables is None or not self.refreshed
        return self.moments.gathered() if first or self.control.affords_refresh() else None

    def absorb(self, summed: Tensor) -> None:
        self.moments.absorb(summed)
        self.refreshed = bool(self.moments.pool[0])  # the pool of all replicas: they agree

    def refresh(self) -> Tensor:
        """New tables; none if those at hand serve the pooled rows as well, or if nothing but zeros was seen."""
        if not self.refreshed:
            return torch.empty(0, dtype=torch.uint8)
        bits = self._target_bits()
        raw = self._make(self.moments, bits)
        new = unpack_tables(raw, self.hidden, self.device)
        stay = self.tables is not None and self._error(self.tables, bits) < MOVED * self._error(new, bits)
        return raw[:0] if stay else raw

    def _error(self, tables: Tables, bits: float) -> float:
        """Least error of the pooled rows in these directions with that many bits a row."""
        mean, covariance = self.moments.mean_and_covariance()
        offset = mean - tables.mean.double() if self.centred else torch.zeros_like(mean)
        second = covariance + torch.outer(offset, offset)
        analysis = tables.analysis.double()
        inside = ((second @ analysis) * analysis).sum(0)
        return distortion(inside, bits)[0] + max(0.0, (second.trace() - inside.sum()).item())

    def tables_limit(self) -> int:
        return size(self.hidden, self.hidden)

    def load(self, tables: Tensor) -> dict[str, float]:
        if tables.numel():
            self._adopt(tables)
        return {}

    # --- rate ---------------------------------------------------------------------------------------

    def count_side(self, nbytes: float) -> None:
        self.control.count_side(nbytes)

    def spent(self) -> Tensor:
        return self.control.tick.clone()

    def steer(self, spent: Tensor) -> None:
        """Aim the next tick at the rate. The knob of every replica moves alike, as their books are the same."""
        self.control.close(spent)
        payload, _, _, rows, fixed = self.control.last.tolist()
        if rows and self.knob:
            self.knob = _float32(self.sender.next_knob(self.knob, 8 * (payload - fixed) / rows, self._target_bits()))

    def aim(self, rate: float) -> None:
        """Forget the books, and hold `rate` from here on."""
        self.control = RateControl(rate, self.control.side_share)

    def _target_bits(self) -> float:
        """Bits for each coded row in the next tick."""
        _, _, dense, rows, fixed = self.control.last.tolist()
        if rows:  # else nothing but zeros was sent, or nothing yet
            self.wanted = _bits_a_row(self.control.target(), dense, fixed, rows)
        return self.wanted

    # --- what it tells --------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        name = "" if self.centred else "backward_"
        found = self.control.metrics(name)
        if self.rows:
            found |= {f"codec/{name}bits_per_token": self.bits / self.rows, f"codec/{name}stats_age": float(self.age)}
            found[f"codec/{name}escape_rate"] = self.escapes / max(1.0, self.symbols)
        return found

    def state(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.knob, self.wanted, self.refreshed, self.age], dtype=torch.float64)
        found = {"numbers": numbers} | ({} if self.tables is None else {"tables": self.tables.raw})
        parts = {
            "moments": self.moments,
            "control": self.control,
            "sender": self.sender,
            "receiver": self.receiver,
        }
        return found | {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        if "tables" in state:
            self._adopt(state["tables"])
        self.knob, self.wanted, refreshed, age = state["numbers"].tolist()
        self.refreshed, self.age = bool(refreshed), int(age)
        for name in ("moments", "control", "sender", "receiver"):
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            getattr(self, name).restore(part)


def _float32(value: float) -> float:
    """As the receiver reads it from a header: both sides must count with the same number."""
    return float(np.float32(value))


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=like.device)


def _bits_a_row(rate: float, dense_bytes: float, fixed_bytes: float, rows: float) -> float:
    """Bits left for each coded row when payloads may take `rate` of dense."""
    return max(1.0, 8 * (rate * dense_bytes - fixed_bytes) / max(1.0, rows))


def transform(config: CodecConfig, hidden: int, seed: int) -> tuple[Way, Way]:
    """The two ways of one boundary; dX has directions of its own, as a basis from X is a random one for it."""
    forward, backward = config.rates
    return Transform(config, hidden, forward, centred=True), Transform(config, hidden, backward, centred=False)
