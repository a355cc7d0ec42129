"""The cells of a sweep, read back: their runs, what they came to, and which learning rate each arm would choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import Run, load_run
from experiments.stats import Estimate, estimate, ignition, leader
from experiments.sweep import FILE, Job, Sweep, cell_name, read_sweep


@dataclass(frozen=True)
class Ignition:
    """When length and entropy of one run left their baselines for good, in steps."""

    length: float | None
    entropy: float | None

    @property
    def led(self) -> str | None:
        return leader(self.length, self.entropy)


@dataclass(frozen=True)
class Cell:
    """All runs of one cell at one point of the grid."""

    arm: str
    point: dict[str, Any]
    runs: tuple[Run, ...]  # that have a folder
    seeds: tuple[str, ...]  # that count

    @property
    def name(self) -> str:
        return cell_name(self.arm, self.point)

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.seed in self.seeds)

    @cached_property
    def completed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.counted if run.status == "completed")

    def values_at(self, step: int | None) -> dict[str, float]:
        """Validation accuracy by seed, at `step` or at the end; only completed runs count."""
        found = {}
        for run in self.completed:
            series = run.series("val", "step", "accuracy")
            value = series.get(step) if step else next(reversed(series.values()), None)
            if value is not None and math.isfinite(value):
                found[run.seed] = value
        return found

    @cached_property
    def values(self) -> dict[str, float]:
        """By seed, at the end."""
        return self.values_at(None)

    @cached_property
    def mean(self) -> Estimate:
        return estimate(list(self.values.values()))

    @cached_property
    def total_ratio(self) -> float | None:
        """All bytes over all that a dense system sends; the mean over completed runs."""
        found = [run.total_ratio for run in self.completed if run.total_ratio is not None]
        return float(np.mean(found)) if found else None

    @cached_property
    def ignitions(self) -> dict[str, Ignition]:
        """By seed, of every run that has steps, completed or not."""
        metrics = ("response_length/mean", "actor/entropy")
        return {run.seed: Ignition(*(ignition(run.series("step", "step", m)) for m in metrics)) for run in self.runs}

    @cached_property
    def clip_spike(self) -> float | None:
        """Mean clipped share of the ticks that refreshed Q, over that of the others; of all runs together."""
        shares: dict[bool, list[float]] = {True: [], False: []}
        for run in self.runs:
            refreshed = run.series("tick", "tick", "codec/q_refreshed")
            for tick, share in run.series("tick", "tick", "actor/pg_clipfrac").items():
                if tick in refreshed and math.isfinite(share):
                    shares[bool(refreshed[tick])].append(share)
        spike, floor = (np.mean(shares[due]) if shares[due] else 0.0 for due in (True, False))
        return float(spike / floor) if floor else None

    def diagnosis(self, name: str) -> Estimate:
        """Over seeds, of the mean of `diagnostics/name` over a run's diagnosed ticks; only completed runs count."""
        series = [run.series("tick", "tick", f"diagnostics/{name}").values() for run in self.completed]
        return estimate([float(np.mean(list(values))) for values in series if values])

    @property
    def absent(self) -> int:
        """Runs without a folder."""
        return len(self.seeds) - len(self.counted)

    @property
    def stopped(self) -> str:
        """`1 failed, 2 interrupted`, of the runs that have a folder; empty where all of them completed."""
        statuses = [run.status for run in self.counted if run.status != "completed"]
        return ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))


@dataclass(frozen=True)
class Findings:
    """A sweep and its cells, in the order of the sweep file: points of the grid on the outside."""

    sweep: Sweep
    cells: list[Cell]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    def at(self, point: dict[str, Any]) -> dict[str, Cell]:
        """Cells by arm at one point of the grid."""
        return {cell.arm: cell for cell in self.cells if cell.point == point}

    @cached_property
    def tuned(self) -> dict[str, Cell]:
        """By arm, the cell at its best point of the grid: without a grid, the cell itself."""
        if not self.sweep.tuning:
            return _best(self.cells)
        later = set(self.sweep.later)
        return _best(self.cells) | {cell.arm: cell for cell in self.cells if set(cell.seeds) == later}

    def at_the_edge(self, cell: Cell) -> bool:
        """Whether a tuned cell sits at an end of an axis, so that its optimum may lie outside of what its arm ran."""
        axes = [(key, {other.point[key] for other in self.cells if other.arm == cell.arm}) for key in self.sweep.axes]
        return any(len(v) > 1 and cell.point[key] in (min(v), max(v)) for key, v in axes)

    @cached_property
    def extended(self) -> dict[str, list[Cell]]:
        """By arm, its cells beyond the grid."""
        points, found = self.sweep.points(), dict[str, list[Cell]]()
        for cell in self.cells:
            if cell.point not in points:
                found.setdefault(cell.arm, []).append(cell)
        return found


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).is_file()


def load_sweep(folder: Path) -> Findings:
    """Raises SweepError if the folder's sweep file cannot be read."""
    sweep = read_sweep(folder / FILE)
    every = tuple(map(str, sweep.seeds))
    if not sweep.tuning:
        return Findings(sweep, [_cell(folder, sweep, arm, p, every) for p in sweep.points() for arm in sweep.cells])
    arms = [_tuning(folder, sweep, arm, every[: sweep.tuning]) for arm in sweep.cells]
    tuning = [cells[i] for i in range(max(map(len, arms))) for cells in arms if i < len(cells)]
    waiting = {cell.arm for cell in tuning if cell.absent}
    best = {arm: c for arm, c in _best(tuning).items() if arm not in waiting and c.mean.n}
    return Findings(sweep, [replace(c, seeds=sweep.later) if c is best.get(c.arm) else c for c in tuning])


def _tuning(folder: Path, sweep: Sweep, arm: str, seeds: tuple[str, ...]) -> list[Cell]:
    """The arm on the grid and beyond: while its best is at an end, one point more, which may not have been run yet."""
    found = [_cell(folder, sweep, arm, point, seeds) for point in sweep.points()]
    for _ in range(sweep.extend):
        best = _best(found)[arm]
        if any(cell.absent for cell in found) or not best.mean.n:
            break
        if not (point := sweep.beyond([cell.point for cell in found], best.point)):
            break
        found.append(_cell(folder, sweep, arm, point, seeds))
    return found


def beyond_grid(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By arm, the points beyond the grid that it has run or, the last one, is to run next."""
    return {arm: [cell.point for cell in cells] for arm, cells in load_sweep(folder).extended.items()}


def chosen(folder: Path) -> dict[str, dict[str, Any]]:
    """The point at which each arm did best over the seeds that tune, of arms that have run on all of their points."""
    findings = load_sweep(folder)
    return {arm: cell.point for arm, cell in findings.tuned.items() if cell.seeds == findings.sweep.later}


def _cell(folder: Path, sweep: Sweep, arm: str, point: dict[str, Any], seeds: tuple[str, ...]) -> Cell:
    folders = [folder / Job(arm, point, seed, {}).folder for seed in sweep.seeds]
    runs = tuple(load_run(path.resolve()) for path in folders if path.is_dir() and any(path.iterdir()))
    return Cell(arm, point, runs, seeds)


def _best(cells: list[Cell]) -> dict[str, Cell]:
    """By arm, the one with the best mean, of those with the most completed runs: where seeds fail is no good point."""
    points: dict[str, list[Cell]] = {}
    for cell in cells:
        points.setdefault(cell.arm, []).append(cell)
    return {arm: max(found, key=lambda c: (c.mean.n, c.mean.mean)) for arm, found in points.items()}
