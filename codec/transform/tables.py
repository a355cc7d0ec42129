"""The tables of a `transform` way: principal axes of the rows seen, made anew where that is worth its bytes.

The first are made of the first payload's rows and travel with it. From then on they change on the Q schedule,
if the books have room for their bytes and the covariance has moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.interface import Tables
from codec.transform.coders import Coder
from codec.transform.directions import Directions, pack_directions, packed_size, unpack_directions
from codec.transform.moments import Moments
from codec.transform.rate import HeldRate
from codec.transform.water_filling import reverse_water_filling

MOVED = 1.02  # new tables are sent if they lower the error at equal bits by more than 2 %
RIDGE = 1e-4  # of the mean variance, added to every direction's


class PrincipalAxes(Tables):
    """Moments of what is sent, and the directions in force; both coders of the way follow them.

    `centred`: rows have a mean worth subtracting.
    """

    def __init__(self, hidden: int, centred: bool, sender: Coder, receiver: Coder, rate: HeldRate):
        self.hidden, self.centred = hidden, centred
        self.sender, self.receiver, self.rate = sender, receiver, rate
        self.device = torch.device("cpu")
        self.moments = Moments(hidden)
        self.directions: Directions | None = None
        self.refreshed = False  # the moments hold rows of all replicas
        self.age = 0  # ticks since the directions came

    def to(self, device: torch.device) -> None:
        self.device = device
        self.moments.to(device)

    def adopt(self, raw: Tensor) -> Directions:
        """Raises CodecError."""
        self.directions = unpack_directions(raw, self.hidden, self.device)
        self.sender.rebase(self.directions.deviations)
        self.receiver.rebase(self.directions.deviations)
        self.age = 0
        return self.directions

    def bootstrap(self, x: Tensor, bits: float) -> Directions:
        """From the rows at hand, which are also the receiver's first; the next refresh replaces them."""
        moments = Moments(self.hidden)
        moments.to(x.device)
        moments.add(x)
        moments.absorb(moments.gathered())
        return self.adopt(self._made(moments, bits))

    def statistics(self) -> Tensor | None:
        first = self.directions is None or not self.refreshed
        return self.moments.gathered() if first or self.rate.books.affords_refresh() else None

    def absorb(self, summed: Tensor) -> None:
        self.moments.absorb(summed)
        self.refreshed = bool(self.moments.pool[0])  # the pool of all replicas: they agree

    def refresh(self) -> Tensor:
        """New tables; none if those at hand serve the pooled rows as well, or if nothing but zeros was seen."""
        if not self.refreshed:
            return torch.empty(0, dtype=torch.uint8)
        bits = self.rate.target_bits()
        raw = self._made(self.moments, bits)
        new = unpack_directions(raw, self.hidden, self.device)
        stay = self.directions is not None and self._error(self.directions, bits) < MOVED * self._error(new, bits)
        return raw[:0] if stay else raw

    def limit(self) -> int:
        return packed_size(self.hidden, self.hidden)

    def load(self, tables: Tensor) -> dict[str, float]:
        if tables.numel():
            self.adopt(tables)
        return {}

    def _made(self, moments: Moments, bits: float) -> Tensor:
        """Packed directions for that many bits a row."""
        mean, covariance = moments.mean_and_covariance()
        # a little of everything: a direction that too few rows have shown is not thought to be empty
        floor = RIDGE * covariance.trace() / self.hidden
        values, vectors = torch.linalg.eigh(covariance + floor * torch.eye(self.hidden).to(covariance))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        k = max(1, self.sender.worthwhile(values, bits))
        mean = mean if self.centred else torch.zeros_like(mean)
        return pack_directions(mean, vectors[:, :k], values[:k].sqrt().clamp_min(1e-20))

    def _error(self, directions: Directions, bits: float) -> float:
        """Least error of the pooled rows in these directions with that many bits a row."""
        mean, covariance = self.moments.mean_and_covariance()
        offset = mean - directions.mean.double() if self.centred else torch.zeros_like(mean)
        second = covariance + torch.outer(offset, offset)
        analysis = directions.analysis.double()
        inside = ((second @ analysis) * analysis).sum(0)
        return reverse_water_filling(inside, bits)[0] + max(0.0, (second.trace() - inside.sum()).item())
