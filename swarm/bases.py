"""Bases and other tables of a rank's boundaries: refreshed on the Q schedule, and the rate of each way held.

sender      statistics ─▶ summed over replicas ─▶ one rank computes ─▶ the other replicas ─▶ across the boundary
receiver                                                                                       └─▶ load
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from codec.boundary import Boundary
from codec.interface import Tables
from codec.schedule import q_should_refresh
from swarm.grid import Grid
from swarm.pipeline import Pipeline


class Bases:
    """What the codecs of one rank's boundaries need between ticks. The sender of a way sees its rows."""

    def __init__(self, pipeline: Pipeline, cuts: dict[int, Boundary], grid: Grid, q_cadence: int):
        self.pipeline, self.cuts, self.grid, self.q_cadence = pipeline, cuts, grid, q_cadence

    def refresh(self, tick: int) -> dict[str, float]:
        """Before a forward: new tables if they are due. Returns metrics."""
        grid, pipeline, found = self.grid, self.pipeline, Means()
        due = self.due(tick)
        if self._has_tables():
            found.add({"codec/q_refreshed": float(due)})
        if due:
            for way, source in (("bwd", pipeline.downstream), ("fwd", pipeline.upstream)):  # X's tables ask dX's
                for boundary in self._sent(way):
                    if (tables := boundary.way(way).tables) is not None:
                        found.add(self._send_tables(boundary, way, tables))
                if source and (tables := source.way(way).tables) is not None:
                    tables.load(grid.recv(way, 0, tables.limit()))
        for boundary in self.cuts.values():
            boundary.begin_tick()
        grid.flush()
        return found.means()

    def due(self, tick: int) -> bool:
        """Whether tables are refreshed before the forward of `tick`; all ranks answer alike."""
        return self._has_tables() and q_should_refresh(tick, self.q_cadence)

    def _has_tables(self) -> bool:
        return any(b.way(w).tables is not None for b in self.cuts.values() for w in ("fwd", "bwd"))

    def close(self) -> dict[str, float]:
        """After the last payload of a tick: what each way did, and its rate for the next. Returns metrics."""
        found = Means()
        for way in ("fwd", "bwd"):
            for boundary in self._sent(way):
                rate = boundary.way(way).rate
                if rate is not None:
                    spent = rate.spent().to(self.grid.device)
                    self.grid.sum_dp(spent, "control", dense_bytes=0)
                    rate.steer(spent)
                found.add(boundary.health(way))
        return found.means()

    def _sent(self, way: str) -> Iterator[Boundary]:
        """Boundaries on which this rank sends that way."""
        yield from self.pipeline.virtual.values()
        neighbour = self.pipeline.downstream if way == "fwd" else self.pipeline.upstream
        if neighbour:
            yield neighbour

    def _send_tables(self, boundary: Boundary, way: str, tables: Tables) -> dict[str, float]:
        """Over a wire its neighbour waits for the tables, though they may be empty."""
        grid, rate = self.grid, boundary.way(way).rate
        before = grid.ledger.sent["basis"]
        raw, statistics = torch.empty(0, dtype=torch.uint8), tables.statistics()
        if statistics is not None:
            grid.sum_dp(statistics, "basis", dense_bytes=0)
            tables.absorb(statistics)
            raw = grid.bytes_from_first_replica(tables.refresh() if grid.d == 0 else None, "basis", tables.limit())
        if boundary is self.pipeline.downstream or boundary is self.pipeline.upstream:
            grid.send(way, raw.to(grid.device))
        grid.ledger.add("basis", raw.numel(), 0)  # to the other side of the boundary, wire or virtual
        if rate is not None:
            rate.count_side(grid.ledger.sent["basis"] - before)
        return tables.load(raw)


class Means:
    """Metrics of several boundaries as one."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.values[name].append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}
