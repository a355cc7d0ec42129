"""Where the bytes and the seconds of runs went: by channel beside what a dense system sends, and by phase of a step.

Of several runs side by side: before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from codec.ledger import CHANNELS
from experiments.drawing import GREY, Picture, as_svg, in_bytes
from experiments.plots import Curve
from experiments.runs import Run

EVERYTHING, REST = "everything", "the rest"
TIMING, STEP, TICKS, TICK = "timing_s/", "step", "ticks", "tick"
ORDER = (EVERYTHING, *CHANNELS, STEP)
SMALLEST = 1e3  # bytes: where the logarithmic axis begins
DENSE = "Pale behind it: what a dense system of the same shape sends. Over the whole run; logarithmic."
SECONDS = (
    "Mean over the steps; of a phase of the ticks, those of all ticks of a step, by the slowest rank of each. "
    "Phases that overlap come to more than their step."
)


class Traffic(NamedTuple):
    """Bytes over a whole run."""

    sent: float
    dense: float  # what a dense system of the same shape sends

    @property
    def ratio(self) -> str:
        return f"{self.sent / self.dense:.4f}" if self.dense else "–"


def traffic_of(run: Run) -> dict[str, Traffic]:
    """By channel in the ledger's order, all together first; empty for a run that has no summary."""
    table = run.summary.get("bytes") or {}
    channels = {c: Traffic(table[c].get("sent", 0.0), table[c].get("dense", 0.0)) for c in CHANNELS if c in table}
    whole = Traffic(sum(t.sent for t in channels.values()), sum(t.dense for t in channels.values()))
    return {EVERYTHING: whole} | channels if channels else {}


def seconds_of(run: Run) -> dict[str, float]:
    """Seconds of a step by phase, means over its steps: the step, its phases, those of its ticks, what is left over."""
    steps, ticks = ([r for r in run.records if r.get("kind") == kind] for kind in ("step", "tick"))
    of_step, of_ticks = (
        {n.removeprefix(TIMING): 0.0 for r in rs for n in r if n.startswith(TIMING)} for rs in (steps, ticks)
    )
    found = {STEP: 0.0} | of_step if of_step else {}
    inside = {name: f"{TICKS}: {name}" for name in of_ticks if name not in (*of_step, TICK)} if of_step else {}
    for name in found:
        found[name] = sum(run.series("step", "step", TIMING + name).values()) / len(steps)
    for name, label in inside.items():
        found[label] = sum(run.series("tick", "tick", TIMING + name).values()) / len(steps)
    left = found.get(STEP, 0.0) - sum(found[name] for name in of_step if name != STEP)
    return found | {REST: left} if left > 0 else found


# --- tables ----------------------------------------------------------------------------------------


class SpendingTable(NamedTuple):
    """One column a curve."""

    headings: list[str]
    rows: list[list[str]]


def channel_table(group: Sequence[Curve]) -> SpendingTable:
    """`3.57 of 71.41 (20 %)`: MB sent, MB of a dense system, share of all that was sent. Its first row: everything."""
    tables = [_mean_traffic(curve) for curve in group]
    rows = [[name, *(_sent_of_dense(table, name) for table in tables)] for name in _names(tables)]
    return SpendingTable(["MB sent, of dense", *(curve.label for curve in group)], rows)


def _sent_of_dense(table: dict[str, Traffic], name: str) -> str:
    if name not in table:
        return "–"
    found, whole = table[name], table[EVERYTHING]
    share = f"{100 * found.sent / whole.sent:.1f}\N{NO-BREAK SPACE}%" if whole.sent else "–"
    more = f"ratio {found.ratio}" if name == EVERYTHING else share
    return f"{found.sent / 1e6:,.2f} of {found.dense / 1e6:,.2f} ({more})"


def phase_table(group: Sequence[Curve]) -> SpendingTable:
    tables = [_mean_seconds(curve) for curve in group]
    rows = [[name, *(f"{table[name]:.3f}" if name in table else "–" for table in tables)] for name in _names(tables)]
    return SpendingTable(["seconds of a step", *(curve.label for curve in group)], rows)


def _mean_traffic(curve: Curve) -> dict[str, Traffic]:
    """Over the seeds of a curve that have any."""
    found = [table for run in curve.runs if (table := traffic_of(run))]
    nothing = Traffic(0.0, 0.0)
    return {n: Traffic(*np.mean([table.get(n, nothing) for table in found], axis=0).tolist()) for n in _names(found)}


def _mean_seconds(curve: Curve) -> dict[str, float]:
    found = [table for run in curve.runs if (table := seconds_of(run))]
    return {name: float(np.mean([table.get(name, 0.0) for table in found])) for name in _names(found)}


def _names(tables: Sequence[Mapping[str, object]]) -> list[str]:
    """Of the rows of all tables: channels as in the ledger; phases as they came, those of ticks behind those of steps."""
    names = dict.fromkeys(name for table in tables for name in table)
    place = {name: i for i, name in enumerate(ORDER)}
    behind = {name: len(ORDER) + name.startswith(f"{TICKS}: ") + 2 * (name == REST) for name in names}
    return sorted(names, key=lambda name: place.get(name, behind[name]))


# --- pictures --------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One of the bars of a row; `behind` stands pale behind it."""

    color: str
    value: float
    behind: float
    label: str


def spending_pictures(group: Sequence[Curve], beside: Sequence[Curve]) -> list[Picture]:
    """Bytes and seconds of the group, as far as it has any, on axes wide enough for the curves of `beside` too."""
    found: list[Picture] = []
    key = " ".join(curve.label for curve in group)
    traffic = [max(pair) for curve in beside for pair in _mean_traffic(curve).values()]
    rows = _rows(group, [{n: (t.sent, t.dense, _of(t)) for n, t in _mean_traffic(curve).items()} for curve in group])
    if rows:
        svg = as_svg(f"bytes {key}", lambda f: _draw_bars(f, rows, max(traffic), SMALLEST), _height(rows))
        found.append(Picture("Bytes by channel", DENSE, svg))
    seconds = [value for curve in beside for value in _mean_seconds(curve).values()]
    phases = _rows(group, [{n: (s, 0.0, f"{s:.3f} s") for n, s in _mean_seconds(curve).items()} for curve in group])
    if phases:
        svg = as_svg(f"seconds {key}", lambda f: _draw_bars(f, phases, max(seconds), 0.0), _height(phases))
        found.append(Picture("Seconds of a step", SECONDS, svg))
    return found


def _of(traffic: Traffic) -> str:
    return f"{in_bytes(traffic.sent)} of {in_bytes(traffic.dense)}" if traffic.dense else in_bytes(traffic.sent)


def _rows(group: Sequence[Curve], tables: list[dict[str, tuple[float, float, str]]]) -> dict[str, list[Bar]]:
    """The bars by name of their row, one a curve, an empty one where a curve has none."""
    return {
        n: [Bar(c.color, *table.get(n, (0.0, 0.0, "–"))) for c, table in zip(group, tables)] for n in _names(tables)
    }


def _height(rows: dict[str, list[Bar]]) -> float:
    """Inches."""
    return 0.6 + sum(0.1 + 0.16 * len(bars) for bars in rows.values())


def _draw_bars(figure: Figure, rows: dict[str, list[Bar]], largest: float, start: float) -> None:
    """Logarithmic from `start` on, as channels differ by orders of magnitude; from 0 on, linear. Labels say the rest."""
    axis = figure.subplots()
    at, middles = 0.0, list[float]()
    for bars in rows.values():
        middles.append(at + (len(bars) - 1) / 2)
        for bar in bars:
            _draw_bar(axis, bar, at, start)
            at += 1
        at += 0.6
    if start:
        axis.set(xscale="log", xlim=(start, start * (max(largest, 10 * start) / start) ** 1.6))
        axis.xaxis.set_major_formatter(lambda value, _: in_bytes(value))
    else:
        axis.set(xlim=(0, largest * 1.3), xlabel="seconds")
    axis.set(ylim=(at - 0.9, -0.7), yticks=middles, yticklabels=list(rows))
    axis.grid(axis="y", visible=False)


def _draw_bar(axis: Axes, bar: Bar, at: float, start: float) -> None:
    axis.barh(at, max(bar.behind - start, 0), 0.84, left=start, color=GREY, alpha=0.35)
    axis.barh(at, max(bar.value - start, 0), 0.5 if bar.behind else 0.84, left=start, color=bar.color)
    end = max(bar.value, bar.behind, start)
    axis.annotate(bar.label, (end, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
