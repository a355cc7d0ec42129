"""How results are put in words: sentences, of text and numbers, and tables. Every number names the cell whose runs gave it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.cells import Cell
from experiments.stats import Estimate


class Number(NamedTuple):
    """A number and the cell it is about."""

    text: str
    cell: str


class Sentence(NamedTuple):
    """`good` sentences come last."""

    parts: tuple[str | Number, ...]
    good: bool


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def interval(found: Estimate) -> str:
    """`+0.120 [+0.050, +0.190]`, or without an interval `+0.120 (one seed)`."""
    if math.isnan(found.mean):
        return "–"
    if math.isnan(found.half):
        return f"{signed(found.mean)} (one seed)"
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def plain(found: Estimate) -> str:
    """`0.738 ± 0.012`, or as much of it as there is."""
    if math.isnan(found.mean):
        return "–"
    return f"{found.mean:.3f}" + ("" if math.isnan(found.half) else f" ± {found.half:.3f}")


def place(point: dict[str, Any]) -> str:
    """`lr 1e-05`, of a point of the grid."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())


def cell_in_words(cell: Cell) -> str:
    """`powersgd`, or of a grid `powersgd at lr 1e-05`."""
    return f"{cell.arm} at {place(cell.point)}" if cell.point else cell.arm


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines, an empty one behind it."""
    return [f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows]] + [""]
