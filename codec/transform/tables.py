"""The tables of a `transform` way: principal axes of the rows seen, made anew where that is worth its bytes.

The first are made of the first payload's rows and travel with it. From then on they change on the Q schedule,
if the books have room for their bytes and the covariance has moved. Those of X then weigh errors by the gradients
that came back (codec/transform/metric.py); those of the first payload cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.interface import Tables
from codec.transform.coders import Coder
from codec.transform.directions import Directions, pack_directions, packed_size, unpack_directions
from codec.transform.metric import Metric
from codec.transform.moments import Moments
from codec.transform.rate import HeldRate
from codec.transform.water_filling import reverse_water_filling

MOVED = 1.02  # new tables are sent if they lower the error at equal bits by more than 2 %
RIDGE = 1e-4  # of the mean variance, added to every direction's


class PrincipalAxes(Tables):
    """Moments of what is sent, and the directions in force; both coders of the way follow them.

    `centred`: rows have a mean worth subtracting. `gradients`: the axes of dX, which weigh errors of X with that share.
    """

    def __init__(
        self,
        hidden: int,
        centred: bool,
        sender: Coder,
        receiver: Coder,
        rate: HeldRate,
        gradients: PrincipalAxes | None = None,
        share: float = 0.0,
    ):
        self.hidden, self.centred, self.gradients, self.share = hidden, centred, gradients, share
        self.sender, self.receiver, self.rate = sender, receiver, rate
        self.device = torch.device("cpu")
        self.moments = Moments(hidden)
        self.directions: Directions | None = None
        self.refreshed = False  # the moments hold rows of all replicas
        self.age = 0  # ticks since the directions came

    def to(self, device: torch.device) -> None:
        self.device = device
        self.moments.to(device)

    def adopt(self, raw: Tensor, metric: Metric | None = None) -> Directions:
        """Raises CodecError."""
        self.directions = unpack_directions(raw, self.hidden, self.device, metric)
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
        return self.adopt(self._made(moments, bits, None))

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
        bits, metric = self.rate.target_bits(), self.metric()
        raw = self._made(self.moments, bits, metric)
        new, old = unpack_directions(raw, self.hidden, self.device, metric), self.directions
        stay = old is not None and self._error(old, bits, metric) < MOVED * self._error(new, bits, metric)
        return raw[:0] if stay else raw

    def limit(self) -> int:
        return packed_size(self.hidden, self.hidden)

    def load(self, tables: Tensor) -> dict[str, float]:
        if tables.numel():
            self.adopt(tables, self.metric())
        return {}

    def metric(self) -> Metric | None:
        """What errors cost by the gradients' tables in force."""
        found = self.gradients and self.gradients.directions
        return Metric(found.basis, found.deviations, found.raw, self.share) if found and self.share else None

    def state(self) -> dict[str, Tensor]:
        """Directions in force, and those of dX that weighed them."""
        if self.directions is None:
            return {}
        metric = self.directions.metric
        return {"tables": self.directions.raw} | ({} if metric is None else {"metric": metric.raw})

    def restore(self, state: dict[str, Tensor]) -> None:
        metric = None
        if "metric" in state:
            found = unpack_directions(state["metric"], self.hidden, self.device)
            metric = Metric(found.basis, found.deviations, found.raw, self.share)
        if "tables" in state:
            self.adopt(state["tables"], metric)

    def _made(self, moments: Moments, bits: float, metric: Metric | None) -> Tensor:
        """Packed directions for that many bits a row: principal axes in the metric."""
        mean, covariance = moments.mean_and_covariance()
        # a little of everything: a direction that too few rows have shown is not thought to be empty
        floor = RIDGE * covariance.trace() / self.hidden
        covariance = covariance + floor * torch.eye(self.hidden).to(covariance)
        if metric is None:
            values, vectors = torch.linalg.eigh(covariance)
        else:
            root, back = metric.roots()
            values, vectors = torch.linalg.eigh(root @ covariance @ root)
            vectors = back @ vectors
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        k = max(1, self.sender.worthwhile(values, bits))
        mean = mean if self.centred else torch.zeros_like(mean)
        return pack_directions(mean, vectors[:, :k], values[:k].sqrt().clamp_min(1e-20))

    def _error(self, directions: Directions, bits: float, metric: Metric | None) -> float:
        """Least error of the pooled rows in these directions with that many bits a row, counted in the metric."""
        mean, covariance = self.moments.mean_and_covariance()
        offset = mean - directions.mean.double() if self.centred else torch.zeros_like(mean)
        second = covariance + torch.outer(offset, offset)
        analysis = directions.analysis.double()
        inside, total = ((second @ analysis) * analysis).sum(0), second.trace()
        if metric is not None:
            basis = directions.basis.double()
            inside, total = inside * (metric.times(basis) * basis).sum(0), metric.times(second).trace()
        return reverse_water_filling(inside, bits)[0] + max(0.0, (total - inside.sum()).item())
