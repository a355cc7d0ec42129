"""The picture of docs/results/speed.md, from the numbers of docs/results/data/speed.csv: `python -m benchmarks.speed_picture`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import as_svg

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BLUE, ORANGE = "#3b7dd8", "#d9822b"
ROW_INCHES, PANEL_INCHES = 0.27, 0.75


class SpeedBar(NamedTuple):
    """One number of a panel; `low` and `high`: the least and the most of single rounds, or an interval."""

    name: str
    value: float
    low: float | None
    high: float | None


def bars_of(text: str) -> dict[str, list[SpeedBar]]:
    """By panel, in the file's order. Columns: panel, name, value, low, high."""
    found: dict[str, list[SpeedBar]] = {}
    for row in csv.DictReader(text.splitlines()):
        low, high = (float(row[end]) if row[end] else None for end in ("low", "high"))
        found.setdefault(row["panel"], []).append(SpeedBar(row["name"], float(row["value"]), low, high))
    return found


def _draw_panel(axes: Axes, title: str, bars: list[SpeedBar]) -> None:
    places = range(len(bars))
    axes.barh(places, [bar.value for bar in bars], height=0.6, color=BLUE)
    for place, bar in zip(places, bars):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=ORANGE)
        axes.annotate(f" {bar.value:.3g}", (max(bar.value, bar.high or 0.0), place), va="center")
    axes.set_yticks(places, [bar.name for bar in bars])
    axes.set_xlim(0, 1.15 * max(max(bar.value, bar.high or 0.0) for bar in bars))
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(False, axis="y")


def main() -> None:
    panels = bars_of((RESULTS / "data" / "speed.csv").read_text())
    heights = [PANEL_INCHES + ROW_INCHES * len(bars) for bars in panels.values()]

    def draw(figure: Figure) -> None:
        drawn = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, (title, bars) in zip(drawn[:, 0], panels.items()):
            _draw_panel(axes, title, bars)

    (RESULTS / "speed.svg").write_text(f"{as_svg('speed', draw, sum(heights), width=7.0)}\n")


if __name__ == "__main__":
    main()
