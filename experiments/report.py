"""`northstar report`: one self-contained page, and one Markdown table, about one or more run folders.

Everything shown was written down by the run itself. A figure for which no run has data is left out,
and a run that stopped early is shown as far as it came, under its own label.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jinja2

from experiments import plots
from experiments.runs import Run, load_runs, text

COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("run", lambda run: run.name),
    ("seed", lambda run: run.seed),
    ("status", lambda run: run.status),
    ("val accuracy", lambda run: run.accuracy),
    ("steps", lambda run: run.steps),
    ("anchor backwards", lambda run: text(run.last("anchor_backwards", "anchor/backwards"))),
    ("bytes_ratio", lambda run: text(run.last("comm/bytes_ratio", "comm/bytes_ratio"), ".4f")),
    ("total_ratio", lambda run: text(run.last("comm/total_ratio", "comm/total_ratio"), ".4f")),
    ("wall seconds", lambda run: text(run.summary.get("wall_s"), ".1f")),
)


def write_html(folders: list[Path], out: Path) -> None:
    """Write the page about the runs in `folders` to `out`. Raises FileNotFoundError for a folder that is not there."""
    runs = load_runs(folders)
    curves = plots.curves(runs)
    page = _template().render(
        title=", ".join(dict.fromkeys(run.name for run in runs)),
        headline=_headline(runs),
        runs=runs,
        columns=[heading for heading, _ in COLUMNS],
        rows=[(run, [cell(run) for _, cell in COLUMNS]) for run in runs],
        curves=[curve for curve in curves if curve.has_data],
        figures=plots.lines(curves),
        bars=plots.bars(curves),
        sent=plots.SENT,
        dense=plots.DENSE,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that a page that someone has open is never half a page
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)


def markdown(folders: list[Path]) -> str:
    """The table of runs, for a terminal or a results file; notes on single runs follow it."""
    runs = load_runs(folders)
    lines = [[heading for heading, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[_cell(cell(run)) for _, cell in COLUMNS] for run in runs]
    notes = [f"- {_cell(run.name)}, seed {_cell(run.seed)}: {_cell(note)}" for run in runs for note in run.notes]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{note}" for note in notes) + ("\n" if notes else "")


def _headline(runs: list[Run]) -> list[tuple[str, str]]:
    """What the top of the page says, as (text, status it is about)."""
    if len(runs) == 1:
        return [(runs[0].status, runs[0].status), (f"seed {runs[0].seed}", "")]
    statuses = [run.status for run in runs]
    counts = [(f"{statuses.count(status)} {status}", status) for status in dict.fromkeys(statuses)]
    return [(f"{len(runs)} runs", ""), *counts, (f"seeds {', '.join(dict.fromkeys(run.seed for run in runs))}", "")]


def _cell(written: str) -> str:
    """Text that can neither end a Markdown table cell nor be taken for HTML."""
    return " ".join(written.split()).replace("|", "\\|").replace("<", "&lt;")


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("experiments", ".")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, autoescape=True, **settings).get_template("report.html.j2")
