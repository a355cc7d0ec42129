"""The parts of a report that only a sweep has: the verdict in words and its tables, for the page and for Markdown."""

from __future__ import annotations

from typing import NamedTuple

from experiments.cells import Cell, Findings
from experiments.frontier import FrontierTable, frontier, frontier_table
from experiments.stats import CONFIDENCE, LEAST_SEEDS
from experiments.verdict import Square, differences, ignited, square, verdict
from experiments.words import Number, Sentence, interval, markdown_table, place, plain

DIAGNOSED = (
    "cos_m_bar",
    "sign_m_bar",
    "cos_g_comp",
    "sign_g_comp",
    "cos_source",
    "error_drift",
    "error_shift",
    "error_noise",
    "cos_update_reward",
    "gain_length",
)


class CellRow(NamedTuple):
    """A cell of the sweep as the table shows it."""

    cell: Cell
    best: bool  # of its arm's points, where there is a grid
    values: list[str]


class SweepTables(NamedTuple):
    """What the template needs of a sweep."""

    how: str
    verdict: list[Sentence]
    frontier: FrontierTable | None  # where cells differ in their bytes
    squares: list[tuple[str, Square, list[tuple[str, str, str]]]]  # where, cells, (contrast, interval, seeds)
    headings: list[str]
    rows: list[CellRow]
    compared: list[tuple[str, str, str, str]]  # pair, where, difference, says
    diagnosed: list[tuple[Cell, list[str]]]  # values of DIAGNOSED, of the cells that have any


def sweep_tables(findings: Findings) -> SweepTables:
    points, found = findings.sweep.points(), frontier(findings)
    squares = [(place(point), four) for point in points if (four := square(findings, point))]
    return SweepTables(
        _how(findings),
        verdict(findings),
        frontier_table(found) if found else None,
        [(where, four, _contrasts(four)) for where, four in squares],
        [
            "cell",
            *[key.rpartition(".")[2] for key in findings.sweep.axes],
            "val accuracy",
            "seeds",
            "not completed",
            "clip spike",
            "ignition",
        ],
        [CellRow(cell, findings.tuned[cell.arm] is cell, _row(cell)) for cell in findings.cells],
        [
            (f"{d.a.arm} − {d.b.arm}", d.where, interval(d.found), _says(d.found.distinguishable, d.found.n))
            for d in differences(findings)
        ],
        _diagnosed(findings),
    )


def _how(findings: Findings) -> str:
    """How the numbers were made, in a paragraph."""
    text = (
        f"Accuracy is that of a run's last validation. Brackets and ± are {CONFIDENCE:.0%} Student intervals over seeds; "
        f"differences are taken within a seed. Only completed runs count. “Not distinguishable” means that the interval "
        f"holds 0, or fewer than {LEAST_SEEDS} seeds. Clip spike: the clipped share of ticks that refreshed Q, over that "
        f"of the others."
    )
    if (pairs := len(differences(findings))) > 1:
        text += (
            f" Of the {pairs} pairs compared, about one in {round(1 / (1 - CONFIDENCE))} would look different by chance "
            "if none was: intervals are not widened for their number."
        )
    if findings.sweep.tuning:
        text += (
            f" The first {findings.sweep.tuning} of the seeds chose each arm's point of the grid; arms are judged "
            "by the others alone, so that the choice favours none. Points that were not chosen show the seeds that tuned."
        )
    if findings.sweep.extend:
        text += f" An arm whose best was at an end of the grid got points beyond it, {findings.sweep.extend} at most."
    elif findings.sweep.grid and not findings.sweep.tuning:
        text += (
            " Each arm is shown at its best point of the grid, chosen by the same seeds that are reported: "
            "a little optimistic for every arm alike."
        )
    return text


def _row(cell: Cell) -> list[str]:
    axes = [f"{value}" for value in cell.point.values()]
    spike = "–" if cell.clip_spike is None else f"{cell.clip_spike:.1f}×"
    return [*axes, plain(cell.mean), f"{len(cell.values)} of {len(cell.seeds)}", _short(cell), spike, ignited(cell)]


def _diagnosed(findings: Findings) -> list[tuple[Cell, list[str]]]:
    found = [(cell, [cell.diagnosis(name) for name in DIAGNOSED]) for cell in findings.cells]
    return [(cell, [plain(e) for e in estimates]) for cell, estimates in found if any(e.n for e in estimates)]


def _short(cell: Cell) -> str:
    return ", ".join([cell.stopped] * bool(cell.stopped) + [f"{cell.absent} not run"] * bool(cell.absent)) or "–"


def _contrasts(found: Square) -> list[tuple[str, str, str]]:
    effects, (first, second) = found.effects, found.factors
    named = [
        (f"main effect, {first}", effects.first),
        (f"main effect, {second}", effects.second),
        ("interaction", effects.interaction),
        ("second main effect minus first", found.second_minus_first),
    ]
    return [(name, interval(e), _says(e.distinguishable, e.n)) for name, e in named]


def _says(distinguishable: bool, n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}" + ("" if distinguishable else ", not distinguishable")


# --- Markdown --------------------------------------------------------------------------------------


def sweep_markdown(findings: Findings) -> str:
    """Everything above the table of runs. Links go to the cells' folders, from the folder of the sweep."""
    found = sweep_tables(findings)
    lines = [f"## {findings.sweep.name}", "", found.how, ""]
    lines += ["- " + "".join(_link(part) for part in sentence.parts) for sentence in found.verdict] + [""]
    if found.frontier:
        rows = [[f"[{cell.arm}]({cell.name})", *values] for cell, values in found.frontier.rows]
        lines += markdown_table(found.frontier.headings, rows)
    for where, the_square, contrasts in found.squares:
        cells = [f"[{cell.arm} {plain(cell.mean)}]({cell.name})" for cell in the_square.cells]
        first, second = the_square.factors
        lines += markdown_table([where, "low", second], [["low", cells[0], cells[2]], [first, cells[1], cells[3]]])
        lines += markdown_table(["contrast", "accuracy", "seeds"], [list(row) for row in contrasts])
    lines += markdown_table(found.headings, [[f"[{row.cell.arm}]({row.cell.name})", *row.values] for row in found.rows])
    if found.diagnosed:
        rows = [[f"[{cell.arm}]({cell.name})", *values] for cell, values in found.diagnosed]
        lines += markdown_table(["diagnosis", *DIAGNOSED], rows)
    if found.compared:
        lines += markdown_table(["difference", "where", "accuracy", "seeds"], [list(row) for row in found.compared])
    return "\n".join(lines) + "\n"


def _link(part: str | Number) -> str:
    return part if isinstance(part, str) else f"[{part.text}]({part.cell})"
