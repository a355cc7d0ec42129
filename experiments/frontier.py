"""What accuracy costs in bytes: every cell at its own best point, by accuracy at the end and by `comm/total_ratio`.

Said in words, as a table and as a picture, where the cells of a sweep differ in their bytes at all.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.cells import Cell, Findings
from experiments.drawing import GREY, Picture, as_svg
from experiments.plots import PALETTE
from experiments.spending import EVERYTHING, traffic_of
from experiments.stats import Estimate, Gate, near_base, paired
from experiments.words import Number, Sentence, cell_in_words, interval, plain

FACTOR = 1.5  # between the largest total and the smallest: with less there is no frontier to show
WIDTH, HEIGHT = 9.0, 4.6  # inches
FONT = 9


class Spot(NamedTuple):
    """A cell on the frontier's plane. Differences are to the base, within a seed, and gates on its drop."""

    cell: Cell
    ratio: float
    difference: Estimate
    gate: Gate

    @property
    def near(self) -> bool:
        return self.difference.n > 0 and self.gate.passed


class Frontier(NamedTuple):
    """Cells by their totals, the smallest first. `base` is one of them, or None where the sweep names none."""

    spots: list[Spot]
    base: Spot | None
    drop: float  # the gate

    @property
    def others(self) -> list[Spot]:
        return [spot for spot in self.spots if spot is not self.base]

    @property
    def smaller(self) -> list[Spot]:
        """Those that send less than the base."""
        return [spot for spot in self.others if self.base and spot.ratio < self.base.ratio]

    @property
    def best(self) -> list[Spot]:
        """The frontier by means: cells that none with fewer bytes equals or beats."""
        found: list[Spot] = []
        for spot in self.spots:
            if not found or spot.cell.mean.mean > found[-1].cell.mean.mean:
                found.append(spot)
        return found


def frontier(findings: Findings) -> Frontier | None:
    """None where cells do not differ in their totals by more than `FACTOR`."""
    name, drop = findings.sweep.gates.base, findings.sweep.gates.drop
    base = {} if name is None else findings.tuned[name].values
    spots = [
        Spot(cell, ratio, paired(cell.values, base), near_base(base, cell.values, drop))
        for cell in findings.tuned.values()
        if cell.values and (ratio := cell.total_ratio)
    ]
    spots.sort(key=lambda spot: spot.ratio)
    if not spots or spots[-1].ratio <= FACTOR * spots[0].ratio:
        return None
    return Frontier(spots, next((spot for spot in spots if spot.cell.arm == name), None), drop)


# --- words and table -------------------------------------------------------------------------------


def frontier_in_words(findings: Findings) -> list[Sentence]:
    """What cannot be told from the base, then the smallest total that is within the gate of it."""
    found = frontier(findings)
    if not found or not found.base:
        return []
    base, near = found.base.cell.arm, [spot for spot in found.smaller if spot.near]
    if not near:
        return [sentence for sentence in (_alike(found, base), *_nearest(found, base)) if sentence.parts]
    sentences = [_alike(found, base), _smallest(near[0], f"The smallest total_ratio within {found.drop:g} of {base}")]
    certain = [spot for spot in near if spot.gate.certain]
    if certain and certain[0] is not near[0]:
        sentences.append(_smallest(certain[0], "The smallest for which that is certain over these seeds"))
    return [sentence for sentence in sentences if sentence.parts]


def _alike(found: Frontier, base: str) -> Sentence:
    """Empty where all can be told apart."""
    parts: list[str | Number] = []
    for spot in found.smaller:
        if spot.difference.n and not spot.difference.distinguishable:
            parts += [", "] * bool(parts) + [Number(spot.cell.arm, spot.cell.name)]
    first = f"Send less than {base} and cannot be told from it over these seeds: "
    return Sentence((first, *parts, ".") if parts else (), False)


def _smallest(spot: Spot, first: str) -> Sentence:
    ratio, difference = Number(f"{spot.ratio:.4f}", spot.cell.name), Number(interval(spot.difference), spot.cell.name)
    doubt = "" if spot.gate.certain else ", not certain over these seeds"
    parts = (f"{first}: {spot.cell.arm} at ", ratio, " (difference ", difference, f"){doubt}.")
    return Sentence(parts, spot.gate.certain)


def _nearest(found: Frontier, base: str) -> list[Sentence]:
    compared = [spot for spot in found.smaller if spot.difference.n]
    if not compared:
        return []
    spot = max(compared, key=lambda spot: spot.difference.mean)
    number = Number(interval(spot.difference), spot.cell.name)
    first = f"No cell that sends less than {base} is within {found.drop:g} of it; the nearest is {spot.cell.arm}, by "
    return [Sentence((first, number, "."), False)]


class FrontierTable(NamedTuple):
    headings: list[str]
    rows: list[tuple[Cell, list[str]]]


def frontier_table(found: Frontier) -> FrontierTable:
    axes = [key.rpartition(".")[2] for key in found.spots[0].cell.point]
    against = [f"difference to {found.base.cell.arm}", "seeds", f"within {found.drop:g}"] if found.base else []
    rows: list[tuple[Cell, list[str]]] = []
    for spot in found.spots:
        values = [str(value) for value in spot.cell.point.values()]
        values += [f"{spot.ratio:.4f}", _megabytes(spot.cell), plain(spot.cell.mean)]
        rows.append((spot.cell, values + _against(spot, found.base)))
    return FrontierTable(["cell", *axes, "total_ratio", "MB sent", "val accuracy", *against], rows)


def _against(spot: Spot, base: Spot | None) -> list[str]:
    if not base or spot is base:
        return ["–", "–", "the base"] if base else []
    says = f"{'yes' if spot.near else 'no'}{'' if spot.gate.certain else ', not certain'}" if spot.difference.n else "–"
    return [interval(spot.difference), str(spot.difference.n), says]


def _megabytes(cell: Cell) -> str:
    found = [traffic[EVERYTHING].sent for run in cell.completed if (traffic := traffic_of(run))]
    return f"{np.mean(found) / 1e6:,.2f}" if found else "–"


# --- picture ---------------------------------------------------------------------------------------


def frontier_picture(found: Frontier) -> Picture:
    """Cells as points with their intervals, the base's as a line with its band, the best at so many bytes as steps."""
    note = "Accuracy at the end, with its interval over seeds; every cell at its own best point of the grid, if there is one. "
    if found.base:
        note += (
            f"Grey: {cell_in_words(found.base.cell)} and its interval. Filled: a mean drop of at most {found.drop:g} "
            "against it within seeds; open: a larger one. "
        )
    note += "Dotted: the best mean at so many bytes or fewer, picked by what is shown and so a little optimistic."
    key = " ".join(["frontier", *(spot.cell.name for spot in found.spots)])
    return Picture("Accuracy against bytes", note, as_svg(key, lambda f: _draw(f, found), HEIGHT, WIDTH))


def _draw(figure: Figure, found: Frontier) -> None:
    axis = figure.subplots()
    means = np.array([spot.cell.mean.mean for spot in found.spots])
    halves = np.nan_to_num([spot.cell.mean.half for spot in found.spots])
    ratios = [spot.ratio for spot in found.spots]
    right = ratios[-1] * 1.3 * (ratios[-1] / ratios[0]) ** 0.15  # with room for a name
    room = min(float(halves.max()), max(0.03, float(np.ptp(means)))) + 0.01
    axis.set(xscale="log", xlim=(ratios[0] / 1.4, right))
    axis.set(ylim=(means.min() - room, means.max() + room))
    axis.set(xlabel="total_ratio: bytes sent over those of a dense system, logarithmic", ylabel="validation accuracy")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    if found.base:
        mean = found.base.cell.mean
        axis.axhline(mean.mean, color=GREY, linewidth=1.2)
        axis.axhspan(*np.nan_to_num([mean.low, mean.high], nan=mean.mean), color=GREY, alpha=0.15, linewidth=0)
    best = [(spot.ratio, spot.cell.mean.mean) for spot in found.best]
    axis.step(*zip(*best, (right, best[-1][1])), where="post", color=PALETTE[0], linestyle=":", linewidth=1.2)
    for spot, half in zip(found.spots, halves):
        color = GREY if spot is found.base else PALETTE[0]
        face = color if spot.near or not found.base or spot is found.base else "none"
        axis.errorbar(spot.ratio, spot.cell.mean.mean, half, color=color, elinewidth=1, alpha=0.45, capsize=2)
        axis.plot(spot.ratio, spot.cell.mean.mean, "o", color=color, markerfacecolor=face, markersize=7)
    _name(figure, axis, found)


def _name(figure: Figure, axis: Axes, found: Frontier) -> None:
    """Names beside the points, up or down or to the left until none lies on another one, a point or the base's line."""
    figure.draw_without_rendering()  # now the layout is known
    figure.set_layout_engine("none")
    points = axis.transData.transform([(spot.ratio, spot.cell.mean.mean) for spot in found.spots]) * 72 / figure.dpi
    line = 1.2 * FONT
    taken = [(x - 4, x + 4, y, 0.9 * line) for x, y in points]
    taken += [(0.0, 72 * WIDTH, points[i][1], 0.6 * line) for i, spot in enumerate(found.spots) if spot is found.base]
    for (x, y), spot in zip(points, found.spots):
        width = 0.6 * FONT * len(spot.cell.arm)
        for level, sign, side in itertools.product(range(12), (1, -1), (1, -1)):
            shift, left = sign * line * (0.7 + level), x + 6 if side > 0 else x - 6 - width
            if not any(left < b and a < left + width and abs(y + shift - v) < room for a, b, v, room in taken):
                break
        else:
            shift, side, left = 0.7 * line, 1, x + 6  # no room anywhere: better on another one than nowhere
        taken.append((left, left + width, y + shift, line))
        arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 4} if abs(shift) > line else None
        style: dict[str, Any] = {"va": "center", "ha": "left" if side > 0 else "right", "fontsize": FONT}
        at, offset = (spot.ratio, spot.cell.mean.mean), (6 * side, shift)
        axis.annotate(spot.cell.arm, at, offset, textcoords="offset points", arrowprops=arrow, **style)
