"""`northstar report`: one self-contained page, and one Markdown table, about one or more run folders or a sweep.

Everything shown was written down by the run itself. A figure for which no run has data is left out,
and a run that stopped early is shown as far as it came, under its own label.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import jinja2
from markupsafe import Markup

from experiments import plots, spending, sweep_report
from experiments.anchor_worth import anchor_in_words
from experiments.cells import Findings, is_sweep, load_sweep
from experiments.frontier import frontier, frontier_picture
from experiments.runs import Run, load_runs, text
from experiments.sample_table import ROWS, SampleTable, sample_table
from experiments.validations import ValidationTable, validation_table
from experiments.words import markdown_table, plain

COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("run", lambda run: run.name),
    ("seed", lambda run: run.seed),
    ("status", lambda run: run.status),
    ("val accuracy", lambda run: run.accuracy),
    ("steps", lambda run: run.steps),
    ("anchor backwards", lambda run: text(run.last("anchor_backwards", "anchor/backwards"))),
    ("total_ratio", lambda run: text(run.total_ratio, ".4f")),
    ("bytes_ratio", lambda run: text(run.last("comm/bytes_ratio", "comm/bytes_ratio"), ".4f")),
    ("wall seconds", lambda run: text(run.summary.get("wall_s"), ".1f")),
)


def write_html(folders: list[Path], out: Path) -> None:
    """Write the page about the runs in `folders` to `out`; about a sweep, if that is the one folder given.

    Raises FileNotFoundError for a folder that is not there.
    """
    findings = _findings(folders)
    runs = findings.runs if findings else load_runs(folders)
    # Of a grid, only each arm at its best: the others are in the table
    drawn = [run for cell in findings.tuned.values() for run in cell.runs] if findings else runs
    cost = frontier(findings) if findings else None
    curves = [curve for curve in plots.curves(drawn) if curve.has_data]
    samples, script = [] if findings else _samples(runs), _script()
    page = _template().render(
        title=findings.sweep.name if findings else ", ".join(dict.fromkeys(run.name for run in runs)),
        headline=_headline(runs),
        anchor=None if findings else _anchor(runs),
        validations=[] if findings else _validations(runs),
        samples=samples,
        script=script if samples else "",
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sweep=sweep_report.sweep_tables(findings) if findings else None,
        frontier=frontier_picture(cost) if cost else None,
        plain=plain,
        diagnosed=sweep_report.DIAGNOSED,
        runs=runs,
        numbers={run.folder: i for i, run in enumerate(runs, start=1)},
        columns=[heading for heading, _ in COLUMNS],
        rows=[(run, [cell(run) for _, cell in COLUMNS]) for run in runs],
        curves=curves,
        groups=[(group, plots.lines(group, curves)) for group in plots.together(curves)],
        spent=[(group, spending.spending_pictures(group, curves), _tables(group)) for group in plots.together(curves)],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that a page that someone has open is never half a page
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)


def report_markdown(folders: list[Path]) -> str:
    """The table of runs, for a terminal or a results file; notes on single runs follow it, then, of runs that are no
    sweep, where their bytes and seconds went. One run alone also says whether its anchor was worth its bytes."""
    findings = _findings(folders)
    runs = findings.runs if findings else load_runs(folders)
    rows = [[_cell(cell(run)) for _, cell in COLUMNS] for run in runs]
    notes = [f"- {_cell(run.name)}, seed {_cell(run.seed)}: {_cell(note)}" for run in runs for note in run.notes]
    notes += [f"- anchor: {anchor}"] if not findings and (anchor := _anchor(runs)) else []
    lines = markdown_table([heading for heading, _ in COLUMNS], rows) + [*notes, ""] * bool(notes)
    for run, table in [] if findings else _validations(runs):
        headings = [f"{table.headings[0]} of {_cell(run.name)}, seed {_cell(run.seed)}", *table.headings[1:]]
        lines += markdown_table(headings, [[_cell(row[0]), *row[1:]] for row in table.rows])
    for group in [] if findings else plots.together(plots.curves(runs)):
        for table in _tables(group):
            lines += markdown_table(list(map(_cell, table.headings)), table.rows)
    words = sweep_report.sweep_markdown(findings) if findings else ""
    return words + "\n".join(lines)


def _samples(runs: list[Run]) -> list[tuple[Run, SampleTable]]:
    """Of each run that has some; several share the rows of a page."""
    tables = [(run, sample_table(run.folder, max(ROWS // len(runs), 12))) for run in runs]
    return [(run, table) for run, table in tables if table]


def _validations(runs: list[Run]) -> list[tuple[Run, ValidationTable]]:
    """Of each run that validates on several sets."""
    tables = [(run, validation_table(run)) for run in runs]
    return [(run, table) for run, table in tables if table]


def _script() -> Markup:
    return Markup((Path(__file__).parent / "report.js").read_text(encoding="utf-8"))


def _tables(group: list[plots.Curve]) -> list[spending.SpendingTable]:
    tables = spending.channel_table(group), spending.phase_table(group)
    return [table for table in tables if table.rows]


def _findings(folders: list[Path]) -> Findings | None:
    """What there is to find in a sweep, where the one folder given is that of a sweep."""
    return load_sweep(folders[0]) if len(folders) == 1 and is_sweep(folders[0]) else None


def _headline(runs: list[Run]) -> list[tuple[str, str]]:
    """What the top of the page says, as (text, status it is about)."""
    if not runs:
        return [("no runs yet", "")]
    if len(runs) == 1:
        ratio = text(runs[0].total_ratio, ".4f")
        return [(runs[0].status, runs[0].status), (f"seed {runs[0].seed}", ""), (f"total_ratio {ratio}", "")]
    statuses = [run.status for run in runs]
    counts = [(f"{statuses.count(status)} {status}", status) for status in dict.fromkeys(statuses)]
    return [(f"{len(runs)} runs", ""), *counts, (f"seeds {', '.join(dict.fromkeys(run.seed for run in runs))}", "")]


def _anchor(runs: list[Run]) -> str | None:
    """What a page about one run says of its anchor."""
    return anchor_in_words(runs[0]) if len(runs) == 1 else None


def _cell(written: str) -> str:
    """Text that can neither end a Markdown table cell nor be taken for HTML."""
    return " ".join(written.split()).replace("|", "\\|").replace("<", "&lt;")


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("experiments", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2")
